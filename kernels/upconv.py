"""Transposed convolution whose stride is its kernel, in Triton: out[n, :, y·kh + r, x·kw + s] =
bias + x[n, :, y, x] @ weight[r, s].

Kernels of neighbouring pixels do not overlap, so it is a matrix product with kh·kw groups of output
channels, each of which goes to pixels of its own. One launch takes all: a program computes a tile
of BLOCK_M pixels of x by BLOCK_N channels of one group, and stores it every kw-th pixel of every
kh-th row. The programs of all groups that read the same pixels are neighbours, and so read them
from memory once.

Images are channels-last, with any stride between pixels, rows and images: the result may be a slice
of the image that U-Net concatenates it into. Weights come packed by
`cvfast.ops.upconv.prepack_gpu`. Addresses are computed in 64 bits.
"""

from __future__ import annotations

import functools
import math

import torch
import triton.language as tl
from torch import Tensor
from triton.compiler import ASTSource

from cvfast.launch.upconv import Problem
from cvfast.launch.upconv import triton as launches
from cvfast.launch.upconv.triton import Launch

from . import compiler, matmul
from .conv import sum_blocks
from .jit import kernel
from .plan import Plan, Strides, strides


@kernel(tensors=4)
def _upconv_kernel(
    x,
    weight,  # [taps, channels, panels * 16]
    bias,  # float32 [panels * 16]
    out,
    pixels,  # of x
    height,
    width,
    channels,  # in units of ALIGN elements, as the strides of x
    out_channels,  # in units of OUT_ALIGN elements, as the strides of out
    panels,
    x_image,
    x_row,
    x_pixel,
    out_image,
    out_row,
    out_pixel,
    KERNEL_HEIGHT: tl.constexpr,
    KERNEL_WIDTH: tl.constexpr,
    PRECISION: tl.constexpr,
    ALIGN: tl.constexpr,
    OUT_ALIGN: tl.constexpr,
    EVEN: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Writes a tile of `out` for one tap."""
    weight_stride = panels * 16
    depth = channels * ALIGN
    tile_columns = (weight_stride + BLOCK_N - 1) // BLOCK_N
    program = tl.program_id(0)
    tile = program // tile_columns
    columns = (program - tile * tile_columns) * BLOCK_N + tl.arange(0, BLOCK_N)
    tap = tile % (KERNEL_HEIGHT * KERNEL_WIDTH)
    index = tile // (KERNEL_HEIGHT * KERNEL_WIDTH) * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = index < pixels
    image, row, column = matmul.pixel(index, height * width, width)

    sums = sum_blocks(
        tl.full((BLOCK_M, BLOCK_N), 0.0, tl.float32),
        x, weight + tap.to(tl.int64) * depth * weight_stride,
        matmul.place(image, row, column, x_image, x_row, x_pixel, ALIGN), row, column, inside,
        columns, 0, (depth + BLOCK_K - 1) // BLOCK_K, depth, depth, weight_stride, height, width,
        0, 0, 0, 0, 1, EVEN, PRECISION, BLOCK_K,
    )  # fmt: skip

    exists = columns < out_channels * OUT_ALIGN
    mask = inside[:, None] & exists[None, :]
    to = matmul.place(
        image, row * KERNEL_HEIGHT + tap // KERNEL_WIDTH,
        column * KERNEL_WIDTH + tap % KERNEL_WIDTH, out_image, out_row, out_pixel, OUT_ALIGN,
    )  # fmt: skip
    pointer = out + to[:, None] + columns[None, :]
    value = matmul.finish(sums, bias, columns, exists, pointer, mask, "none", False)
    tl.store(pointer, value.to(out.dtype.element_ty), mask=mask)


def forward(
    x: Tensor, weight: Tensor, bias: Tensor, problem: Problem, launch: Launch, out: Tensor
) -> None:
    """Writes the transposed convolution to `out`.

    Args:
        x: [N, C, H, W], float32, float16 or bfloat16, adjacent channels; on a CUDA device, or on
            the CPU where TRITON_INTERPRET=1.
        weight: [kh·kw, C, N16], dtype of x, and bias: float32 [N16], both from
            `cvfast.ops.upconv.prepack_gpu`.
        problem: the geometry.
        launch: see `cvfast.launch.upconv.triton`.
        out: [N, K, kh·H, kw·W], dtype of x, adjacent channels, such as a slice of a wider image.

    Raises:
        ValueError: if the launch parameters do not fit the problem.
    """
    plan = _plan(problem, launch, strides(x), strides(out))
    if out.numel():
        plan.start(x, weight, bias, out)


@functools.lru_cache(maxsize=4096)
def _plan(problem: Problem, launch: Launch, x: Strides, out: Strides) -> Plan:
    """How the kernel is launched on images of these strides."""
    launches.validate(problem, launch, "forward")
    wide = 16 // problem.dtype.itemsize
    align = math.gcd(wide, problem.channels, *x)
    out_align = math.gcd(wide, problem.out_channels, *out)
    sizes = (
        problem.pixels,
        problem.height,
        problem.width,
        problem.channels // align,
        problem.out_channels // out_align,
        problem.columns // 16,
        *(stride // align for stride in x),
        *(stride // out_align for stride in out),
    )
    constants = {
        "KERNEL_HEIGHT": problem.kernel[0],
        "KERNEL_WIDTH": problem.kernel[1],
        "PRECISION": "tf32" if problem.tf32 else "ieee",
        "ALIGN": align,
        "OUT_ALIGN": out_align,
        "EVEN": problem.channels % launch.block_k == 0,
        "BLOCK_M": launch.block_m,
        "BLOCK_N": launch.block_n,
        "BLOCK_K": launch.block_k,
    }
    options = {"num_warps": launch.num_warps, "num_stages": launch.num_stages}
    grid = launches.grid(problem, launch, "forward")
    return Plan("upconv", _upconv_kernel, grid, sizes, constants, options)


def source(
    problem: Problem, launch: Launch, pass_: str = "forward", activation: str = "none"
) -> tuple[ASTSource, dict[str, int]]:
    """What Triton compiles for a launch on contiguous, aligned tensors, and its options.

    Raises:
        ValueError: for an activation, which the kernel does not have.
    """
    launches.validate(problem, launch, pass_)
    if activation != "none":
        raise ValueError(f"upconv: activation={activation!r}: the kernel computes none")
    (kh, kw), k = problem.kernel, problem.out_channels
    x = (problem.channels * problem.height * problem.width, problem.channels * problem.width)
    out = (k * kh * problem.height * kw * problem.width, k * kw * problem.width)
    plan = _plan(problem, launch, (*x, problem.channels), (*out, k))
    dtypes = [problem.dtype, problem.dtype, torch.float32, problem.dtype]
    return compiler.source(_upconv_kernel, dtypes, plan.constants), plan.options
