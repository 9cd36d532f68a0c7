"""Copies of images from layout to layout in Triton.

A program copies a tile of PIXELS pixels and CHANNELS channels. Where one side has adjacent channels
and the other adjacent pixels, Triton turns the tile around in shared memory, so that both sides are
read and written in whole sectors. Addresses are computed in 64 bits.
"""

from __future__ import annotations

from typing import Any

import torch
import triton.language as tl
from torch import Tensor
from triton.compiler import ASTSource

from cvfast.launch.copy_layout import Problem
from cvfast.launch.copy_layout import triton as launches
from cvfast.launch.tile2d import Launch

from . import compiler, matmul
from .jit import jit, kernel


@jit
def _tile(
    tensor, index, channel, plane, width, image_stride, channel_stride, row_stride, pixel_stride,
    ADJACENT: tl.constexpr,
):  # fmt: skip
    """Pointers to a tile of an image, of which `ADJACENT` says what lies next to each other."""
    channel = channel.to(tl.int64)
    if ADJACENT == "channels":
        at = matmul.offsets(index, plane, width, image_stride, row_stride, pixel_stride, False)
        return tensor + at[:, None] + channel[None, :]
    elif ADJACENT == "pixels":
        image = index // plane
        at = image.to(tl.int64) * image_stride + (index - image * plane)
        return tensor + at[:, None] + (channel * channel_stride)[None, :]
    else:
        at = matmul.offsets(index, plane, width, image_stride, row_stride, pixel_stride, False)
        return tensor + at[:, None] + (channel * channel_stride)[None, :]


@kernel(tensors=2)
def _copy(
    x, out, channels, pixels, plane, width, x_image, x_channel, x_row, x_pixel,
    out_image, out_channel, out_row, out_pixel,
    SOURCE: tl.constexpr, TARGET: tl.constexpr, PIXELS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """One tile. `pixels` are of all images, `plane` of one."""
    blocks = (channels + CHANNELS - 1) // CHANNELS
    channel = tl.program_id(0) % blocks * CHANNELS + tl.arange(0, CHANNELS)
    index = tl.program_id(0) // blocks * PIXELS + tl.arange(0, PIXELS)
    mask = (index < pixels)[:, None] & (channel < channels)[None, :]
    source = _tile(x, index, channel, plane, width, x_image, x_channel, x_row, x_pixel, SOURCE)
    target = _tile(
        out, index, channel, plane, width, out_image, out_channel, out_row, out_pixel, TARGET
    )
    tl.store(target, tl.load(source, mask=mask), mask=mask)


def forward(x: Tensor, out: Tensor, problem: Problem, launch: Launch) -> None:
    """Launches the kernel; the operator in `cvfast.ops.layout` has checked what it hands over.

    Args:
        x: [N, C, H, W], float32, float16 or bfloat16, of any strides; on a CUDA device, or on the
            CPU where TRITON_INTERPRET=1.
        out: of x's shape and dtype, of any strides.
    """
    launches.validate(problem, launch, "forward")
    if not out.numel():
        return
    with torch.cuda.device_of(x):
        _copy[launches.grid(problem, launch, "forward")](
            x, out, problem.channels, problem.pixels, problem.height * problem.width,
            problem.width, *x.stride(), *out.stride(), **_constants(problem, launch),
            num_warps=launch.num_warps,
        )  # fmt: skip


def _constants(problem: Problem, launch: Launch) -> dict[str, Any]:
    return {
        "SOURCE": problem.source,
        "TARGET": problem.target,
        "PIXELS": launch.pixels,
        "CHANNELS": launch.channels,
    }


def source(
    problem: Problem, launch: Launch, pass_: str = "forward", activation: str = "none"
) -> tuple[ASTSource, dict[str, int]]:
    """What Triton compiles for a launch on aligned tensors, and its options."""
    del activation
    launches.validate(problem, launch, pass_)
    dtypes = [problem.dtype, problem.dtype]
    constants = _constants(problem, launch)
    return compiler.source(_copy, dtypes, constants), {"num_warps": launch.num_warps}
