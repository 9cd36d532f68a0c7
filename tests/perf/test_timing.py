from __future__ import annotations

import time

import pytest

from cvfast.perf import timing


class FakeMachine:
    """A clock in nanoseconds that only its own calls move."""

    def __init__(self) -> None:
        self.now = 0
        self.log: list[str] = []
        self.slowdown = 1.0

    def clock(self) -> int:
        return self.now

    def call(self, name: str, seconds: float):
        def run() -> None:
            self.log.append(name)
            self.now += round(seconds * 1e9 * self.slowdown)

        return run


@pytest.fixture
def machine() -> FakeMachine:
    return FakeMachine()


def interleave(machine: FakeMachine, seconds: dict[str, float], **kwargs):
    kwargs = {"min_rounds": 4, "min_time": 0.0, "burst": 3, "settle": 0.0} | kwargs
    kwargs.setdefault("probe", machine.call("probe", 1e-3))
    calls = {name: machine.call(name, value) for name, value in seconds.items()}
    return timing.interleave(calls, clock=machine.clock, **kwargs)


def test_statistics_of_rounds():
    measured = timing.Timing.from_rounds([[3.0, 1.0, 2.0], [5.0, 4.0, 6.0]], discarded=2)
    assert measured.median == 3.5
    assert (measured.p20, measured.p80) == (2.0, 5.0)
    assert measured.min == 1.0
    assert measured.n == 6
    assert measured.rounds == (2.0, 5.0)
    assert measured.to_dict() == {
        "median": 3.5,
        "p20": 2.0,
        "p80": 5.0,
        "min": 1.0,
        "n": 6,
        "discarded": 2,
        "unsteady": True,
    }


def test_wide_spread_is_marked():
    assert not timing.Timing.from_rounds([[1.0, 1.1, 1.2, 1.3, 1.4]]).unsteady
    assert timing.Timing.from_rounds([[1.0, 1.0, 1.5, 2.0, 2.0]]).unsteady


@pytest.mark.parametrize("rounds", [[], [[1.0], []]])
def test_no_samples_is_an_error(rounds):
    with pytest.raises(ValueError, match="at least one round"):
        timing.Timing.from_rounds(rounds)


def test_measures_what_the_clock_says(machine):
    measured = interleave(machine, {"a": 2e-3, "b": 1e-3})
    assert measured["a"].median == pytest.approx(2e-3)
    assert measured["b"].median == pytest.approx(1e-3)
    assert measured["a"].n == 4 * 3
    assert timing.ratio(measured["a"], measured["b"]) == pytest.approx(2.0)


def test_rounds_alternate_their_order_and_drop_the_first_sample(machine):
    interleave(machine, {"a": 1e-3, "b": 1e-3}, min_rounds=2)
    measured = "".join(name[0] for name in machine.log)
    warm_up = "a" * 4 + "b" * 4
    burst = 1 + 3  # the first is dropped
    probe = "p" * 4
    expected = warm_up + probe + "a" * burst + "b" * burst + probe + "b" * burst + "a" * burst
    assert measured == expected + probe


def test_short_calls_are_timed_in_batches(machine):
    measured = interleave(machine, {"tiny": 1e-6}, min_rounds=1, burst=1)
    assert measured["tiny"].median == pytest.approx(1e-6)
    before = machine.log.count("tiny")
    machine.log.clear()
    batch = timing._calibrate(machine.call("tiny", 1e-6), machine.clock)
    assert 50 <= batch.calls <= 100
    assert before > 2 * batch.calls


def test_ratio_pairs_rounds_so_that_drift_cancels(machine):
    """The machine slows down fourfold, steadily: medians of each suffer, their ratio does not."""
    a, b = machine.call("a", 3e-3), machine.call("b", 1e-3)
    rounds: dict[str, list[list[float]]] = {"a": [], "b": []}
    for step in range(10):
        machine.slowdown = 1 + step / 3
        for name, call in (("a", a), ("b", b)):
            rounds[name].append([timing._time_calls(call, 1, machine.clock)])
    timings = {name: timing.Timing.from_rounds(samples) for name, samples in rounds.items()}
    assert timings["a"].p80 > 1.5 * timings["a"].p20
    assert timing.ratio(timings["a"], timings["b"]) == pytest.approx(3.0)


def test_slow_rounds_are_discarded_and_counted(machine):
    """Half speed in probes 2 to 4 taints rounds 1 to 4 of 0, 1, 2, ..."""
    probes = 0

    def probe() -> None:
        nonlocal probes
        machine.slowdown = 2.0 if 2 <= probes // 4 <= 4 else 1.0
        probes += 1
        machine.now += round(1e6 * machine.slowdown)

    measured = interleave(machine, {"a": 1e-3}, min_rounds=5, probe=probe)
    assert measured["a"].discarded == 4
    assert measured["a"].n == 5 * 3
    assert measured["a"].p80 == pytest.approx(1e-3)


def test_a_little_noise_is_kept(machine):
    probes = 0

    def probe() -> None:
        nonlocal probes
        probes += 1
        machine.now += round(1e6 * (1.2 if probes % 8 < 4 else 1.0))

    assert interleave(machine, {"a": 1e-3}, probe=probe)["a"].discarded == 0


def test_min_time_and_max_time_bound_the_run(machine):
    measured = interleave(machine, {"a": 0.1}, min_rounds=1, min_time=3.0)
    assert 3.0 <= measured["a"].n * 0.1 / 3 * 4 <= 4.0
    measured = interleave(machine, {"a": 10.0}, min_rounds=100, max_time=50.0)
    assert len(measured["a"].rounds) == 2


def test_ratio_refuses_timings_of_different_runs(machine):
    a = interleave(machine, {"a": 1e-3}, min_rounds=3)["a"]
    b = interleave(machine, {"b": 1e-3}, min_rounds=4)["b"]
    with pytest.raises(ValueError, match="same interleave"):
        timing.ratio(a, b)


@pytest.mark.parametrize(
    "kwargs", [{"min_rounds": 0}, {"max_time": 0.0}, {"burst": 0}, {"settle": -1.0}]
)
def test_bad_bounds_are_errors(kwargs):
    with pytest.raises(ValueError, match="interleave"):
        timing.interleave({"a": lambda: None}, **kwargs)


def test_no_variants_is_an_error():
    with pytest.raises(ValueError, match="at least one variant"):
        timing.interleave({})


def test_real_clock_tells_slow_from_fast():
    measured = timing.interleave(
        {"slow": lambda: time.sleep(4e-3), "fast": lambda: time.sleep(1e-3)},
        min_rounds=2,
        min_time=0.0,
        settle=0.0,
        burst=3,
    )
    assert timing.ratio(measured["slow"], measured["fast"]) > 1.5
