"""The Triton kernels elementwise and copy_layout: values, layouts, slices, and what is refused."""

from __future__ import annotations

import importlib
import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from cvfast import tolerance
from cvfast.kernels import compiler, copy_layout
from cvfast.kernels import elementwise as kernels
from cvfast.launch import copy_layout as copies
from cvfast.launch import elementwise as launches
from cvfast.launch import table, tile2d
from cvfast.launch.tile2d import Launch
from cvfast.perf import devices
from cvfast.testing import image

elementwise = importlib.import_module("cvfast.ops.elementwise")
layout = importlib.import_module("cvfast.ops.layout")
ops = torch.ops.cvfast
pytestmark = pytest.mark.gpu_kernels

ACTIVATIONS = elementwise.ACTIVATIONS
DTYPES = elementwise.KERNEL_DTYPES
SHAPES = [(1, 1, 1, 1), (2, 13, 5, 9), (3, 16, 1, 1), (1, 40, 7, 3), (2, 8, 1, 6), (2, 24, 6, 1)]


def vectors(channels: int, device: str) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(7)
    scale = torch.rand(channels, generator=generator) + 0.5
    return scale.to(device), torch.randn(channels, generator=generator).to(device)


def check(out: Tensor, *arguments: Any) -> None:
    double = [a.double() if isinstance(a, Tensor) else a for a in arguments]
    truth, eager = elementwise.reference(*double), elementwise.reference(*arguments)
    verdict = tolerance.check(out, truth, eager)
    assert verdict.ok, verdict.message


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("op", ["none", "add", "mul"])
@pytest.mark.parametrize("affine", [False, True])
def test_elementwise_triton_computes_every_combination(
    device: str, shape: tuple[int, ...], op: str, affine: bool
) -> None:
    n, c, h, w = shape
    scale, shift = vectors(c, device) if affine else (None, None)
    x = image(shape, seed=1).to(device)
    others: list[Tensor | None] = [None]
    if op != "none":
        broadcast = [(n, c, h, w), (n, c, 1, 1), (1, c, h, w), (1, c, 1, 1)]
        others = [image(size, seed=2).to(device) for size in broadcast]
    for y in others:
        arguments = (x, y, op, "relu", scale, shift)
        check(ops.elementwise_triton(*arguments), *arguments)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_elementwise_triton_activations_pass_nan(
    device: str, activation: str, dtype: torch.dtype
) -> None:
    x = (4 * image((1, 20, 3, 5))).to(device=device, dtype=dtype)
    check(ops.elementwise_triton(x, None, "none", activation), x, None, "none", activation)
    special = torch.tensor([float("nan"), 0.0, 1e4, -1e4, float("inf")], device=device, dtype=dtype)
    special = special.reshape(1, 5, 1, 1)
    torch.testing.assert_close(
        ops.elementwise_triton(special, None, "none", activation),
        elementwise.reference(special, None, "none", activation),
        equal_nan=True,
    )


def slice_of(wide: Tensor, channels: int, offset: int) -> Tensor:
    return wide[:, offset : offset + channels, 1:-1, 2:-1]


@pytest.mark.parametrize("offset", [0, 3, 8])
@pytest.mark.parametrize("channels", [5, 16])
def test_elementwise_triton_reads_and_writes_slices_only(
    device: str, channels: int, offset: int
) -> None:
    shape = (2, channels + 16, 6, 8)
    x, y = (slice_of(image(shape, seed=s).to(device), channels, offset) for s in (3, 4))
    canvas = torch.full_like(image(shape), float("nan")).to(device)
    out = slice_of(canvas, channels, 8)
    ops.elementwise_triton.out(x, y, "add", "none", out=out)
    check(out, x, y, "add", "none")
    out.fill_(float("nan"))
    assert canvas.isnan().all()


def test_elementwise_triton_may_overwrite_what_it_reads(device: str) -> None:
    x, y = (image((2, 12, 4, 5), seed=s).to(device) for s in (5, 6))
    expected = elementwise.reference(x, y, "mul", "relu6")
    for out in (x, y):
        a, b = x.clone(), y.clone()
        target = a if out is x else b
        ops.elementwise_triton.out(a, b, "mul", "relu6", out=target)
        torch.testing.assert_close(target, expected)


def test_elementwise_triton_batch_of_none(device: str) -> None:
    x = torch.empty(0, 8, 3, 3, device=device).contiguous(memory_format=torch.channels_last)
    assert ops.elementwise_triton(x, x, "add", "none").shape == x.shape


@pytest.mark.parametrize(
    "launch", [Launch(1, 1, 1), Launch(4, 16, 1), Launch(64, 8, 2), Launch(2, 64, 4)]
)
def test_elementwise_triton_any_tile_gives_the_same(device: str, launch: Launch) -> None:
    for problem, activation in launches.GENERAL[:2]:
        example = elementwise.example(problem, activation, device=device)
        small = [
            None if t is None else t[..., :5, :5] if t.dim() == 4 else t for t in example.inputs
        ]
        x, y, scale, shift = small
        rest = (None if v is None else v.float() for v in (scale, shift))
        arguments = (x, y, problem.op, activation, *rest)
        out = torch.empty_like(x)
        elementwise._run(*arguments, out=out, launch=launch)
        assert torch.equal(out, ops.elementwise_triton(*arguments))


def test_elementwise_triton_refuses_by_name(device: str) -> None:
    x = image((1, 8, 3, 3)).to(device)
    scale, shift = vectors(8, device)
    for arguments, message in (
        ((x, None, "add", "none"), "op='add' with no y"),
        ((x, x, "none", "none"), "op='none' with y"),
        ((x, x, "sub", "none"), "op='sub'"),
        ((x, None, "none", "elu"), "unknown activation 'elu'"),
        ((x.double(), None, "none", "none"), "x is torch.float64"),
        ((x[0], None, "none", "none"), "expected float32"),
        ((x, x[:, :4], "add", "none"), r"y is torch.float32 \[1, 4, 3, 3\]"),
        ((x, x.half(), "add", "none"), "y is torch.float16"),
        ((x.contiguous(), None, "none", "none"), "x is not channels-last"),
        ((x, None, "none", "none", scale, None), "come together"),
        ((x, None, "none", "none", scale[:4], shift), r"scale is torch.float32 \[4\]"),
        ((x, None, "none", "none", scale, shift.half()), "shift is torch.float16"),
    ):
        with pytest.raises(ValueError, match=message):
            ops.elementwise_triton(*arguments)
    with pytest.raises(ValueError, match=r"out is torch.float32 \[1, 4, 3, 3\]"):
        ops.elementwise_triton.out(x, None, "none", "none", out=x[:, :4])


@pytest.mark.parametrize("dtype", DTYPES)
def test_copy_layout_triton_between_all_layouts(device: str, dtype: torch.dtype) -> None:
    kinds = ("channels", "pixels", "neither")
    for shape, source, target in itertools.product(SHAPES[1:4], kinds, kinds):
        values = image(shape, seed=8).to(device=device, dtype=dtype)
        x = layout._laid_out(values, source)
        out = layout._laid_out(torch.full_like(values, float("nan")), target)
        ops.copy_layout_triton.out(x, out=out)
        assert torch.equal(out, values)


def test_copy_layout_triton_writes_the_slice_only(device: str) -> None:
    canvas = torch.full_like(image((2, 20, 5, 7)), float("nan")).to(device)
    x = image((2, 4, 3, 4)).to(device).contiguous()
    ops.copy_layout_triton.out(x, out=slice_of(canvas, 4, 9))
    assert torch.equal(slice_of(canvas, 4, 9), x)
    slice_of(canvas, 4, 9).fill_(float("nan"))
    assert canvas.isnan().all()


def test_copy_layout_triton_takes_no_pixels_of_a_broadcast_for_neighbours(device: str) -> None:
    one = torch.randn(2, 6, 1, 1, device=device)
    out = torch.empty(2, 6, 3, 5, device=device)
    ops.copy_layout_triton.out(one.expand(out.shape), out=out)
    assert torch.equal(out, one.expand(out.shape))


def test_copy_layout_triton_refuses_by_name(device: str) -> None:
    x = image((1, 8, 3, 3)).to(device)
    for out in (x[:, :4], x.half(), x[0]):
        with pytest.raises(ValueError, match="expected the same for both"):
            ops.copy_layout_triton.out(x, out=out)


@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_120"])
def test_elementwise_and_copy_layout_triton_compile_to_wide_accesses(arch: str) -> None:
    device = devices.by_arch(arch)
    for op, kernel, calls in (
        ("elementwise", kernels, launches.GENERAL),
        ("copy_layout", copy_layout, copies.GENERAL),
    ):
        for problem, activation in calls:
            launch = table.parameters(op, "triton").heuristic(problem, "forward", device)
            source, options = kernel.source(problem, launch, "forward", activation)
            ptx = compiler.compiled(source, options, int(arch.removeprefix("sm_"))).asm["ptx"]
            assert "ld.local" not in ptx
            if op == "elementwise" and problem.channels % 8 == 0:
                assert "ld.global.v4.b32" in ptx
                assert "st.global.v4.b32" in ptx


def test_elementwise_and_copy_layout_launches_are_checked_and_cover_the_image() -> None:
    for op, calls in (("elementwise", launches.GENERAL), ("copy_layout", copies.GENERAL)):
        module = table.parameters(op, "triton")
        for (problem, _), device in itertools.product(calls, devices.DEVICES):
            found = module.candidates(problem, "forward", device)
            assert found[0] == module.heuristic(problem, "forward", device)
            assert len(found) == len(set(found)) <= 32
            for launch in found:
                module.validate(problem, launch, "forward")
                (programs,) = module.grid(problem, launch, "forward")
                assert (
                    programs * launch.pixels * launch.channels >= problem.pixels * problem.channels
                )
        with pytest.raises(ValueError, match="channels=3: expected a power of two"):
            module.validate(problem, Launch(4, 3, 1), "forward")
        with pytest.raises(ValueError, match="pass_='backward'"):
            module.validate(problem, Launch(4, 4, 1), "backward")
    huge = copies.Problem(1, 1, 1 << 16, 1 << 15)
    with pytest.raises(ValueError, match="split the batch"):
        tile2d.grid("copy_layout", huge, Launch(64, 1, 1), "forward")
