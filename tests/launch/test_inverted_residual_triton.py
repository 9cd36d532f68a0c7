from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cvfast.launch.inverted_residual import GENERAL, Problem, triton
from cvfast.launch.inverted_residual.triton import Launch
from cvfast.ops.inverted_residual import fuses_on_gpu, separate_seconds
from cvfast.perf import devices

PROBLEM = Problem(8, 24, 144, 24, 56, 56, (3, 3), (1, 1), (1, 1))
LAUNCH = Launch(rows=4, positions=16, hidden=32, channels=32, outputs=32, num_warps=2)
H200, RTX_4090 = devices.find("H200"), devices.find("4090")


def block(
    batch: int, channels: int, hidden: int, out: int, size: int, stride: int = 1, kernel: int = 3
) -> Problem:
    return Problem(
        batch, channels, hidden, out, size, size, (kernel,) * 2, (stride,) * 2, (kernel // 2,) * 2,
        expands=hidden > channels, residual=channels == out and stride == 1,
    )  # fmt: skip


BLOCKS = [
    (32, 32, 16, 112),
    (16, 96, 24, 112, 2),
    (24, 144, 24, 56),
    (24, 144, 32, 56, 2),
    (32, 192, 32, 28),
    (32, 192, 64, 28, 2),
    (64, 384, 96, 14),
    (40, 120, 0, 28, 1, 5),
]
"""MobileNet v2's, as far as the kernel takes them, and one of v3."""


@pytest.mark.parametrize("device", devices.DEVICES, ids=lambda device: device.name)
def test_candidates_fit_the_device_and_begin_with_the_heuristic(device: devices.Device) -> None:
    for problem in (block(batch, *shape) for shape in BLOCKS for batch in (1, 256)):
        found = triton.candidates(problem, "forward", device)
        assert found[0] == triton.heuristic(problem, "forward", device)
        assert len(found) == len(set(found)) > 3
        times = [triton.predict(problem, launch, "forward", device) for launch in found]
        assert times == sorted(times)
        for launch in found:
            triton.validate(problem, launch, "forward")
            threads = 32 * launch.num_warps
            registers = triton.registers(problem, launch)
            shared = triton.shared_bytes(problem, launch)
            held = devices.occupancy(device.architecture, threads, registers, shared)
            assert held.blocks_per_sm >= 1


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    device=st.sampled_from(devices.DEVICES),
    problem=st.builds(
        Problem,
        batch=st.integers(0, 300),
        channels=st.integers(1, 32),
        hidden=st.integers(1, 1200),
        out_channels=st.integers(0, 1500),
        height=st.integers(1, 300),
        width=st.integers(1, 300),
        kernel=st.tuples(st.integers(1, 31), st.integers(1, 31)),
        stride=st.tuples(st.integers(1, 4), st.integers(1, 4)),
        padding=st.just((15, 15, 16, 16)),
        expands=st.booleans(),
        dtype=st.sampled_from((torch.float16, torch.float32)),
    ),
)
def test_the_heuristic_can_launch_whatever_the_kernel_supports(
    problem: Problem, device: devices.Device
) -> None:
    assert triton.unsupported(problem) is None
    launch = triton.heuristic(problem, "forward", device)
    triton.validate(problem, launch)
    triton.grid(problem, launch)


def test_every_position_has_one_program() -> None:
    for problem, _ in GENERAL:
        launch = triton.heuristic(problem, "forward", RTX_4090)
        programs, columns = triton.grid(problem, launch)
        strips = -(-problem.out_height // launch.rows) * problem.batch
        if problem.projects:
            positions = strips * problem.out_width
            assert 0 <= programs * launch.positions - positions < launch.positions
            assert 0 <= columns * launch.outputs - problem.out_channels < launch.outputs
        else:
            assert programs == strips
            assert 0 <= columns * launch.hidden - problem.hidden < launch.hidden


def test_expansions_are_counted() -> None:
    # At stride 1, each of 3 columns reads (rows + 2) / rows rows: 9 times with one row, 4.5 with 4.
    assert triton.expansions(PROBLEM, replace(LAUNCH, rows=1)) == 9.0
    assert triton.expansions(PROBLEM, LAUNCH) == 4.5
    # At stride 2, of a quarter of the pixels: 9 / 4 with one row, 3 · 9 / 4 / 4 with 4.
    halved = replace(PROBLEM, stride=(2, 2))
    assert triton.expansions(halved, replace(LAUNCH, rows=1)) == 2.25
    assert triton.expansions(halved, LAUNCH) == 1.6875
    assert triton.expansions(PROBLEM, replace(LAUNCH, outputs=16)) == 9.0  # two blocks of outputs
    assert triton.expansions(replace(PROBLEM, expands=False), LAUNCH) == 0.0
    assert triton.expansions(replace(PROBLEM, batch=0), LAUNCH) == 0.0


@pytest.mark.parametrize("backend", ["triton", "cuda"])
@pytest.mark.parametrize("device", [H200, RTX_4090], ids=lambda device: device.name)
def test_fuses_where_hidden_tensors_are_large(device: devices.Device, backend: str) -> None:
    assert fuses_on_gpu(block(256, 16, 96, 24, 112, 2), device, backend)
    assert not fuses_on_gpu(block(256, 160, 960, 320, 7), device, backend)


def test_what_no_kernel_takes_is_not_fused() -> None:
    assert not fuses_on_gpu(block(256, 96, 576, 96, 14), H200, "triton")
    assert not fuses_on_gpu(replace(PROBLEM, dtype=torch.float32), H200, "cuda")


def test_hidden_tensors_that_fit_into_l2_cost_no_memory_traffic() -> None:
    small = block(1, 24, 144, 24, 56)
    assert separate_seconds(small, H200) < 10e-6  # three launches
    large = block(256, 24, 144, 24, 56)
    hidden = 256 * 56 * 56 * 144 * 2
    assert separate_seconds(large, H200) > 4 * hidden / H200.dram_bandwidth


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rows": 0}, "rows=0: expected 1 to 29"),
        ({"rows": 30}, "rows=30: expected 1 to 29"),
        ({"positions": 8}, "positions=8: expected a power of two from 16"),
        ({"hidden": 48}, "hidden=48: expected a power of two from 16"),
        ({"channels": 24}, "channels=24: expected a power of two from 16"),
        ({"outputs": 0}, "outputs=0: expected a power of two from 16"),
        ({"num_warps": 3}, "num_warps=3: expected a power of two up to 32"),
        ({"registers": 100}, "registers=100: expected a multiple of 8 from 32, or 255"),
        ({"num_stages": 0}, "num_stages=0: expected at least 1"),
    ],
    ids=str,
)
def test_wrong_launches_are_named(change: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        triton.validate(PROBLEM, replace(LAUNCH, **change))


def test_what_is_not_supported_is_named() -> None:
    with pytest.raises(ValueError, match="expected forward"):
        triton.validate(PROBLEM, LAUNCH, "backward_input")
    with pytest.raises(ValueError, match=r"expands at most 64 channels of .*: the operands of 96"):
        triton.validate(replace(PROBLEM, channels=96), LAUNCH)
    with pytest.raises(ValueError, match="windows of up to 31 rows, not 33"):
        triton.validate(replace(PROBLEM, kernel=(33, 3), padding=(16, 1)), LAUNCH)
    with pytest.raises(ValueError, match="too many programs"):
        triton.grid(replace(PROBLEM, batch=2**31), replace(LAUNCH, rows=1))
