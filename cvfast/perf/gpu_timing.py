"""Interleaved timing on a CUDA device, by events on its stream.

The disturbances of a GPU, and what is done about each:

- caches: between two networks a layer's input is rarely in L2, in a loop over one kernel it always
  is. `interleave_cuda` overwrites a buffer of twice the L2 before each call (cold), outside what is
  timed, or runs calls back to back (warm);
- the host: a kernel of five microseconds takes the host longer to launch. The stream is first given
  flushes enough to keep it busy until the host has enqueued a whole burst, so that no event waits
  for the host; only then are the results read, all at once;
- clocks: they are read through NVML after each burst, and a round that ran at clearly lower clocks
  than the best is discarded and counted. Nothing here sets them;
- drift: variants take turns, in alternating order, as in `cvfast.perf.timing`.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch

from cvfast.perf import clocks
from cvfast.perf.timing import MIN_SAMPLE, Timing, check_bounds, collect

SLOW_CLOCK = 1.1
"""A round during which the SM clock was this factor below the best round's is discarded."""

_BURST_TIME = 20e-3
# A stream holds about a thousand commands before the host blocks; a sample is up to ten.
_MAX_BURST = 50
_MAX_LEAD = 400
_WARM_UP = 3


class CaptureError(RuntimeError):
    """A variant cannot be captured in a CUDA graph; the message names it and says why."""


class Stream(Protocol):
    """What timing needs of a device's stream; commands are enqueued, and run in order."""

    def flush(self) -> None:
        """Enqueues work that leaves nothing of earlier calls in L2."""

    def record(self) -> Any:
        """Enqueues an event."""

    def seconds(self, start: Any, end: Any) -> float:
        """Between two events that the device has passed."""

    def synchronize(self) -> None:
        """Returns when the device has done everything that was enqueued."""

    def capture(self, call: Callable[[], object], calls: int) -> Callable[[], object]:
        """`calls` calls of `call` as one graph; what is returned enqueues it."""


class TorchStream:
    """The current stream of the current CUDA device."""

    def __init__(self) -> None:
        properties = torch.cuda.get_device_properties(torch.cuda.current_device())
        self._buffer = torch.empty(2 * properties.L2_cache_size, dtype=torch.int8, device="cuda")

    def flush(self) -> None:
        self._buffer.zero_()

    def record(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self, start: torch.cuda.Event, end: torch.cuda.Event) -> float:
        return start.elapsed_time(end) * 1e-3

    def synchronize(self) -> None:
        torch.cuda.synchronize(self._buffer.device)

    def capture(self, call: Callable[[], object], calls: int) -> Callable[[], object]:
        return capture(call, calls)


def capture(call: Callable[[], object], calls: int = 1) -> Callable[[], object]:
    """`calls` calls of `call` as a CUDA graph of the current device.

    Returns:
        Enqueues the graph on the current stream, and returns what the last captured call returned;
        its tensors are overwritten by the next replay.

    Raises:
        RuntimeError: from CUDA or from `call`, if it does what a graph cannot hold.
    """
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # lazy initialisation and autotuning must not be captured
        for _ in range(_WARM_UP):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(calls):
            result = call()

    def replay() -> object:
        graph.replay()
        return result

    return replay


def interleave_cuda(
    variants: Mapping[str, Callable[[], object]],
    *,
    cold_l2: bool = True,
    graph: bool = False,
    queued: bool = True,
    min_rounds: int = 5,
    min_time: float = 0.1,
    max_time: float = 10.0,
    burst: int | None = None,
    stream: Stream | None = None,
    sampler: clocks.Sampler | None = None,
    log: list[clocks.Sample] | None = None,
    clock: Callable[[], int] = time.perf_counter_ns,
) -> dict[str, Timing]:
    """Times callables that enqueue CUDA work, against each other; a `Timing` of each, in seconds.

    Args:
        variants: name → callable without arguments, on the current stream. It need not wait for
            its work; one that does is timed with the host's part.
        cold_l2: flush L2 before each call. Otherwise short calls are timed in batches, back to
            back.
        graph: capture each variant once, and time replays.
        queued: keep the stream filled, so that only the device's time counts. Without it, the
            time the host takes between the first launch and the last of a call counts as well:
            what a user waits for who runs a network without a graph.
        min_rounds: rounds to keep at least, unless `max_time` ends the run first.
        min_time: seconds to spend per variant at least, on average.
        max_time: seconds after which no further round starts. One round always runs.
        burst: samples per variant and round; by default as many as fill about 20 ms, 1 to 50.
        stream: default, the current device's current stream.
        sampler: of the clocks; default, NVML where it is, for the current device.
        log: what the sampler said is appended, one sample per burst.
        clock: nanoseconds, of the host; for tests.

    Raises:
        ValueError: if there is no variant, or a bound is not positive.
        CaptureError: with `graph`, if a variant cannot be captured.
    """
    check_bounds(variants, min_rounds, max_time)
    if burst is not None and burst < 1:
        raise ValueError("interleave_cuda() needs burst >= 1")
    if stream is None:
        stream = TorchStream()
        sampler = sampler or clocks.nvml(torch.cuda.current_device())
    meter = _Meter(stream, cold_l2, queued, clock)
    plans = {name: meter.plan(name, call, graph) for name, call in variants.items()}
    log = [] if log is None else log
    slowest = 0.0

    def sample(name: str) -> list[float]:
        nonlocal slowest
        seconds = meter.burst(plans[name], burst or plans[name].samples)
        if sampler is not None:
            log.append(sampler.sample())
            slowest = max(slowest, 1 / (log[-1].sm_mhz or math.inf))
        return seconds

    # Each variant draws its own power, and so has its own clock: a round is judged by the lowest of
    # all its bursts, or the order of the variants would decide.
    def probe() -> float:
        nonlocal slowest
        result, slowest = slowest, 0.0
        return result

    return collect(
        list(variants),
        sample,
        probe,
        slow=SLOW_CLOCK,
        min_rounds=min_rounds,
        min_time=min_time,
        max_time=max_time,
        clock=clock,
    )


def copy_bandwidth(device: str = "cuda", *, nbytes: int = 1 << 30, **kwargs: Any) -> float:
    """Bytes per second, read plus written, of a device-to-device copy with cold L2.

    Args:
        device: the current one.
        nbytes: size of the tensor that is copied.
        **kwargs: of `interleave_cuda`.
    """
    source = torch.empty(nbytes, dtype=torch.int8, device=device).random_()
    target = torch.empty_like(source)
    copied = interleave_cuda({"copy": lambda: target.copy_(source)}, **kwargs)["copy"]
    return 2 * nbytes / copied.median


@dataclass(frozen=True)
class _Plan:
    """How one variant is timed.

    Attributes:
        run: enqueues `calls` calls.
        samples: that fill `_BURST_TIME`.
        host: seconds that the host takes to enqueue one sample.
    """

    run: Callable[[], object]
    calls: int
    samples: int
    host: float


class _Meter:
    """Takes samples off a stream."""

    def __init__(self, stream: Stream, cold: bool, queued: bool, clock: Callable[[], int]) -> None:
        self.stream, self.cold, self.queued, self.clock = stream, cold, queued, clock
        stream.flush()
        start = stream.record()
        for _ in range(8):
            stream.flush()
        end = stream.record()
        stream.synchronize()
        self.flush_seconds = max(stream.seconds(start, end) / 8, 1e-6)

    def plan(self, name: str, call: Callable[[], object], graph: bool) -> _Plan:
        """Warms a variant up, and finds how many calls make a sample long enough to time."""
        for _ in range(_WARM_UP):
            call()
        self.stream.synchronize()
        calls = 1
        while True:
            run = self._repeat(name, call, calls, graph)
            plan = _Plan(run, calls, samples=1, host=self._host_seconds(run))
            seconds = min(self.burst(plan, 3))
            if self.cold or seconds * calls >= MIN_SAMPLE:
                break
            missing = math.ceil(1.2 * MIN_SAMPLE / max(seconds, 1e-9))
            calls = max(2 * calls, min(10 * calls, missing))
        each = max(plan.host, seconds * calls + (self.flush_seconds if self.cold else 0.0))
        samples = min(_MAX_BURST, max(1, math.floor(_BURST_TIME / each)))
        return replace(plan, samples=samples)

    def burst(self, plan: _Plan, samples: int) -> list[float]:
        """Seconds per call of `samples` samples, after one that is dropped."""
        if self.queued:
            lead = math.ceil(plan.host * (samples + 1) / self.flush_seconds)
            for _ in range(min(lead, _MAX_LEAD)):
                self.stream.flush()
        pairs = [self._sample(plan.run) for _ in range(samples + 1)]
        self.stream.synchronize()
        return [self.stream.seconds(start, end) / plan.calls for start, end in pairs[1:]]

    def _sample(self, run: Callable[[], object]) -> tuple[Any, Any]:
        if self.cold:
            self.stream.flush()
        start = self.stream.record()
        run()
        return start, self.stream.record()

    def _host_seconds(self, run: Callable[[], object]) -> float:
        """What enqueueing a sample takes, the longer of two."""
        longest = 0.0
        for _ in range(2):
            before = self.clock()
            self._sample(run)
            longest = max(longest, (self.clock() - before) * 1e-9)
            self.stream.synchronize()
        return longest

    def _repeat(
        self, name: str, call: Callable[[], object], calls: int, graph: bool
    ) -> Callable[[], object]:
        if graph:
            try:
                return self.stream.capture(call, calls)
            except Exception as error:
                raise CaptureError(
                    f"{name} cannot be captured in a CUDA graph: {type(error).__name__}: {error}"
                ) from error
        if calls == 1:
            return call

        def run() -> None:
            for _ in range(calls):
                call()

        return run
