"""The model of a launch's time: its limits, and that it moves the right way."""

from __future__ import annotations

import importlib.util
import json
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import torch

from cvfast import inventory
from cvfast.launch import calls as shipped
from cvfast.perf import predict as model
from cvfast.perf.compiled import Binary
from cvfast.perf.devices import DEVICES, find
from cvfast.perf.predict import COPY_SHARE, LATENCY, LAUNCH, Work, predict

# A thread loads eight times 16 bytes and stores as many, with one multiply-add for each 4 bytes.
CODE = {"LDG.E.128": 8, "STG.E.128": 8, "FFMA": 32}
STREAM = Binary("stream", "sm_90", 64, 0, 0, 4096, CODE, CODE)
THREADS = 256
H200 = find("H200")


def stream(blocks: int, **changes: object) -> Work:
    half = blocks * THREADS * 128
    return replace(Work(half, half, blocks * THREADS * 32), **changes)  # type: ignore[arg-type]


def kernel(code: dict[str, int], **changes: object) -> Binary:
    return replace(STREAM, instructions=code, core=code, **changes)  # type: ignore[arg-type]


def run(blocks: int, binary: Binary = STREAM, work: Work | None = None, **launch: int):
    options = {"blocks": blocks, "threads": THREADS, "dynamic_shared": 0} | launch
    return predict(H200, binary, work or stream(blocks), **options)  # type: ignore[arg-type]


def test_a_large_stream_runs_at_the_bandwidth_of_a_copy() -> None:
    found = run(132 * 4 * 1000)
    assert found.limiter == "bandwidth"
    assert found.copy_share == pytest.approx(1, abs=1e-3)
    bytes_ = 132 * 4 * 1000 * THREADS * 256
    assert found.seconds == pytest.approx(LAUNCH + bytes_ / (COPY_SHARE * 4.8e12), rel=1e-3)
    assert found.roofline == bytes_ / 4.8e12
    assert found.waves == 1000


def test_a_small_launch_costs_the_launch_and_a_latency() -> None:
    found = run(1)
    assert found.seconds == pytest.approx(LAUNCH + LATENCY)
    assert found.limiter == "launch"


def test_less_in_flight_is_slower_once_latency_is_the_limit() -> None:
    narrow = kernel({"LDG.E": 2, "STG.E": 2, "FFMA": 32})
    found = run(132 * 4 * 100, narrow)
    assert found.limiter == "latency"
    # 1024 threads of 8 bytes on each of 132 SMs, each 800 ns.
    assert found.seconds - LAUNCH == pytest.approx(
        stream(132 * 4 * 100).read / (132 * 1024 * 8) * LATENCY, rel=1e-6
    )


def test_arithmetic_is_the_limit_where_there_is_enough_of_it() -> None:
    blocks = 132 * 4 * 100
    binary = kernel({"LDG.E.128": 16, "FFMA": 3200, "MOV": 784})
    found = run(blocks, binary, stream(blocks, multiply_adds=blocks * THREADS * 32_000))
    assert found.limiter == "issue"
    # 4000 instructions a run, 10 runs, 8 warps a block, four a cycle on each SM.
    cycles = blocks / 132 * 4000 * 10 * 8 / 4
    assert found.seconds - LAUNCH == pytest.approx(cycles / H200.clock_hz)


def test_shared_memory_traffic_is_the_limit_where_it_dominates() -> None:
    blocks = 132 * 4 * 100
    binary = kernel({"LDG.E.128": 8, "LDS.128": 64, "FFMA": 8})
    found = run(blocks, binary, stream(blocks, multiply_adds=blocks * THREADS * 64))
    assert found.limiter == "load/store"
    # 8 runs of 72 times 16 bytes a thread, and its 256 of device memory, 128 of them a cycle.
    cycles = blocks / 132 * THREADS * (8 * 72 * 16 + 256) / 128
    assert found.seconds - LAUNCH == pytest.approx(cycles / H200.clock_hz)


# A warp's 16x8x16 product is 64 multiply-adds a thread, four warps' 64x128x16 are 1024.
@pytest.mark.parametrize(
    ("arch", "opcode", "adds", "share"),
    [
        ("sm_90", "HGMMA.64x128x16.F32", 1024, 1.0),
        ("sm_90", "HMMA.16816.F32", 64, model.MMA_SHARE),
        ("sm_90", "HMMA.1688.F32.TF32", 32, model.MMA_SHARE / 2),
        ("sm_89", "HMMA.16816.F32", 64, 1.0),
    ],
)
def test_matrix_units_are_the_limit_of_large_products(
    arch: str, opcode: str, adds: int, share: float
) -> None:
    device = find("H200" if arch == "sm_90" else "RTX 4090")
    blocks = device.sms * 100
    binary = kernel({"LDG.E.128": 1, opcode: 16}, arch=arch)
    work = stream(blocks, multiply_adds=blocks * THREADS * 16 * adds * 50)
    found = predict(device, binary, work, blocks=blocks, threads=THREADS, dynamic_shared=0)
    assert found.limiter == "matrix"
    peak = device.half_matrix_flops * share
    assert found.seconds - LAUNCH == pytest.approx(2 * work.multiply_adds / peak, rel=1e-6)


def test_what_is_in_flight_is_bounded_by_registers_or_shared_memory() -> None:
    binary = kernel({"LDGSTS.E.128": 1, "FFMA": 32})
    assert model.bytes_in_flight(binary, THREADS, 32768) == 32768
    assert model.bytes_in_flight(STREAM, THREADS, 32768) == THREADS * 128
    few_registers = replace(STREAM, registers=32)
    assert model.bytes_in_flight(few_registers, THREADS, 0) == THREADS * 64


def test_a_block_more_than_a_wave_starts_another_wave() -> None:
    full, more = run(132 * 4), run(132 * 4 + 1)
    assert full.waves == 1
    assert more.seconds > full.seconds + LATENCY


@pytest.mark.parametrize("device", DEVICES, ids=lambda device: device.name)
def test_time_grows_with_work_and_shrinks_with_bandwidth(device) -> None:
    times = [
        predict(device, STREAM, stream(n), blocks=n, threads=THREADS, dynamic_shared=0).seconds
        for n in (1, 100, 1000, 10_000, 100_000)
    ]
    assert times == sorted(times)
    assert all(seconds > LAUNCH for seconds in times)
    faster = replace(device, dram_bandwidth=2 * device.dram_bandwidth)
    again = predict(
        faster, STREAM, stream(100_000), blocks=100_000, threads=THREADS, dynamic_shared=0
    )
    assert again.seconds < times[-1]
    assert again.roofline == stream(100_000).bytes / faster.dram_bandwidth


def test_no_prediction_beats_the_roofline() -> None:
    for blocks in (1, 7, 500, 12_345):
        found = run(blocks)
        assert found.seconds > found.roofline
        assert 0 < found.copy_share <= 1


def test_a_kernel_that_does_not_fit_has_no_time() -> None:
    with pytest.raises(ValueError, match="does not fit on NVIDIA H200: too much of its shared"):
        run(1, dynamic_shared=300_000)
    with pytest.raises(ValueError, match="at least one block"):
        run(0)


@pytest.fixture(scope="module")
def predictions() -> ModuleType:
    path = Path(__file__).parents[2] / "benchmarks" / "predictions.py"
    spec = importlib.util.spec_from_file_location("benchmarks_predictions", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("op", shipped.OPS)
def test_every_layer_is_predicted_at_every_batch(predictions: ModuleType, op: str) -> None:
    calls = predictions.layers(op)
    assert {c.problem for c in calls} == {
        c.problem for c in shipped.network_calls([op]) if c.problem.dtype is torch.float16
    }
    assert len(calls) == len({c.problem for c in calls})


def test_a_row_follows_from_the_compiled_kernel(
    predictions: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Everything(dict):
        def __missing__(self, name: str) -> Binary:
            return STREAM

    def build(found: list[inventory.Configuration]) -> dict[str, inventory.Build]:
        return {one.key: inventory.Build(Everything()) for one in found}

    monkeypatch.setattr(inventory, "build", build)
    calls = [c for c in predictions.layers("depthwise", [256]) if c.problem.width == 112]
    rows = predictions.predicted(H200, "cuda", calls)
    assert [row["layer"] for row in rows] == [call.describe() for call in calls]
    for call, row in zip(calls, rows, strict=True):
        p = call.problem
        inputs = p.batch * p.channels * p.height * p.width
        outputs = p.batch * p.channels * p.out_height * p.out_width
        weights = 4 * p.channels * (p.kernel[0] * p.kernel[1] + 1)
        assert row["bytes"] == 2 * (inputs + outputs) + weights
        assert row["flops"] == 2 * outputs * p.kernel[0] * p.kernel[1]
        assert row["seconds"] > row["roofline"] == pytest.approx(row["bytes"] / 4.8e12, abs=1e-9)
    (group,) = predictions.summarize(rows)
    assert group["layers"] == len(rows)
    assert group["seconds"] == pytest.approx(sum(row["seconds"] for row in rows), abs=1e-8)
    assert sum(group["limiters"].values()) == len(rows)


PREDICTED = (Path(__file__).parents[2] / "benchmarks/results/gpu").glob("predicted_*.json")


@pytest.mark.parametrize("op", sorted(path.stem.partition("_")[2] for path in PREDICTED))
def test_the_committed_predictions_are_of_these_layers(predictions: ModuleType, op: str) -> None:
    column = shipped.column(op)
    text = predictions.result(column.op).read_text(encoding="utf-8")
    content = json.loads(text)
    for device in predictions.DEVICES:
        for backend in column.backends:
            calls = predictions.layers(column.op)
            expected = {
                call.describe()
                for call in calls
                if call.served_by(backend)
                and inventory.launch_of(backend, find(device).architecture.name, call) is not None
            }
            rows = [
                row
                for row in content["rows"]
                if (row["device"], row["backend"]) == (find(device).name, backend)
            ]
            assert {row["layer"] for row in rows} == expected
    assert predictions.summarize(content["rows"]) == content["summary"]
    assert text == predictions.render(column.op, content["rows"])
