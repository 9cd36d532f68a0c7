"""Interleaved wall-clock timing that survives a noisy machine.

Variants that are to be compared run in one process, round-robin, in short bursts, so that drift
over minutes hits all of them alike. Three disturbances are dealt with one by one:

- the thread pool of the variant before spins on for tens of milliseconds and takes the cores from
  whoever runs next: a pause precedes each burst, and the burst's first sample is dropped;
- a virtual machine sometimes runs at half speed for a second: a fixed matrix product is timed
  before and after each round, and a round beside which it ran slow is discarded and counted;
- a call of a few microseconds drowns in the clock's own cost: such calls are timed in batches.
"""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

MIN_SAMPLE = 50e-6
"""Seconds a sample must last; shorter calls are batched. The clock costs about 50 ns, so 0.1 %."""

SETTLE = 0.05
"""Seconds of pause before each burst. Measured: right after one another, ONNX Runtime, OpenVINO
(TBB) and torch (OpenMP) run up to twice as slow for 40 ms; 50 ms later they run as if alone."""

SLOW_PROBE = 1.3
"""A round whose slower probe exceeds the best round's by this factor is discarded."""

UNSTEADY = 1.5
"""A `Timing` whose p80 exceeds its p20 by this factor is marked; left alone, it stays below 1.2."""

_BURST_TIME = 40e-3
_MAX_BURST = 100


@dataclass(frozen=True)
class Timing:
    """Seconds per call over the samples kept.

    Attributes:
        median, p20, p80, min: order statistics of the samples, in seconds.
        n: number of samples kept.
        discarded: number of rounds thrown away because the machine ran slow.
        rounds: the median of each round kept, in order. Round i of one variant ran beside round i
            of the others of the same `interleave`, so they can be compared pairwise.
    """

    median: float
    p20: float
    p80: float
    min: float
    n: int
    discarded: int = 0
    rounds: tuple[float, ...] = field(default=(), repr=False)

    @classmethod
    def from_rounds(cls, rounds: Sequence[Sequence[float]], discarded: int = 0) -> Timing:
        """Summarises the samples of each round, in seconds.

        Raises:
            ValueError: without at least one sample in every round.
        """
        if not rounds or not all(rounds):
            raise ValueError("a Timing needs at least one round, and a sample in every round")
        samples = sorted(sample for samples in rounds for sample in samples)
        return cls(
            median=statistics.median(samples),
            p20=_quantile(samples, 0.2),
            p80=_quantile(samples, 0.8),
            min=samples[0],
            n=len(samples),
            discarded=discarded,
            rounds=tuple(statistics.median(samples) for samples in rounds),
        )

    @property
    def unsteady(self) -> bool:
        """Whether the spread is so wide that something else must have been running."""
        return self.p80 > UNSTEADY * self.p20

    def to_dict(self) -> dict[str, Any]:
        """The summary for JSON, in seconds; leaves out `rounds`."""
        return {
            "median": self.median,
            "p20": self.p20,
            "p80": self.p80,
            "min": self.min,
            "n": self.n,
            "discarded": self.discarded,
            "unsteady": self.unsteady,
        }


def ratio(a: Timing, b: Timing) -> float:
    """How many times as long `a` takes as `b`: the median of the ratios of paired rounds.

    Raises:
        ValueError: if the two do not come from the same `interleave`.
    """
    if not a.rounds or len(a.rounds) != len(b.rounds):
        raise ValueError(
            "ratio() needs two Timings of the same interleave(): their rounds are paired"
        )
    return statistics.median(x / y for x, y in zip(a.rounds, b.rounds, strict=True))


def interleave(
    variants: Mapping[str, Callable[[], object]],
    *,
    min_rounds: int = 5,
    min_time: float = 1.0,
    max_time: float = 60.0,
    burst: int | None = None,
    settle: float = SETTLE,
    probe: Callable[[], object] | None = None,
    clock: Callable[[], int] = time.perf_counter_ns,
) -> dict[str, Timing]:
    """Times several callables against each other and returns a `Timing` for each.

    Args:
        variants: name → callable without arguments. Each must return with its work done.
        min_rounds: rounds to keep at least, unless `max_time` ends the run first.
        min_time: seconds to spend per variant at least, on average.
        max_time: seconds after which no further round starts. One round always runs.
        burst: samples kept per variant and round; by default as many as fill about 40 ms, 1 to 100.
        settle: seconds of pause before each burst; 0 where all variants share one thread pool.
        probe: the fixed piece of work that tells the machine's speed; by default a 384³ float32
            matrix product on torch's current threads.
        clock: nanoseconds; for tests.

    Raises:
        ValueError: if there is no variant, or a bound is not positive.
    """
    if settle < 0 or (burst is not None and burst < 1):
        raise ValueError("interleave() needs settle >= 0 and burst >= 1")
    check_bounds(variants, min_rounds, max_time)
    work = probe or _matmul_probe()
    batches = {name: _calibrate(call, clock) for name, call in variants.items()}
    return collect(
        list(variants),
        lambda name: _burst(variants[name], batches[name], burst, settle, clock),
        lambda: _time_probe(work, settle, clock),
        slow=SLOW_PROBE,
        min_rounds=min_rounds,
        min_time=min_time,
        max_time=max_time,
        clock=clock,
    )


def check_bounds(names: Collection[str], min_rounds: int, max_time: float) -> None:
    """Refuses, with a ValueError, what no interleaved run can do."""
    if not names:
        raise ValueError("interleave() needs at least one variant to time")
    if min_rounds < 1 or max_time <= 0:
        raise ValueError("interleave() needs min_rounds >= 1 and max_time > 0")


def collect(
    names: Sequence[str],
    sample: Callable[[str], list[float]],
    probe: Callable[[], float],
    *,
    slow: float,
    min_rounds: int,
    min_time: float,
    max_time: float,
    clock: Callable[[], int] = time.perf_counter_ns,
) -> dict[str, Timing]:
    """The loop of every interleaved run: rounds over `names`, in alternating order.

    Args:
        names: the variants.
        sample: one burst of a variant, in seconds per call.
        probe: how slow the machine is right now, in any unit; called before and after each round.
        slow: a round whose slower probe exceeds the best round's by this factor is discarded.
        min_rounds, min_time, max_time, clock: see `interleave`.
    """
    rounds: list[dict[str, list[float]]] = []
    probes: list[float] = []
    collecting = gc.isenabled()
    gc.disable()
    try:
        start = clock()
        before = probe()
        while True:
            # Alternate the order, so that no variant always follows the same neighbour.
            order = names if len(rounds) % 2 == 0 else names[::-1]
            rounds.append({name: sample(name) for name in order})
            after = probe()
            probes.append(max(before, after))
            before = after
            kept = _quiet(probes, slow)
            elapsed = (clock() - start) * 1e-9
            if elapsed >= max_time or (
                len(kept) >= min_rounds and elapsed >= min_time * len(names)
            ):
                break
    finally:
        if collecting:
            gc.enable()
    discarded = len(rounds) - len(kept)
    return {name: Timing.from_rounds([rounds[i][name] for i in kept], discarded) for name in names}


def _quiet(probes: Sequence[float], slow: float) -> list[int]:
    """Indices of the rounds in which the machine ran at full speed; never empty."""
    limit = slow * min(probes)
    return [index for index, probe in enumerate(probes) if probe <= limit]


@dataclass(frozen=True)
class _Batch:
    calls: int
    """Calls per sample."""
    samples: int
    """Samples that fill `_BURST_TIME`."""


def _calibrate(call: Callable[[], object], clock: Callable[[], int]) -> _Batch:
    """Warms a variant up and finds how many calls make a sample long enough to time."""
    call()
    calls = 1
    while True:
        sample = min(_time_calls(call, calls, clock) for _ in range(3))
        if sample >= MIN_SAMPLE:
            break
        calls = max(
            2 * calls, min(10 * calls, math.ceil(1.2 * calls * MIN_SAMPLE / max(sample, 1e-9)))
        )
    return _Batch(calls, min(_MAX_BURST, max(1, math.floor(_BURST_TIME / sample))))


def _burst(
    call: Callable[[], object],
    batch: _Batch,
    burst: int | None,
    settle: float,
    clock: Callable[[], int],
) -> list[float]:
    """Seconds per call of one burst, its first sample dropped."""
    time.sleep(settle)
    _time_calls(call, batch.calls, clock)
    samples = burst or batch.samples
    return [_time_calls(call, batch.calls, clock) / batch.calls for _ in range(samples)]


def _time_calls(call: Callable[[], object], calls: int, clock: Callable[[], int]) -> float:
    start = clock()
    for _ in range(calls):
        call()
    return (clock() - start) * 1e-9


def _time_probe(probe: Callable[[], object], settle: float, clock: Callable[[], int]) -> float:
    """Seconds of the best of a few runs, the first of which wakes the thread pool."""
    time.sleep(settle)
    return min(_time_calls(probe, 1, clock) for _ in range(4))


def _matmul_probe() -> Callable[[], object]:
    a, b, out = torch.rand(384, 384), torch.rand(384, 384), torch.empty(384, 384)

    def probe() -> object:
        return torch.mm(a, b, out=out)

    return probe


def _quantile(ordered: Sequence[float], q: float) -> float:
    """Linear interpolation between the two nearest of the sorted samples."""
    position = q * (len(ordered) - 1)
    low = math.floor(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (position - low) * (ordered[high] - ordered[low])
