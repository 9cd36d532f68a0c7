"""Depthwise convolution in Triton: forward, gradient of the image, gradient of weights and bias.

The work is bound by memory, so all turns on reading each pixel from DRAM once and spending few
instructions on it. One thread, here a *lane*, computes a patch of ROWS x COLUMNS results for VECTOR
adjacent channels, all in registers:

    for each row of the source that the patch needs:
        load its pixels, each once, as vectors of channels
        add each pixel, times the right weight, to every result that it belongs to
        store the rows of the patch that are now complete

so a 3x3 convolution with an 8x2 patch loads 10 x 4 pixels for 16 results, 2.5 each instead of 9,
and what neighbouring lanes load twice comes from the L1 cache. The loops over the patch are
unrolled when the kernel is compiled; what reads what is worked out by the functions of `Axis`.

The gradient of the image is the same kernel with source and result exchanged: x[p] was read for
y[o] at tap t if p = o * stride - padding + t * dilation, so it receives from every o that solves
this. The gradient of the weights multiplies the same pairs and sums over all patches instead; each
program sums its share of them and a second kernel adds the shares in a fixed order, so that the
result is the same, bit for bit, at every run.

Images are channels-last: adjacent channels, with any stride between pixels, rows and images.
Weights come packed by `cvfast.ops.depthwise.prepack`. Addresses are computed in 64 bits.
"""

from __future__ import annotations

import functools
import itertools
import math
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.compiler import ASTSource

from cvfast.launch.depthwise import Problem
from cvfast.launch.depthwise import triton as launches
from cvfast.launch.depthwise.triton import Launch

from . import compiler, epilogue
from .jit import jit, kernel
from .plan import Plan, Strides, check_image, strides

_MAX_RESIDENT = tl.constexpr(launches.MAX_RESIDENT)


@dataclass(frozen=True)
class Axis:
    """How the results of a patch read the source, along one axis.

    Attributes:
        taps, stride, padding, dilation: of the convolution.
        positions: number of results of the patch along this axis.
        transposed: the source is the gradient of the output, the result that of the image.
    """

    taps: int
    stride: int
    padding: int
    dilation: int
    positions: int
    transposed: bool


@triton.constexpr_function
def _source(axis, position, tap):
    """Where in the source `position` reads `tap`, relative to `_origin`; None if nowhere."""
    if not axis.transposed:
        return position * axis.stride + tap * axis.dilation
    offset = position + axis.padding - tap * axis.dilation
    return None if offset % axis.stride else offset // axis.stride


@triton.constexpr_function
def _sources(axis):
    """The offsets that a patch reads, ascending; a *step* is an index into them."""
    offsets = {_source(axis, i, tap) for i in range(axis.positions) for tap in range(axis.taps)}
    return sorted(offsets - {None})


@triton.constexpr_function
def _steps(axis):
    return len(_sources(axis))


@triton.constexpr_function
def _offset(axis, step):
    return _sources(axis)[step]


@triton.constexpr_function
def _step(axis, position, tap):
    """The step at which `position` reads `tap`; -1 if nowhere."""
    offset = _source(axis, position, tap)
    return -1 if offset is None else _sources(axis).index(offset)


@triton.constexpr_function
def _tap(axis, position, step):
    """The tap at which `position` reads the source of `step`; -1 if it does not."""
    for tap in range(axis.taps):
        if _step(axis, position, tap) == step:
            return tap
    return -1


@triton.constexpr_function
def _last_step(axis, position):
    """The step at which `position` is complete; the first, if it reads nothing."""
    return max(0, *(_step(axis, position, tap) for tap in range(axis.taps)))


@jit
def _origin(index, AXIS: tl.constexpr):
    """Where in the source patch number `index` along the axis begins, for `_source`."""
    if AXIS.transposed:
        return index * (AXIS.positions // AXIS.stride)
    else:
        return index * (AXIS.positions * AXIS.stride) - AXIS.padding


@triton.constexpr_function
def _positions(axis):
    return axis.positions


@triton.constexpr_function
def _taps(axis):
    return axis.taps


@jit
def _inside(position, size):
    """Whether 0 <= position < size, by one unsigned comparison."""
    return position.to(tl.uint32, bitcast=True) < size.to(tl.uint32, bitcast=True)


@jit
def _with(values, INDEX: tl.constexpr, value):
    """The tuple `values` with another value at INDEX."""
    return values[:INDEX] + (value,) + values[INDEX + 1 :]  # noqa: RUF005


@jit
def _add(values, INDEX: tl.constexpr, term):
    return _with(values, INDEX, values[INDEX] + term)


@jit
def _load_row(pointer, pixel_stride, column, width, mask, AXIS: tl.constexpr):
    """The pixels of one row that a patch reads, zeros outside the image."""
    pixels = ()
    for step in tl.static_range(_steps(AXIS)):
        inside = mask & _inside(column + _offset(AXIS, step), width)
        address = pointer + _offset(AXIS, step) * pixel_stride
        pixels += (tl.load(address, mask=inside, other=0.0),)
    return pixels


@jit
def _gradients(grads, outputs, ACTIVATION: tl.constexpr):
    """A row of gradients, before the activation that `outputs` went through."""
    row = ()
    for i in tl.static_range(len(grads)):
        row += (epilogue.gradient(grads[i], outputs[i], ACTIVATION),)
    return row


@jit
def _load_weights(pointer, mask, FIRST: tl.constexpr, COUNT: tl.constexpr):
    """COUNT rows of packed weights: a tap or the bias each."""
    rows = ()
    for i in tl.static_range(COUNT):
        rows += (tl.load(pointer + (FIRST + i) * 16, mask=mask, other=0.0),)
    return rows


@jit
def _accumulate(sums, pixels, weights, AXIS: tl.constexpr):
    """Adds pixels times weights to a row of results."""
    for position in tl.static_range(_positions(AXIS)):
        for tap in tl.static_range(_taps(AXIS)):
            if _step(AXIS, position, tap) >= 0:
                term = pixels[_step(AXIS, position, tap)].to(tl.float32) * weights[tap]
                sums = _add(sums, position, term)
    return sums


@jit
def _store_row(pointer, pixel_stride, sums, column, width, mask, ACTIVATION: tl.constexpr):
    for i in tl.static_range(len(sums)):
        y = epilogue.activate(sums[i], ACTIVATION).to(pointer.dtype.element_ty)
        tl.store(pointer + i * pixel_stride, y, mask=mask & (column + i < width))


@kernel(tensors=4)
def _patch_kernel(
    source,  # [N, height, width, channels]: the image x, or the gradient of the output
    output,  # shaped as source: the output, where its activation masks the gradient; else unread
    packed,  # float32 [MULTIPLIER, panels, taps + 1, 16]
    result,  # [N, result_height, result_width, channels]
    batch,
    channels,  # of the image x; like all strides, in units of ALIGN elements
    source_height,
    source_width,
    source_image_stride,
    source_row_stride,
    source_pixel_stride,
    output_image_stride,
    output_row_stride,
    output_pixel_stride,
    result_height,
    result_width,
    result_image_stride,
    result_row_stride,
    result_pixel_stride,
    vectors,  # vectors of channels that adjacent lanes take before the next patch begins
    VERTICAL: tl.constexpr,
    HORIZONTAL: tl.constexpr,
    MULTIPLIER: tl.constexpr,
    ACTIVATION: tl.constexpr,
    ALIGN: tl.constexpr,
    EVEN: tl.constexpr,  # the channels of every lane exist
    LANES: tl.constexpr,
    VECTOR: tl.constexpr,
    WIDE: tl.constexpr,  # lanes are counted in 64 bits, which costs instructions
):
    """Writes `result`: one patch of one image and VECTOR channels per lane."""
    TRANSPOSED: tl.constexpr = VERTICAL.transposed
    ROWS: tl.constexpr = VERTICAL.positions
    COLUMNS: tl.constexpr = HORIZONTAL.positions
    WIDTH: tl.constexpr = HORIZONTAL.taps
    TAPS: tl.constexpr = VERTICAL.taps * HORIZONTAL.taps
    STEPS: tl.constexpr = _steps(VERTICAL)
    # The gradient of an input channel sums over the output channels made from it.
    DEPTH: tl.constexpr = MULTIPLIER if TRANSPOSED else 1
    # Weights that fit are loaded once; those of large kernels are loaded again for every row.
    RESIDENT: tl.constexpr = TAPS * VECTOR <= _MAX_RESIDENT
    image_channels = channels * ALIGN
    result_channels = image_channels if TRANSPOSED else image_channels * MULTIPLIER

    # Lane -> image, row of patches, chunk of channels, column of patches, vector in the chunk.
    program = tl.program_id(0)
    if WIDE:
        program = program.to(tl.int64)
    lane = program * LANES + tl.arange(0, LANES)[:, None]
    across = (result_width + COLUMNS - 1) // COLUMNS
    down = (result_height + ROWS - 1) // ROWS
    chunks = (result_channels + vectors * VECTOR - 1) // (vectors * VECTOR)
    vector = lane % vectors
    lane = lane // vectors
    patch_column = lane % across
    lane = lane // across
    vector += lane % chunks * vectors
    lane = lane // chunks
    patch_row = lane % down
    image = lane // down
    if WIDE:
        vector = vector.to(tl.int32)
        patch_column = patch_column.to(tl.int32)
        patch_row = patch_row.to(tl.int32)
    row = patch_row * ROWS
    column = patch_column * COLUMNS
    element = tl.arange(0, VECTOR)[None, :]
    channel = vector * VECTOR + element
    exists = image < batch
    if not EVEN:
        exists = exists & (channel < result_channels)

    # The channels of the source, and the weights that lead from them to those of the result.
    panels = (image_channels + 15) // 16
    if TRANSPOSED or MULTIPLIER == 1:
        source_channel = channel * DEPTH
        part = vector % (16 // VECTOR) * VECTOR + element
        weight = packed + (vector // (16 // VECTOR) * ((TAPS + 1) * 16) + part)
    else:
        source_channel = channel // MULTIPLIER
        panel = channel % MULTIPLIER * panels + source_channel // 16
        weight = packed + (panel * ((TAPS + 1) * 16) + source_channel % 16)

    top = _origin(patch_row, VERTICAL)
    left = _origin(patch_column, HORIZONTAL)
    row_stride = source_row_stride.to(tl.int64) * ALIGN
    pixel_stride = source_pixel_stride.to(tl.int64) * ALIGN
    image_offset = image.to(tl.int64) * (source_image_stride.to(tl.int64) * ALIGN)
    source += image_offset + top * row_stride + left * pixel_stride + source_channel
    if ACTIVATION != "none" and TRANSPOSED:
        output_row = output_row_stride.to(tl.int64) * ALIGN
        output_pixel = output_pixel_stride.to(tl.int64) * ALIGN
        image_offset = image.to(tl.int64) * (output_image_stride.to(tl.int64) * ALIGN)
        output += image_offset + top * output_row + left * output_pixel + source_channel
    result_row = result_row_stride.to(tl.int64) * ALIGN
    result_pixel = result_pixel_stride.to(tl.int64) * ALIGN
    image_offset = image.to(tl.int64) * (result_image_stride.to(tl.int64) * ALIGN)
    result += image_offset + row * result_row + column * result_pixel + channel

    sums = ()
    bias = tl.full((LANES, VECTOR), 0.0, tl.float32)
    if not TRANSPOSED:
        bias += tl.load(weight + TAPS * 16, mask=exists, other=0.0)
    for _ in tl.static_range(ROWS):
        row_sums = ()
        for _ in tl.static_range(COLUMNS):
            row_sums += (bias,)
        sums += (row_sums,)

    for depth in tl.static_range(DEPTH):
        if RESIDENT:
            resident = ()
            for tap_row in tl.static_range(TAPS // WIDTH):
                resident += (_load_weights(weight, exists, tap_row * WIDTH, WIDTH),)
        for step in tl.static_range(STEPS + 1):
            if step < STEPS:
                inside = exists & _inside(top + _offset(VERTICAL, step), source_height)
                pointer = source + _offset(VERTICAL, step) * row_stride
                pixels = _load_row(pointer, pixel_stride, left, source_width, inside, HORIZONTAL)
                if ACTIVATION != "none" and TRANSPOSED:
                    pointer = output + _offset(VERTICAL, step) * output_row
                    y = _load_row(pointer, output_pixel, left, source_width, inside, HORIZONTAL)
                    pixels = _gradients(pixels, y, ACTIVATION)
            # After the next loads, which could not overtake a store.
            for i in tl.static_range(ROWS):
                if depth == DEPTH - 1 and _last_step(VERTICAL, i) == step - 1:
                    pointer = result + i * result_row
                    inside = exists & (row + i < result_height)
                    _store_row(
                        pointer, result_pixel, sums[i], column, result_width, inside,
                        "none" if TRANSPOSED else ACTIVATION,
                    )  # fmt: skip
            if step < STEPS:
                for i in tl.static_range(ROWS):
                    if _tap(VERTICAL, i, step) >= 0:
                        if RESIDENT:
                            weights = resident[_tap(VERTICAL, i, step)]
                        else:
                            weights = _load_weights(
                                weight, exists, _tap(VERTICAL, i, step) * WIDTH, WIDTH
                            )
                        sums = _with(sums, i, _accumulate(sums[i], pixels, weights, HORIZONTAL))
        if depth < DEPTH - 1:
            source += 1
            output += 1
            weight += panels * ((TAPS + 1) * 16)


@kernel(tensors=4)
def _weight_kernel(
    grad,  # [N, grad_height, grad_width, C · MULTIPLIER], of the output
    output,  # shaped as grad: the output, where its activation masks the gradient; else unread
    x,  # [N, height, width, C]
    shares,  # float32 [splits, MULTIPLIER, panels, taps + 1, 16]
    batch,
    channels,  # of x; like all strides, in units of ALIGN elements
    height,
    width,
    x_image_stride,
    x_row_stride,
    x_pixel_stride,
    grad_height,
    grad_width,
    grad_image_stride,
    grad_row_stride,
    grad_pixel_stride,
    output_image_stride,
    output_row_stride,
    output_pixel_stride,
    steps,  # times that a program reads PATCHES patches
    VERTICAL: tl.constexpr,  # its taps are the rows of the kernel that one program sums
    HORIZONTAL: tl.constexpr,
    KERNEL_HEIGHT: tl.constexpr,
    MULTIPLIER: tl.constexpr,
    ACTIVATION: tl.constexpr,
    ALIGN: tl.constexpr,
    EVEN: tl.constexpr,  # the channels of every tile exist
    PATCHES: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """Writes one share of the gradients of weights and bias, for CHANNELS channels of the output.

    A tile is [PATCHES, CHANNELS]: each thread sums over the patches that it reads, and what the
    threads of a channel hold is added at the end.
    """
    ROWS: tl.constexpr = VERTICAL.positions
    COLUMNS: tl.constexpr = HORIZONTAL.positions
    TAP_ROWS: tl.constexpr = VERTICAL.taps
    WIDTH: tl.constexpr = HORIZONTAL.taps
    TAPS: tl.constexpr = KERNEL_HEIGHT * HORIZONTAL.taps
    image_channels = channels * ALIGN
    panels = (image_channels + 15) // 16
    tiles = (panels * 16 * MULTIPLIER + CHANNELS - 1) // CHANNELS
    across = (grad_width + COLUMNS - 1) // COLUMNS
    down = (grad_height + ROWS - 1) // ROWS

    program = tl.program_id(0)
    channel = program % tiles * CHANNELS + tl.arange(0, CHANNELS)[None, :]
    program = program // tiles
    first_row = program % (KERNEL_HEIGHT // TAP_ROWS) * TAP_ROWS
    share = program // (KERNEL_HEIGHT // TAP_ROWS)
    x_channel = channel // MULTIPLIER if MULTIPLIER > 1 else channel

    x_row = x_row_stride.to(tl.int64) * ALIGN
    x_pixel = x_pixel_stride.to(tl.int64) * ALIGN
    grad_row = grad_row_stride.to(tl.int64) * ALIGN
    grad_pixel = grad_pixel_stride.to(tl.int64) * ALIGN
    output_row = output_row_stride.to(tl.int64) * ALIGN
    output_pixel = output_pixel_stride.to(tl.int64) * ALIGN

    sums = ()
    for _ in tl.static_range(TAP_ROWS * WIDTH + 1):
        sums += (tl.full((PATCHES, CHANNELS), 0.0, tl.float32),)
    step = 0
    # Not `for`: the interpreter of Triton 3.6 makes no range of scalars with NumPy 2.4.
    while step < steps:
        patch = (share * steps + step) * PATCHES + tl.arange(0, PATCHES)[:, None]
        column = patch % across * COLUMNS
        patch = patch // across
        row = patch % down * ROWS
        image = patch // down
        exists = image < batch
        if not EVEN:
            exists = exists & (channel < image_channels * MULTIPLIER)
        image = image.to(tl.int64)
        top = _origin(row // ROWS, VERTICAL) + first_row * VERTICAL.dilation
        left = _origin(column // COLUMNS, HORIZONTAL)

        grads = ()
        for i in tl.static_range(ROWS):
            inside = exists & _inside(row + i, grad_height)
            pointer = grad + image * (grad_image_stride.to(tl.int64) * ALIGN)
            pointer += (row + i) * grad_row + column * grad_pixel + channel
            g = _load_results(pointer, grad_pixel, column, grad_width, inside, HORIZONTAL)
            if ACTIVATION != "none":
                pointer = output + image * (output_image_stride.to(tl.int64) * ALIGN)
                pointer += (row + i) * output_row + column * output_pixel + channel
                y = _load_results(pointer, output_pixel, column, grad_width, inside, HORIZONTAL)
                g = _gradients(g, y, ACTIVATION)
            grads += (g,)
            for j in tl.static_range(COLUMNS):
                sums = _add(sums, TAP_ROWS * WIDTH, g[j].to(tl.float32))

        for source_row in tl.static_range(_steps(VERTICAL)):
            inside = exists & _inside(top + _offset(VERTICAL, source_row), height)
            pointer = x + image * (x_image_stride.to(tl.int64) * ALIGN)
            pointer += (top + _offset(VERTICAL, source_row)) * x_row + left * x_pixel + x_channel
            pixels = _load_row(pointer, x_pixel, left, width, inside, HORIZONTAL)
            for i in tl.static_range(ROWS):
                if _tap(VERTICAL, i, source_row) >= 0:
                    sums = _correlate(
                        sums, grads[i], pixels, _tap(VERTICAL, i, source_row), HORIZONTAL
                    )
        step += 1

    target = (channel % MULTIPLIER * panels + x_channel // 16) * ((TAPS + 1) * 16) + x_channel % 16
    target += share * (panels * (MULTIPLIER * (TAPS + 1) * 16))
    stored = channel < panels * 16 * MULTIPLIER
    for tap in tl.static_range(TAP_ROWS * WIDTH):
        total = tl.reduce(sums[tap], 0, _plus)[None, :]
        tl.store(shares + target + (first_row * WIDTH + tap) * 16, total, mask=stored)
    total = tl.reduce(sums[TAP_ROWS * WIDTH], 0, _plus)[None, :]
    tl.store(shares + target + TAPS * 16, total, mask=stored & (first_row == 0))


@jit
def _load_results(pointer, pixel_stride, column, width, mask, AXIS: tl.constexpr):
    """A patch's row of what lies in the place of its results; zeros outside the image."""
    row = ()
    for i in tl.static_range(_positions(AXIS)):
        inside = mask & (column + i < width)
        row += (tl.load(pointer + i * pixel_stride, mask=inside, other=0.0),)
    return row


@jit
def _correlate(sums, grads, pixels, TAP_ROW: tl.constexpr, AXIS: tl.constexpr):
    """Adds to the sums of one row of taps the gradients times the pixels that they were read at."""
    for tap in tl.static_range(_taps(AXIS)):
        for i in tl.static_range(_positions(AXIS)):
            term = grads[i].to(tl.float32) * pixels[_step(AXIS, i, tap)].to(tl.float32)
            sums = _add(sums, TAP_ROW * _taps(AXIS) + tap, term)
    return sums


@jit
def _plus(a, b):
    return a + b


@kernel(tensors=2)
def _sum_kernel(shares, result, count, size, SHARES: tl.constexpr, ELEMENTS: tl.constexpr):
    """result [size] = the sum of shares [count, size], in a fixed order."""
    element = tl.program_id(0) * ELEMENTS + tl.arange(0, ELEMENTS)[None, :]
    total = tl.full((SHARES, ELEMENTS), 0.0, tl.float32)
    first = 0
    while first < count:
        share = first + tl.arange(0, SHARES)[:, None]
        inside = (share < count) & (element < size)
        total += tl.load(shares + share.to(tl.int64) * size + element, mask=inside, other=0.0)
        first += SHARES
    total = tl.reduce(total, 0, _plus)[None, :]
    tl.store(result + element, total, mask=element < size)


def forward(
    x: Tensor,
    packed: Tensor,
    problem: Problem,
    launch: Launch,
    activation: str = "none",
    out: Tensor | None = None,
) -> Tensor:
    """The output: convolution, bias and activation.

    Args:
        x: [N, C, H, W], float32, float16 or bfloat16, adjacent channels; on a CUDA device, or on
            the CPU where TRITON_INTERPRET=1.
        packed: float32 [m, ceil(C / 16), kh·kw + 1, 16], from `cvfast.ops.depthwise.prepack`.
        problem: the geometry of x and the convolution.
        launch: see `cvfast.launch.depthwise.triton`.
        activation: "none", "relu", "relu6" or "hardswish".
        out: where the output is written, or None for a new tensor: [N, m·C, H', W'], dtype of x,
            adjacent channels; images, rows and pixels may lie apart, as in a channel slice.

    Returns:
        [N, m·C, H', W'], dtype of x: `out`, or channels-last.

    Raises:
        ValueError: if the tensors do not fit the problem, or the problem the launch parameters.
    """
    _check_activation(activation, ("none", "relu", "relu6", "hardswish"))
    _check_image("x", x, problem, (problem.channels, problem.height, problem.width))
    if out is not None:
        _check_image("out", out, problem, launches.result_size(problem, "forward"))
    return _patches(x, None, packed, problem, launch, "forward", activation, out)


def backward_input(
    grad: Tensor,
    output: Tensor | None,
    packed: Tensor,
    problem: Problem,
    launch: Launch,
    activation: str = "none",
) -> Tensor:
    """The gradient of the image.

    Args:
        grad: [N, m·C, H', W'], of the output; adjacent channels.
        output: shaped as grad: the forward pass's output. Unread if activation is "none".
        packed, problem, launch: as for `forward`.
        activation: "none", "relu" or "relu6": the one that the output went through.

    Returns:
        [N, C, H, W], channels-last, dtype of grad.

    Raises:
        ValueError: as `forward`.
    """
    output = _check_gradient(grad, output, problem, activation)
    return _patches(grad, output, packed, problem, launch, "backward_input", activation)


def backward_weight(
    grad: Tensor,
    output: Tensor | None,
    x: Tensor,
    problem: Problem,
    launch: Launch,
    activation: str = "none",
) -> Tensor:
    """The gradients of weights and bias; the same, bit for bit, at every run.

    Args:
        grad, output, activation: as for `backward_input`.
        x, problem, launch: as for `forward`.

    Returns:
        float32 [m, ceil(C / 16), kh·kw + 1, 16], laid out as `packed`: the bias's gradient in the
        last row, zeros beyond the last channel.

    Raises:
        ValueError: as `forward`.
    """
    output = _check_gradient(grad, output, problem, activation)
    _check_image("x", x, problem, (problem.channels, problem.height, problem.width))
    images = [x, grad] if output is None else [x, grad, output]
    plan = _plan(problem, launch, "backward_weight", activation, *map(strides, images))
    result = grad.new_empty(_packed_shape(problem), dtype=torch.float32)
    shares = result if launch.splits == 1 else result.new_empty((launch.splits, *result.shape))
    plan.start(grad, grad if output is None else output, x, shares)
    if launch.splits > 1:
        size = result.numel()
        with torch.cuda.device_of(result):
            _sum_kernel[(-(-size // _SUM_ELEMENTS),)](
                shares, result, launch.splits, size, SHARES=_SUM_SHARES, ELEMENTS=_SUM_ELEMENTS
            )
    return result


_SUM_SHARES, _SUM_ELEMENTS = 32, 64


def _patches(
    source: Tensor,
    output: Tensor | None,
    packed: Tensor,
    problem: Problem,
    launch: Launch,
    pass_: str,
    activation: str,
    result: Tensor | None = None,
) -> Tensor:
    if packed.shape != _packed_shape(problem) or packed.dtype != torch.float32:
        raise ValueError(
            f"depthwise: packed is {packed.dtype} {tuple(packed.shape)}, expected float32 "
            f"{_packed_shape(problem)} from cvfast.ops.depthwise.prepack"
        )
    if result is None:
        result = torch.empty(
            (problem.batch, *launches.result_size(problem, pass_)),
            dtype=source.dtype,
            device=source.device,
            memory_format=torch.channels_last,
        )
    images = [source, result] if output is None else [source, output, result]
    plan = _plan(problem, launch, pass_, activation, *map(strides, images))
    if result.numel():
        plan.start(source, source if output is None else output, packed, result)
    return result


@functools.lru_cache(maxsize=4096)
def _plan(
    problem: Problem, launch: Launch, pass_: str, activation: str, *image_strides: Strides
) -> Plan:
    """How the kernel of `pass_` is launched on images of these strides, in its order of tensors.

    Strides are those of source, output and result, in the gradient of the weights of x, grad and
    output; an output that is not read may be left out.
    """
    launches.validate(problem, launch, pass_)
    align = math.gcd(launch.vector, problem.channels, *itertools.chain(*image_strides))
    units = [tuple(stride // align for stride in image) for image in image_strides]
    image, out = (problem.height, problem.width), (problem.out_height, problem.out_width)
    constants: dict[str, Any] = {
        "MULTIPLIER": problem.multiplier,
        "ACTIVATION": activation,
        "ALIGN": align,
        "EVEN": launches.even(problem, launch, pass_),
    }
    taps = list(problem.kernel)
    if pass_ == "backward_weight":
        taps[0] = launches.tap_rows(problem, launch)
        x, grad, output = (*units, *units[1:])[:3]
        sizes = (*image, *x, *out, *grad, *output, launches.steps(problem, launch))
        constants["KERNEL_HEIGHT"] = problem.kernel[0]
        constants["PATCHES"] = launch.patches
        constants["CHANNELS"] = launch.channels
    else:
        source, output, result = units[0], units[-2], units[-1]
        source_size, size = (image, out) if pass_ == "forward" else (out, image)
        vectors = launch.channels // launch.vector
        sizes = (*source_size, *source, *output, *size, *result, vectors)
        constants["LANES"] = launch.lanes
        constants["VECTOR"] = launch.vector
        constants["WIDE"] = launches.lanes(problem, launch, pass_) + launch.lanes > 2**31
    for i, name in enumerate(("VERTICAL", "HORIZONTAL")):
        constants[name] = Axis(
            taps=taps[i],
            stride=problem.stride[i],
            padding=problem.padding[i],
            dilation=problem.dilation[i],
            positions=(launch.rows, launch.columns)[i],
            transposed=pass_ == "backward_input",
        )
    return Plan(
        op="depthwise",
        kernel=_weight_kernel if pass_ == "backward_weight" else _patch_kernel,
        grid=launches.grid(problem, launch, pass_),
        sizes=(problem.batch, problem.channels // align, *sizes),
        constants=constants,
        options={"num_warps": launch.num_warps, "num_stages": launch.num_stages},
    )


def _packed_shape(problem: Problem) -> tuple[int, int, int, int]:
    taps = problem.kernel[0] * problem.kernel[1]
    return problem.multiplier, -(-problem.channels // 16), taps + 1, 16


def _check_activation(activation: str, known: tuple[str, ...]) -> None:
    if activation not in known:
        raise ValueError(
            f"depthwise: unknown activation {activation!r}; expected {', '.join(known)}"
        )


def _check_image(name: str, image: Tensor, problem: Problem, size: tuple[int, int, int]) -> None:
    check_image("depthwise", name, image, problem.dtype, (problem.batch, *size))


def _check_gradient(
    grad: Tensor, output: Tensor | None, problem: Problem, activation: str
) -> Tensor | None:
    """The output, where its activation is to be undone."""
    _check_activation(activation, ("none", "relu", "relu6"))
    size = (problem.out_channels, problem.out_height, problem.out_width)
    _check_image("grad", grad, problem, size)
    if activation == "none":
        return None
    if output is None:
        raise ValueError(f"depthwise: the gradient of {activation} needs the output")
    _check_image("output", output, problem, size)
    return output


def source(
    problem: Problem, launch: Launch, pass_: str, activation: str = "relu6"
) -> tuple[ASTSource, dict[str, int]]:
    """What Triton compiles for a launch on contiguous, aligned tensors, and its options.

    The kernel that adds the shares of the weights' gradient is left out: it is a plain sum.
    """
    x = (problem.channels, problem.height, problem.width)
    out = (problem.out_channels, problem.out_height, problem.out_width)
    images = {
        "forward": [x, out],
        "backward_input": [out, out, x],
        "backward_weight": [x, out, out],
    }[pass_]
    contiguous = [(c * h * w, c * w, c) for c, h, w in images]
    plan = _plan(problem, launch, pass_, activation, *contiguous)
    tensors = plan.kernel.arg_names[:4]
    float32 = ("packed", "shares")
    dtypes = [torch.float32 if name in float32 else problem.dtype for name in tensors]
    return compiler.source(plan.kernel, dtypes, plan.constants), plan.options
