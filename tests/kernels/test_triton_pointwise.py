from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from cvfast.backends import Unsupported
from cvfast.kernels import compiler
from cvfast.kernels import pointwise as kernels
from cvfast.launch.pointwise import GENERAL, Problem
from cvfast.launch.pointwise.triton import Launch, heuristic
from cvfast.ops import pointwise
from cvfast.ops.pointwise import ACTIVATIONS, KERNEL_DTYPES, example, prepack_gpu, reference
from cvfast.perf import compiled, devices
from cvfast.testing import assert_close_to_float64, guarded, image, poisoned_memory
from cvfast.tolerance import check

pytestmark = pytest.mark.gpu_kernels

SMALL = Launch(16, 16, 16, num_warps=4, num_stages=2, group=2)
LAUNCHES = {
    "heuristic": None,
    "tiles": SMALL,
    "wide": replace(SMALL, block_m=32, block_n=32, block_k=32),
    "shares": replace(SMALL, splits=3),
    "in_turn": replace(SMALL, programs=3),
    "shares_in_turn": replace(SMALL, splits=2, programs=3, group=1),
}
FLAGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "prologue": {"prologue": True},
    "gate": {"gate": True},
    "everything": {"prologue": True, "gate": True, "residual": True},
    "strided": {"stride": (2, 1), "residual": True},
}


@pytest.mark.parametrize("launch", LAUNCHES)
@pytest.mark.parametrize("flags", FLAGS)
def test_close_to_float64(flags: str, launch: str, device: str) -> None:
    # 40 pixels and 19 channels leave edges in tiles of any size; 37 channels in steps of any.
    problem = Problem(2, 37, 19, 5, 4, dtype=torch.float32, **FLAGS[flags])
    _check(problem, "relu", LAUNCHES[launch], device)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", KERNEL_DTYPES)
def test_dtypes_and_activations(dtype: torch.dtype, activation: str, device: str) -> None:
    problem = Problem(1, 24, 40, 3, 5, residual=True, dtype=dtype)
    _check(problem, activation, replace(SMALL, splits=2), device)


@pytest.mark.parametrize(
    "problem",
    [
        Problem(1, 1, 1, 1, 1),
        Problem(3, 16, 16, 1, 1),
        Problem(1, 8, 8, 1, 33),
        Problem(1, 48, 17, 7, 3, stride=(3, 2)),
        Problem(2, 130, 65, 4, 4, gate=True),
    ],
    ids=Problem.describe,
)
def test_shapes(problem: Problem, device: str) -> None:
    _check(replace(problem, dtype=torch.float32), "none", None, device)


def _check(problem: Problem, activation: str, launch: Launch | None, device: str) -> None:
    with poisoned_memory():
        case = example(problem, activation, device=device)
        (y,) = case.run("triton", launch)
    assert y.is_contiguous(memory_format=torch.channels_last)
    (expected,), (baseline,) = case.reference(torch.float64), case.reference(problem.dtype)
    verdict = check(y, expected, baseline)
    assert verdict, str(verdict)


@pytest.mark.parametrize("stride", [(1, 1), (2, 2)], ids=str)
def test_slices(stride: tuple[int, int], device: str) -> None:
    x = guarded(image((2, 24, 5, 6)).to(device))
    weight, bias = (
        image((20, 24, 1, 1), seed=1).contiguous().to(device),
        image((1, 20, 1, 1), seed=2),
    )
    bias = bias.flatten().to(device)
    size = pointwise_size(x.tensor, stride)
    residual = guarded(image((2, 20, *size), seed=3).to(device))
    out = guarded(torch.zeros(2, 20, *size, device=device))
    torch.ops.cvfast.pointwise_triton.out(
        x.tensor, *prepack_gpu(weight, bias, x.tensor.dtype), stride, None, None, None,
        residual.tensor, "relu6", out=out.tensor,
    )  # fmt: skip

    def definition(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor) -> Tensor:
        return reference(x, weight, bias, None, None, None, residual, stride, "relu6")

    assert_close_to_float64(out.tensor, definition, x.tensor, weight, bias, residual.tensor)
    out.assert_untouched()


def pointwise_size(x: Tensor, stride: tuple[int, int]) -> tuple[int, int]:
    return -(-x.shape[2] // stride[0]), -(-x.shape[3] // stride[1])


def test_every_other_pixel_of_a_destination(device: str) -> None:
    x = image((1, 16, 4, 3)).to(device)
    weight = image((8, 16, 1, 1), seed=1).contiguous().to(device)
    whole = torch.full((1, 8, 8, 6), 7.0, device=device).to(memory_format=torch.channels_last)
    torch.ops.cvfast.pointwise_triton.out(
        x, *prepack_gpu(weight, None, x.dtype), (1, 1), None, None, None, None, "none",
        out=whole[:, :, 1::2, ::2],
    )  # fmt: skip
    assert_close_to_float64(whole[:, :, 1::2, ::2], reference, x, weight)
    assert (whole[:, :, ::2] == 7).all() and (whole[:, :, :, 1::2] == 7).all()


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_nan_passes(activation: str, device: str) -> None:
    x = image((1, 16, 2, 2)).to(device)
    x[0, 3, 1, 1] = float("nan")
    weight = image((16, 16, 1, 1), seed=1).contiguous().to(device)
    y = pointwise(x, weight, activation=activation, backend="triton")
    assert y[0, :, 1, 1].isnan().all() and not y[0, :, 0].isnan().any()


def test_shares_add_up_to_the_same_bits_every_time(device: str) -> None:
    problem = Problem(1, 200, 16, 3, 3, dtype=torch.float32)
    case = example(problem, "none", device=device)
    (first,), (second,) = (case.run("triton", replace(SMALL, splits=4)) for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.slow
def test_offsets_beyond_two_to_the_31(device: str) -> None:
    # Two images 2^31 + 64 elements apart; on the CPU, only the pages touched take memory.
    distance = 2**31 + 64
    values = image((2, 8, 4, 4), torch.float16).to(device)
    packed = prepack_gpu(image((8, 8, 1, 1), torch.float16, seed=1).to(device), None, values.dtype)
    far = [
        torch.empty(distance + 8 * 4 * 4, dtype=torch.float16, device=device).as_strided(
            values.shape, (distance, 1, 32, 8)
        )
        for _ in range(3)
    ]
    for view in far:
        view.copy_(values)
    x, residual, out = far
    rest = ((1, 1), None, None, None)
    torch.ops.cvfast.pointwise_triton.out(x, *packed, *rest, residual, "relu", out=out)
    near = torch.ops.cvfast.pointwise_triton(values, *packed, 8, *rest, values, "relu")
    assert torch.equal(out, near)


def test_a_column_of_pixels_and_single_pixels_of_wider_images(device: str) -> None:
    for size in ((4, 1), (1, 1)):
        x = guarded(image((3, 16, *size)).to(device))
        weight = image((16, 16, 1, 1), seed=1).contiguous().to(device)
        y = pointwise(x.tensor, weight, backend="triton")
        assert_close_to_float64(y, reference, x.tensor, weight)


def test_no_image_is_no_work(device: str) -> None:
    x = torch.empty(0, 8, 4, 4, device=device).to(memory_format=torch.channels_last)
    y = pointwise(x, torch.zeros(8, 8, 1, 1, device=device), backend="triton")
    assert y.shape == (0, 8, 4, 4)


def test_gradient_is_pytorchs(device: str) -> None:
    x, weight = image((2, 6, 3, 4)).to(device), image((5, 6, 1, 1), seed=1).contiguous().to(device)
    inputs = [t.detach().requires_grad_() for t in (x, weight)]
    grads = torch.autograd.grad(
        pointwise(*inputs, activation="relu", backend="triton").sum(), inputs
    )
    expected = torch.autograd.grad(reference(*inputs, activation="relu").sum(), inputs)
    for grad, truth in zip(grads, expected, strict=True):
        torch.testing.assert_close(grad, truth)


def test_contiguous_images_are_refused_by_name(device: str) -> None:
    x, weight = torch.zeros(1, 4, 3, 3, device=device), torch.zeros(4, 4, 1, 1, device=device)
    with pytest.raises(Unsupported, match="x is not channels-last"):
        pointwise(x, weight, backend="triton")


def _bad_calls() -> Iterator[tuple[str, dict[str, Any]]]:
    yield "weight is torch.float32", {"weight": torch.zeros(8, 8)}
    yield "bias is torch.float16", {"bias": torch.zeros(16, dtype=torch.float16)}
    yield "residual is", {"residual": torch.zeros(1, 8, 4, 4)}
    yield "residual's channels are not adjacent", {"residual": torch.zeros(1, 8, 3, 3)}
    yield "scale is", {"scale": torch.zeros(7), "shift": torch.zeros(8)}
    yield "scale and shift come together", {"scale": torch.zeros(8)}
    yield "gate is", {"gate": torch.zeros(2, 8)}


@pytest.mark.parametrize(("message", "change"), [*_bad_calls()], ids=lambda v: str(v)[:30])
def test_bad_operands_are_named(message: str, change: dict[str, Any], device: str) -> None:
    x = image((1, 8, 3, 3)).to(device)
    weight, bias = prepack_gpu(torch.zeros(8, 8, 1, 1), None, x.dtype)
    arguments: dict[str, Any] = {
        "x": x, "weight": weight.to(device), "bias": bias.to(device), "stride": (1, 1),
        "scale": None, "shift": None, "gate": None, "residual": None, "activation": "none",
    }  # fmt: skip
    arguments |= {n: v.to(device) for n, v in change.items()}
    with pytest.raises(ValueError, match=message):
        torch.ops.cvfast.pointwise_triton.out(**arguments, out=torch.empty_like(x))


@pytest.mark.parametrize("backend", ["triton"])
def test_opcheck(backend: str, device: str) -> None:
    x = image((1, 8, 3, 3)).to(device)
    weight = image((8, 8, 1, 1), seed=1).contiguous().to(device)
    torch.library.opcheck(
        torch.ops.cvfast.pointwise.default,
        (x, weight, None, None, None, None, None, (1, 1), "relu", backend),
    )
    packed = prepack_gpu(weight, None, x.dtype)
    rest = ((1, 1), None, None, None, None, "none")
    torch.library.opcheck(
        torch.ops.cvfast.pointwise_triton.default, (x, *packed, 8, *rest),
        test_utils=("test_schema", "test_faketensor"),
    )  # fmt: skip


@pytest.mark.parametrize("arch", devices.ARCHITECTURES)
def test_compiled_code(arch: str) -> None:
    architecture = devices.architecture(arch)
    major, minor = architecture.capability
    network = (
        (Problem(1, 2048, 512, 7, 7), "relu"),
        (Problem(256, 64, 1, 256, 256), "none"),
        (Problem(256, 64, 256, 56, 56, residual=True), "relu"),
        (Problem(1, 1024, 128, 14, 14, prologue=True), "relu"),
        (Problem(256, 96, 24, 56, 56, dtype=torch.float32, tf32=True), "none"),
    )
    for problem, activation in (*network, *GENERAL[:4]):
        launch = heuristic(problem, "forward", devices.by_arch(arch))
        kernel = compiler.compiled(
            *kernels.source(problem, launch, "forward", activation), 10 * major + minor
        )
        (binary,) = compiled.read(kernel.asm["cubin"])
        census = binary.census()
        assert binary.local_bytes == 0, problem.describe()
        assert kernel.metadata.shared <= architecture.shared_per_block, problem.describe()
        assert {"HMMA", "HGMMA", "UTCHMMA"} & census.keys(), problem.describe()
        if problem.channels % 8 == 0 and problem.dtype != torch.float32:
            assert "LDGSTS.128" in census and "LDG.16" not in census, problem.describe()
        if problem.out_channels % 8 == 0:
            assert "STG.16" not in census, problem.describe()
