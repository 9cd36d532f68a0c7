"""Plans of GPU kernels: calls on views of one arena, captured in a CUDA graph at the first run.

Inputs and outputs lie in the arena as well, so that the addresses which a graph holds never change:
a run copies what it is given in, replays, and copies the results out. The copy in also changes the
layout, where the input is not channels-last.
"""

from __future__ import annotations

import functools
import itertools
import threading
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import memory
from .nodes import Call, Graph, Image, Node
from .plan import ArenaPlan


class GpuPlan(ArenaPlan):
    """``graph`` on tensors on ``device``.

    On a CUDA device the first run captures a CUDA graph, which later runs replay; while the
    caller captures a graph of their own, a run becomes part of that, and its replays must not
    coincide with other runs. On the CPU (interpreted kernels) the calls are made one by one. On
    ``meta`` a plan can only be looked at.

    Safe to run from several threads and on several streams: the plans of a device take turns.
    """

    def __init__(self, graph: Graph, device: torch.device) -> None:
        super().__init__(graph, memory.GPU_ALIGNMENT)
        self.device = device
        self._memory = torch.empty(max(1, self.arena_bytes), dtype=torch.uint8, device=device)
        self._steps = [node.calls(self._tensor) for node in graph.nodes]
        self._inputs = [self._tensor(image) for image in graph.inputs]
        self._outputs = [self._tensor(image) for image in graph.outputs]
        self._graph: torch.cuda.CUDAGraph | None = None
        self._captures = device.type == "cuda"
        # What is allocated while a graph is captured, such as the sums of shares that are added
        # up later, lies in a pool that all graphs share: no two of them may run at once.
        self._turn = _shared(device).turn if self._captures else _Turn(device)

    def calls(self) -> Iterator[tuple[Node, Call]]:
        """Every call of a run, with its node."""
        for node, calls in zip(self.graph.nodes, self._steps, strict=True):
            yield from ((node, call) for call in calls)

    def run(self, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> None:
        """Fill ``outputs`` from ``inputs``, tensors of the sizes of the graph's and any strides."""
        with self._turn.taken(self._memory):
            self._execute(inputs)
            for out, image in zip(outputs, self._outputs, strict=True):
                out.copy_(image)

    def run_in_place(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        """The results where the plan computed them: in memory that its next run overwrites."""
        with self._turn.taken(self._memory):
            self._execute(inputs)
        return list(self._outputs)

    def profile(self, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> list[dict[str, Any]]:
        """Run call by call, and say of each step what it was and how many seconds it took."""
        with self._turn.taken(self._memory):
            self._copy_in(inputs)
            marks = [_mark(self.device)]
            for calls in self._steps:
                for call in calls:
                    call()
                marks.append(_mark(self.device))
            for out, image in zip(outputs, self._outputs, strict=True):
                out.copy_(image)
        seconds = [_seconds(a, b) for a, b in itertools.pairwise(marks)]
        return self._rows(seconds, [0.0] * len(seconds))

    def _tensor(self, image: Image) -> Tensor:
        root = image.root()[0]
        begin = self.arena.offsets[root]
        whole = self._memory[begin : begin + root.bytes].view(root.dtype)
        first = whole.storage_offset() + image.offset()
        return whole.as_strided(image.shape, image.memory_strides(), first)

    def _copy_in(self, inputs: Sequence[Tensor]) -> None:
        for buffer, x in zip(self._inputs, inputs, strict=True):
            buffer.copy_(x)

    def _call_all(self) -> None:
        for calls in self._steps:
            for call in calls:
                call()

    def _execute(self, inputs: Sequence[Tensor]) -> None:
        self._copy_in(inputs)
        if self.device.type != "cuda":
            self._call_all()
            return
        callers_graph = torch.cuda.is_current_stream_capturing()
        if self._captures and not callers_graph:
            self._graph = self._capture()
            self._captures = False
        if self._graph is None or callers_graph:
            self._call_all()
        else:
            self._graph.replay()

    def _capture(self) -> torch.cuda.CUDAGraph | None:
        """The calls as a CUDA graph; None, with a warning, if one of them cannot be captured."""
        shared, caller = _shared(self.device), torch.cuda.current_stream()
        graph = torch.cuda.CUDAGraph()
        # PyTorch allows one capture at a time; it leaves its stream current when one fails.
        with _CAPTURE, torch.cuda.stream(shared.stream):
            shared.stream.wait_stream(caller)
            self._call_all()  # compiles kernels, lets libraries choose their algorithms
            caller.wait_stream(shared.stream)
            try:
                with torch.cuda.graph(
                    graph, shared.pool, shared.stream, capture_error_mode="thread_local"
                ):
                    self._call_all()
            except RuntimeError as error:
                warnings.warn(
                    "cvfast: a plan cannot be captured in a CUDA graph, and runs call by call, "
                    f"which is slower: {type(error).__name__}: {error}",
                    RuntimeWarning,
                    stacklevel=2,
                )
                return None
        return graph


class _Turn:
    """One run at a time, of all that share it: among threads by a lock, on a GPU by an event."""

    def __init__(self, device: torch.device) -> None:
        self._lock = threading.Lock()
        self._done = torch.cuda.Event() if device.type == "cuda" else None

    @contextmanager
    def taken(self, memory: Tensor) -> Iterator[None]:
        """Work that is issued inside waits for the work of the turn before; it uses ``memory``."""
        if self._done is None:
            with self._lock:
                yield
            return
        with self._lock, torch.cuda.device(memory.device):
            if torch.cuda.is_current_stream_capturing():
                # An event from outside may not be waited for; the caller's graph keeps the order.
                yield
                return
            stream = torch.cuda.current_stream()
            stream.wait_event(self._done)
            memory.record_stream(stream)
            yield
            self._done.record(stream)


_CAPTURE = threading.Lock()


class _Shared(NamedTuple):
    """What all graphs on a device share: memory, the stream that fills it, and their turn."""

    pool: Any
    stream: torch.cuda.Stream
    turn: _Turn


@functools.cache
def _shared(device: torch.device) -> _Shared:
    return _Shared(torch.cuda.graph_pool_handle(), torch.cuda.Stream(device), _Turn(device))


def _mark(device: torch.device) -> Any:
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record(torch.cuda.current_stream(device))
    return event


def _seconds(begin: Any, end: Any) -> float:
    if isinstance(end, float):
        return float(end - begin)
    end.synchronize()
    return float(begin.elapsed_time(end)) * 1e-3
