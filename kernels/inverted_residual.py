"""The inverted residual in Triton: expansion, depthwise convolution and projection in one kernel.

The depthwise convolution needs a pixel's neighbours, but what a matrix product leaves in registers
cannot be shifted by a pixel in Triton, and shared memory cannot be addressed. So the *image* is
shifted, which loads can do, and expanded once for every column of the window:

    for each chunk of hidden channels:
        for each column of the window:
            for each row of the image that ROWS rows of outputs read:
                load the pixels, shifted by the column; expand and activate them
                add them, times the right tap, to every row of outputs that they belong to
        activate the depthwise sums, and add their projection to the block's sums
    add bias and residual to those, activate, store

so that a 3x3 block expands 3 (ROWS + 2) / ROWS times each pixel's share at stride 1: 4.5 times with
4 rows, where a kernel that shifts for every tap expands 9 times. The hidden tensor never leaves the
registers.

A *position* is one column of ROWS rows of outputs; a program takes POSITIONS of them, adjacent
along rows of images and then through the batch, each with an address of its own: no width and no
batch leaves a tile empty. Without an expansion, pixels are loaded as they are.

Blocks with squeeze-excite end at the depthwise convolution. One program then takes all columns of
ROWS rows, a chunk of hidden channels wide, so that it can take the means over each row.

Images are channels-last: adjacent channels, with any stride between pixels, rows and images.
Addresses are computed in 64 bits.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.compiler import ASTSource

from cvfast.launch.inverted_residual import Problem
from cvfast.launch.inverted_residual import triton as launches
from cvfast.launch.inverted_residual.triton import Launch

from . import compiler, epilogue
from .jit import jit, kernel
from .matmul import pixel, product
from .plan import Plan, Strides, check_image, strides


@dataclass(frozen=True)
class Window:
    """What one program computes of the depthwise convolution, all of it known when compiled.

    Attributes:
        height, width, stride_down, stride_across: of the convolution.
        rows: of outputs.
        hidden: channels of a chunk.
        channels, products: of x; its channels that one matrix product reads, and how many products
            an expansion takes: none without an expansion.
        whole_chunks, whole_products: whether all of those channels exist.
        precision: of products of float32: "tf32" or "ieee".
        expand_activation, depthwise_activation: as `epilogue.activate` takes them.
    """

    height: int
    width: int
    stride_down: int
    stride_across: int
    rows: int
    hidden: int
    channels: int
    products: int
    whole_chunks: bool
    whole_products: bool
    precision: str
    expand_activation: str
    depthwise_activation: str


@triton.constexpr_function
def _image_rows(window):
    """Rows of the image that a program reads."""
    return (window.rows - 1) * window.stride_down + window.height


@triton.constexpr_function
def _tap_row(window, row, image_row):
    """The row of taps by which a row of outputs reads a row of the image; -1 if it does not."""
    tap = image_row - row * window.stride_down
    return tap if 0 <= tap < window.height else -1


@triton.constexpr_function
def _field(window, name):
    return getattr(window, name)


@jit
def _inside(position, size):
    """Whether 0 <= position < size, by one unsigned comparison."""
    return position.to(tl.uint32, bitcast=True) < size.to(tl.uint32, bitcast=True)


@jit
def _load_expansion(expand, hidden_stride, channels, hidden, mask, WINDOW: tl.constexpr):
    """The matrices [hidden, channels of a product] of a chunk."""
    matrices = ()
    for i in tl.static_range(_field(WINDOW, "products")):
        channel = i * WINDOW.channels + tl.arange(0, WINDOW.channels)[None, :]
        inside = mask if WINDOW.whole_products else mask & (channel < channels)
        address = expand + channel * hidden_stride + hidden
        matrices += (tl.load(address, mask=inside, other=0.0),)
    return matrices


@jit
def _expand(pixels, channels, inside, matrices, bias, WINDOW: tl.constexpr):
    """Hidden channels [hidden, positions] of pixels that lie at the pointers; 0 if not `inside`."""
    ACTIVATION: tl.constexpr = WINDOW.expand_activation
    PRECISION: tl.constexpr = WINDOW.precision
    # Pixels outside the image are loaded as zeros, which without the bias stay zeros through the
    # products and, but for hard-sigmoid, the activation: one instruction instead of two.
    y = inside.to(tl.float32) * bias
    for i in tl.static_range(len(matrices)):
        channel = i * WINDOW.channels + tl.arange(0, WINDOW.channels)[:, None]
        mask = inside if WINDOW.whole_products else inside & (channel < channels)
        x = tl.load(pixels + channel, mask=mask, other=0.0)
        y = product(matrices[i], x, y, PRECISION)
    y = epilogue.activate(y, ACTIVATION)
    return tl.where(inside, y, 0.0) if ACTIVATION == "hardsigmoid" else y


@jit
def _depthwise(
    x,  # pointers [1, positions] to the pixel that the first tap of the first row reads
    row_stride,
    pixel_stride,
    top,  # of that pixel
    left,
    height,
    width,
    exists,  # [1, positions]
    channels,
    expand,
    expand_bias,
    depthwise,
    first,  # hidden channel of the chunk
    hidden,  # channels, and those that there are weights for: a multiple of 16
    panels,
    WINDOW: tl.constexpr,
):
    """The depthwise convolution of a chunk, activated: a tile [hidden, positions] for each row."""
    ACTIVATION: tl.constexpr = WINDOW.depthwise_activation
    TAPS: tl.constexpr = WINDOW.height * WINDOW.width
    channel = first + tl.arange(0, WINDOW.hidden)[:, None]
    packed = depthwise + (channel // 16 * ((TAPS + 1) * 16) + channel % 16)
    mask = channel < panels * 16
    bias = tl.load(packed + TAPS * 16, mask=mask, other=0.0)
    matrices = ()
    expansion_bias = bias
    if _field(WINDOW, "products") > 0:
        expansion_bias = tl.load(expand_bias + channel, mask=mask, other=0.0)
        matrices = _load_expansion(expand, panels * 16, channels, channel, mask, WINDOW)
    sums = ()
    for _ in tl.static_range(_field(WINDOW, "rows")):
        sums += (tl.full((WINDOW.hidden, x.shape[1]), 0.0, tl.float32) + bias,)

    # Bit i: row i of the image exists. A bit is taken where it is needed, one instruction; as
    # conditions of their own, which no loop changes, they would occupy registers throughout.
    rows = tl.full((1, x.shape[1]), 0, tl.int32)
    for i in tl.static_range(_image_rows(WINDOW)):
        rows += tl.where(exists & _inside(top + i, height), 1 << i, 0)

    # Not `static_range`: the body is compiled once.
    column = 0
    while column < WINDOW.width:
        in_column = tl.where(_inside(left + column, width), rows, 0)
        taps = ()
        for i in tl.static_range(_field(WINDOW, "height")):
            tap = packed + (i * WINDOW.width + column) * 16
            taps += (tl.load(tap, mask=mask, other=0.0),)
        for image_row in tl.static_range(_image_rows(WINDOW)):
            inside = (in_column & (1 << image_row)) != 0
            pixels = x + (image_row * row_stride + column * pixel_stride)
            if len(matrices) > 0:
                y = _expand(pixels, channels, inside, matrices, expansion_bias, WINDOW)
            else:
                inside = inside if WINDOW.whole_chunks else inside & (channel < hidden)
                y = tl.load(pixels + channel, mask=inside, other=0.0).to(tl.float32)
            for row in tl.static_range(_field(WINDOW, "rows")):
                if _tap_row(WINDOW, row, image_row) >= 0:
                    term = y * taps[_tap_row(WINDOW, row, image_row)]
                    sums = sums[:row] + (sums[row] + term,) + sums[row + 1 :]  # noqa: RUF005
        column += 1

    results = ()
    for row in tl.static_range(_field(WINDOW, "rows")):
        results += (epilogue.activate(sums[row], ACTIVATION),)
    return results


@kernel(tensors=8)
def _block_kernel(
    x,  # [N, height, width, channels]
    expand,  # [channels, hidden rounded up to 16]; unread without an expansion, as its bias
    expand_bias,  # float32
    depthwise,  # float32 [1, panels, taps + 1, 16]
    project,  # [hidden, out_channels rounded up to 16]
    project_bias,  # float32
    residual,  # shaped as out; unread without RESIDUAL
    out,  # [N, out_height, out_width, out_channels]
    batch,
    channels,  # of x; like its strides, in units of ALIGN elements
    hidden,
    out_channels,  # like the strides of out and residual, in units of OUT_ALIGN elements
    height,
    width,
    image_stride,
    row_stride,
    pixel_stride,
    out_height,
    out_width,
    out_image_stride,
    out_row_stride,
    out_pixel_stride,
    residual_image_stride,
    residual_row_stride,
    residual_pixel_stride,
    padding_top,
    padding_left,
    WINDOW: tl.constexpr,
    POSITIONS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    RESIDUAL: tl.constexpr,
    ACTIVATION: tl.constexpr,
    ALIGN: tl.constexpr,
    OUT_ALIGN: tl.constexpr,
):
    """Writes OUTPUTS channels of `out` at POSITIONS positions."""
    ROWS: tl.constexpr = WINDOW.rows
    HIDDEN: tl.constexpr = WINDOW.hidden
    PRECISION: tl.constexpr = WINDOW.precision
    panels = (hidden + 15) // 16
    image_channels = channels * ALIGN
    result_channels = out_channels * OUT_ALIGN

    position = tl.program_id(0) * POSITIONS + tl.arange(0, POSITIONS)[None, :]
    strips = (out_height + ROWS - 1) // ROWS
    image, strip, column = pixel(position, strips * out_width, out_width)
    row = strip * ROWS
    exists = image < batch
    image = image.to(tl.int64)

    top = row * WINDOW.stride_down - padding_top
    left = column * WINDOW.stride_across - padding_left
    x_row = row_stride.to(tl.int64) * ALIGN
    x_pixel = pixel_stride.to(tl.int64) * ALIGN
    x += image * (image_stride.to(tl.int64) * ALIGN) + top * x_row + left * x_pixel

    output = tl.program_id(1) * OUTPUTS + tl.arange(0, OUTPUTS)[:, None]
    outputs = (result_channels + 15) // 16 * 16
    bias = tl.load(project_bias + output, mask=output < outputs, other=0.0)
    sums = ()
    for _ in tl.static_range(ROWS):
        sums += (tl.full((OUTPUTS, POSITIONS), 0.0, tl.float32) + bias,)

    first = 0
    while first < hidden:
        tiles = _depthwise(
            x, x_row, x_pixel, top, left, height, width, exists, image_channels, expand,
            expand_bias, depthwise, first, hidden, panels, WINDOW,
        )  # fmt: skip
        channel = first + tl.arange(0, HIDDEN)[None, :]
        inside = output < outputs
        if not WINDOW.whole_chunks:
            inside = inside & (channel < hidden)
        matrix = tl.load(project + channel * outputs + output, mask=inside, other=0.0)
        added = ()
        for i in tl.static_range(ROWS):
            tile = tiles[i].to(matrix.dtype)
            added += (product(matrix, tile, sums[i], PRECISION),)
        sums = added
        first += HIDDEN

    out_row = out_row_stride.to(tl.int64) * OUT_ALIGN
    out_pixel = out_pixel_stride.to(tl.int64) * OUT_ALIGN
    out += image * (out_image_stride.to(tl.int64) * OUT_ALIGN)
    out += row * out_row + column * out_pixel + output
    residual_row = residual_row_stride.to(tl.int64) * OUT_ALIGN
    residual_pixel = residual_pixel_stride.to(tl.int64) * OUT_ALIGN
    residual += image * (residual_image_stride.to(tl.int64) * OUT_ALIGN)
    residual += row * residual_row + column * residual_pixel + output
    for i in tl.static_range(ROWS):
        y = sums[i]
        inside = exists & (row + i < out_height) & (output < result_channels)
        if RESIDUAL:
            y += tl.load(residual + i * residual_row, mask=inside, other=0.0).to(tl.float32)
        y = epilogue.activate(y, ACTIVATION).to(out.dtype.element_ty)
        tl.store(out + i * out_row, y, mask=inside)


@jit
def _plus(a, b):
    return a + b


@kernel(tensors=6)
def _squeeze_kernel(
    x,  # [N, height, width, channels]
    expand,  # [channels, hidden rounded up to 16]; unread without an expansion, as its bias
    expand_bias,  # float32
    depthwise,  # float32 [1, panels, taps + 1, 16]
    out,  # [N, out_height, out_width, hidden]
    means,  # [N, out_height, 1, hidden]
    channels,  # of x; like its strides, in units of ALIGN elements
    hidden,  # like the strides of out, in units of OUT_ALIGN elements
    height,
    width,
    image_stride,
    row_stride,
    pixel_stride,
    out_height,
    out_width,
    out_image_stride,
    out_row_stride,
    out_pixel_stride,
    means_image_stride,
    means_row_stride,
    padding_top,
    padding_left,
    WINDOW: tl.constexpr,
    POSITIONS: tl.constexpr,
    ALIGN: tl.constexpr,
    OUT_ALIGN: tl.constexpr,
):
    """Writes a chunk of hidden channels of ROWS rows of `out`, and their means over each row."""
    ROWS: tl.constexpr = WINDOW.rows
    HIDDEN: tl.constexpr = WINDOW.hidden
    hidden_channels = hidden * OUT_ALIGN
    panels = (hidden_channels + 15) // 16
    strips = (out_height + ROWS - 1) // ROWS
    row = tl.program_id(0) % strips * ROWS
    image = (tl.program_id(0) // strips).to(tl.int64)
    first = tl.program_id(1) * HIDDEN
    channel = first + tl.arange(0, HIDDEN)[:, None]

    top = row * WINDOW.stride_down - padding_top
    x_row = row_stride.to(tl.int64) * ALIGN
    x_pixel = pixel_stride.to(tl.int64) * ALIGN
    x += image * (image_stride.to(tl.int64) * ALIGN) + top * x_row
    out_row = out_row_stride.to(tl.int64) * OUT_ALIGN
    out_pixel = out_pixel_stride.to(tl.int64) * OUT_ALIGN
    out += image * (out_image_stride.to(tl.int64) * OUT_ALIGN) + row * out_row

    totals = ()
    for _ in tl.static_range(ROWS):
        totals += (tl.full((HIDDEN, 1), 0.0, tl.float32),)
    begin = 0
    while begin < out_width:
        column = begin + tl.arange(0, POSITIONS)[None, :]
        exists = column < out_width
        left = column * WINDOW.stride_across - padding_left
        tiles = _depthwise(
            x + left * x_pixel, x_row, x_pixel, top, left, height, width, exists,
            channels * ALIGN, expand, expand_bias, depthwise, first, hidden_channels, panels,
            WINDOW,
        )  # fmt: skip
        address = out + column * out_pixel + channel
        added = ()
        for i in tl.static_range(ROWS):
            total = tl.reduce(tl.where(exists, tiles[i], 0.0), 1, _plus, keep_dims=True)
            added += (totals[i] + total,)
            inside = exists & (row + i < out_height) & (channel < hidden_channels)
            tl.store(address + i * out_row, tiles[i].to(out.dtype.element_ty), mask=inside)
        totals = added
        begin += POSITIONS

    means += image * (means_image_stride.to(tl.int64) * OUT_ALIGN) + channel
    means_row = means_row_stride.to(tl.int64) * OUT_ALIGN
    for i in tl.static_range(ROWS):
        mean = (totals[i] / out_width.to(tl.float32)).to(means.dtype.element_ty)
        inside = (row + i < out_height) & (channel < hidden_channels)
        tl.store(means + (row + i) * means_row, mean, mask=inside)


def forward(
    x: Tensor,
    expand: Tensor | None,
    expand_bias: Tensor | None,
    depthwise: Tensor,
    project: Tensor,
    project_bias: Tensor,
    residual: Tensor | None,
    problem: Problem,
    launch: Launch,
    activations: Sequence[str],
    out: Tensor,
) -> None:
    """Writes the block's output into `out`.

    Args:
        x: [N, C, H, W], float32, float16 or bfloat16, adjacent channels; on a CUDA device, or on
            the CPU where TRITON_INTERPRET=1.
        expand, expand_bias: from `cvfast.ops.pointwise.prepack_gpu`, or None without an expansion.
        depthwise: float32 [1, ceil(E / 16), kh·kw + 1, 16], from `cvfast.ops.depthwise.prepack`.
        project, project_bias: as `expand` and its bias.
        residual: [N, O, H', W'], laid out as x, or None.
        problem: the geometry of all of these.
        launch: see `cvfast.launch.inverted_residual.triton`.
        activations: behind expansion, depthwise convolution and projection: "none", "relu",
            "relu6", "hardswish" or "hardsigmoid".
        out: [N, O, H', W'], laid out as x.

    Raises:
        ValueError: if the tensors do not fit the problem, or the problem the launch parameters.
    """
    size = (problem.out_channels, problem.out_height, problem.out_width)
    _check_inputs(x, expand, expand_bias, depthwise, problem, activations)
    _check_matrix("project", project, project_bias, problem.hidden, problem.out_channels, x.dtype)
    check_image(_OP, "out", out, problem.dtype, (problem.batch, *size))
    images = [x, out, out]
    if residual is not None:
        check_image(_OP, "residual", residual, problem.dtype, (problem.batch, *size))
        images[2] = residual
    if problem.residual != (residual is not None):
        raise ValueError(f"{_OP}: problem.residual={problem.residual} says otherwise of residual")
    if out.numel():
        plan = _plan(problem, launch, tuple(activations), *map(strides, images))
        plan.start(
            x, *_expansion(expand, expand_bias, x, depthwise), depthwise, project, project_bias,
            images[2], out,
        )  # fmt: skip


def squeeze(
    x: Tensor,
    expand: Tensor | None,
    expand_bias: Tensor | None,
    depthwise: Tensor,
    problem: Problem,
    launch: Launch,
    activations: Sequence[str],
    out: Tensor,
    row_means: Tensor,
) -> None:
    """Writes the depthwise convolution of a block without projection, and its means over each row.

    The means are of the numbers before they are rounded to the dtype of `out`, and the same, bit
    for bit, at every run.

    Args:
        x, expand, expand_bias, depthwise, problem, launch: as for `forward`.
        activations: behind expansion and depthwise convolution.
        out: [N, E, H', W'], laid out as x.
        row_means: [N, E, H', 1], laid out as x.

    Raises:
        ValueError: as `forward`.
    """
    _check_inputs(x, expand, expand_bias, depthwise, problem, activations)
    size = (problem.batch, problem.hidden, problem.out_height)
    check_image(_OP, "out", out, problem.dtype, (*size, problem.out_width))
    check_image(_OP, "row_means", row_means, problem.dtype, (*size, 1))
    if out.numel():
        plan = _plan(problem, launch, tuple(activations), *map(strides, (x, out, row_means)))
        plan.start(x, *_expansion(expand, expand_bias, x, depthwise), depthwise, out, row_means)


_OP = "inverted_residual"


def _expansion(
    expand: Tensor | None, expand_bias: Tensor | None, x: Tensor, depthwise: Tensor
) -> tuple[Tensor, Tensor]:
    """The expansion's tensors; in place of absent ones, others of their dtype, never read."""
    if expand is None or expand_bias is None:
        return x, depthwise
    return expand, expand_bias


@functools.lru_cache(maxsize=4096)
def _plan(
    problem: Problem, launch: Launch, activations: tuple[str, ...], *image_strides: Strides
) -> Plan:
    """How the kernel is launched on images of these strides: x, out, and residual or row_means."""
    launches.validate(problem, launch)
    vector = 16 // problem.dtype.itemsize
    outputs = problem.out_channels or problem.hidden
    x, out, last = image_strides
    align = math.gcd(vector, problem.channels, *x)
    out_align = math.gcd(vector, outputs, *itertools.chain(out, last))
    products = -(-problem.channels // launch.channels) if problem.expands else 0
    window = Window(
        height=problem.kernel[0],
        width=problem.kernel[1],
        stride_down=problem.stride[0],
        stride_across=problem.stride[1],
        rows=launch.rows,
        hidden=launch.hidden,
        channels=launch.channels,
        products=products,
        whole_chunks=problem.hidden % launch.hidden == 0,
        whole_products=problem.channels % launch.channels == 0,
        precision="tf32" if problem.tf32 else "ieee",
        expand_activation=activations[0],
        depthwise_activation=activations[1],
    )
    constants = {
        "WINDOW": window,
        "POSITIONS": launch.positions,
        "ALIGN": align,
        "OUT_ALIGN": out_align,
    }
    image = (problem.height, problem.width, *(stride // align for stride in x))
    result = (problem.out_height, problem.out_width, *(stride // out_align for stride in out))
    rest = tuple(stride // out_align for stride in last)
    padding = problem.padding[:2]
    channels, hidden = problem.channels // align, problem.hidden
    if problem.projects:
        constants["OUTPUTS"] = launch.outputs
        constants["RESIDUAL"] = problem.residual
        constants["ACTIVATION"] = activations[2]
        kernel = _block_kernel
        head = (problem.batch, channels, hidden, outputs // out_align)
    else:
        kernel, rest = _squeeze_kernel, rest[:2]
        head = (channels, hidden // out_align)
    return Plan(
        op=_OP,
        kernel=kernel,
        grid=launches.grid(problem, launch),
        sizes=(*head, *image, *result, *rest, *padding),
        constants=constants,
        options={
            "num_warps": launch.num_warps,
            "num_stages": launch.num_stages,
            "maxnreg": launch.registers,
        },
    )


def _check_inputs(
    x: Tensor,
    expand: Tensor | None,
    expand_bias: Tensor | None,
    depthwise: Tensor,
    problem: Problem,
    activations: Sequence[str],
) -> None:
    for activation in activations:
        if activation not in _ACTIVATIONS:
            raise ValueError(
                f"{_OP}: unknown activation {activation!r}; expected {', '.join(_ACTIVATIONS)}"
            )
    shape = (problem.batch, problem.channels, problem.height, problem.width)
    check_image(_OP, "x", x, problem.dtype, shape)
    if problem.expands != (expand is not None):
        raise ValueError(f"{_OP}: problem.expands={problem.expands} says otherwise of expand")
    if expand is not None:
        _check_matrix("expand", expand, expand_bias, problem.channels, problem.hidden, x.dtype)
    packed = (1, -(-problem.hidden // 16), problem.kernel[0] * problem.kernel[1] + 1, 16)
    if depthwise.shape != packed or depthwise.dtype != torch.float32:
        raise ValueError(
            f"{_OP}: depthwise is {depthwise.dtype} {tuple(depthwise.shape)}, expected float32 "
            f"{packed} from cvfast.ops.depthwise.prepack"
        )


_ACTIVATIONS = ("none", "relu", "relu6", "hardswish", "hardsigmoid")


def _check_matrix(
    name: str, weight: Tensor, bias: Tensor | None, rows: int, columns: int, dtype: torch.dtype
) -> None:
    padded = -(-columns // 16) * 16
    if weight.shape != (rows, padded) or weight.dtype != dtype or not weight.is_contiguous():
        raise ValueError(
            f"{_OP}: {name} is {weight.dtype} {tuple(weight.shape)}, expected contiguous {dtype} "
            f"{(rows, padded)} from cvfast.ops.pointwise.prepack_gpu"
        )
    if bias is None or bias.shape != (padded,) or bias.dtype != torch.float32:
        raise ValueError(
            f"{_OP}: {name}_bias must be float32 ({padded},) from cvfast.ops.pointwise.prepack_gpu"
        )


def source(
    problem: Problem, launch: Launch, pass_: str = "forward", activation: str = "relu6"
) -> tuple[ASTSource, dict[str, int]]:
    """What Triton compiles for a launch on contiguous, aligned tensors, and its options.

    Args:
        pass_: "forward".
        activation: behind expansion and depthwise convolution; the projection has none.
    """
    launches.validate(problem, launch, pass_)
    outputs = problem.out_channels or problem.hidden
    out_pixels = problem.out_height * problem.out_width
    x = (problem.channels * problem.height * problem.width, problem.channels * problem.width)
    out = (outputs * out_pixels, outputs * problem.out_width)
    plan = _plan(
        problem, launch, (activation, activation, "none"), (*x, problem.channels), (*out, outputs),
        (*out, outputs),
    )  # fmt: skip
    float32 = ("expand_bias", "depthwise", "project_bias")
    tensors = plan.kernel.arg_names[: 8 if problem.projects else 6]
    dtypes = [torch.float32 if name in float32 else problem.dtype for name in tensors]
    return compiler.source(plan.kernel, dtypes, plan.constants), plan.options
