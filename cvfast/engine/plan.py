"""Plan: a graph of kernel calls recorded over one arena, and run by one call into C++."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from cvfast import extension

from . import memory
from .nodes import Graph, Image, describe

ops = torch.ops.cvfast

_library = torch.library.Library("cvfast", "FRAGMENT")
for _schema in (
    "plan_record(Tensor arena, Tensor[] externals, int threads) -> ()",
    "plan_barrier() -> ()",
    "plan_finish() -> int",
    "plan_abandon() -> ()",
    "plan_run(int plan, Tensor[] inputs, Tensor(a!)[] outputs) -> ()",
    "plan_profile(int plan, Tensor[] inputs, Tensor(a!)[] outputs) -> int[]",
    "plan_memory(int plan) -> int[]",
    "plan_delete(int plan) -> ()",
):
    _library.define(_schema)


class Plan:
    """``graph`` for ``threads`` threads. May run in several threads at once, each on its own arena.

    ``arena_bytes`` is what the images between inputs and outputs take, ``scratch_bytes`` what
    kernels take beside them, ``bytes_copied`` what is copied for want of a better place.

    Raises:
        RuntimeError: without the compiled extension, or where a kernel refuses its arguments.
    """

    def __init__(self, graph: Graph, threads: int) -> None:
        if not (status := extension.load("cpu")):
            raise RuntimeError(str(status))
        memory.place(graph)
        lives = memory.lifetimes(graph)
        arena = memory.pack(lives)
        self.graph = graph
        self.threads = threads
        self.arena_bytes = arena.bytes
        self.least_arena_bytes = memory.lower_bound(lives)
        self.bytes_copied = sum(node.bytes_copied() for node in graph.nodes)
        self._id = self._record(arena)
        weakref.finalize(self, _delete, self._id)
        self.scratch_bytes: int = ops.plan_memory(self._id)[1]

    def _record(self, arena: memory.Arena) -> int:
        # Written to by none: pages that are not touched take no memory.
        base = torch.empty(max(1, arena.bytes), dtype=torch.uint8)
        externals = [_stand_in(image) for image in (*self.graph.inputs, *self.graph.outputs)]

        def tensor(image: Image) -> Tensor:
            root, channel = image.root()
            if root.external is not None:
                whole = externals[root.external]
            else:
                begin = arena.offsets[root]
                whole = base[begin : begin + root.bytes].view(root.dtype)
            first = whole.storage_offset() + channel
            return whole.as_strided(image.shape, image.memory_strides(), first)

        ops.plan_record(base, externals, self.threads)
        try:
            for node in self.graph.nodes:
                node.record(tensor)
                ops.plan_barrier()
        except BaseException:
            ops.plan_abandon()
            raise
        number: int = ops.plan_finish()
        return number

    def run(self, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> None:
        """Fill ``outputs`` from ``inputs``: tensors of the sizes and strides of the graph's."""
        ops.plan_run(self._id, inputs, outputs)

    def profile(self, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> list[dict[str, Any]]:
        """Run, and say of each step what it was, its FLOPs and how many seconds it took."""
        times = ops.plan_profile(self._id, inputs, outputs)
        return [
            {**describe(node), "flops": node.flops(), "seconds": time * 1e-9}
            for node, time in zip(self.graph.nodes, times, strict=True)
        ]

    def measured_bytes(self) -> int:
        """Memory that runs so far took beside weights, inputs and outputs."""
        arena, scratch, count = ops.plan_memory(self._id)
        return (arena + scratch) * count


def _delete(number: int) -> None:
    ops.plan_delete(number)


def _stand_in(image: Image) -> Tensor:
    return torch.empty_strided(image.shape, image.memory_strides(), dtype=image.dtype)
