"""Pooling in Triton: the largest or the mean of each window.

A program computes a patch of ROWS x COLUMNS results of CHANNELS channels. It walks over the taps of
the window and loads, for each, the pixels that the patch reads there; windows overlap, and what
another result of the patch has read before comes from the L1 cache. Images are channels-last with
any stride between pixels, rows and images. Addresses are computed in 64 bits.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton.language as tl
from torch import Tensor
from triton.compiler import ASTSource

from cvfast.launch.pool import Problem
from cvfast.launch.pool import triton as launches
from cvfast.launch.pool.triton import Launch

from . import compiler, matmul
from .jit import jit, kernel
from .plan import strides


@jit
def _with_tap(
    value, x, row, column, height, width, row_stride, pixel_stride, inside, scale, shift, channels,
    inside_channels, KIND: tl.constexpr, PROLOGUE: tl.constexpr,
):  # fmt: skip
    """`value`, a tile [results, channels], and the pixels at (row, column)."""
    in_image = (row >= 0) & (row < height) & (column >= 0) & (column < width)
    mask = inside & in_image[:, None]
    offset = row.to(tl.int64) * row_stride + column.to(tl.int64) * pixel_stride
    if KIND == "max":
        pixels = tl.load(x + offset[:, None], mask=mask, other=float("-inf"))
        value = tl.maximum(value, pixels.to(tl.float32), tl.PropagateNan.ALL)
    else:
        pixels = tl.load(x + offset[:, None], mask=mask, other=0.0).to(tl.float32)
        if PROLOGUE:
            pixels = matmul.normalize(pixels, scale, shift, channels, inside_channels)
            pixels = tl.where(mask, pixels, 0.0)
        value += pixels
    return value


@jit
def windows(
    value, x, row, column, height, width, row_stride, pixel_stride, inside, scale, shift, channels,
    inside_channels, KIND: tl.constexpr, KERNEL_H: tl.constexpr, KERNEL_W: tl.constexpr,
    DILATION_H: tl.constexpr, DILATION_W: tl.constexpr, PROLOGUE: tl.constexpr,
    UNROLLED: tl.constexpr,
):  # fmt: skip
    """The largest of `value` and a window, or `value` plus the window's sum, in float32.

    Args:
        value: a tile [results, channels].
        x: a tile of pointers to the channels in the first pixel of the results' images.
        row, column: [results], where the windows begin.
        inside: a tile of what is to be computed at all.
        scale, shift: of PROLOGUE, which leaves what is beyond the image 0.
    """
    if UNROLLED:
        for i in tl.static_range(KERNEL_H):
            for j in tl.static_range(KERNEL_W):
                value = _with_tap(
                    value, x, row + i * DILATION_H, column + j * DILATION_W, height, width,
                    row_stride, pixel_stride, inside, scale, shift, channels, inside_channels,
                    KIND, PROLOGUE,
                )  # fmt: skip
    else:
        for tap in range(KERNEL_H * KERNEL_W):
            i = tap // KERNEL_W
            j = tap - i * KERNEL_W
            value = _with_tap(
                value, x, row + i * DILATION_H, column + j * DILATION_W, height, width,
                row_stride, pixel_stride, inside, scale, shift, channels, inside_channels,
                KIND, PROLOGUE,
            )  # fmt: skip
    return value


@jit
def counted(begin, size, PADDING: tl.constexpr, KERNEL: tl.constexpr, PADDED: tl.constexpr):
    """How many positions of a window from `begin` on a mean counts along one axis: those in the
    image, or with PADDED in the padding too, but none beyond it."""
    end = tl.minimum(begin + KERNEL, size + PADDING)
    if not PADDED:
        begin = tl.maximum(begin, 0)
        end = tl.minimum(end, size)
    return end - begin


@kernel(tensors=4)
def _pool(
    x, scale, shift, out, channels, height, width, out_height, out_width,
    x_image, x_row, x_pixel, out_image, out_row, out_pixel, divisor,
    KIND: tl.constexpr, KERNEL_H: tl.constexpr, KERNEL_W: tl.constexpr, STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr, PADDING_H: tl.constexpr, PADDING_W: tl.constexpr,
    DILATION_H: tl.constexpr, DILATION_W: tl.constexpr, PADDED: tl.constexpr,
    DIVIDED: tl.constexpr, PROLOGUE: tl.constexpr, UNROLLED: tl.constexpr, ALIGN: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """One patch of one image; strides in units of ALIGN elements, as is `channels`."""
    total = channels * ALIGN
    blocks = (total + CHANNELS - 1) // CHANNELS
    across = (out_width + COLUMNS - 1) // COLUMNS
    down = (out_height + ROWS - 1) // ROWS
    program = tl.program_id(0)
    channel = program % blocks * CHANNELS + tl.arange(0, CHANNELS)
    program = program // blocks
    result = tl.arange(0, ROWS * COLUMNS)
    column = program % across * COLUMNS + result % COLUMNS
    program = program // across
    row = program % down * ROWS + result // COLUMNS
    image = (program // down).to(tl.int64)

    inside_channels = channel < total
    inside = ((row < out_height) & (column < out_width))[:, None] & inside_channels[None, :]
    first_row = row * STRIDE_H - PADDING_H
    first_column = column * STRIDE_W - PADDING_W
    empty: tl.constexpr = float("-inf") if KIND == "max" else 0.0
    value = windows(
        tl.full((ROWS * COLUMNS, CHANNELS), empty, tl.float32),
        x + image * x_image * ALIGN + channel[None, :], first_row, first_column, height, width,
        x_row.to(tl.int64) * ALIGN, x_pixel.to(tl.int64) * ALIGN, inside, scale, shift, channel,
        inside_channels, KIND, KERNEL_H, KERNEL_W, DILATION_H, DILATION_W, PROLOGUE, UNROLLED,
    )  # fmt: skip
    if KIND == "avg":
        if DIVIDED:
            value /= divisor.to(tl.float32)
        else:
            count = counted(first_row, height, PADDING_H, KERNEL_H, PADDED) * counted(
                first_column, width, PADDING_W, KERNEL_W, PADDED
            )
            value /= tl.maximum(count, 1).to(tl.float32)[:, None]
    offset = (
        image * out_image + row.to(tl.int64) * out_row + column.to(tl.int64) * out_pixel
    ) * ALIGN
    tl.store(out + offset[:, None] + channel[None, :], value.to(out.dtype.element_ty), mask=inside)


def forward(
    x: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    out: Tensor,
    problem: Problem,
    launch: Launch,
) -> None:
    """Launches the kernel; the operators in `cvfast.ops.pool` have checked what they hand over.

    Args:
        x: [N, C, H, W], float32, float16 or bfloat16, adjacent channels; on a CUDA device, or on
            the CPU where TRITON_INTERPRET=1.
        scale, shift: float32 [C] each, or None.
        out: [N, C, H', W'], dtype of x, adjacent channels.
    """
    launches.validate(problem, launch, "forward")
    if not out.numel():
        return
    layout = [*strides(x), *strides(out)]
    align = _align(problem, layout)
    with torch.cuda.device_of(x):
        _pool[launches.grid(problem, launch, "forward")](
            x, x if scale is None else scale, x if shift is None else shift, out,
            problem.channels // align, problem.height, problem.width, problem.out_height,
            problem.out_width, *(stride // align for stride in layout), problem.divisor,
            **_constants(problem, launch, align), num_warps=launch.num_warps,
        )  # fmt: skip


def _align(problem: Problem, layout: list[int]) -> int:
    """Elements that divide all that addresses are made of: 16 bytes' at most."""
    return math.gcd(16 // problem.dtype.itemsize, problem.channels, *layout)


def _constants(problem: Problem, launch: Launch, align: int) -> dict[str, Any]:
    constants: dict[str, Any] = {
        "KIND": problem.kind,
        "PADDED": problem.count_include_pad,
        "DIVIDED": problem.divisor != 0,
        "PROLOGUE": problem.prologue,
        "UNROLLED": problem.taps <= launches.MAX_UNROLLED,
        "ALIGN": align,
        "ROWS": launch.rows,
        "COLUMNS": launch.columns,
        "CHANNELS": launch.channels,
    }
    for name in ("kernel", "stride", "padding", "dilation"):
        pair = getattr(problem, name)
        constants |= {f"{name.upper()}_{axis}": pair[i] for i, axis in enumerate("HW")}
    return constants


def source(
    problem: Problem, launch: Launch, pass_: str = "forward", activation: str = "none"
) -> tuple[ASTSource, dict[str, int]]:
    """What Triton compiles for a launch on contiguous, aligned tensors, and its options."""
    del activation
    launches.validate(problem, launch, pass_)
    dtypes = [problem.dtype, torch.float32, torch.float32, problem.dtype]
    constants = _constants(problem, launch, _align(problem, []))
    return compiler.source(_pool, dtypes, constants), {"num_warps": launch.num_warps}
