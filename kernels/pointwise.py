"""Pointwise (1x1) convolution in Triton: a matrix product over the pixels of all images.

    out = activation(x' @ weight + bias + residual),  x' = gate * relu(scale * x + shift)

A program computes a tile of BLOCK_M pixels by BLOCK_N output channels. It walks over the input
channels BLOCK_K at a time; what stands before the product in a network (DenseNet's batch norm and
ReLU, squeeze-excite's gate) is done to the tile of x between its load and the product, what stands
behind it (bias, residual, activation) to the sums before they are stored, so that each image is
read once and written once. Programs take tiles until none is left: as many programs as the GPU
holds at a time, or one for each tile.

Where the tiles are fewer than the GPU's SMs, the channels are cut into SPLITS shares: each program
leaves its sums in a workspace, and a second kernel adds them in a fixed order, so that the result
is the same, bit for bit, at every run.

Weights come packed by `cvfast.ops.pointwise.prepack_gpu`: [C, N16], rows of output channels padded
to a multiple of 16. Channels and strides of x and the gate come in units of SOURCE_ALIGN elements,
those of residual and out in units of ALIGN, those of the weights in units of 16: products with a
constant tell the compiler how wide loads and stores may be. The stride of the convolution is in
those of x.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
import triton.language as tl
from torch import Tensor
from triton.compiler import ASTSource

from cvfast.launch.pointwise import Problem
from cvfast.launch.pointwise import triton as launches
from cvfast.launch.pointwise.triton import Launch

from . import compiler, matmul, plan, shares
from .jit import jit, kernel


@jit
def _sums(
    x, weight, scale, shift, gate, inside, columns, begin, end, channels, weight_stride,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    PROLOGUE: tl.constexpr, GATE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """x' @ weight of a tile over the channels from `begin` to `end`; x and gate point to the first
    channel of each pixel."""
    sums = tl.full((BLOCK_M, BLOCK_N), 0.0, tl.float32)
    for first in range(begin, end, BLOCK_K):
        k = first + tl.arange(0, BLOCK_K)
        within = k < channels
        mask = inside[:, None] & within[None, :]
        a = tl.load(x[:, None] + k[None, :], mask=mask, other=0.0)
        if PROLOGUE:
            a = matmul.normalize(a, scale, shift, k, within)
        if GATE:
            factor = tl.load(gate[:, None] + k[None, :], mask=mask, other=0.0)
            a = (a.to(tl.float32) * factor.to(tl.float32)).to(a.dtype)
        b = tl.load(
            weight + k.to(tl.int64)[:, None] * weight_stride + columns[None, :],
            mask=within[:, None] & (columns < weight_stride)[None, :],
            other=0.0,
        )
        sums = matmul.product(a, b, sums, PRECISION)
    return sums


@kernel(tensors=9)
def multiply(
    x, weight, bias, scale, shift, gate, residual, out, workspace,
    pixels, plane, width, channels, out_channels, weight_stride, steps,
    x_image, x_row, x_pixel, gate_image, residual_image, residual_row, residual_pixel,
    out_image, out_row, out_pixel,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
    SPLITS: tl.constexpr, SOURCE_ALIGN: tl.constexpr, ALIGN: tl.constexpr,
    EVENLY_SPACED: tl.constexpr, PROLOGUE: tl.constexpr, GATE: tl.constexpr,
    RESIDUAL: tl.constexpr, ACTIVATION: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Tiles of the result; with SPLITS > 1, of the sums of each share of `steps` steps."""
    channels, out_channels = channels * SOURCE_ALIGN, out_channels * ALIGN
    weight_stride *= 16
    rows = (pixels + BLOCK_M - 1) // BLOCK_M
    tile_columns = (out_channels + BLOCK_N - 1) // BLOCK_N
    tiles = rows * tile_columns * SPLITS
    for number in range(tl.program_id(0), tiles, tl.num_programs(0)):
        part = number % SPLITS
        row, column = matmul.tile_of(number // SPLITS, rows, tile_columns, GROUP)
        index = row * BLOCK_M + tl.arange(0, BLOCK_M)
        inside = index < pixels
        columns = column * BLOCK_N + tl.arange(0, BLOCK_N)
        at = matmul.offsets(index, plane, width, x_image, x_row, x_pixel, EVENLY_SPACED)
        image = (index // plane).to(tl.int64)
        # Steps, not channels, are handed over: so the compiler knows where a share may begin.
        begin = part * steps * BLOCK_K
        sums = _sums(
            x + at * SOURCE_ALIGN, weight, scale, shift, gate + image * gate_image * SOURCE_ALIGN,
            inside, columns, begin, tl.minimum(begin + steps * BLOCK_K, channels), channels,
            weight_stride, BLOCK_M, BLOCK_N, BLOCK_K, PROLOGUE, GATE, PRECISION,
        )  # fmt: skip
        if SPLITS > 1:
            shares.leave(sums, workspace, part, index, inside, columns, pixels, weight_stride)
        else:
            exists = columns < out_channels
            mask = inside[:, None] & exists[None, :]
            at = matmul.offsets(
                index, plane, width, residual_image, residual_row, residual_pixel, EVENLY_SPACED
            )
            value = matmul.finish(
                sums, bias, columns, exists, residual + (at * ALIGN)[:, None] + columns[None, :],
                mask, ACTIVATION, RESIDUAL,
            )  # fmt: skip
            at = matmul.offsets(index, plane, width, out_image, out_row, out_pixel, EVENLY_SPACED)
            target = out + (at * ALIGN)[:, None] + columns[None, :]
            tl.store(target, value.to(out.dtype.element_ty), mask=mask)


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    gate: Tensor | None,
    residual: Tensor | None,
    out: Tensor,
    problem: Problem,
    launch: Launch,
    activation: str,
) -> None:
    """Launches the kernels on `out`'s device.

    Args:
        x: [N, C, H, W], adjacent channels.
        weight, bias: of `prepack_gpu`.
        scale, shift: float32 [C].
        gate: [N, C], adjacent channels.
        residual: as out.
        out: [N, O, H', W'], adjacent channels.
    """
    launches.validate(problem, launch, "forward")
    if problem.pixels == 0:
        return
    added = out if residual is None else residual
    even, (source, *others) = _places(problem, x, added, out)
    source = (*source, 0 if gate is None else gate.stride(0))
    source_align = launches.align(problem.dtype, problem.channels, *source)
    strides = tuple(itertools.chain(*others))
    align = launches.align(problem.dtype, problem.out_channels, *strides)
    sizes = (
        problem.pixels, problem.out_height * problem.out_width, problem.out_width,
        problem.channels // source_align, problem.out_channels // align, weight.shape[1] // 16,
        launches.steps(problem, launch), *(stride // source_align for stride in source),
        *(stride // align for stride in strides),
    )  # fmt: skip
    workspace = out
    if launch.splits > 1:
        shape = (launch.splits, problem.pixels, weight.shape[1])
        workspace = torch.empty(shape, dtype=torch.float32, device=out.device)
    plan.Plan(
        "pointwise", multiply, launches.grid(problem, launch, "forward"), sizes,
        _constants(problem, launch, activation, source_align, align, even), _options(launch),
    ).start(
        x, weight, bias, _or(scale, bias), _or(shift, bias), _or(gate, x), added, out, workspace
    )  # fmt: skip
    if launch.splits > 1:
        finish = {"RESIDUAL": problem.residual, "ACTIVATION": activation}
        shares.finish(workspace, bias, added, out, align, **finish)


def _or(tensor: Tensor | None, stand_in: Tensor) -> Tensor:
    """A kernel wants a tensor for what it does not read, too."""
    return stand_in if tensor is None else tensor


def _places(
    problem: Problem, x: Tensor, residual: Tensor, out: Tensor
) -> tuple[bool, list[plan.Strides]]:
    """Whether the pixels of every image are evenly spaced, and the strides between those that the
    kernel reads or writes."""
    image, row, pixel = plan.strides(x)
    source = (image, row * problem.stride[0], pixel * problem.stride[1])
    strides = [source, plan.strides(residual), plan.strides(out)]
    size = (problem.batch, problem.out_height, problem.out_width)
    spacing = [_spacing(each, size) for each in strides]
    if None in spacing:
        return False, strides
    return True, [(0, 0, each or 0) for each in spacing]


def _spacing(strides: plan.Strides, size: tuple[int, int, int]) -> int | None:
    """Elements from each pixel to the next, over rows and images; None if they differ."""
    spacing, pixels = 0, 1
    for stride, count in zip(reversed(strides), reversed(size), strict=True):
        if count > 1:
            spacing = stride if pixels == 1 else spacing
            if stride != pixels * spacing:
                return None
            pixels *= count
    return spacing


def _constants(
    problem: Problem, launch: Launch, activation: str, source_align: int, align: int, even: bool
) -> dict[str, Any]:
    return {
        "BLOCK_M": launch.block_m,
        "BLOCK_N": launch.block_n,
        "BLOCK_K": launch.block_k,
        "GROUP": launch.group,
        "SPLITS": launch.splits,
        "SOURCE_ALIGN": source_align,
        "ALIGN": align,
        "EVENLY_SPACED": even,
        "PROLOGUE": problem.prologue,
        "GATE": problem.gate,
        "RESIDUAL": problem.residual,
        "ACTIVATION": activation,
        "PRECISION": "tf32" if problem.tf32 else "ieee",
    }


def _options(launch: Launch) -> dict[str, int]:
    return {"num_warps": launch.num_warps, "num_stages": launch.num_stages}


def source(
    problem: Problem, launch: Launch, pass_: str = "forward", activation: str = "none"
) -> tuple[ASTSource, dict[str, int]]:
    """What Triton compiles for a call on images without gaps, and the options of the launch."""
    launches.validate(problem, launch, pass_)
    image, single = problem.dtype, torch.float32
    dtypes = [image, image, single, single, single, image, image, image]
    dtypes.append(single if launch.splits > 1 else image)
    aligns = (launches.align(image, c) for c in (problem.channels, problem.out_channels))
    constants = _constants(problem, launch, activation, *aligns, problem.stride == (1, 1))
    return compiler.source(multiply, dtypes, constants), _options(launch)
