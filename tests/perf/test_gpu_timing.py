from __future__ import annotations

import pytest
import torch

from cvfast.perf import gpu_timing
from cvfast.perf.clocks import Sample
from cvfast.perf.gpu_timing import CaptureError, copy_bandwidth, interleave_cuda
from cvfast.perf.timing import ratio

US = 1e-6


class FakeGpu:
    """A stream: the host enqueues, the device runs in order, and either may wait for the other.

    A call takes `cold` seconds on the device after a flush, else `warm`.
    """

    def __init__(self, flush=40 * US, record=1 * US):
        self.host = 0.0  # both times in seconds
        self.device = 0.0
        self.flush_seconds, self.record_seconds = flush, record
        self.flushed = True
        self.log: list[str] = []
        self.captured: list[tuple[str, int]] = []
        self.mhz = 2000

    def clock(self) -> int:
        return round(self.host * 1e9)

    def _enqueue(self, host, device):
        self.host += host
        self.device = max(self.device, self.host) + device

    def flush(self):
        self.log.append("flush")
        self.flushed = True
        self._enqueue(2 * US, self.flush_seconds)

    def record(self):
        self.log.append("record")
        self._enqueue(self.record_seconds, 0.0)
        return self.device

    def seconds(self, start, end):
        return end - start

    def synchronize(self):
        self.log.append("synchronize")
        self.host = max(self.host, self.device)

    def call(self, name, cold, warm=None, host=5 * US):
        def run():
            self.log.append(name)
            self._enqueue(host, cold if self.flushed or warm is None else warm)
            self.flushed = False

        run.graph_seconds = (cold, cold if warm is None else warm)
        return run

    def capture(self, call, calls):
        cold, warm = call.graph_seconds
        self.captured.append((call.__name__, calls))

        def replay():
            first = cold if self.flushed else warm
            self._enqueue(8 * US, first + (calls - 1) * warm)
            self.flushed = False

        return replay

    def sample(self):
        return Sample(sm_mhz=self.mhz)


@pytest.fixture
def gpu():
    return FakeGpu()


def measure(gpu, variants, **kwargs):
    kwargs = {"min_rounds": 4, "min_time": 0.0} | kwargs
    return interleave_cuda(variants, stream=gpu, clock=gpu.clock, **kwargs)


def test_cold_calls_follow_a_flush_that_is_not_timed(gpu):
    timings = measure(gpu, {"a": gpu.call("a", cold=10 * US, warm=4 * US)})
    assert timings["a"].median == pytest.approx(10 * US)
    assert timings["a"].p80 == pytest.approx(10 * US)
    calls = [i for i, word in enumerate(gpu.log) if word == "a"][gpu_timing._WARM_UP :]
    assert all(gpu.log[i - 2 : i + 2] == ["flush", "record", "a", "record"] for i in calls)


def test_warm_calls_are_batched_and_not_flushed(gpu):
    timings = measure(gpu, {"a": gpu.call("a", cold=10 * US, warm=4 * US)}, cold_l2=False)
    assert timings["a"].median == pytest.approx(4 * US)
    batch = gpu.log[len(gpu.log) - gpu.log[::-1].index("record") - 1 - 13 :][:13]
    assert batch.count("a") >= 12  # 50 us of 4 us
    assert gpu.log.count("flush") < gpu.log.count("a") / 5


def test_a_filled_queue_hides_the_host(gpu):
    """The host needs 30 us for what the device does in 4: only unqueued does that count."""
    call = gpu.call("a", cold=4 * US, host=30 * US)
    for cold in (True, False):
        queued = measure(gpu, {"a": call}, cold_l2=cold)["a"]
        assert queued.p80 == pytest.approx(4 * US)
    assert measure(gpu, {"a": call}, cold_l2=False, queued=False)["a"].median > 29 * US


def test_a_graph_is_captured_once_per_variant_and_replayed(gpu):
    calls = {"a": gpu.call("a", 4 * US), "b": gpu.call("b", 8 * US)}
    timings = measure(gpu, calls, graph=True)
    assert gpu.captured == [("run", 1), ("run", 1)]
    assert ratio(timings["b"], timings["a"]) == pytest.approx(2.0)
    warm_ups = gpu_timing._WARM_UP
    assert (gpu.log.count("a"), gpu.log.count("b")) == (warm_ups, warm_ups)


def test_a_warm_graph_holds_as_many_calls_as_a_sample_needs(gpu):
    timings = measure(gpu, {"a": gpu.call("a", 10 * US, 4 * US)}, graph=True, cold_l2=False)
    assert gpu.captured[-1][1] >= 13
    assert timings["a"].median == pytest.approx(4 * US)


def test_failed_capture_names_the_variant(gpu, monkeypatch):
    def fail(call, calls):
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(gpu, "capture", fail)
    with pytest.raises(CaptureError, match=r"^a cannot be captured .*: operation not permitted"):
        measure(gpu, {"a": gpu.call("a", 1e-5)}, graph=True)


def test_variants_take_turns_in_alternating_order(gpu):
    variants = {name: gpu.call(name, 1e-3) for name in "ab"}
    measure(gpu, variants, min_rounds=2, burst=2)
    bursts = "".join(word for word in gpu.log if word in variants)
    assert bursts.endswith("aaabbb" + "bbbaaa")  # the first of each is dropped


def test_results_are_read_once_per_burst(gpu):
    measure(gpu, {"a": gpu.call("a", 1e-3)}, min_rounds=1, burst=7)
    last = "".join(word[0] for word in gpu.log).rsplit("s", 2)[1]
    assert last.lstrip("f") == "frar".lstrip("f") + "frar" * 7


def test_rounds_at_low_clocks_are_discarded_whoever_lowered_them(gpu):
    """Variant b draws more power. Of its rounds two run far below the others: those go."""
    rounds = 0

    def heavy():
        nonlocal rounds
        rounds += 1
        gpu.mhz = 1300 if rounds in (12, 15) else 1800
        gpu._enqueue(5 * US, 1e-3 * 1800 / gpu.mhz)

    def light():
        gpu.mhz = 1980
        gpu._enqueue(5 * US, 1e-3)

    log: list[Sample] = []
    calls = {"a": light, "b": heavy}
    timings = measure(gpu, calls, burst=1, min_rounds=5, sampler=gpu, log=log)
    kept, discarded = len(timings["a"].rounds), timings["a"].discarded
    assert discarded >= 1
    assert kept == 5
    assert len(log) == 2 * (kept + discarded)
    assert timings["b"].p80 == pytest.approx(1e-3)
    assert {sample.sm_mhz for sample in log} >= {1980, 1800, 1300}


def test_without_clocks_nothing_is_discarded(gpu):
    class Silent:
        def sample(self):
            return Sample()

    timings = measure(gpu, {"a": gpu.call("a", 1e-3)}, sampler=Silent())
    assert timings["a"].discarded == 0
    assert len(timings["a"].rounds) == 4


def test_time_bounds(gpu):
    timings = measure(gpu, {"a": gpu.call("a", 0.1)}, min_rounds=1, min_time=2.0)
    assert 2.0 <= timings["a"].n * 2 * 0.1 <= 2.6  # half of the samples are dropped
    timings = measure(gpu, {"a": gpu.call("a", 5.0)}, min_rounds=100, max_time=25.0)
    assert len(timings["a"].rounds) == 3


def test_copy_bandwidth_counts_bytes_read_and_written():
    copied: list[int] = []

    class Target(FakeGpu):
        def record(self):
            if len(copied) % 2:  # between the two events of a sample lies one copy
                self._enqueue(0.0, 1e-3)
            copied.append(1)
            return super().record()

    target = Target()
    rate = copy_bandwidth(
        "cpu", nbytes=1 << 20, stream=target, clock=target.clock, min_rounds=1, min_time=0.0
    )
    assert rate == pytest.approx(2 * (1 << 20) / 1e-3, rel=0.01)


@pytest.mark.parametrize("kwargs", [{"min_rounds": 0}, {"max_time": 0.0}, {"burst": 0}])
def test_bad_bounds_are_errors(gpu, kwargs):
    with pytest.raises(ValueError, match="interleave"):
        measure(gpu, {"a": gpu.call("a", 1e-3)}, **kwargs)


def test_no_variants_is_an_error(gpu):
    with pytest.raises(ValueError, match="at least one variant"):
        measure(gpu, {})


@pytest.mark.gpu
def test_on_a_device():
    x = torch.randn(1 << 24, device="cuda", dtype=torch.float16)
    y = torch.empty_like(x)
    calls = {"copy": lambda: y.copy_(x), "twice": lambda: (y.copy_(x), y.copy_(x))}
    for graph in (False, True):
        timings = interleave_cuda(calls, graph=graph)
        assert 1.5 < ratio(timings["twice"], timings["copy"]) < 2.5
    small = torch.randn(1 << 20, device="cuda", dtype=torch.float16)
    call = {"add": lambda: small + 1}
    cold, warm = interleave_cuda(call)["add"], interleave_cuda(call, cold_l2=False)["add"]
    assert warm.median < cold.median
    assert copy_bandwidth(nbytes=1 << 28) > 1e11


@pytest.mark.gpu
def test_capture_error_on_a_device():
    x = torch.randn(8, device="cuda")
    with pytest.raises(CaptureError, match="reads_back cannot be captured"):
        interleave_cuda({"reads_back": lambda: x.sum().item()}, graph=True)
