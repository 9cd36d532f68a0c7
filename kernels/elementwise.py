"""Elementwise steps in Triton: activation((scale x + shift) op y) on channels-last images.

A program computes a tile of PIXELS pixels and CHANNELS channels. The images may have any stride
between pixels, rows and images, 0 among them: a gate is an image whose pixels are all the same.
Sums are float32. Addresses are computed in 64 bits.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton.language as tl
from torch import Tensor
from triton.compiler import ASTSource

from cvfast.launch.elementwise import Problem
from cvfast.launch.elementwise import triton as launches
from cvfast.launch.tile2d import Launch

from . import compiler, epilogue, matmul
from .jit import kernel


@kernel(tensors=5)
def _elementwise(
    x, y, scale, shift, out, channels, pixels, plane, width,
    x_image, x_row, x_pixel, y_image, y_row, y_pixel, out_image, out_row, out_pixel,
    OP: tl.constexpr, AFFINE: tl.constexpr, ACTIVATION: tl.constexpr,
    EVENLY_SPACED: tl.constexpr, Y_EVENLY_SPACED: tl.constexpr, ALIGN: tl.constexpr,
    PIXELS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """One tile; strides in units of ALIGN elements, as is `channels`. `pixels` are of all images,
    `plane` of one."""
    total = channels * ALIGN
    blocks = (total + CHANNELS - 1) // CHANNELS
    channel = tl.program_id(0) % blocks * CHANNELS + tl.arange(0, CHANNELS)
    index = tl.program_id(0) // blocks * PIXELS + tl.arange(0, PIXELS)
    inside = channel < total
    mask = (index < pixels)[:, None] & inside[None, :]
    at = matmul.offsets(index, plane, width, x_image, x_row, x_pixel, EVENLY_SPACED) * ALIGN
    value = tl.load(x + at[:, None] + channel[None, :], mask=mask, other=0.0).to(tl.float32)
    if AFFINE:
        factor = tl.load(scale + channel, mask=inside, other=0.0)
        addend = tl.load(shift + channel, mask=inside, other=0.0)
        value = value * factor[None, :] + addend[None, :]
    if OP != "none":
        at = matmul.offsets(index, plane, width, y_image, y_row, y_pixel, Y_EVENLY_SPACED) * ALIGN
        other = tl.load(y + at[:, None] + channel[None, :], mask=mask, other=0.0).to(tl.float32)
        value = value + other if OP == "add" else value * other
    value = epilogue.activate(value, ACTIVATION)
    at = matmul.offsets(index, plane, width, out_image, out_row, out_pixel, EVENLY_SPACED) * ALIGN
    target = out + at[:, None] + channel[None, :]
    tl.store(target, value.to(out.dtype.element_ty), mask=mask)


def forward(
    x: Tensor,
    y: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    out: Tensor,
    problem: Problem,
    launch: Launch,
    activation: str,
) -> None:
    """Launches the kernel; the operator in `cvfast.ops.elementwise` has checked what it hands over.

    Args:
        x: [N, C, H, W], float32, float16 or bfloat16, adjacent channels; on a CUDA device, or on
            the CPU where TRITON_INTERPRET=1.
        y: of x's dtype and, but for sizes of 1, shape; adjacent channels.
        scale, shift: float32 [C] each, or None.
        out: of x's shape and dtype, adjacent channels; may be x or y itself.
    """
    launches.validate(problem, launch, "forward")
    if not out.numel():
        return
    images = [x, x if y is None else y.expand(x.shape), out]
    strides = [[image.stride(axis) for axis in (0, 2, 3)] for image in images]
    align = _align(problem, [stride for three in strides for stride in three])
    evenly = [_evenly_spaced(problem, *three) for three in strides]
    constants = _constants(problem, launch, activation, align, evenly[0] and evenly[2], evenly[1])
    with torch.cuda.device_of(x):
        _elementwise[launches.grid(problem, launch, "forward")](
            x, images[1], x if scale is None else scale, x if shift is None else shift, out,
            problem.channels // align, problem.pixels, problem.height * problem.width,
            problem.width, *(stride // align for three in strides for stride in three),
            **constants, num_warps=launch.num_warps,
        )  # fmt: skip


def _evenly_spaced(problem: Problem, image: int, row: int, pixel: int) -> bool:
    """Whether all pixels of all images are one stride apart."""
    rows = problem.height == 1 or row == problem.width * pixel
    images = problem.batch == 1 or image == problem.height * problem.width * pixel
    return rows and images and (problem.width > 1 or (problem.height == 1 and problem.batch == 1))


def _align(problem: Problem, strides: list[int]) -> int:
    """Elements that divide all that addresses are made of: 16 bytes' at most."""
    return math.gcd(16 // problem.dtype.itemsize, problem.channels, *strides)


def _constants(
    problem: Problem, launch: Launch, activation: str, align: int, evenly: bool, y_evenly: bool
) -> dict[str, Any]:
    return {
        "OP": problem.op,
        "AFFINE": problem.affine,
        "ACTIVATION": activation,
        "EVENLY_SPACED": evenly,
        "Y_EVENLY_SPACED": y_evenly,
        "ALIGN": align,
        "PIXELS": launch.pixels,
        "CHANNELS": launch.channels,
    }


def source(
    problem: Problem, launch: Launch, pass_: str = "forward", activation: str = "none"
) -> tuple[ASTSource, dict[str, int]]:
    """What Triton compiles for a launch on contiguous, aligned tensors, and its options."""
    launches.validate(problem, launch, pass_)
    dtypes = [problem.dtype] * 2 + [torch.float32] * 2 + [problem.dtype]
    constants = _constants(problem, launch, activation, _align(problem, []), True, not problem.gate)
    return compiler.source(_elementwise, dtypes, constants), {"num_warps": launch.num_warps}
