"""Where images lie: concatenations without copies, and one arena whose memory is used again."""

from __future__ import annotations

from dataclasses import dataclass

from .nodes import Concat, Copy, Graph, Image, Node

ALIGNMENT = 64
"""Bytes; a cache line and the widest vector."""

GPU_ALIGNMENT = 256
"""Bytes; of every allocation on a GPU, and more than any of its memory accesses asks for."""


def place(graph: Graph) -> None:
    """Let the parts of concatenations be written where they belong.

    Later concatenations first, so that those of a dense block, each of which extends the one
    before, all become slices of the last one's memory. A part that has its place elsewhere, or that
    is handed in, is copied.
    """
    writers = graph.writers()
    nodes: list[Node] = []
    for node in reversed(graph.nodes):
        if not isinstance(node, Concat):
            nodes.append(node)
            continue
        if not _already_side_by_side(node):
            nodes += reversed(_place_parts(node, graph, writers))
    graph.nodes = nodes[::-1]


def _already_side_by_side(node: Concat) -> bool:
    """Whether the parts lie next to each other as it is; then ``out`` becomes a view of them."""
    first, channel = node.parts[0].root()
    if first is node.parts[0] or node.out.parent is not None or node.out.external is not None:
        return False
    expected = channel
    for part in node.parts:
        if part.root() != (first, expected):
            return False
        expected += part.channels
    node.out.parent, node.out.channel = first, channel
    return True


def _place_parts(node: Concat, graph: Graph, writers: dict[Image, Node]) -> list[Copy]:
    copies: list[Copy] = []
    channel = 0
    for part in node.parts:
        fixed = part.external is not None or part.strides is not None or part.parent is not None
        if part in writers and not fixed and part is not node.out.root()[0]:
            part.parent, part.channel = node.out, channel
        else:
            to = Image(part.shape, part.dtype, parent=node.out, channel=channel)
            copies.append(Copy(to, part, is_part=True, name=node.name, backend=node.backend))
        channel += part.channels
    return copies


@dataclass(frozen=True)
class Lifetime:
    """From the first step that writes an image's memory to the last that reads it, inclusive.

    Inputs are written before the first step, outputs read after the last.
    """

    image: Image
    first: int
    last: int


def lifetimes(graph: Graph) -> list[Lifetime]:
    """Of all images that have memory of their own in the arena."""
    first: dict[Image, int] = {}
    last: dict[Image, int] = {}
    for step, node in enumerate(graph.nodes):
        for image in (*node.reads(), *node.writes()):
            root = image.root()[0]
            first.setdefault(root, step)
            last[root] = step
    first.update((image.root()[0], 0) for image in graph.inputs)
    last.update((image.root()[0], len(graph.nodes)) for image in graph.outputs)
    return [Lifetime(i, first[i], last[i]) for i in last if i.external is None]


@dataclass(frozen=True)
class Arena:
    """``offsets``: bytes from the arena's start, of images that have memory of their own."""

    bytes: int
    offsets: dict[Image, int]


def pack(lives: list[Lifetime], alignment: int = ALIGNMENT) -> Arena:
    """Offsets such that no two images share memory while both live: the largest first, each at the
    lowest place that is free throughout its life (Pisarchyk and Lee, 2020, greedy by size)."""
    placed: list[tuple[int, int, Lifetime]] = []
    offsets: dict[Image, int] = {}
    for life in sorted(lives, key=lambda life: (-life.image.bytes, life.first)):
        size = -(-life.image.bytes // alignment) * alignment
        offset = 0
        for begin, end, other in placed:  # by offset
            if other.last < life.first or life.last < other.first:
                continue
            if offset + size <= begin:
                break
            offset = max(offset, end)
        offsets[life.image] = offset
        placed.append((offset, offset + size, life))
        placed.sort(key=lambda entry: entry[0])
    return Arena(max((end for _, end, _ in placed), default=0), offsets)


def lower_bound(lives: list[Lifetime]) -> int:
    """Bytes that live at the busiest step: no arena can be smaller."""
    steps = max((life.last for life in lives), default=-1) + 1
    return max(
        (sum(v.image.bytes for v in lives if v.first <= s <= v.last) for s in range(steps)),
        default=0,
    )
