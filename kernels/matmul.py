"""What the matrix kernels share: where pixels lie, what happens to a tile before and after the
product, and in which order programs take tiles.

A matrix kernel multiplies pixels by weights: rows are the pixels of all images, one after another,
columns are output channels. Images are channels-last with any stride between pixels, rows and
images, so that a tile of them may be a slice of a wider buffer.
"""

from __future__ import annotations

import triton.language as tl

from . import epilogue
from .jit import jit


@jit
def pixel(index, plane, width):
    """Image, row and column of pixel number `index` of images of `plane` pixels in rows of
    `width`."""
    image = index // plane
    inside = index - image * plane
    row = inside // width
    return image, row, inside - row * width


@jit
def offsets(
    index, plane, width, image_stride, row_stride, pixel_stride, EVENLY_SPACED: tl.constexpr
):
    """Elements from the first pixel to pixel number `index`, in 64 bits.

    EVENLY_SPACED: all pixels of all images are `pixel_stride` apart, which spares the divisions.
    """
    if EVENLY_SPACED:
        return index.to(tl.int64) * pixel_stride
    else:
        image, row, column = pixel(index, plane, width)
        return (
            image.to(tl.int64) * image_stride
            + row.to(tl.int64) * row_stride
            + column.to(tl.int64) * pixel_stride
        )


@jit
def place(image, row, column, image_stride, row_stride, pixel_stride, ALIGN: tl.constexpr):
    """Elements from the first pixel to this one, in 64 bits.

    Strides are in units of ALIGN elements, which tells the compiler what offsets are multiples of.
    """
    return (
        image.to(tl.int64) * (image_stride.to(tl.int64) * ALIGN)
        + row.to(tl.int64) * (row_stride.to(tl.int64) * ALIGN)
        + column.to(tl.int64) * (pixel_stride.to(tl.int64) * ALIGN)
    )


@jit
def tile_of(program, rows, columns, GROUP: tl.constexpr):
    """Row and column of a program's tile: programs next to each other take GROUP tiles of rows of
    one column before the next column, so that what they read is in L2."""
    in_group = GROUP * columns
    group = program // in_group
    first = group * GROUP
    height = tl.minimum(rows - first, GROUP)
    inside = program - group * in_group
    return first + inside % height, inside // height


@jit
def normalize(tile, scale, shift, channels, inside):
    """relu(scale * tile + shift) of a tile [pixels, channels] of an image: the batch norm and ReLU
    before a convolution. What is beyond the image stays 0."""
    factor = tl.load(scale + channels, mask=inside, other=0.0)
    addend = tl.load(shift + channels, mask=inside, other=0.0)
    value = tile.to(tl.float32) * factor[None, :] + addend[None, :]
    return epilogue.activate(value, "relu").to(tile.dtype)


@jit
def product(a, b, accumulator, PRECISION: tl.constexpr):
    """accumulator + a b, in float32; PRECISION is of float32 operands: "tf32" or "ieee"."""
    return tl.dot(a, b, accumulator, input_precision=PRECISION)


@jit
def finish(
    accumulator, bias, columns, inside_columns, residual, mask, ACTIVATION: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
):  # fmt: skip
    """activation(accumulator + bias + residual) of a tile [pixels, output channels], in float32.

    `residual` and `mask` are tiles of pointers and of what is inside the image."""
    value = accumulator + tl.load(bias + columns, mask=inside_columns, other=0.0)[None, :]
    if HAS_RESIDUAL:
        value += tl.load(residual, mask=mask, other=0.0).to(tl.float32)
    return epilogue.activate(value, ACTIVATION)
