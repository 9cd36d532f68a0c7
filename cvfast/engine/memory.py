"""Where images lie: concatenations without copies, sums in the place of what is added to, and one
arena whose memory is used again."""

from __future__ import annotations

from bisect import insort
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from operator import itemgetter
from types import MappingProxyType

import torch

from .nodes import Concat, Copy, Graph, Image, Kept, Node, Pointwise

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


def overwrite(graph: Graph) -> None:
    """Let steps write over what none reads after them, where their kernels allow it.

    So the sums of a row of residual blocks all lie in one place, which a kernel reads and writes
    once, and a step needs memory for one of the two only.
    """
    last = _last_steps(graph)
    for step, node in enumerate(graph.nodes):
        candidates = [image.root()[0] for image in node.may_overwrite()]
        reads = [image.root()[0] for image in node.reads()]
        for root in candidates:
            if (
                last[root] == step
                and root.external is None
                and reads.count(root) == candidates.count(root)  # not for another purpose as well
                and _has_place_of(node.out, root)
            ):
                last[root] = last.pop(node.out)
                node.out.parent = root
                break


def _has_place_of(image: Image, other: Image) -> bool:
    """Whether ``image``, which has no place yet, can have that of ``other``."""
    return (
        image.parent is None
        and image.external is None
        and (image.shape, image.dtype) == (other.shape, other.dtype)
        and image.memory_strides() == other.memory_strides()
    )


def keep_pixels(graph: Graph) -> None:
    """Where an image is kept for a strided 1x1 convolution alone, keep the pixels that it reads
    instead, if the busiest step then needs less memory: so it is in the first block of ResNet's
    stages, whose shortcut reads every fourth pixel of what is the largest image there."""
    for node in list(graph.nodes):
        if not (isinstance(node, Pointwise) and node.backend == "cpu" and node.stride != (1, 1)):
            continue
        step = graph.nodes.index(node)
        root = node.x.root()[0]
        if root.external is not None or _last_steps(graph)[root] != step:
            continue
        users = [i for i, n in enumerate(graph.nodes[:step]) if root in _roots(n)]
        n, _, height, width = node.out.shape
        kept = Image((n, node.x.channels, height, width), node.x.dtype)
        copy = Kept(kept, node.x, stride=node.stride, name=node.name)
        rest = [replace(node, x=kept, stride=(1, 1)), *graph.nodes[step + 1 :]]
        orders = [
            [*graph.nodes[:at], copy, *graph.nodes[at:step], *rest]
            for at in range(users[-1] + 1, step + 1)
        ]
        graph.nodes = min([graph.nodes, *orders], key=lambda nodes: _peak(graph, nodes))


def _peak(graph: Graph, nodes: list[Node]) -> int:
    """Bytes at the busiest step of ``nodes``, with the inputs and outputs of ``graph``."""
    return lower_bound(lifetimes(Graph(nodes, graph.inputs, graph.outputs)))


def _roots(node: Node) -> set[Image]:
    return {image.root()[0] for image in (*node.reads(), *node.writes())}


@dataclass(frozen=True)
class Lifetime:
    """From the first step that writes an image's memory to the last that reads it, inclusive.

    Inputs are written before the first step, outputs read after the last. ``bytes``: what the image
    takes in the arena.
    """

    image: Image
    first: int
    last: int
    bytes: int


def lifetimes(graph: Graph) -> list[Lifetime]:
    """Of all images that have memory of their own in the arena."""
    first: dict[Image, int] = {}
    for step, node in enumerate(graph.nodes):
        for image in (*node.reads(), *node.writes()):
            first.setdefault(image.root()[0], step)
    first.update((image.root()[0], 0) for image in graph.inputs)
    last = _last_steps(graph)
    return [Lifetime(i, first[i], last[i], i.bytes) for i in last if i.external is None]


def _last_steps(graph: Graph) -> dict[Image, int]:
    """The last step that reads or writes each image's memory: past the end for outputs."""
    last: dict[Image, int] = {}
    for step, node in enumerate(graph.nodes):
        last.update((image.root()[0], step) for image in (*node.reads(), *node.writes()))
    last.update((image.root()[0], len(graph.nodes)) for image in graph.outputs)
    return last


def scratch_lifetime(step: int, size: int) -> Lifetime:
    """Of ``size`` bytes that the kernels of one step need for themselves."""
    return Lifetime(Image((1, size, 1, 1), torch.uint8), step, step, size)


@dataclass(frozen=True)
class Arena:
    """``offsets``: bytes from the arena's start, of images that have memory of their own."""

    bytes: int
    offsets: dict[Image, int]


_ATTEMPTS = 8
"""Orders that :func:`pack` tries beside the first."""


def pack(
    lives: Sequence[Lifetime],
    alignment: int = ALIGNMENT,
    given: Mapping[Image, int] = MappingProxyType({}),
) -> Arena:
    """Offsets such that no two images share memory while both live: the largest first, each at the
    lowest place that is free throughout its life (Pisarchyk and Lee, 2020, greedy by size). While
    that takes more than the busiest step, the one that ends highest is placed first of all. Images
    that are ``given`` stay at these offsets."""
    bound = lower_bound([replace(v, bytes=_aligned(v.bytes, alignment)) for v in lives])
    free = [v for v in lives if v.image not in given]
    order = sorted(free, key=lambda v: (-v.bytes, v.first))
    there = [v for v in lives if v.image in given]
    best = arena = _first_fit(order, alignment, there, given)
    for _ in range(_ATTEMPTS):
        if best.bytes == bound or not order:
            break
        highest = max(order, key=lambda v: arena.offsets[v.image] + v.bytes)
        order.remove(highest)
        order.insert(0, highest)
        arena = _first_fit(order, alignment, there, given)
        best = min(best, arena, key=lambda a: a.bytes)
    return best


def _first_fit(
    order: Sequence[Lifetime],
    alignment: int,
    there: Sequence[Lifetime],
    offsets_there: Mapping[Image, int],
) -> Arena:
    begins = sorted(((offsets_there[v.image], v) for v in there), key=itemgetter(0))
    placed = [(begin, begin + _aligned(v.bytes, alignment), v) for begin, v in begins]
    for life in order:
        size, offset = _aligned(life.bytes, alignment), 0
        for begin, end, other in placed:
            if offset + size <= begin:
                break
            if other.first <= life.last and life.first <= other.last:
                offset = max(offset, end)
        insort(placed, (offset, offset + size, life), key=itemgetter(0))
    offsets = {life.image: offset for offset, _, life in placed}
    return Arena(max((end for _, end, _ in placed), default=0), offsets)


def _aligned(size: int, alignment: int) -> int:
    return -(-size // alignment) * alignment


def largest_gap(lives: list[Lifetime], arena: Arena, step: int) -> int:
    """The most bytes in a row, aligned, that no image takes at ``step``."""
    there = [v for v in lives if v.first <= step <= v.last]
    begins = sorted(arena.offsets[v.image] for v in there)
    ends = sorted(_aligned(arena.offsets[v.image] + v.bytes, ALIGNMENT) for v in there)
    return max(begin - end for begin, end in zip([*begins, arena.bytes], [0, *ends], strict=True))


def lower_bound(lives: list[Lifetime]) -> int:
    """Bytes that live at the busiest step: no arena can be smaller."""
    steps = max((life.last for life in lives), default=-1) + 1
    return max(
        (sum(v.bytes for v in lives if v.first <= s <= v.last) for s in range(steps)),
        default=0,
    )
