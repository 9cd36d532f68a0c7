from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cvfast.launch.depthwise import PASSES, Problem, triton
from cvfast.launch.depthwise.triton import Launch
from cvfast.perf import devices

PROBLEM = Problem(8, 96, 56, 56, (3, 3), (1, 1), (1, 1))
LAUNCH = Launch(rows=4, columns=2, vector=4, channels=32, num_warps=4)


def layers() -> list[Problem]:
    shapes = [(32, 112, 3, 1), (96, 112, 3, 2), (72, 56, 5, 2), (144, 14, 3, 1), (960, 7, 5, 1)]
    return [
        Problem(batch, c, s, s, (k, k), (stride,) * 2, (k // 2,) * 2, dtype=dtype)
        for (c, s, k, stride), batch, dtype in itertools.product(
            shapes, (1, 256), (torch.float16, torch.float32)
        )
    ]


@pytest.mark.parametrize("pass_", PASSES)
@pytest.mark.parametrize("device", devices.DEVICES, ids=lambda device: device.name)
def test_candidates_fit_the_device_and_begin_with_the_heuristic(
    device: devices.Device, pass_: str
) -> None:
    for problem in layers():
        found = triton.candidates(problem, pass_, device)
        assert found[0] == triton.heuristic(problem, pass_, device)
        assert len(found) == len(set(found)) > 3
        for launch in found:
            triton.validate(problem, launch, pass_)
            assert triton.grid(problem, launch, pass_)[0] >= 1
            registers = triton.registers(problem, launch, pass_)
            held = devices.occupancy(device.architecture, launch.lanes, registers, 0)
            assert held.blocks_per_sm >= 1


@settings(max_examples=300, deadline=None, derandomize=True)
@given(
    pass_=st.sampled_from(PASSES),
    device=st.sampled_from(devices.DEVICES),
    problem=st.builds(
        Problem,
        batch=st.integers(0, 300),
        channels=st.integers(1, 2000),
        height=st.integers(1, 300),
        width=st.integers(1, 300),
        kernel=st.tuples(st.integers(1, 31), st.integers(1, 31)),
        stride=st.tuples(st.integers(1, 4), st.integers(1, 4)),
        padding=st.just((31, 31)),
        dilation=st.tuples(st.integers(1, 2), st.integers(1, 2)),
        multiplier=st.integers(1, 4),
        dtype=st.sampled_from((torch.float16, torch.float32)),
    ),
)
def test_the_heuristic_can_launch_anything(
    problem: Problem, pass_: str, device: devices.Device
) -> None:
    launch = triton.heuristic(problem, pass_, device)
    triton.validate(problem, launch, pass_)
    triton.grid(problem, launch, pass_)


@pytest.mark.parametrize("device", devices.DEVICES, ids=lambda device: device.name)
def test_large_batches_leave_no_lane_idle_and_small_ones_no_multiprocessor(
    device: devices.Device,
) -> None:
    for problem in layers():
        launch = triton.heuristic(problem, "forward", device)
        assert problem.channels % launch.channels == 0
        lanes = triton.grid(problem, launch, "forward")[0] * launch.lanes
        results = problem.batch * problem.channels * problem.out_height * problem.out_width
        idle = 1 - results / (lanes * launch.rows * launch.columns * launch.vector)
        assert idle < 0.36  # 7x7 in patches of 7x2, and the last program
        if problem.batch > 1:
            assert launch.rows > 1
            assert lanes >= 8 * devices.WARP * device.sms


def test_a_share_of_the_weights_gradient_is_never_empty() -> None:
    for problem in layers():
        launch = triton.heuristic(problem, "backward_weight", devices.find("H200"))
        groups = -(-triton.patches(problem, launch, "backward_weight") // launch.patches)
        steps = triton.steps(problem, launch)
        assert (launch.splits - 1) * steps < groups <= launch.splits * steps


@pytest.mark.parametrize(
    ("pass_", "change", "message"),
    [
        ("forward", {"rows": 0}, "rows=0: expected at least 1"),
        ("forward", {"columns": -1}, "columns=-1: expected at least 1"),
        ("forward", {"vector": 16}, "vector=16: expected 1, 2, 4 or 8"),
        ("forward", {"channels": 30}, "channels=30: expected a multiple of vector=4"),
        ("forward", {"num_warps": 3}, "num_warps=3: expected a power of two up to 32"),
        ("forward", {"splits": 2}, "splits=2: expected 1"),
        ("backward_input", {"rows": 3}, "rows=3: expected a multiple of the stride, 2"),
        ("backward_input", {"columns": 1}, "columns=1: expected a multiple of the stride, 2"),
        ("backward_weight", {"channels": 48}, "channels=48: expected a power of two"),
        ("backward_weight", {"channels": 1024}, "to 32·num_warps·vector=512"),
        ("backward_weight", {"splits": 0}, "splits=0: expected at least 1"),
        ("sideways", {}, "pass_='sideways': expected forward"),
    ],
    ids=str,
)
def test_wrong_launches_are_named(pass_: str, change: dict[str, int], message: str) -> None:
    problem = replace(PROBLEM, stride=(2, 2))
    with pytest.raises(ValueError, match=message):
        triton.validate(problem, replace(LAUNCH, **change), pass_)


def test_more_programs_than_a_grid_holds_are_refused() -> None:
    huge = replace(PROBLEM, batch=2**30, channels=16, height=64, width=64)
    with pytest.raises(ValueError, match="more than 2³¹"):
        triton.grid(huge, replace(LAUNCH, rows=1, columns=1, channels=16), "forward")
