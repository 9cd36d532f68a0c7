"""Launch parameters of the convolution and the transposed one, which share a model of tiles."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cvfast.launch import calls, conv, tiles, upconv
from cvfast.launch.conv import triton
from cvfast.launch.upconv import triton as up
from cvfast.perf import devices

PROBLEM = conv.Problem(1, 512, 7, 7, 512, (3, 3), padding=(1, 1))
LARGE = replace(PROBLEM, batch=256)
LAUNCH = tiles.Launch(64, 64, 32)
EVERY_DEVICE = pytest.mark.parametrize("device", devices.DEVICES, ids=lambda device: device.name)


@EVERY_DEVICE
@pytest.mark.parametrize("op", ["conv", "upconv"])
def test_candidates_fit_the_device_and_begin_with_the_heuristic(
    op: str, device: devices.Device
) -> None:
    module = {"conv": triton, "upconv": up}[op]
    for call in calls.network_calls([op])[::7]:
        found = module.candidates(call.problem, "forward", device)
        assert found[0] == module.heuristic(call.problem, "forward", device)
        assert 3 < len(found) == len(set(found)) <= 32
        for launch in found:
            module.validate(call.problem, launch, "forward")
            assert module.grid(call.problem, launch, "forward")[0] >= 1
            operands = (launch.block_m + launch.block_n) * launch.block_k
            used = operands * call.problem.dtype.itemsize * launch.num_stages
            assert used <= device.architecture.shared_per_block


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    device=st.sampled_from(devices.DEVICES),
    problem=st.builds(
        conv.Problem,
        batch=st.integers(0, 300),
        channels=st.integers(1, 2000),
        height=st.integers(1, 300),
        width=st.integers(1, 300),
        out_channels=st.integers(1, 2000),
        kernel=st.tuples(st.integers(1, 7), st.integers(1, 7)),
        padding=st.just((6, 6)),
        channels2=st.sampled_from((0, 0, 13, 512)),
        dtype=st.sampled_from((torch.float16, torch.float32)),
        tf32=st.booleans(),
    ),
)
def test_the_heuristic_can_launch_anything(problem: conv.Problem, device: devices.Device) -> None:
    launch = triton.heuristic(problem, "forward", device)
    triton.validate(problem, launch, "forward")
    triton.grid(problem, launch, "forward")
    shared = triton.steps(problem, launch) * launch.splits
    assert shared >= triton.product(problem).steps(launch.block_k)


@EVERY_DEVICE
def test_small_images_are_shared_out_and_large_batches_are_not(device: devices.Device) -> None:
    launch = triton.heuristic(PROBLEM, "forward", device)
    assert launch.splits > 1
    assert triton.grid(PROBLEM, launch, "forward")[0] > device.sms // 3
    launch = triton.heuristic(LARGE, "forward", device)
    assert launch.splits == 1
    assert launch.block_m * launch.block_n >= 64 * 64


@EVERY_DEVICE
def test_the_heuristic_wastes_few_columns(device: devices.Device) -> None:
    for op, module in (("conv", triton), ("upconv", up)):
        for call in calls.network_calls([op]):
            launch = module.heuristic(call.problem, "forward", device)
            product = module.product(call.problem)
            columns = -(-product.columns // launch.block_n) * launch.block_n
            assert columns <= 1.5 * product.columns


def test_the_model_never_promises_more_than_the_hardware() -> None:
    for name in ("H200", "4090"):
        device = devices.find(name)
        for call in calls.network_calls(["conv"], [256]):
            if call.problem.dtype != torch.float16:
                continue
            product = triton.product(call.problem)
            launch = triton.heuristic(call.problem, "forward", device)
            seconds = tiles.cycles(product, launch, device) / device.clock_hz
            rate = tiles._MATRIX_FLOPS[device.architecture.capability]
            assert seconds > call.problem.flops() / (rate * device.sms * device.clock_hz)


def test_shares_of_the_transposed_convolution_are_refused() -> None:
    problem = upconv.Problem(1, 1024, 16, 16, 512, (2, 2))
    with pytest.raises(ValueError, match="splits=2: expected 1"):
        up.validate(problem, replace(LAUNCH, splits=2), "forward")
    assert up.grid(problem, LAUNCH, "forward") == (4 * 8 * 4,)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"block_m": 8}, "block_m=8: expected a power of two from 16 to 256"),
        ({"block_n": 48}, "block_n=48: expected a power of two from 16 to 256"),
        ({"block_k": 256}, "block_k=256: expected a power of two from 16 to 128"),
        ({"num_warps": 3}, "num_warps=3: expected 1, 2 or 4"),
        ({"num_warps": 8}, "num_warps=8: expected 1, 2 or 4"),
        ({"num_stages": 0}, "num_stages=0: expected 1 to 8"),
        ({"splits": 0}, "splits=0: expected 1 to the 144 steps"),
        ({"splits": 145}, "splits=145: expected 1 to the 144 steps"),
    ],
    ids=str,
)
def test_wrong_launches_are_named(change: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        triton.validate(PROBLEM, replace(LAUNCH, **change), "forward")


def test_other_passes_are_refused() -> None:
    for module, problem in ((triton, PROBLEM), (up, upconv.Problem(1, 16, 2, 2, 16, (2, 2)))):
        with pytest.raises(ValueError, match="pass_='backward'"):
            module.validate(problem, LAUNCH, "backward")


def test_more_pixels_than_32_bits_count_are_refused() -> None:
    huge = replace(PROBLEM, batch=2**20, height=64, width=64)
    with pytest.raises(ValueError, match="call it on parts of the batch"):
        triton.grid(huge, LAUNCH, "forward")


def test_problems_describe_themselves() -> None:
    problem = conv.Problem(1, 64, 8, 9, 32, (3, 1), (2, 2), (1, 0), (1, 2), 16, residual=True)
    assert problem.describe() == (
        "64+16-32 3x1 at 1x8x9, stride 2, dilation 1x2, residual, float16"
    )
    assert (problem.out_height, problem.out_width) == (4, 5)
    assert replace(problem, padding=(0, 0, 1, 0)).out_height == 4
    single = replace(PROBLEM, dtype=torch.float32, tf32=True)
    assert single.describe() == "512-512 3x3 at 1x7x7, tf32"
    assert upconv.Problem(1, 8, 2, 3, 4, (2, 1)).describe() == "8-4 2x1 at 1x2x3, float16"
