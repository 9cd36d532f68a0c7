from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from cvfast import tolerance
from cvfast.backends import Unsupported
from cvfast.kernels import compiler
from cvfast.kernels import upconv as kernels
from cvfast.launch.upconv import Problem
from cvfast.launch.upconv.triton import Launch, heuristic
from cvfast.ops import upconv
from cvfast.perf import compiled, devices
from cvfast.testing import assert_close_to_float64, guarded, image, poisoned_memory

pytestmark = pytest.mark.gpu_kernels

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
BASE = Problem(2, 20, 3, 5, 24, (2, 2), torch.float32)
TILE = Launch(16, 16, 16)


@pytest.mark.parametrize(
    ("problem", "launch"),
    [
        (BASE, TILE),
        (BASE, None),
        (replace(BASE, channels=32), Launch(32, 32, 32)),
        (replace(BASE, channels=1, out_channels=1), TILE),
        (replace(BASE, channels=19, out_channels=37), TILE),
        (replace(BASE, kernel=(3, 1)), TILE),
        (replace(BASE, kernel=(1, 4), height=1), TILE),
        (replace(BASE, height=1, width=1), TILE),
        *((replace(BASE, dtype=dtype), TILE) for dtype in DTYPES[1:]),
    ],
    ids=str,
)
def test_matches_float64(problem: Problem, launch: Launch | None, device: str) -> None:
    one = upconv.example(problem, device=device)
    with poisoned_memory():
        (y,) = one.run("triton", launch)
    assert y.is_contiguous(memory_format=torch.channels_last)
    with torch.backends.mkldnn.flags(enabled=False):
        (expected,), (baseline,) = (one.reference(dtype) for dtype in (torch.float64, y.dtype))
    verdict = tolerance.check(y, expected, baseline)
    assert verdict, str(verdict)


def test_slices_are_read_and_written_within_their_borders(device: str) -> None:
    x = guarded(image((2, 20, 3, 4)).to(device))
    weight = image((20, 9, 2, 2), seed=1).to(device)
    bias = image((1, 9, 1, 1), seed=2).reshape(9).to(device)
    out = guarded(torch.full((2, 9, 6, 8), float("nan"), device=device), canary=7.0)
    packed = upconv.prepack_gpu(weight, bias, x.tensor.dtype)
    torch.ops.cvfast.upconv_triton.out(x.tensor, *packed, (2, 2), out=out.tensor)
    out.assert_untouched()
    assert_close_to_float64(out.tensor, upconv.reference, x.tensor, weight, bias)


def test_nan_and_infinity_stay_in_their_pixels(device: str) -> None:
    x = image((1, 20, 3, 4), kind="nonfinite").to(device)
    weight = image((20, 9, 2, 2), seed=1).to(device)
    y = upconv.upconv(x, weight, backend="triton")
    assert_close_to_float64(y, upconv.reference, x, weight)


def test_public_function(device: str) -> None:
    x, weight = image((1, 20, 3, 4)).to(device), image((20, 9, 2, 3), seed=1).to(device)
    expected = upconv.reference(x, weight)
    assert upconv.upconv(x, weight, backend="triton").shape == expected.shape
    assert torch.equal(upconv.upconv(x, weight, backend="reference"), expected)
    # Only the reference has a gradient.
    weight.requires_grad_()
    upconv.upconv(x, weight).sum().backward()
    assert weight.grad is not None
    with pytest.raises(RuntimeError, match="has no gradient"):
        torch.ops.cvfast.upconv_triton(
            x.clone().requires_grad_(), *upconv.prepack_gpu(weight, None, x.dtype), (2, 3), 9
        )


def test_batch_zero(device: str) -> None:
    weight = image((20, 9, 2, 2)).to(device)
    y = upconv.upconv(image((0, 20, 3, 4)).to(device), weight, backend="triton")
    assert y.shape == (0, 9, 6, 8)


@pytest.mark.slow
def test_offsets_beyond_two_to_the_31(device: str) -> None:
    # Two images 2^31 + 64 elements apart; on the CPU, only the pages touched take memory.
    distance = 2**31 + 64
    x = image((2, 16, 2, 2), torch.float16).to(device)
    weight = image((16, 16, 2, 2), torch.float16, seed=1).to(device)
    expected = upconv.upconv(x, weight, backend="triton")
    buffer = torch.empty(distance + 16 * 4 * 4, dtype=torch.float16, device=device)
    out = buffer.as_strided((2, 16, 4, 4), (distance, 1, 64, 16))
    packed = upconv.prepack_gpu(weight, None, x.dtype)
    torch.ops.cvfast.upconv_triton.out(x, *packed, (2, 2), out=out)
    assert torch.equal(out, expected)


def test_operator(device: str) -> None:
    x = image((1, 20, 3, 4)).to(device)
    weight, bias = upconv.prepack_gpu(image((20, 9, 2, 2), seed=1).to(device), None, x.dtype)
    torch.library.opcheck(torch.ops.cvfast.upconv_triton.default, (x, weight, bias, (2, 2), 9))
    y = torch.ops.cvfast.upconv_triton(x, weight, None, (2, 2), 9)
    fake = torch.ops.cvfast.upconv_triton(x.to("meta"), weight.to("meta"), None, (2, 2), 9)
    assert (fake.shape, fake.stride()) == (y.shape, y.stride())


def test_an_example_counts_its_work() -> None:
    problem = replace(BASE, out_channels=32)
    x, out = (2, 20, 3, 5), (2, 32, 6, 10)
    assert problem.flops() == upconv.flops(x, out)
    assert problem.bytes() == upconv.bytes_moved(x, (20, 32, 2, 2), out, 4) + 4 * 32


def layout(*shape: int) -> Tensor:
    return torch.zeros(shape).contiguous(memory_format=torch.channels_last)


def test_wrong_arguments_are_named(device: str) -> None:
    x, weight = layout(1, 20, 3, 4).to(device), torch.zeros(20, 9, 2, 2, device=device)
    for change, error, message in (
        ({"x": torch.zeros(20, 3, 4, device=device)}, ValueError, r"x has shape \(20, 3, 4\)"),
        ({"weight": weight[:19]}, ValueError, r"expected \[20, K, R, S\]"),
        ({"bias": torch.zeros(8, device=device)}, ValueError, r"bias has shape \(8,\)"),
        ({"weight": weight.half()}, TypeError, "weight is torch.float16 but x is torch.float32"),
        ({"x": torch.zeros(1, 20, 3, 4, device=device)}, Unsupported, "not channels-last"),
    ):
        arguments = {"x": x, "weight": weight, **change}
        with pytest.raises(error, match=message):
            upconv.upconv(**arguments, backend="triton")
    packed = upconv.prepack_gpu(weight, None, x.dtype)
    call = torch.ops.cvfast.upconv_triton.out
    for arguments, out, error, message in (
        ((x, *packed), layout(1, 9, 6, 7), ValueError, "out has shape"),
        ((x, *packed), torch.zeros(1, 9, 6, 8), ValueError, "out is not channels-last"),
        ((x, *packed), layout(1, 9, 6, 8).half(), TypeError, "out is torch.float16"),
        ((x, packed[0][:3], packed[1]), layout(1, 9, 6, 8), ValueError, "upconv.prepack_gpu"),
        ((x, packed[0], packed[1][:9]), layout(1, 9, 6, 8), ValueError, "the packed bias is"),
    ):
        with pytest.raises(error, match=message):
            call(*arguments, (2, 2), out=out.to(device))
    with pytest.raises(ValueError, match="activation='relu'"):
        upconv.example(BASE, "relu", device=device)
    with pytest.raises(ValueError, match="activation='relu'"):
        kernels.source(BASE, TILE, activation="relu")


@pytest.mark.parametrize("arch", devices.ARCHITECTURES)
def test_compiled_code(arch: str) -> None:
    device = devices.by_arch(arch)
    for problem in (
        Problem(1, 1024, 16, 16, 512, (2, 2)),
        Problem(64, 128, 128, 128, 64, (2, 2), torch.bfloat16),
    ):
        launch = heuristic(problem, "forward", device)
        kernel = compiler.compiled(*kernels.source(problem, launch), int(arch.removeprefix("sm_")))
        (binary,) = compiled.read(kernel.asm["cubin"])
        assert binary.local_bytes == 0
        assert kernel.metadata.shared <= device.architecture.shared_per_block
        census = binary.census()
        assert any(name.endswith("GMMA" if arch == "sm_90" else "MMA") for name in census)
        assert census["LDGSTS.128"] > 0 and census["STG.128"] > 0
