"""The branches of an Inception module in Triton: several convolutions in one launch.

The convolutions of a module that do not wait for each other are too small to fill a GPU one by one,
so one grid computes the tiles of all: each program finds the branch that its tile belongs to and
then does what `kernels/conv.py` does, an implicit matrix product. Branches differ in the image they
read, in their kernel and in what they write; what is known when a call is compiled (kernels,
strides, padding) makes the code of each branch its own. The longest products come first, so that
the last programs to finish are short ones.

1x1 convolutions of one image are one product with their weights side by side, whose columns go to
several images: slices of the module's result, or inputs of its next launch. A branch may pool
before its 1x1 convolution; it then computes the pixels of its left side from their windows while it
reads them ("max", "avg"), and the pooled image never exists.

Images are channels-last: adjacent channels, with any stride between pixels, rows and images.
Weights come packed by `cvfast.ops.inception.prepack`. Addresses are computed in 64 bits.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.compiler import ASTSource

from cvfast.launch.inception import Problem
from cvfast.launch.inception import triton as launches
from cvfast.launch.inception.triton import Launch

from . import compiler, conv, matmul, pool
from .jit import jit, kernel
from .plan import Plan, Strides, strides


@dataclass(frozen=True)
class Static:
    """What the code of a branch is compiled for.

    Attributes:
        kind and what follows: see `cvfast.launch.inception.Branch`.
        even: all blocks of channels are full.
        align, out_align: elements that the strides of its source, and of its results, are counted
            in, as are the channels.
        parts: how many images it writes.
    """

    kind: str
    kernel_height: int
    kernel_width: int
    stride_y: int
    stride_x: int
    padding_y: int
    padding_x: int
    even: bool
    align: int
    out_align: int
    parts: int


@dataclass(frozen=True)
class Statics:
    """Those of all branches."""

    branches: tuple[Static, ...]


@triton.constexpr_function
def _count(statics):
    return len(statics.branches)


@triton.constexpr_function
def _static(statics, index):
    return statics.branches[index]


@jit
def _sum_pooled(
    sums, x, weight, image, top, left, inside, columns, channels, weight_stride, height, width,
    down, right, KIND: tl.constexpr, KERNEL_H: tl.constexpr, KERNEL_W: tl.constexpr,
    PADDING_H: tl.constexpr, PADDING_W: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Adds the product of pooled pixels to a tile of sums; as `conv.sum_blocks`."""
    element = tl.arange(0, BLOCK_K)
    IS_MAX: tl.constexpr = KIND == "max"
    count = pool.counted(top, height, PADDING_H, KERNEL_H, KIND == "avg") * pool.counted(
        left, width, PADDING_W, KERNEL_W, KIND == "avg"
    )
    divisor = tl.maximum(count, 1).to(tl.float32)[:, None]
    # Not loaded ahead: each tap's pixels would take a buffer of their own in shared memory.
    for begin in tl.range(0, channels, BLOCK_K, num_stages=1):
        channel = begin + element
        exists = channel < channels
        mask = inside[:, None] & exists[None, :]
        a = pool.windows(
            tl.full((BLOCK_M, BLOCK_K), float("-inf") if IS_MAX else 0.0, tl.float32),
            x + image[:, None] + channel[None, :], top, left, height, width, down, right, mask,
            x, x, channel, exists, "max" if IS_MAX else "avg", KERNEL_H, KERNEL_W, 1, 1, False,
            True,
        )  # fmt: skip
        if IS_MAX:
            # Beyond the last channel weights are 0, which times infinity is none.
            a = tl.where(mask, a, 0.0)
        else:
            a /= divisor
        row = weight + channel.to(tl.int64)[:, None] * weight_stride
        within = exists[:, None] & (columns < weight_stride)[None, :]
        b = tl.load(row + columns[None, :], mask=within, other=0.0)
        sums = matmul.product(a.to(b.dtype), b, sums, PRECISION)
    return sums


@jit
def _tile(
    x, weight, bias, outs, sizes, results, program, STATIC: tl.constexpr,
    ACTIVATION: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Tile number `program` of a branch."""
    pixels, plane, row_length, height, width, channels, panels, x_image, x_row, x_pixel = sizes
    KIND: tl.constexpr = STATIC.kind
    KERNEL_H: tl.constexpr = STATIC.kernel_height
    KERNEL_W: tl.constexpr = STATIC.kernel_width
    PADDING_Y: tl.constexpr = STATIC.padding_y
    PADDING_X: tl.constexpr = STATIC.padding_x
    EVEN: tl.constexpr = STATIC.even
    ALIGN: tl.constexpr = STATIC.align
    OUT_ALIGN: tl.constexpr = STATIC.out_align
    PARTS: tl.constexpr = STATIC.parts
    weight_stride = panels * 16
    tile_columns = (weight_stride + BLOCK_N - 1) // BLOCK_N
    # Tiles that read the same pixels are neighbours, and so find them in L2.
    tile_row = program // tile_columns
    first_column = (program - tile_row * tile_columns) * BLOCK_N
    index = tile_row * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = first_column + tl.arange(0, BLOCK_N)
    inside = index < pixels
    image, row, column = matmul.pixel(index, plane, row_length)
    top = row * STATIC.stride_y - PADDING_Y
    left = column * STATIC.stride_x - PADDING_X
    depth = channels * ALIGN
    down = x_row.to(tl.int64) * ALIGN
    right = x_pixel.to(tl.int64) * ALIGN
    sums = tl.full((BLOCK_M, BLOCK_N), 0.0, tl.float32)
    if KIND == "conv":
        blocks = (depth + BLOCK_K - 1) // BLOCK_K
        steps = blocks * (KERNEL_H * KERNEL_W)
        corner = matmul.place(image, top, left, x_image, x_row, x_pixel, ALIGN)
        sums = conv.sum_blocks(
            sums, x, weight, corner, top, left, inside, columns, 0, steps, depth, depth,
            weight_stride, height, width, down, right, 1, 1, KERNEL_W, EVEN, PRECISION,
            BLOCK_K,
        )  # fmt: skip
    else:
        first_pixel = image.to(tl.int64) * (x_image.to(tl.int64) * ALIGN)
        sums = _sum_pooled(
            sums, x, weight, first_pixel, top, left, inside, columns, depth, weight_stride, height,
            width, down, right, KIND, KERNEL_H, KERNEL_W, PADDING_Y, PADDING_X, PRECISION, BLOCK_M,
            BLOCK_K,
        )  # fmt: skip
    exists = columns < weight_stride
    value = matmul.finish(sums, bias, columns, exists, bias, exists, ACTIVATION, False)
    begin = 0
    for part in tl.static_range(PARTS):
        part_channels, part_panels, out_image, out_row, out_pixel = results[part]
        if (begin < first_column + BLOCK_N) & (begin + part_panels * 16 > first_column):
            channel = columns - begin
            to = matmul.place(image, row, column, out_image, out_row, out_pixel, OUT_ALIGN)
            own = (channel >= 0) & (channel < part_channels * OUT_ALIGN)
            tl.store(
                outs[part] + to[:, None] + channel[None, :], value.to(x.dtype.element_ty),
                mask=inside[:, None] & own[None, :],
            )  # fmt: skip
        begin += part_panels * 16


@kernel(tensors=4)
def _branches(
    x,  # of each branch; tuples all
    weight,  # [taps, channels, panels * 16]
    bias,  # float32 [panels * 16]
    outs,  # tuples of images
    sizes,
    results,  # channels, panels and strides of each of outs
    STATICS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Writes a tile of one branch."""
    program = tl.program_id(0)
    begin = 0
    for i in tl.static_range(_count(STATICS)):
        rows = (sizes[i][0] + BLOCK_M - 1) // BLOCK_M
        end = begin + rows * ((sizes[i][6] * 16 + BLOCK_N - 1) // BLOCK_N)
        if (program >= begin) & (program < end):
            _tile(
                x[i], weight[i], bias[i], outs[i], sizes[i], results[i], program - begin,
                _static(STATICS, i), ACTIVATION, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K,
            )  # fmt: skip
        begin = end


def forward(
    x: Sequence[Tensor],
    weight: Sequence[Tensor],
    bias: Sequence[Tensor],
    problem: Problem,
    launch: Launch,
    activation: str,
    out: Sequence[Sequence[Tensor]],
) -> None:
    """Launches the kernel; `cvfast.ops.inception` has checked what it hands over.

    Args:
        x: of each branch, [N, C, H, W], adjacent channels; on a CUDA device, or on the CPU where
            TRITON_INTERPRET=1.
        weight, bias: of each branch, from `cvfast.ops.inception.prepack`.
        problem: the geometry of the branches, in the same order.
        launch: see `cvfast.launch.inception.triton`.
        activation: of all branches.
        out: of each branch, the images that it writes: [N, K, H', W'], adjacent channels.

    Raises:
        ValueError: if the launch parameters do not fit the problem.
    """
    plan = _plan(
        problem, launch, activation, tuple(map(strides, x)),
        tuple(tuple(map(strides, images)) for images in out),
    )  # fmt: skip
    if plan.grid == (0,):
        return
    order = _order(problem)

    def ordered(values: Sequence[Any]) -> tuple[Any, ...]:
        return tuple(values[i] for i in order)

    with torch.cuda.device_of(x[0]):
        _branches[plan.grid](
            ordered(x), ordered(weight), ordered(bias), tuple(map(tuple, ordered(out))),
            *plan.sizes, **plan.constants, **plan.options,
        )  # fmt: skip


def _order(problem: Problem) -> list[int]:
    """Branches, those first whose programs take longest."""
    work = [branch.taps * branch.channels for branch in problem.branches]
    return sorted(range(len(work)), key=lambda i: -work[i])


@functools.lru_cache(maxsize=4096)
def _plan(
    problem: Problem,
    launch: Launch,
    activation: str,
    x: tuple[Strides, ...],
    out: tuple[tuple[Strides, ...], ...],
) -> Plan:
    """How the kernel is launched on images of these strides."""
    launches.validate(problem, launch, "forward")
    wide = 16 // problem.dtype.itemsize
    statics, sizes, results = [], [], []
    for i in _order(problem):
        branch = problem.branches[i]
        align = math.gcd(wide, branch.channels, *x[i])
        out_align = math.gcd(wide, *branch.parts, *(s for part in out[i] for s in part))
        even = branch.channels % launch.block_k == 0
        statics.append(
            Static(
                branch.kind, *branch.kernel, *branch.stride, *branch.padding, even, align,
                out_align, len(branch.parts),
            )
        )  # fmt: skip
        plane = branch.out_height * branch.out_width
        sizes.append(
            (
                problem.pixels(branch), plane, branch.out_width, branch.height, branch.width,
                branch.channels // align, branch.columns // 16, *(s // align for s in x[i]),
            )
        )  # fmt: skip
        results.append(
            tuple(
                (channels // out_align, -(-channels // 16), *(s // out_align for s in part))
                for channels, part in zip(branch.parts, out[i], strict=True)
            )
        )
    constants = {
        "STATICS": Statics(tuple(statics)),
        "ACTIVATION": activation,
        "PRECISION": "tf32" if problem.tf32 else "ieee",
        "BLOCK_M": launch.block_m,
        "BLOCK_N": launch.block_n,
        "BLOCK_K": launch.block_k,
    }
    options = {"num_warps": launch.num_warps, "num_stages": launch.num_stages}
    grid = launches.grid(problem, launch, "forward")
    numbers = (tuple(sizes), tuple(results))
    return Plan("inception", _branches, grid, numbers, constants, options)


def source(
    problem: Problem, launch: Launch, pass_: str = "forward", activation: str = "none"
) -> tuple[ASTSource, dict[str, int]]:
    """What Triton compiles for a launch on contiguous, aligned tensors, and its options."""
    launches.validate(problem, launch, pass_)

    def lie(channels: int, height: int, width: int) -> Strides:
        return channels * height * width, channels * width, channels

    x = tuple(lie(b.channels, b.height, b.width) for b in problem.branches)
    out = tuple(
        tuple(lie(part, b.out_height, b.out_width) for part in b.parts) for b in problem.branches
    )
    plan = _plan(problem, launch, activation, x, out)
    images = [problem.dtype] * len(x)
    parts = [[problem.dtype] * len(problem.branches[i].parts) for i in _order(problem)]
    dtypes = [images, images, [torch.float32] * len(x), parts]
    sizes = dict(zip(("sizes", "results"), plan.sizes, strict=True))
    return compiler.source(_branches, dtypes, plan.constants, sizes), plan.options
