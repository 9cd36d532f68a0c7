from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cvfast.launch import global_pool, pool
from cvfast.launch.global_pool import triton as global_launches
from cvfast.launch.pool import triton as launches
from cvfast.ops.pool import bytes_moved
from cvfast.perf import devices

PROBLEM = pool.Problem(8, 64, 112, 112, "max", (3, 3), (2, 2), (1, 1))


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    device=st.sampled_from(devices.DEVICES),
    dtype=st.sampled_from((torch.float16, torch.float32)),
    batch=st.integers(0, 300),
    channels=st.integers(1, 2100),
    height=st.integers(3, 300),
    width=st.integers(3, 300),
    kernel=st.integers(1, 3),
    stride=st.integers(1, 3),
)
def test_heuristics_and_candidates_can_launch_anything(
    device: devices.Device, dtype: torch.dtype, batch: int, channels: int, height: int, width: int,
    kernel: int, stride: int,
) -> None:  # fmt: skip
    problem = pool.Problem(
        batch, channels, height, width, "avg", (kernel,) * 2, (stride,) * 2, dtype=dtype
    )
    found = launches.candidates(problem, "forward", device)
    assert found[0] == launches.heuristic(problem, "forward", device)
    assert 3 < len(found) == len(set(found)) <= 32
    for launch in found:
        launches.validate(problem, launch, "forward")
        launches.grid(problem, launch, "forward")
    means = global_pool.Problem(batch, channels, height, width, dtype=dtype)
    others = global_launches.candidates(means, "forward", device)
    assert others[0] == global_launches.heuristic(means, "forward", device)
    assert 3 < len(others) == len(set(others)) <= 32
    for other in others:
        global_launches.validate(means, other, "forward")
        global_launches.grid(means, other, "forward")


def test_large_images_are_cut_into_patches_and_small_ones_spread_over_the_gpu() -> None:
    device = devices.find("H200")
    large = launches.heuristic(PROBLEM, "forward", device)
    assert (large.rows, large.columns, large.channels) == (4, 8, 64)
    small = replace(PROBLEM, batch=1, height=14, width=14)
    assert launches.grid(small, launches.heuristic(small, "forward", device), "forward") == (49,)


def test_counts_of_work() -> None:
    out = (8, 64, 56, 56)
    assert (PROBLEM.out_height, PROBLEM.out_width) == out[2:]
    assert PROBLEM.bytes() == bytes_moved((8, 64, 112, 112), out, torch.float16)
    assert PROBLEM.flops() == 9 * torch.Size(out).numel()
    assert PROBLEM.describe() == "max 3x3 at 8x64x112x112, stride 2, float16"
    means = global_pool.Problem(2, 3, 4, 5, prologue=True)
    assert (means.flops(), means.bytes()) == (120, 2 * 120 + 2 * 6 + 8 * 3)
    assert means.describe() == "mean of 2x3x4x5, behind a batch norm, float16"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rows": 3}, "rows=3: expected a power of two up to 64"),
        ({"columns": 0}, "columns=0: expected a power of two"),
        ({"channels": 2048}, "channels=2048: expected a power of two up to 1024"),
        ({"num_warps": 64}, "num_warps=64: expected a power of two up to 32"),
    ],
    ids=str,
)
def test_wrong_launches_are_named(change: dict[str, int], message: str) -> None:
    launch = replace(launches.Launch(4, 8, 64, 4), **change)
    with pytest.raises(ValueError, match=message):
        launches.validate(PROBLEM, launch, "forward")
    with pytest.raises(ValueError, match="pass_='backward'"):
        launches.validate(PROBLEM, launch, "backward")


def test_wrong_launches_of_global_pooling_are_named() -> None:
    problem = global_pool.Problem(1, 2, 3, 4)
    with pytest.raises(ValueError, match="pixels=5: expected a power of two up to 1024"):
        global_launches.validate(problem, global_launches.Launch(5, 16, 1), "forward")
    with pytest.raises(ValueError, match="pass_='backward'"):
        global_launches.validate(problem, global_launches.Launch(4, 16, 1), "backward")


def test_more_programs_than_a_grid_holds_are_refused() -> None:
    huge = replace(PROBLEM, batch=2**24, channels=16)
    with pytest.raises(ValueError, match="more than 2³¹"):
        launches.grid(huge, launches.Launch(1, 1, 16, 1), "forward")
    many = global_pool.Problem(2**31, 1, 1, 1)
    with pytest.raises(ValueError, match="more than 2³¹"):
        global_launches.grid(many, global_launches.Launch(1, 1, 1), "forward")
