"""Steps in bands of rows: a large image that the next step shrinks is never there as a whole.

A network's first layers write its largest images, and a pool or a strided convolution reads most of
them at once and keeps a quarter. Cut into bands, the two take turns on a few rows at a time: the
image between them takes the memory of one band, which is still in the cache when it is read.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any, NamedTuple

from .nodes import (
    Conv,
    Depthwise,
    Graph,
    Image,
    InvertedResidual,
    Kept,
    Node,
    Pointwise,
    Pool,
)

BAND_BYTES = 1 << 20
"""Of one image, about: what a core's L2 holds. Smaller bands would leave threads less to share."""

LEAST_BYTES = 3 << 19
"""Of an image that is cut."""

Bandable = Conv | Depthwise | InvertedResidual | Pointwise | Pool


class Window(NamedTuple):
    """The rows that one row of a result is computed from: ``size`` of them, ``stride`` further on
    for the next, the first ``padding`` above the image."""

    size: int
    stride: int
    padding: int

    def rows(self, begin: int, end: int) -> tuple[int, int]:
        """Those of rows [begin, end) of the result; they may lie beyond the image's."""
        first = begin * self.stride - self.padding
        return first, first + (end - begin - 1) * self.stride + self.size


def cut(graph: Graph) -> None:
    """Rewrite pairs of neighbouring steps of ``graph``, whose images have their places, as bands:
    where the first writes a large image that the second alone reads, and shrinks."""
    readers = graph.readers()
    nodes: list[Node] = []
    for node in graph.nodes:
        before = nodes[-1] if nodes else node
        if (
            isinstance(before, Bandable)
            and isinstance(node, Bandable)
            and graph.sole_reader(before.out, readers) is node
            and node.x is before.out
            and before.out.parent is None
            and (bounds := _bounds(before, node))
        ):
            nodes[-1:] = _in_turns(before, node, bounds)
        else:
            nodes.append(node)
    graph.nodes = nodes


def _window(node: Bandable) -> Window | None:
    """None where the kernels cannot compute some rows alone."""
    if node.backend != "cpu":
        return None
    if isinstance(node, Pointwise):
        return Window(1, node.stride[0], 0)
    dilation = 1 if isinstance(node, InvertedResidual) else node.dilation[0]
    window = Window(dilation * (node.kernel_size[0] - 1) + 1, node.stride[0], node.padding[0])
    if isinstance(node, InvertedResidual) and (node.means is not None or node.expand is not None):
        return None  # means are of all rows; each band would expand the rows at its edges again
    if isinstance(node, Pool) and not _pools_rows_alone(node, window):
        return None
    return window


def _pools_rows_alone(pool: Pool, window: Window) -> bool:
    """Padding is the same above and below: what a band has too much must hold no window."""
    if pool.kind != "max":
        return False
    ends_inside = window.rows(0, pool.out.shape[2])[1] <= pool.x.shape[2]
    return pool.padding[0] == 0 or (
        ends_inside and pool.padding[0] < window.stride and not pool.ceil_mode
    )


def _bounds(first: Bandable, second: Bandable) -> list[int]:
    """Where the bands of the second step's rows begin, and the last one's end; none if the pair is
    better left whole."""
    window = _window(second)
    images, _, rows, _ = second.out.shape
    size = first.out.bytes // max(1, images)
    if _window(first) is None or window is None or window.stride == 1 or size < LEAST_BYTES:
        return []
    # Even numbers of rows: Winograd's tiles take four rows of the source.
    pairs = rows // 2
    count = min(-(-size // BAND_BYTES), pairs)
    if count < 2:
        return []
    bounds = [2 * (i * pairs // count) for i in range(count)] + [rows]
    advance = min(end - begin for begin, end in pairwise(bounds)) * window.stride - window.padding
    shared = window.size - window.stride  # rows that move to the front of the buffer, in one piece
    return bounds if advance >= shared else []


def _in_turns(first: Bandable, second: Bandable, bounds: list[int]) -> list[Node]:
    """The pair as bands. Rows that two bands read are copied from one to the next."""
    window = _window(second)
    assert window is not None
    n, c, height, w = first.out.shape
    spans = [_inside(window.rows(*band), height) for band in pairwise(bounds)]
    buffer = Image((n, c, max(end - begin for begin, end in spans), w), first.out.dtype)
    nodes: list[Node] = []
    before = (0, 0)
    for (row, row_end), (begin, end) in zip(pairwise(bounds), spans, strict=True):
        kept = before[1] - begin
        if kept > 0:
            source = buffer.rows(begin - before[0], before[1] - before[0])
            nodes.append(Kept(buffer.rows(0, kept), source, name=first.name))
        kept = max(0, kept)
        nodes.append(_band(first, begin + kept, end, buffer.rows(kept, end - begin)))
        source = buffer.rows(0, end - begin)
        nodes.append(_band(second, row, row_end, second.out.rows(row, row_end), source))
        before = begin, end
    return nodes


def _band(node: Bandable, begin: int, end: int, out: Image, x: Image | None = None) -> Bandable:
    """``node`` for rows [``begin``, ``end``) of its result alone, written to ``out``. ``x``: the
    rows that it reads, if they are not where ``node`` finds them."""
    window = _window(node)
    assert window is not None
    height = node.x.shape[2]
    rows = window.rows(begin, end)
    first, last = _inside(rows, height)
    changes: dict[str, Any] = {"out": out, "x": x or node.x.rows(first, last)}
    if isinstance(node, Pool):
        changes["padding"] = (first - rows[0], node.padding[1])
        return replace(node, **changes)
    if not isinstance(node, Pointwise):
        left, right = node.padding[1], node.padding[-1]
        changes["padding"] = (first - rows[0], left, rows[1] - last, right)
    if isinstance(node, Conv) and node.x2 is not None:
        changes["x2"] = node.x2.rows(first, last)
    if not isinstance(node, Depthwise) and node.residual is not None:
        changes["residual"] = node.residual.rows(begin, end)
    return replace(node, **changes)


def _inside(rows: tuple[int, int], height: int) -> tuple[int, int]:
    return max(0, rows[0]), min(height, rows[1])
