"""The second kernel of a product whose sums are cut into shares: adds them and finishes the result.

Where a result has fewer tiles than the GPU has multiprocessors, several programs share a tile, each
summing over a part of the channels (split-K). Each leaves its sums in a workspace, float32 [shares,
pixels, columns]; adding them here in a fixed order makes the result the same, bit for bit, at every
run, which atomic additions would not.
"""

from __future__ import annotations

from typing import Any

import triton.language as tl
from torch import Tensor

from . import matmul
from .jit import jit, kernel
from .plan import Plan, strides

# Two rows of four warps' 16-byte loads.
_BLOCK_M, _BLOCK_N = 16, 64


@jit
def leave(sums, workspace, share, index, inside, columns, pixels, width):
    """Stores a tile of one share's sums; `width`: columns of the workspace."""
    at = (share.to(tl.int64) * pixels + index) * width
    mask = inside[:, None] & (columns < width)[None, :]
    tl.store(workspace + at[:, None] + columns[None, :], sums, mask=mask)


@kernel(tensors=4)
def add_shares(
    workspace,  # float32 [SHARES, pixels, panels * 16]
    bias,  # float32 [panels * 16]
    residual,  # as out; unread without RESIDUAL
    out,
    pixels,
    plane,
    width,
    panels,
    out_channels,  # like all strides, in units of ALIGN elements
    residual_image,
    residual_row,
    residual_pixel,
    out_image,
    out_row,
    out_pixel,
    SHARES: tl.constexpr,
    RESIDUAL: tl.constexpr,
    ACTIVATION: tl.constexpr,
    ALIGN: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """activation(sum of the shares + bias + residual)."""
    index = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = index < pixels
    exists = columns < out_channels * ALIGN
    mask = inside[:, None] & exists[None, :]
    sums = tl.full((BLOCK_M, BLOCK_N), 0.0, tl.float32)
    for share in tl.static_range(SHARES):
        at = (index + tl.cast(share, tl.int64) * pixels) * (panels * 16)
        sums += tl.load(workspace + at[:, None] + columns[None, :], mask=mask, other=0.0)
    image, row, column = matmul.pixel(index, plane, width)
    added = matmul.place(image, row, column, residual_image, residual_row, residual_pixel, ALIGN)
    value = matmul.finish(
        sums, bias, columns, exists, residual + added[:, None] + columns[None, :], mask,
        ACTIVATION, RESIDUAL,
    )  # fmt: skip
    to = matmul.place(image, row, column, out_image, out_row, out_pixel, ALIGN)
    tl.store(out + to[:, None] + columns[None, :], value.to(out.dtype.element_ty), mask=mask)


def finish(
    workspace: Tensor, bias: Tensor, residual: Tensor, out: Tensor, align: int, **constants: Any
) -> None:
    """Starts `add_shares`.

    Args:
        workspace: what programs left of each share.
        bias, residual, out: see `add_shares`.
        align: divides the channels and strides of residual and out.
        constants: RESIDUAL and ACTIVATION.
    """
    shares, pixels, columns = workspace.shape
    plane = out.shape[2] * out.shape[3]
    sizes = (out.shape[1], *strides(residual), *strides(out))
    grid = (-(-pixels // _BLOCK_M), -(-columns // _BLOCK_N))
    sizes = (pixels, plane, out.shape[3], columns // 16, *(size // align for size in sizes))
    constants = {
        "SHARES": shares, "ALIGN": align, "BLOCK_M": _BLOCK_M, "BLOCK_N": _BLOCK_N, **constants
    }  # fmt: skip
    Plan("add_shares", add_shares, grid, sizes, constants, {}).start(workspace, bias, residual, out)
