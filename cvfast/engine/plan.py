"""Plan: a graph of kernel calls over one arena; on the CPU recorded, and run by one call into C++.

What a GPU makes of it is in :mod:`cvfast.engine.gpu`.
"""

from __future__ import annotations

import weakref
from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from cvfast import extension

from . import bands, memory, stages
from .nodes import Graph, Image, describe
from .stages import Group, Stage

ops = torch.ops.cvfast

_library = torch.library.Library("cvfast", "FRAGMENT")
for _schema in (
    "plan_record(Tensor arena, Tensor[] externals, int threads) -> ()",
    "plan_limit_scratch(int bytes) -> ()",
    "plan_barrier() -> int",
    "plan_finish(int arena_bytes, int[] scratch) -> int",
    "plan_abandon() -> ()",
    "plan_run(int plan, Tensor[] inputs, Tensor(a!)[] outputs) -> ()",
    "plan_profile(int plan, Tensor[] inputs, Tensor(a!)[] outputs) -> int[]",
    "plan_memory(int plan) -> int[]",
    "plan_delete(int plan) -> ()",
):
    _library.define(_schema)


class ArenaPlan(ABC):
    """``graph``, its images placed in one arena.

    ``bytes_copied`` is what is copied for want of a better place, ``bytes_kept`` what is moved to
    where less memory is needed until it is read again; ``stages`` say which steps run
    for a few images of the batch at a time.
    """

    def __init__(self, graph: Graph, alignment: int) -> None:
        memory.place(graph)
        bands.cut(graph)
        memory.overwrite(graph)
        memory.keep_pixels(graph)
        self.graph = graph
        self.stages = self._stages()
        lives = memory.lifetimes(graph)
        # In the arena these hold the images of one group, and of one after the other.
        self._of_group = {v.image for v in lives if any(s.holds(v) for s in self.stages)}
        self.lives = stages.lifetimes(lives, self.stages)
        self.arena = memory.pack(self.lives, alignment)
        self.bytes_copied = sum(node.bytes_copied() for node in graph.nodes)
        self.bytes_kept = sum(node.bytes_kept() for node in graph.nodes)

    @property
    def arena_bytes(self) -> int:
        """Memory of a run, beside weights and what is handed in and out."""
        return self.arena.bytes

    @property
    def least_arena_bytes(self) -> int:
        """The bound that no arena can go below."""
        return memory.lower_bound(self.lives)

    def _stages(self) -> list[Stage]:
        return [Stage(0, len(self.graph.nodes))]

    @abstractmethod
    def run(self, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> None:
        """Fill ``outputs`` from ``inputs``: tensors of the sizes of the graph's."""

    @abstractmethod
    def profile(self, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> list[dict[str, Any]]:
        """Run, and say of each step what it was, its FLOPs and bytes, how many seconds it took, and
        how many its threads spent waiting for each other at its end, all together."""

    def _rows(self, seconds: Sequence[float], waited: Sequence[float]) -> list[dict[str, Any]]:
        return [
            {
                **describe(node),
                "flops": node.flops(),
                "bytes": node.bytes(),
                "seconds": taken,
                "waited": idle,
            }
            for node, taken, idle in zip(self.graph.nodes, seconds, waited, strict=True)
        ]


_LEAST_SCRATCH = 128 << 10
"""Bytes that a kernel may take as scratch memory on each thread, whatever the images leave free."""

_SCRATCH_SHARE = 16
"""That all threads may take is at least this fraction of what the images take."""


class Plan(ArenaPlan):
    """``graph`` for ``threads`` threads of the CPU. May run in several threads at once, each on its
    own arena. Inputs and outputs, which have the strides of the graph's, are not in the arena; the
    scratch memory of kernels is.

    Raises:
        RuntimeError: without the compiled extension, or where a kernel refuses its arguments.
    """

    def __init__(self, graph: Graph, threads: int) -> None:
        if not (status := extension.load("cpu")):
            raise RuntimeError(str(status))
        super().__init__(graph, memory.ALIGNMENT)
        self.threads = threads
        self._id = self._record()
        weakref.finalize(self, _delete, self._id)

    def _stages(self) -> list[Stage]:
        return stages.choose(self.graph)

    def _record(self) -> int:
        least = max(self.arena.bytes // _SCRATCH_SHARE, self.threads * _LEAST_SCRATCH)
        most_scratch = [
            max(least, memory.largest_gap(self.lives, self.arena, step))
            for step in range(len(self.graph.nodes))
        ]
        try:
            # How much scratch memory steps need is known once they are recorded.
            sizes = self._append_calls(most_scratch)
            scratch = [memory.scratch_lifetime(step, size) for step, size in enumerate(sizes)]
            images, self.lives = self.arena, [*self.lives, *scratch]
            stay = memory.pack(self.lives, given=images.offsets)
            move = memory.pack(self.lives)
            self.arena = stay if stay.bytes <= move.bytes else move
            if self.arena is move:
                ops.plan_abandon()
                if self._append_calls(most_scratch) != sizes:
                    raise RuntimeError("cvfast: kernels asked for other scratch memory than before")
            phases = stages.order(self.stages)
            places = [self.arena.offsets[scratch[step].image] for step, _ in phases]
            number: int = ops.plan_finish(self.arena.bytes, places)
        except BaseException:
            ops.plan_abandon()
            raise
        return number

    def _append_calls(self, most_scratch: Sequence[int]) -> list[int]:
        """Record the calls of all steps with the arena as it is; return the scratch memory that
        each step needs, where it may take ``most_scratch``, in bytes."""
        arena = self.arena
        # Written to by none: pages that are not touched take no memory.
        base = torch.empty(max(1, arena.bytes), dtype=torch.uint8)
        externals = [_stand_in(image) for image in (*self.graph.inputs, *self.graph.outputs)]

        def tensor(image: Image, group: Group) -> Tensor:
            root = image.root()[0]
            images, strides = group.images(image.shape[0]), image.memory_strides()
            if root.external is not None:
                whole = externals[root.external]
            else:
                whole = base[arena.offsets[root] :].view(root.dtype)
            first = whole.storage_offset() + image.offset()
            if root not in self._of_group:
                first += images.start * strides[0]
            return whole.as_strided((len(images), *image.shape[1:]), strides, first)

        ops.plan_record(base, externals, self.threads)
        sizes = [0] * len(self.graph.nodes)
        for step, group in stages.order(self.stages):
            ops.plan_limit_scratch(most_scratch[step])
            for call in self.graph.nodes[step].calls(partial(tensor, group=group)):
                call()  # appends itself
            sizes[step] = max(sizes[step], ops.plan_barrier())
        return sizes

    def run(self, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> None:
        ops.plan_run(self._id, inputs, outputs)

    def profile(self, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> list[dict[str, Any]]:
        times = ops.plan_profile(self._id, inputs, outputs)
        seconds, waited = ([0.0] * len(self.graph.nodes) for _ in range(2))
        for phase, (step, _) in enumerate(stages.order(self.stages)):
            seconds[step] += times[2 * phase] * 1e-9
            waited[step] += times[2 * phase + 1] * 1e-9
        return self._rows(seconds, waited)

    def measured_bytes(self) -> int:
        """Memory that runs so far took beside weights, inputs and outputs."""
        arena, count = ops.plan_memory(self._id)
        return arena * count


def _delete(number: int) -> None:
    ops.plan_delete(number)


def _stand_in(image: Image) -> Tensor:
    return torch.empty_strided(image.shape, image.memory_strides(), dtype=image.dtype)
