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
to a multiple of 16. Sizes and strides come in units of VECTOR elements, those of the weights in
units of 16; the stride of the convolution is in those of x.
"""

from __future__ import annotations

from typing import Any

import torch
import triton.language as tl
from torch import Tensor
from triton.compiler import ASTSource

from cvfast.launch.pointwise import Problem
from cvfast.launch.pointwise import triton as launches
from cvfast.launch.pointwise.triton import Launch

from . import compiler, matmul
from .jit import jit, kernel


@jit
def _sums(
    x, weight, scale, shift, gate, index, inside, image, columns, begin, end, channels,
    weight_stride, gate_stride, offset,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    PROLOGUE: tl.constexpr, GATE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """x' @ weight of a tile over the channels from `begin` to `end`."""
    sums = tl.full((BLOCK_M, BLOCK_N), 0.0, tl.float32)
    for first in range(begin, end, BLOCK_K):
        k = first + tl.arange(0, BLOCK_K)
        within = k < channels
        mask = inside[:, None] & within[None, :]
        a = tl.load(x + offset[:, None] + k[None, :], mask=mask, other=0.0)
        if PROLOGUE:
            a = matmul.normalize(a, scale, shift, k, within)
        if GATE:
            factor = tl.load(gate + image[:, None] * gate_stride + k[None, :], mask=mask, other=0.0)
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
    pixels, plane, width, channels, out_channels, weight_stride, share,
    x_image, x_row, x_pixel, gate_image, residual_image, residual_row, residual_pixel,
    out_image, out_row, out_pixel,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
    SPLITS: tl.constexpr, VECTOR: tl.constexpr, EVENLY_SPACED: tl.constexpr,
    PROLOGUE: tl.constexpr, GATE: tl.constexpr, RESIDUAL: tl.constexpr,
    ACTIVATION: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Tiles of the result, or with SPLITS > 1 of the sums of each share in `workspace`."""
    # Products with a constant tell the compiler what they are multiples of, and so how wide its
    # loads and stores may be.
    channels, out_channels = channels * VECTOR, out_channels * VECTOR
    weight_stride *= 16
    x_image, x_row, x_pixel = x_image * VECTOR, x_row * VECTOR, x_pixel * VECTOR
    out_image, out_row, out_pixel = out_image * VECTOR, out_row * VECTOR, out_pixel * VECTOR
    residual_image, residual_row = residual_image * VECTOR, residual_row * VECTOR
    residual_pixel *= VECTOR
    gate_image *= VECTOR
    rows = (pixels + BLOCK_M - 1) // BLOCK_M
    tile_columns = (out_channels + BLOCK_N - 1) // BLOCK_N
    tiles = rows * tile_columns * SPLITS
    for number in range(tl.program_id(0), tiles, tl.num_programs(0)):
        part = number % SPLITS
        row, column = matmul.tile_of(number // SPLITS, rows, tile_columns, GROUP)
        index = row * BLOCK_M + tl.arange(0, BLOCK_M)
        inside = index < pixels
        columns = column * BLOCK_N + tl.arange(0, BLOCK_N)
        offset = matmul.offsets(index, plane, width, x_image, x_row, x_pixel, EVENLY_SPACED)
        begin = part * share
        sums = _sums(
            x, weight, scale, shift, gate, index, inside, index // plane, columns, begin,
            tl.minimum(begin + share, channels), channels, weight_stride, gate_image, offset,
            BLOCK_M, BLOCK_N, BLOCK_K, PROLOGUE, GATE, PRECISION,
        )  # fmt: skip
        mask = inside[:, None] & (columns < out_channels)[None, :]
        if SPLITS > 1:
            at = (part * pixels + index).to(tl.int64) * out_channels
            tl.store(workspace + at[:, None] + columns[None, :], sums, mask=mask)
        else:
            added = matmul.offsets(
                index, plane, width, residual_image, residual_row, residual_pixel, EVENLY_SPACED
            )
            value = matmul.finish(
                sums, bias, columns, columns < out_channels,
                residual + added[:, None] + columns[None, :], mask, ACTIVATION, RESIDUAL,
            )  # fmt: skip
            to = matmul.offsets(index, plane, width, out_image, out_row, out_pixel, EVENLY_SPACED)
            tl.store(
                out + to[:, None] + columns[None, :], value.to(out.dtype.element_ty), mask=mask
            )


@kernel(tensors=4)
def add_shares(
    workspace, bias, residual, out,
    pixels, plane, width, out_channels, residual_image, residual_row, residual_pixel,
    out_image, out_row, out_pixel,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SPLITS: tl.constexpr, VECTOR: tl.constexpr,
    EVENLY_SPACED: tl.constexpr, RESIDUAL: tl.constexpr, ACTIVATION: tl.constexpr,
):  # fmt: skip
    """The result from the sums that `multiply` left of each share."""
    out_channels *= VECTOR
    out_image, out_row, out_pixel = out_image * VECTOR, out_row * VECTOR, out_pixel * VECTOR
    residual_image, residual_row = residual_image * VECTOR, residual_row * VECTOR
    residual_pixel *= VECTOR
    index = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = index < pixels
    columns = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = inside[:, None] & (columns < out_channels)[None, :]
    sums = tl.full((BLOCK_M, BLOCK_N), 0.0, tl.float32)
    for part in tl.static_range(SPLITS):
        at = (part * pixels + index).to(tl.int64) * out_channels
        sums += tl.load(workspace + at[:, None] + columns[None, :], mask=mask, other=0.0)
    added = matmul.offsets(
        index, plane, width, residual_image, residual_row, residual_pixel, EVENLY_SPACED
    )
    value = matmul.finish(
        sums, bias, columns, columns < out_channels,
        residual + added[:, None] + columns[None, :], mask, ACTIVATION, RESIDUAL,
    )  # fmt: skip
    to = matmul.offsets(index, plane, width, out_image, out_row, out_pixel, EVENLY_SPACED)
    tl.store(out + to[:, None] + columns[None, :], value.to(out.dtype.element_ty), mask=mask)


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
    facts = vector, _ = _facts(x, gate, added, out, problem)
    constants = _constants(problem, launch, activation, facts)
    pixels = (problem.pixels, problem.out_height * problem.out_width, problem.out_width)
    out_channels = problem.out_channels // vector
    sizes = (
        problem.channels // vector, out_channels, weight.stride(0) // 16,
        launches.share(problem, launch),
    )  # fmt: skip
    x_image, x_row, x_pixel = _strides(x, vector)
    source = (x_image, x_row * problem.stride[0], x_pixel * problem.stride[1])
    gate_image = 0 if gate is None else gate.stride(0) // vector
    strides = (*_strides(added, vector), *_strides(out, vector))
    workspace = out
    if launch.splits > 1:
        workspace = torch.empty(
            launch.splits * problem.pixels * problem.out_channels,
            dtype=torch.float32, device=out.device,
        )  # fmt: skip
    options = {"num_warps": launch.num_warps, "num_stages": launch.num_stages}
    multiply[launches.grid(problem, launch, "forward")](
        x, weight, bias, _or(scale, bias), _or(shift, bias), _or(gate, x), added, out, workspace,
        *pixels, *sizes, *source, gate_image, *strides, **constants, **options,
    )  # fmt: skip
    if launch.splits > 1:
        rest = {n: constants[n] for n in add_shares.arg_names if n in constants}
        rest |= {"BLOCK_M": 16, "BLOCK_N": 64}
        grid = (-(-problem.pixels // 16), -(-problem.out_channels // 64))
        add_shares[grid](
            workspace, bias, added, out, *pixels, out_channels, *strides, **rest, num_warps=4
        )


def _or(tensor: Tensor | None, stand_in: Tensor) -> Tensor:
    """A kernel wants a tensor for what it does not read, too."""
    return stand_in if tensor is None else tensor


def _strides(image: Tensor, unit: int = 1) -> tuple[int, int, int]:
    """Between images, rows and pixels, in units of `unit` elements."""
    return image.stride(0) // unit, image.stride(2) // unit, image.stride(3) // unit


def _evenly_spaced(image: Tensor) -> bool:
    """Whether all pixels of all images are as far apart as those of a row."""
    n, _, h, w = image.shape
    image_stride, row, pixel = _strides(image)
    return (h == 1 or row == w * pixel) and (n == 1 or image_stride == h * w * pixel)


def _facts(
    x: Tensor, gate: Tensor | None, residual: Tensor, out: Tensor, problem: Problem
) -> tuple[int, bool]:
    """Elements that may be accessed at once, and whether pixels are evenly spaced."""
    images = (x, residual, out)
    strides = [stride for image in images for stride in _strides(image)]
    strides += [] if gate is None else [gate.stride(0)]
    even = problem.stride == (1, 1) and all(map(_evenly_spaced, images))
    return launches.vector(problem, strides), even


def _constants(
    problem: Problem, launch: Launch, activation: str, facts: tuple[int, bool]
) -> dict[str, Any]:
    return {
        "BLOCK_M": launch.block_m,
        "BLOCK_N": launch.block_n,
        "BLOCK_K": launch.block_k,
        "GROUP": launch.group,
        "SPLITS": launch.splits,
        "VECTOR": facts[0],
        "EVENLY_SPACED": facts[1],
        "PROLOGUE": problem.prologue,
        "GATE": problem.gate,
        "RESIDUAL": problem.residual,
        "ACTIVATION": activation,
        "PRECISION": "tf32" if problem.tf32 else "ieee",
    }


def source(
    problem: Problem, launch: Launch, pass_: str = "forward", activation: str = "none"
) -> tuple[ASTSource, dict[str, int]]:
    """What Triton compiles for a call on images without gaps, and the options of the launch."""
    launches.validate(problem, launch, pass_)
    facts = (launches.vector(problem, []), problem.stride == (1, 1))
    image, single = problem.dtype, torch.float32
    dtypes = [image, image, single, single, single, image, image, image]
    dtypes.append(single if launch.splits > 1 else image)
    options = {"num_warps": launch.num_warps, "num_stages": launch.num_stages}
    constants = _constants(problem, launch, activation, facts)
    return compiler.source(multiply, dtypes, constants), options
