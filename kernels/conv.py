"""Convolution in Triton: a matrix product whose left side is gathered while it is read.

    out = activation(sum over taps t of x[pixels shifted by t] @ weight[t] + bias + residual)

Rows of the product are the pixels of the result, of all images, one after another; columns are
output channels. A program computes a tile of BLOCK_M by BLOCK_N. It walks over all pairs of a tap
and a block of BLOCK_K channels: a tap shifts the pixels it reads by a constant, what lies in the
padding is read as zero, and so the matrix that im2col would write never exists ("implicit GEMM",
Chetlur et al., "cuDNN: Efficient Primitives for Deep Learning", 2014). Images of few channels are
walked over by single elements of (tap, channel) instead: a photograph's 3 channels would leave most
of a block empty, but 7 x 7 x 3 = 147 elements fill five blocks of 32 to 92 %.

Two images whose channels a network would concatenate are read one after the other, each with
strides of its own. Where tiles are fewer than multiprocessors, SHARES programs share the walk of
each (see `kernels/shares.py`).

Images are channels-last: adjacent channels, with any stride between pixels, rows and images; those
of few channels may lie in planes. Weights come packed by `cvfast.ops.conv.prepack_gpu`. Addresses
are computed in 64 bits.
"""

from __future__ import annotations

import functools
import math

import torch
import triton.language as tl
from torch import Tensor
from triton.compiler import ASTSource

from cvfast.launch.conv import Problem
from cvfast.launch.conv import triton as launches
from cvfast.launch.conv.triton import Launch

from . import compiler, matmul, shares
from .jit import jit, kernel
from .plan import Plan, Strides, strides


@jit
def _within(position, size):
    """Whether 0 <= position < size, by one unsigned comparison."""
    return position.to(tl.uint32, bitcast=True) < size.to(tl.uint32, bitcast=True)


@jit
def sum_blocks(
    sums,
    x,
    weight,  # of the first channel of x at the first tap, and the tile's first column
    corner,  # [BLOCK_M]: elements from x to where a pixel's first tap reads
    top,  # [BLOCK_M]: row and column there
    left,
    inside,
    columns,
    first,  # steps to walk: pairs of a tap and a block of channels
    last,
    channels,  # of x
    weight_channels,  # rows of the weight from one tap to the next
    weight_stride,
    height,
    width,
    down,  # elements from one tap's pixel to that below it, and beside it
    right,
    dilation_y,
    dilation_x,
    KERNEL_WIDTH: tl.constexpr,
    EVEN: tl.constexpr,  # all blocks of channels are full
    PRECISION: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Adds the products of steps `first` to `last` to a tile of sums."""
    element = tl.arange(0, BLOCK_K)
    blocks = (channels + BLOCK_K - 1) // BLOCK_K
    for step in range(first, last):
        tap = step // blocks
        begin = (step - tap * blocks) * BLOCK_K
        tap_row = tap // KERNEL_WIDTH
        tap_column = tap - tap_row * KERNEL_WIDTH
        channel = begin + element
        read = _within(top + tap_row * dilation_y, height)
        read = read & _within(left + tap_column * dilation_x, width) & inside
        pixel = corner + (tap_row * down + tap_column * right)
        weight_row = (tap.to(tl.int64) * weight_channels + begin) * weight_stride
        row = weight + weight_row + element[:, None] * weight_stride
        if EVEN:
            a = tl.load(x + pixel[:, None] + channel[None, :], mask=read[:, None], other=0.0)
            b = tl.load(row + columns[None, :], mask=(columns < weight_stride)[None, :], other=0.0)
        else:
            exists = channel < channels
            mask = read[:, None] & exists[None, :]
            a = tl.load(x + pixel[:, None] + channel[None, :], mask=mask, other=0.0)
            mask = exists[:, None] & (columns < weight_stride)[None, :]
            b = tl.load(row + columns[None, :], mask=mask, other=0.0)
        sums = matmul.product(a, b, sums, PRECISION)
    return sums


@jit
def _sum_elements(
    sums,
    x,
    weight,
    corner,
    top,
    left,
    inside,
    columns,
    first,
    last,
    weight_stride,
    height,
    width,
    down,
    right,
    channel_stride,
    dilation_y,
    dilation_x,
    KERNEL_HEIGHT: tl.constexpr,
    KERNEL_WIDTH: tl.constexpr,
    CHANNELS: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """As `sum_blocks`, but a step is BLOCK_K pairs of a tap and a channel."""
    for step in range(first, last):
        element = step * BLOCK_K + tl.arange(0, BLOCK_K)
        exists = element < KERNEL_HEIGHT * KERNEL_WIDTH * CHANNELS
        tap = element // CHANNELS
        channel = element - tap * CHANNELS
        tap_row = tap // KERNEL_WIDTH
        tap_column = tap - tap_row * KERNEL_WIDTH
        read = _within(top[:, None] + (tap_row * dilation_y)[None, :], height)
        read = read & _within(left[:, None] + (tap_column * dilation_x)[None, :], width)
        read = read & inside[:, None] & exists[None, :]
        shift = tap_row * down + tap_column * right + channel * channel_stride
        a = tl.load(x + corner[:, None] + shift[None, :], mask=read, other=0.0)
        mask = exists[:, None] & (columns < weight_stride)[None, :]
        row = weight + element[:, None] * weight_stride
        b = tl.load(row + columns[None, :], mask=mask, other=0.0)
        sums = matmul.product(a, b, sums, PRECISION)
    return sums


@kernel(tensors=7)
def _conv_kernel(
    x,
    x2,  # unread unless SECOND
    weight,  # [taps, channels of x and x2, panels * 16]
    bias,  # float32 [panels * 16]
    residual,  # as out; unread unless RESIDUAL
    out,
    workspace,  # float32 [SHARES, pixels, panels * 16]; unread unless SHARES > 1
    pixels,  # of the result
    plane,  # pixels of one image of the result, and of one row
    row_length,
    out_channels,  # in units of OUT_ALIGN elements, as the strides of residual and out
    panels,
    height,
    width,
    channels,  # in units of ALIGN elements, as channels2 and the strides of x and x2
    channels2,
    steps,  # of a share
    x_image,
    x_row,
    x_pixel,
    x_channel,
    x2_image,
    x2_row,
    x2_pixel,
    residual_image,
    residual_row,
    residual_pixel,
    out_image,
    out_row,
    out_pixel,
    stride_y,
    stride_x,
    padding_y,
    padding_x,
    dilation_y,
    dilation_x,
    KERNEL_HEIGHT: tl.constexpr,
    KERNEL_WIDTH: tl.constexpr,
    FLAT: tl.constexpr,  # channels of x, if taps and channels are one axis; else 0
    SECOND: tl.constexpr,
    RESIDUAL: tl.constexpr,
    ACTIVATION: tl.constexpr,
    PRECISION: tl.constexpr,
    ALIGN: tl.constexpr,
    OUT_ALIGN: tl.constexpr,
    EVEN: tl.constexpr,
    SHARES: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Writes a tile of `out`, or of one share's sums."""
    weight_stride = panels * 16
    # Tiles that read the same pixels are neighbours, and so find them in L2.
    program = tl.program_id(0)
    tile_columns = (weight_stride + BLOCK_N - 1) // BLOCK_N
    share = program % SHARES
    tile = program // SHARES
    tile_row = tile // tile_columns
    index = tile_row * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = (tile - tile_row * tile_columns) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = index < pixels
    image, row, column = matmul.pixel(index, plane, row_length)
    top = row * stride_y - padding_y
    left = column * stride_x - padding_x

    first = share * steps
    last = first + steps
    sums = tl.full((BLOCK_M, BLOCK_N), 0.0, tl.float32)
    corner = matmul.place(image, top, left, x_image, x_row, x_pixel, ALIGN)
    down = x_row.to(tl.int64) * ALIGN * dilation_y
    right = x_pixel.to(tl.int64) * ALIGN * dilation_x
    if FLAT > 0:
        all_steps = (KERNEL_HEIGHT * KERNEL_WIDTH * FLAT + BLOCK_K - 1) // BLOCK_K
        sums = _sum_elements(
            sums, x, weight, corner, top, left, inside, columns, first,
            tl.minimum(last, all_steps), weight_stride, height, width, down, right,
            x_channel.to(tl.int64) * ALIGN, dilation_y, dilation_x, KERNEL_HEIGHT, KERNEL_WIDTH,
            FLAT, PRECISION, BLOCK_K,
        )  # fmt: skip
    else:
        depth = channels * ALIGN
        depth2 = channels2 * ALIGN
        all_steps = KERNEL_HEIGHT * KERNEL_WIDTH * ((depth + BLOCK_K - 1) // BLOCK_K)
        sums = sum_blocks(
            sums, x, weight, corner, top, left, inside, columns, first,
            tl.minimum(last, all_steps), depth, depth + depth2, weight_stride, height, width,
            down, right, dilation_y, dilation_x, KERNEL_WIDTH, EVEN, PRECISION, BLOCK_K,
        )  # fmt: skip
        if SECOND:
            second_steps = KERNEL_HEIGHT * KERNEL_WIDTH * ((depth2 + BLOCK_K - 1) // BLOCK_K)
            sums = sum_blocks(
                sums, x2, weight + depth.to(tl.int64) * weight_stride,
                matmul.place(image, top, left, x2_image, x2_row, x2_pixel, ALIGN), top, left,
                inside, columns, tl.maximum(first - all_steps, 0),
                tl.minimum(last - all_steps, second_steps), depth2, depth + depth2, weight_stride,
                height, width, x2_row.to(tl.int64) * ALIGN * dilation_y,
                x2_pixel.to(tl.int64) * ALIGN * dilation_x, dilation_y, dilation_x, KERNEL_WIDTH,
                EVEN, PRECISION, BLOCK_K,
            )  # fmt: skip

    if SHARES > 1:
        shares.leave(sums, workspace, share, index, inside, columns, pixels, weight_stride)
    else:
        exists = columns < out_channels * OUT_ALIGN
        mask = inside[:, None] & exists[None, :]
        added = matmul.place(
            image, row, column, residual_image, residual_row, residual_pixel, OUT_ALIGN
        )
        value = matmul.finish(
            sums, bias, columns, exists, residual + added[:, None] + columns[None, :], mask,
            ACTIVATION, RESIDUAL,
        )  # fmt: skip
        to = matmul.place(image, row, column, out_image, out_row, out_pixel, OUT_ALIGN)
        tl.store(out + to[:, None] + columns[None, :], value.to(out.dtype.element_ty), mask=mask)


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    residual: Tensor | None,
    x2: Tensor | None,
    problem: Problem,
    launch: Launch,
    activation: str,
    out: Tensor,
) -> None:
    """Writes the convolution to `out`.

    Args:
        x: [N, C, H, W], float32, float16 or bfloat16, adjacent channels (any stride between them
            if C < 16 and there is no x2); on a CUDA device, or on the CPU where TRITON_INTERPRET=1.
        weight: [kh·kw, C + C2, N16], dtype of x, and bias: float32 [N16], both from
            `cvfast.ops.conv.prepack_gpu`.
        residual: [N, K, P, Q], dtype of x, adjacent channels.
        x2: [N, C2, H, W], dtype of x, adjacent channels.
        problem: the geometry of x and the convolution.
        launch: see `cvfast.launch.conv.triton`.
        activation: "none", "relu", "relu6", "hardswish" or "hardsigmoid".
        out: [N, K, P, Q], dtype of x, adjacent channels, such as a slice of a wider image.

    Raises:
        ValueError: if the launch parameters do not fit the problem.
    """
    second, added = x if x2 is None else x2, out if residual is None else residual
    layouts = (strides(x), x.stride(1), strides(second), strides(added), strides(out))
    plan = _plan(problem, launch, activation, *layouts)
    if not out.numel():
        return
    workspace = bias
    if launch.splits > 1:
        workspace = bias.new_empty((launch.splits, problem.pixels, problem.columns))
    plan.start(x, second, weight, bias, added, out, workspace)
    if launch.splits > 1:
        align = plan.constants["OUT_ALIGN"]
        shares.finish(
            workspace, bias, added, out, align, RESIDUAL=problem.residual, ACTIVATION=activation
        )


@functools.lru_cache(maxsize=4096)
def _plan(
    problem: Problem,
    launch: Launch,
    activation: str,
    x: Strides,
    x_channel: int,
    x2: Strides,
    residual: Strides,
    out: Strides,
) -> Plan:
    """How the kernel is launched on images of these strides."""
    launches.validate(problem, launch, "forward")
    wide = 16 // problem.dtype.itemsize
    align = out_align = 1
    if not problem.flat:
        align = math.gcd(wide, problem.channels, problem.channels2, *x, *x2)
    out_align = math.gcd(wide, problem.out_channels, *residual, *out)
    channels = (problem.channels, problem.channels2)
    sizes = (
        problem.pixels,
        problem.out_height * problem.out_width,
        problem.out_width,
        problem.out_channels // out_align,
        problem.columns // 16,
        problem.height,
        problem.width,
        *(c // align for c in channels),
        launches.steps(problem, launch),
        *(stride // align for stride in x),
        x_channel if problem.flat else 1,
        *(stride // align for stride in x2),
        *(stride // out_align for stride in (*residual, *out)),
        *problem.stride,
        *problem.padding[:2],
        *problem.dilation,
    )
    constants = {
        "KERNEL_HEIGHT": problem.kernel[0],
        "KERNEL_WIDTH": problem.kernel[1],
        "FLAT": problem.channels if problem.flat else 0,
        "SECOND": problem.channels2 > 0,
        "RESIDUAL": problem.residual,
        "ACTIVATION": activation,
        "PRECISION": "tf32" if problem.tf32 else "ieee",
        "ALIGN": align,
        "OUT_ALIGN": out_align,
        "EVEN": all(c % launch.block_k == 0 for c in channels),
        "SHARES": launch.splits,
        "BLOCK_M": launch.block_m,
        "BLOCK_N": launch.block_n,
        "BLOCK_K": launch.block_k,
    }
    options = {"num_warps": launch.num_warps, "num_stages": launch.num_stages}
    grid = launches.grid(problem, launch, "forward")
    return Plan("conv", _conv_kernel, grid, sizes, constants, options)


def source(
    problem: Problem, launch: Launch, pass_: str = "forward", activation: str = "none"
) -> tuple[ASTSource, dict[str, int]]:
    """What Triton compiles for a launch on contiguous, aligned tensors, and its options.

    The kernel that adds the shares is left out: it is a plain sum.
    """
    launches.validate(problem, launch, pass_)

    def lie(channels: int, height: int, width: int) -> Strides:
        return channels * height * width, channels * width, channels

    x = lie(problem.channels, problem.height, problem.width)
    x2 = lie(problem.channels2, problem.height, problem.width) if problem.channels2 else x
    out = lie(problem.out_channels, problem.out_height, problem.out_width)
    plan = _plan(problem, launch, activation, x, 1, x2, out, out)
    dtypes = [problem.dtype] * 3 + [torch.float32] + [problem.dtype] * 2 + [torch.float32]
    return compiler.source(_conv_kernel, dtypes, plan.constants), plan.options
