"""Convolutions that do not wait for each other, in one launch: the branches of a module.

The convolutions of an Inception module are too small to fill a GPU one by one. Between a module's
input and its concatenation every one has a level: how many others of the module it waits for, one
after another. Those of a level become one node; those of them that read one image with one kernel
become one product; and a pooling that only a 1x1 convolution reads joins that.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod

from torch import Tensor

from cvfast.launch.inception import Branch
from cvfast.launch.pool.triton import MAX_UNROLLED
from cvfast.ops import inception

from .nodes import Call, Concat, Conv, Graph, Image, Node, Pointwise, Pool, Tensors, ops


@dataclass(frozen=True, eq=False)
class Member:
    """A product of a group: what ``cvfast::inception_triton`` calls a branch."""

    x: Image
    packed: tuple[Tensor, Tensor]
    outs: tuple[Image, ...]
    kind: str
    kernel_size: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]

    @property
    def geometry(self) -> tuple[object, ...]:
        return self.x, self.kind, self.kernel_size, self.stride, self.padding

    def branch(self) -> Branch:
        _, channels, height, width = self.x.shape
        parts = tuple(image.channels for image in self.outs)
        return Branch(
            channels, height, width, parts, self.kind, self.kernel_size, self.stride, self.padding
        )


@dataclass(eq=False)
class Grouped(Node):
    """``cvfast::inception_*``. ``out`` is the first of the images that the members write."""

    members: list[Member]
    activation: str

    def reads(self) -> list[Image]:
        return list(dict.fromkeys(member.x for member in self.members))

    def writes(self) -> list[Image]:
        return [image for member in self.members for image in member.outs]

    def flops(self) -> int:
        return sum(
            2 * prod(image.shape) * member.x.channels * member.branch().taps
            for member in self.members
            for image in member.outs
        )

    def calls(self, tensor: Tensors) -> list[Call]:
        weights, biases = zip(*(member.packed for member in self.members), strict=True)
        arguments = (
            [tensor(member.x) for member in self.members],
            list(weights),
            list(biases),
            *inception.flatten([member.branch() for member in self.members]),
            self.activation,
        )
        out = [tensor(image) for image in self.writes()]
        return [Call(getattr(ops, f"inception_{self.backend}").out, arguments, {"out": out})]


@dataclass(frozen=True, eq=False)
class _Step:
    """A convolution that could join a group, and the nodes that it stands for."""

    member: Member
    activation: str
    nodes: tuple[Node, ...]


def group_branches(graph: Graph) -> None:
    """Rewrite ``graph``, of Triton nodes: steps of one level of a module become one node."""
    steps = _steps(graph)
    for concat in [node for node in graph.nodes if isinstance(node, Concat)][::-1]:
        for group in _levels(graph, concat, steps):
            order = _ordered(graph, group)
            if order is None:
                continue
            graph.nodes = order
            for step in group:
                steps.pop(step.nodes[-1])


def _steps(graph: Graph) -> dict[Node, _Step]:
    """What could join a group, by the node that writes its result."""
    writers, readers = graph.writers(), graph.readers()
    found: dict[Node, _Step] = {}
    for node in graph.nodes:
        member = _member(node)
        if member is None or not isinstance(node, Conv | Pointwise):
            continue
        nodes: tuple[Node, ...] = (node,)
        pool = writers.get(node.x)
        if (
            isinstance(pool, Pool)
            and (kind := _window(pool)) is not None
            and member.branch().taps == 1
            and member.stride == (1, 1)
            and graph.sole_reader(pool.out, readers) is node
        ):
            geometry = (kind, pool.kernel_size, pool.stride, pool.padding)
            member = Member(pool.x, member.packed, member.outs, *geometry)
            nodes = (pool, node)
        found[node] = _Step(member, node.activation, nodes)
    return found


def _member(node: Node) -> Member | None:
    """What a group's kernel is told of a convolution; None if it does not compute such."""
    if node.backend != "triton":
        return None
    if isinstance(node, Pointwise):
        if node.scale is not None or node.gate is not None or node.residual is not None:
            return None
        weight, bias = node.packed
        return Member(
            node.x, (weight[None], bias), (node.out,), "conv", (1, 1), node.stride, (0, 0)
        )
    if isinstance(node, Conv):
        top, left, bottom, right = (*node.padding, *node.padding)[:4]
        if (
            node.residual is not None
            or node.x2 is not None
            or node.dilation != (1, 1)
            or (top, left) != (bottom, right)
            or not node.x.channels_adjacent()
        ):
            return None
        weight, bias = node.packed
        geometry = (node.kernel_size, node.stride, (top, left))
        return Member(node.x, (weight, bias), (node.out,), "conv", *geometry)
    return None


def _window(pool: Pool) -> str | None:
    """The kind of window that a group's kernel computes in passing; None if it does not."""
    plain = (
        pool.scale is None
        and pool.divisor_override is None
        and not pool.ceil_mode
        and pool.dilation == (1, 1)
        and prod(pool.kernel_size) <= MAX_UNROLLED
    )
    if not plain:
        return None
    if pool.kind == "max":
        return "max"
    return "avg" if pool.count_include_pad else "avg_inside"


def _levels(graph: Graph, concat: Concat, steps: dict[Node, _Step]) -> Iterator[list[_Step]]:
    """The groups between a module's input and its concatenation."""
    before = _ancestors(graph)
    members = _behind(graph, concat, steps)
    depths: dict[_Step, int] = {}
    for step in members:  # as they run
        waits = (depths[s] for s in depths if s.nodes[-1] in before[step.nodes[-1]])
        depths[step] = 1 + max(waits, default=-1)
    levels: dict[tuple[int, str, object], list[_Step]] = {}
    for step, depth in depths.items():
        key = (depth, step.activation, step.member.x.dtype)
        levels.setdefault(key, []).append(step)
    return (level for level in levels.values() if len(level) > 1)


def _behind(graph: Graph, concat: Concat, steps: dict[Node, _Step]) -> list[_Step]:
    """The steps that lead to a concatenation by nothing but steps and concatenations within it."""
    writers = graph.writers()
    seen: set[Node] = set()
    waiting = list(concat.parts)
    while waiting:
        node = writers.get(waiting.pop())
        if node is None or node in seen:
            continue
        if isinstance(node, Concat):
            waiting += node.parts
        elif node in steps:
            waiting.append(steps[node].member.x)
        else:
            continue
        seen.add(node)
    return [steps[node] for node in graph.nodes if node in seen and node in steps]


def _ancestors(graph: Graph) -> dict[Node, set[Node]]:
    """The nodes that each node waits for."""
    writers = graph.writers()
    found: dict[Node, set[Node]] = {}
    for node in graph.nodes:
        direct = {writers[image] for image in node.reads() if image in writers}
        found[node] = direct.union(*(found[other] for other in direct))
    return found


def _ordered(graph: Graph, group: list[_Step]) -> list[Node] | None:
    """The graph's nodes with a group as one node, in an order in which they may run, as near to the
    present one as can be; None if there is no such order."""
    joined: dict[tuple[object, ...], list[Member]] = {}
    for step in group:
        joined.setdefault(step.member.geometry, []).append(step.member)
    members = [_side_by_side(same) for same in joined.values()]
    last = group[0].nodes[-1]
    name = ", ".join(step.nodes[-1].name for step in group)
    node = Grouped(
        members[0].outs[0], members, group[0].activation, name=name, backend=last.backend
    )
    gone = {inner for step in group for inner in step.nodes}
    places = {other: i for i, other in enumerate(graph.nodes)}
    places[node] = places[last]
    nodes = [other for other in graph.nodes if other not in gone] + [node]
    writers = {image: other for other in nodes for image in other.writes()}
    waits = {n: {writers[i] for i in n.reads() if i in writers} for n in nodes}
    readers: dict[Node, list[Node]] = {n: [] for n in nodes}
    for reader, sources in waits.items():
        for source in sources:
            readers[source].append(reader)
    counts = {n: len(sources) for n, sources in waits.items()}
    ready = [(places[n], n) for n in nodes if not counts[n]]
    heapq.heapify(ready)
    order: list[Node] = []
    while ready:
        _, n = heapq.heappop(ready)
        order.append(n)
        for reader in readers[n]:
            counts[reader] -= 1
            if not counts[reader]:
                heapq.heappush(ready, (places[reader], reader))
    return order if len(order) == len(nodes) else None


def _side_by_side(same: list[Member]) -> Member:
    """Members that read one image with one kernel, as one."""
    first = same[0]
    packed = inception.join([member.packed for member in same])
    outs = tuple(image for member in same for image in member.outs)
    return Member(first.x, packed, outs, first.kind, first.kernel_size, first.stride, first.padding)
