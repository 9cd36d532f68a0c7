from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from cvfast.launch.pointwise import GENERAL, Problem
from cvfast.launch.pointwise.triton import (
    Launch,
    align,
    candidates,
    grid,
    heuristic,
    shared_bytes,
    steps,
    tiles,
    validate,
)
from cvfast.perf.devices import ARCHITECTURES, by_arch

PROBLEMS = [
    Problem(1, 64, 256, 56, 56),
    Problem(256, 64, 256, 56, 56),
    Problem(1, 2048, 512, 7, 7),
    Problem(1, 1024, 128, 14, 14, prologue=True),
    Problem(256, 144, 24, 56, 56, residual=True),
    Problem(1, 960, 160, 7, 7, gate=True),
    Problem(1, 1280, 1000, 1, 1),
    *(problem for problem, _ in GENERAL),
]


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("problem", PROBLEMS, ids=Problem.describe)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_heuristic_can_be_launched(problem: Problem, dtype: torch.dtype, arch: str) -> None:
    problem, device = replace(problem, dtype=dtype), by_arch(arch)
    launch = heuristic(problem, "forward", device)
    validate(problem, launch)
    assert shared_bytes(problem, launch) <= device.architecture.shared_per_block
    summed = steps(problem, launch) * launch.block_k * launch.splits
    assert summed >= problem.channels
    assert grid(problem, launch)[0] >= 1


def test_small_images_are_shared_out() -> None:
    device = by_arch("sm_90")
    problem = Problem(1, 2048, 512, 7, 7)
    launch = heuristic(problem, "forward", device)
    assert launch.splits > 1
    assert device.sms // 2 <= tiles(problem, launch) <= device.sms


def test_large_images_are_not() -> None:
    launch = heuristic(Problem(256, 64, 256, 56, 56), "forward", by_arch("sm_90"))
    assert (launch.splits, launch.block_m, launch.block_n) == (1, 128, 128)


@pytest.mark.parametrize(
    ("channels", "width"), [(24, 32), (32, 32), (96, 32), (160, 32), (256, 128), (8, 16)]
)
def test_width_wastes_few_columns(channels: int, width: int) -> None:
    launch = heuristic(Problem(256, 64, channels, 56, 56), "forward", by_arch("sm_90"))
    assert launch.block_n == width


@pytest.mark.parametrize("problem", PROBLEMS[:4], ids=Problem.describe)
def test_candidates(problem: Problem) -> None:
    device = by_arch("sm_89")
    found = candidates(problem, "forward", device, limit=20)
    assert found[0] == heuristic(problem, "forward", device)
    assert 8 <= len(found) == len(set(found)) <= 20
    for launch in found:
        validate(problem, launch)
        assert shared_bytes(problem, launch) <= device.architecture.shared_per_block


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"block_m": 24}, "block_m=24: expected one of 16"),
        ({"block_k": 8}, "block_k=8"),
        ({"num_warps": 3}, "num_warps=3: expected a power of two"),
        ({"num_stages": 0}, "num_stages=0: expected at least 1"),
        ({"splits": 5}, "splits=5: expected from 1 to 4"),
        ({"programs": -1}, "programs=-1: expected at least 0"),
    ],
)
def test_bad_launches_are_named(change: dict[str, int], message: str) -> None:
    launch = replace(Launch(16, 16, 16, num_warps=4, num_stages=2), **change)
    with pytest.raises(ValueError, match=message):
        validate(Problem(1, 64, 64, 7, 7), launch)


def test_other_passes_are_refused() -> None:
    with pytest.raises(ValueError, match="pass_='backward'"):
        validate(Problem(1, 64, 64, 7, 7), Launch(16, 16, 16, 4, 2), "backward")


def test_too_many_pixels_are_refused() -> None:
    with pytest.raises(ValueError, match="too many for one call"):
        grid(Problem(1 << 17, 16, 16, 128, 128), Launch(16, 16, 16, 4, 2))


def test_alignment_follows_what_everything_is_a_multiple_of() -> None:
    assert align(torch.float16, 64) == 8
    assert align(torch.float16, 64, 24, 100) == 4
    assert align(torch.float32, 64) == 4
    assert align(torch.float16, 37) == 1
