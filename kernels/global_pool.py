"""Global average pooling in Triton: the mean of each channel over all pixels of an image.

A program averages CHANNELS channels of one image: it reads PIXELS pixels at a time, adds them up
lane by lane, and adds the lanes at the end, always in the same order. Images are channels-last with
any stride between pixels, rows and images. Addresses are computed in 64 bits.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton.language as tl
from torch import Tensor
from triton.compiler import ASTSource

from cvfast.launch.global_pool import Problem
from cvfast.launch.global_pool import triton as launches
from cvfast.launch.global_pool.triton import Launch

from . import compiler, matmul
from .jit import jit, kernel
from .plan import strides


@jit
def _plus(a, b):
    return a + b


@kernel(tensors=4)
def _mean(
    x, scale, shift, out, channels, pixels, width, x_image, x_row, x_pixel, out_image,
    PROLOGUE: tl.constexpr, EVENLY_SPACED: tl.constexpr, ALIGN: tl.constexpr,
    PIXELS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """CHANNELS channels of one image; strides in units of ALIGN elements, as is `channels`."""
    total = channels * ALIGN
    blocks = (total + CHANNELS - 1) // CHANNELS
    image = (tl.program_id(0) // blocks).to(tl.int64)
    channel = tl.program_id(0) % blocks * CHANNELS + tl.arange(0, CHANNELS)
    inside_channels = channel < total
    source = x + image * x_image * ALIGN + channel[None, :]
    sums = tl.full((PIXELS, CHANNELS), 0.0, tl.float32)
    for first in range(0, pixels, PIXELS):
        index = first + tl.arange(0, PIXELS)
        offset = matmul.offsets(index, pixels, width, 0, x_row, x_pixel, EVENLY_SPACED) * ALIGN
        mask = (index < pixels)[:, None] & inside_channels[None, :]
        tile = tl.load(source + offset[:, None], mask=mask, other=0.0).to(tl.float32)
        if PROLOGUE:
            tile = matmul.normalize(tile, scale, shift, channel, inside_channels)
            tile = tl.where(mask, tile, 0.0)
        sums += tile
    mean = tl.reduce(sums, 0, _plus) / pixels.to(tl.float32)
    target = out + image * out_image * ALIGN + channel
    tl.store(target, mean.to(out.dtype.element_ty), mask=inside_channels)


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
        out: [N, C, 1, 1], dtype of x, adjacent channels.
    """
    launches.validate(problem, launch, "forward")
    if not out.numel():
        return
    x_image, x_row, x_pixel = strides(x)
    if problem.width == 1:
        x_pixel = x_row
    evenly = problem.height == 1 or x_row == problem.width * x_pixel
    layout = (x_image, x_row, x_pixel, strides(out)[0])
    align = _align(problem, *layout)
    with torch.cuda.device_of(x):
        _mean[launches.grid(problem, launch, "forward")](
            x, x if scale is None else scale, x if shift is None else shift, out,
            problem.channels // align, problem.pixels, problem.width,
            *(stride // align for stride in layout),
            **_constants(problem, launch, align, evenly), num_warps=launch.num_warps,
        )  # fmt: skip


def _align(problem: Problem, *layout: int) -> int:
    """Elements that divide all that addresses are made of: 16 bytes' at most."""
    return math.gcd(16 // problem.dtype.itemsize, problem.channels, *layout)


def _constants(problem: Problem, launch: Launch, align: int, evenly: bool) -> dict[str, Any]:
    return {
        "PROLOGUE": problem.prologue,
        "EVENLY_SPACED": evenly,
        "ALIGN": align,
        "PIXELS": launch.pixels,
        "CHANNELS": launch.channels,
    }


def source(
    problem: Problem, launch: Launch, pass_: str = "forward", activation: str = "none"
) -> tuple[ASTSource, dict[str, int]]:
    """What Triton compiles for a launch on contiguous, aligned tensors, and its options."""
    del activation
    launches.validate(problem, launch, pass_)
    dtypes = [problem.dtype, torch.float32, torch.float32, problem.dtype]
    constants = _constants(problem, launch, _align(problem), True)
    return compiler.source(_mean, dtypes, constants), {"num_warps": launch.num_warps}
