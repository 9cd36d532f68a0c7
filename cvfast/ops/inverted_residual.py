"""Inverted residual (MobileNet v2, v3): expansion, depthwise convolution, projection, in one pass.

hidden = expand_activation(expand · x + expand_bias)
d = depthwise_activation(hidden ⋆ depthwise + depthwise_bias)
out = activation(project · d + project_bias + residual)

Without the expansion, hidden = x: MobileNet v1's separable convolution, and the first block of v2.
Blocks with squeeze-excite stop at d (`inverted_residual_squeeze`), whose means decide the gate; the
projection behind the gate is a `pointwise`. Batch norm is folded before (`fold_batch_norm`).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cvfast import backends, extension
from cvfast.backends import Reason
from cvfast.launch import table
from cvfast.launch.inverted_residual import Problem
from cvfast.ops import _example, _flops, _gradient, _packing
from cvfast.ops._example import Example
from cvfast.ops.activation import Activation
from cvfast.ops.depthwise import prepack as prepack_depthwise
from cvfast.ops.pointwise import ACTIVATIONS, KERNEL_DTYPES, prepack_gpu
from cvfast.ops.pointwise import prepack as prepack_pointwise
from cvfast.ops.pointwise import reference as pointwise_reference
from cvfast.perf import devices, predict

GPU_BACKENDS = ("triton", "cuda")

BACKEND_DTYPES = {
    "cpu": KERNEL_DTYPES,
    "triton": KERNEL_DTYPES,
    "cuda": (torch.bfloat16, torch.float16),  # the tensor cores' float32 products are TF32's
}
GPU_ACTIVATIONS = ("none", "relu", "relu6", "hardswish")

_TAGS = [torch.Tag.needs_fixed_stride_order, torch.Tag.pt2_compliant_tag]
_WEIGHTS = "Tensor? expand, Tensor? expand_bias, Tensor depthwise, Tensor? depthwise_bias"
_GEOMETRY = "int[2] stride, int[2] padding, str expand_activation, str depthwise_activation"
_PACKED_GEOMETRY = (
    "int[2] kernel_size, int[2] stride, int[] padding, str expand_activation, "
    "str depthwise_activation"
)
_BLOCK = "Tensor x, Tensor? expand, Tensor depthwise, Tensor project, Tensor? residual, int hidden"
_SQUEEZE = "Tensor x, Tensor? expand, Tensor depthwise, int hidden"

_UNPACKED = "Tensor x, Tensor? expand, Tensor? expand_bias, Tensor depthwise"
_GPU_BLOCK = f"{_UNPACKED}, Tensor project, Tensor project_bias, Tensor? residual, int hidden"
_GPU_SQUEEZE = f"{_UNPACKED}, int hidden"
_OUT = "*, Tensor(a!) out"
_SQUEEZE_OUT = "*, Tensor(a!) out, Tensor(b!) row_means"

_library = torch.library.Library("cvfast", "FRAGMENT")
_schemas = [
    f"inverted_residual(Tensor x, {_WEIGHTS}, Tensor project, Tensor? project_bias, "
    f'Tensor? residual, {_GEOMETRY}, str activation, str backend="auto") -> Tensor',
    f"inverted_residual_squeeze(Tensor x, {_WEIGHTS}, {_GEOMETRY}, "
    'str backend="auto") -> (Tensor, Tensor)',
]
for _backend, _block, _squeeze in (
    ("cpu", _BLOCK, _SQUEEZE),
    *((name, _GPU_BLOCK, _GPU_SQUEEZE) for name in GPU_BACKENDS),
):
    _schemas += [
        f"inverted_residual_{_backend}({_block}, int out_channels, {_PACKED_GEOMETRY}, "
        "str activation) -> Tensor",
        f"inverted_residual_{_backend}.out({_block}, {_PACKED_GEOMETRY}, str activation, "
        f"{_OUT}) -> ()",
        f"inverted_residual_squeeze_{_backend}({_squeeze}, {_PACKED_GEOMETRY}) -> (Tensor, Tensor)",
        f"inverted_residual_squeeze_{_backend}.out({_squeeze}, {_PACKED_GEOMETRY}, "
        f"{_SQUEEZE_OUT}) -> ()",
    ]
for _schema in _schemas:
    _library.define(_schema, tags=_TAGS)
# What csrc/cuda/bindings.cpp implements; `launch` comes from cvfast.launch.inverted_residual.cuda.
for _schema in (
    f"inverted_residual_cuda_launch({_GPU_BLOCK}, {_PACKED_GEOMETRY}, str activation, "
    f"int[] launch, {_OUT}) -> ()",
    f"inverted_residual_squeeze_cuda_launch({_GPU_SQUEEZE}, {_PACKED_GEOMETRY}, int[] launch, "
    f"{_SQUEEZE_OUT}) -> ()",
    "inverted_residual_cuda_shared_bytes(int channels, int hidden, int out_channels, int[2] size, "
    "int kernel, int stride, bool expands, int[] launch) -> int",
):
    _library.define(_schema)


def inverted_residual(
    x: Tensor,
    expand: Tensor | None,
    expand_bias: Tensor | None,
    depthwise: Tensor,
    depthwise_bias: Tensor | None,
    project: Tensor,
    project_bias: Tensor | None,
    *,
    residual: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 1,
    expand_activation: str = "relu6",
    depthwise_activation: str = "relu6",
    activation: str = "none",
    backend: str = "auto",
) -> Tensor:
    """Expansion, depthwise convolution and projection in one pass.

    Args:
        x: [N, C, H, W]. The kernels take float32 (`cuda` does not), bfloat16 and float16 in
            channels-last layout (adjacent channels; images, rows and pixels may lie apart, as in a
            channel slice), where no gradient is asked for. Everything else runs on the reference.
        expand: [E, C, 1, 1], or None where E = C and the depthwise convolution reads x itself; its
            dtype, and that of everything below, is x's.
        expand_bias: [E] or None.
        depthwise: [E, 1, kh, kw].
        depthwise_bias: [E] or None.
        project: [O, E, 1, 1].
        project_bias: [O] or None.
        residual: [N, O, H', W'] or None: added before `activation`; often x itself.
        stride, padding: of the depthwise convolution; one number, or (vertical, horizontal).
        expand_activation, depthwise_activation, activation: "none", "relu", "relu6", "hardswish" or
            "hardsigmoid".
        backend: "auto", "reference", "cpu", "triton" or "cuda".

    Returns:
        [N, O, H', W'] in the dtype of x: channels-last from the kernel, else as PyTorch lays it
        out.

    Raises:
        ValueError: for arguments that do not fit together, or an unknown activation or backend.
        TypeError: for dtypes that differ or are not floating point.
        cvfast.backends.Unsupported: if the `backend` that was asked for cannot serve the call.
    """
    stride, padding = _pair("stride", stride), _pair("padding", padding)
    activations = expand_activation, depthwise_activation, activation
    weights = expand, expand_bias, depthwise, depthwise_bias, project, project_bias
    _validate(x, *weights, residual, stride, padding, activations)
    call = _problem_of(x, *weights, residual, stride, padding)
    chosen = backends.select(
        "inverted_residual", backend, x.device, x, residual, weights, call, activations
    )
    arguments = (x, *weights, residual, stride, padding, *activations)
    if chosen == "reference":
        return reference(*arguments)
    return torch.ops.cvfast.inverted_residual(*arguments, chosen)


def inverted_residual_squeeze(
    x: Tensor,
    expand: Tensor | None,
    expand_bias: Tensor | None,
    depthwise: Tensor,
    depthwise_bias: Tensor | None,
    *,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 1,
    expand_activation: str = "hardswish",
    depthwise_activation: str = "hardswish",
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """The first half of a block with squeeze-excite: expansion, depthwise convolution, and means.

    Arguments and errors are those of `inverted_residual`.

    Returns:
        d [N, E, H', W'], and its means over each row, [N, E, H', 1], both in the dtype of x. The
        mean of the means, over H', is what squeeze-excite's first layer reads.
    """
    stride, padding = _pair("stride", stride), _pair("padding", padding)
    activations = expand_activation, depthwise_activation
    weights = expand, expand_bias, depthwise, depthwise_bias
    _validate(x, *weights, None, None, None, stride, padding, activations)
    call = _problem_of(x, *weights, None, None, None, stride, padding)
    chosen = backends.select(
        "inverted_residual", backend, x.device, x, None, weights, call, activations
    )
    arguments = (x, *weights, stride, padding, *activations)
    if chosen == "reference":
        return squeeze_reference(*arguments)
    return torch.ops.cvfast.inverted_residual_squeeze(*arguments, chosen)


def reference(
    x: Tensor,
    expand: Tensor | None,
    expand_bias: Tensor | None,
    depthwise: Tensor,
    depthwise_bias: Tensor | None,
    project: Tensor,
    project_bias: Tensor | None,
    residual: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    expand_activation: str,
    depthwise_activation: str,
    activation: str,
) -> Tensor:
    """The definition in plain PyTorch: any device, dtype and layout."""
    d, _ = squeeze_reference(
        x, expand, expand_bias, depthwise, depthwise_bias, stride, padding, expand_activation,
        depthwise_activation,
    )  # fmt: skip
    return pointwise_reference(d, project, project_bias, residual=residual, activation=activation)


def squeeze_reference(
    x: Tensor,
    expand: Tensor | None,
    expand_bias: Tensor | None,
    depthwise: Tensor,
    depthwise_bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    expand_activation: str,
    depthwise_activation: str,
) -> tuple[Tensor, Tensor]:
    """The definition of the first half: d, and its means over each row."""
    if expand is not None:
        x = pointwise_reference(x, expand, expand_bias, activation=expand_activation)
    y = F.conv2d(x, depthwise, depthwise_bias, tuple(stride), tuple(padding), groups=x.shape[1])
    y = Activation(depthwise_activation)(y)
    return y, y.mean(3, keepdim=True)


def _check(
    backend: str,
    x: Tensor,
    residual: Tensor | None = None,
    weights: Sequence[Tensor | None] = (),
    problem: Problem | None = None,
    activations: Sequence[str] = (),
) -> Reason | None:
    if (reason := backends.wrong_device(backend, x.device)) is not None:
        return reason
    if x.dtype not in BACKEND_DTYPES[backend]:
        taken = ", ".join(str(d).removeprefix("torch.") for d in BACKEND_DTYPES[backend])
        return Reason("dtype", f"x is {x.dtype}; the kernel takes {taken}")
    for name, tensor in (("x", x), ("residual", residual)):
        if tensor is not None and (reason := backends.wrong_layout(tensor, name)) is not None:
            return reason
    if torch.is_grad_enabled() and any(
        t is not None and t.requires_grad for t in (x, residual, *weights)
    ):
        return Reason("gradient", "the kernel has no gradient; run it under torch.no_grad()")
    if backend in GPU_BACKENDS and problem is not None:
        return _gpu_check(backend, problem, activations)
    return None


def _gpu_check(backend: str, problem: Problem, activations: Sequence[str]) -> Reason | None:
    for activation in activations:
        if activation not in GPU_ACTIVATIONS:
            return Reason("activation", f"the kernel does not fuse {activation}")
    text = table.parameters("inverted_residual", backend).unsupported(problem)
    return None if text is None else Reason("shape", text)


for _backend in ("cpu", *GPU_BACKENDS):
    backends.register("inverted_residual", _backend)(functools.partial(_check, _backend))


def output_size(
    size: Sequence[int], kernel_size: Sequence[int], stride: Sequence[int], padding: Sequence[int]
) -> tuple[int, int]:
    """(H', W') of a block over an image of `size` (H, W).

    Args:
        padding: (vertical, horizontal), or (top, left, bottom, right).
    """
    h, w = (
        (size[i] + padding[i] + padding[i - 2] - kernel_size[i]) // stride[i] + 1 for i in (0, 1)
    )
    return h, w


def flops(
    x_shape: Sequence[int],
    hidden: int,
    out_channels: int,
    kernel_size: Sequence[int],
    out_size: Sequence[int],
    *,
    expand: bool = True,
) -> int:
    """Multiplications and additions of a block, as `torch.utils.flop_counter` counts convolutions.

    Args:
        x_shape: [N, C, H, W].
        hidden: channels of the depthwise convolution.
        out_channels: of the projection; 0 without one.
        out_size: (H', W').
        expand: whether there is an expansion.
    """
    n, channels, h, w = x_shape
    pixels = n * out_size[0] * out_size[1]
    count = pixels * hidden * (kernel_size[0] * kernel_size[1] + out_channels)
    return 2 * (count + (n * h * w * channels * hidden if expand else 0))


def bytes_moved(
    x_shape: Sequence[int],
    hidden: int,
    out_channels: int,
    kernel_size: Sequence[int],
    out_size: Sequence[int],
    dtype: torch.dtype = torch.float32,
    *,
    expand: bool = True,
) -> int:
    """Least traffic of a block: x and the packed weights read once, the output written once.

    Arguments are those of `flops`. A residual other than x comes on top; the three layers run
    one by one also write and read the hidden tensor, before and behind the depthwise convolution.
    """
    n, channels, h, w = x_shape
    images = n * (h * w * channels + out_size[0] * out_size[1] * (out_channels or hidden))
    weight_size = 2 if dtype == torch.bfloat16 else 4
    products = (channels if expand else 0) + out_channels
    taps = kernel_size[0] * kernel_size[1] + 1
    biases = (hidden if expand else 0) + out_channels
    return images * dtype.itemsize + weight_size * hidden * products + 4 * (hidden * taps + biases)


# What the fused kernel keeps out of memory must exceed this. Measured on Zen 5 (1 MB of L2 a core)
# over the 33 blocks of MobileNet v1, v2 and v3-large, at batch 1 and 8, one and two threads.
_LEAST_BYTES = {True: 512 * 1024, False: 1024 * 1024}  # with and without an expansion
# Lower images lose to the three kernels what their bands expand twice; so do bands of few rows. The
# first half of a squeeze-excite block keeps less out of memory.
_LEAST_HEIGHT, _LEAST_SQUEEZE_HEIGHT = 14, 28
_LEAST_BAND = 7
# Hidden channels that the kernel takes at once (kMostChunk and kMostChunkAlone of its source). With
# more, AMX multiplies few at a time: without such blocks MobileNet v1 in bfloat16, batch 8, takes
# 0.84 of the time on Granite Rapids; v2, v3-large and Lite0 0.96 to 1.02.
_MOST_HIDDEN_AMX = {True: 192, False: 256}


def fuses(
    x_shape: Sequence[int],
    hidden: int,
    out_channels: int | None,
    *,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    expands: bool,
    dtype: torch.dtype = torch.float32,
    threads: int = 1,
) -> bool:
    """Whether a block runs faster in one kernel than in two or three, each in one arena.

    The tensors between the layers must be too large for the L2 cache, and the image high enough:
    neighbouring threads both expand the rows between them.

    Args:
        x_shape: [N, C, H, W].
        hidden: channels of the depthwise convolution.
        out_channels: of the projection; None for the first half of a block with squeeze-excite.
        expands: whether there is an expansion.
        threads: that the plan runs on.
    """
    n, _, height, width = x_shape
    padding = [k // 2 for k in kernel_size]
    out_height, out_width = output_size((height, width), kernel_size, stride, padding)
    squeeze = out_channels is None
    if squeeze and not expands:
        return False
    if dtype == torch.float32:
        # Products that AMX can multiply run faster alone: the block multiplies floats as they are.
        products = []
        if expands:
            products.append((n * height * width, x_shape[1], hidden))
        if out_channels is not None:
            products.append((n * out_height * out_width, hidden, out_channels))
        if all(extension.cpu_amx_takes_floats(*product) for product in products):
            return False
    amx = dtype == torch.bfloat16 and extension.cpu_isa() == "avx512_amx"
    if amx and hidden > _MOST_HIDDEN_AMX[expands]:
        return False
    pixels = height * width if expands else out_height * out_width
    spared = n * pixels * hidden * dtype.itemsize
    bands = -(-threads // max(n, 1))
    least_height = _LEAST_SQUEEZE_HEIGHT if squeeze else _LEAST_HEIGHT
    return spared > _LEAST_BYTES[expands] and out_height >= max(least_height, bands * _LEAST_BAND)


_GPU_MARGIN = 1.2
"""How much faster one kernel must be than three by prediction: neither was measured yet."""


def fuses_on_gpu(problem: Problem, device: devices.Device, backend: str) -> bool:
    """Whether a block should run faster in one kernel of a GPU than in two or three.

    Fused, the hidden tensors stay out of memory, but each pixel is expanded several times and
    fewer programs share the work: it pays where the hidden tensors are large.

    Args:
        problem: the block, or its first half, whose means then count as one more kernel.
        device: where; it need not be here.
        backend: "triton" or "cuda".
    """
    parameters = table.parameters("inverted_residual", backend)
    if parameters.unsupported(problem) is not None:
        return False
    try:
        launch = table.choose("inverted_residual", backend, problem, "forward", device)
    except ValueError:  # no launch fits on the device
        return False
    fused = parameters.predict(problem, launch, "forward", device)
    return _GPU_MARGIN * fused < separate_seconds(problem, device)


def separate_seconds(problem: Problem, device: devices.Device) -> float:
    """Predicted seconds of a block on a GPU in kernels of its own for each layer.

    Each takes what device memory or arithmetic need, whichever is longer. A hidden tensor that
    fills no more than half of the L2 cache is read from there, and need not leave it.
    """
    item = problem.dtype.itemsize
    pixels = problem.batch * problem.height * problem.width
    out_pixels = problem.batch * problem.out_height * problem.out_width

    def kept(count: int) -> int:
        return 0 if 2 * count * item <= device.l2_bytes else count * item

    image = pixels * problem.channels * item
    expanded, filtered = kept(pixels * problem.hidden), kept(out_pixels * problem.hidden)
    taps = problem.kernel[0] * problem.kernel[1]
    # Of each kernel, bytes and multiply-adds.
    expansion = (image + expanded, pixels * problem.hidden * problem.channels)
    filtering = (expanded if problem.expands else image) + filtered
    projection = (
        filtered + out_pixels * problem.out_channels * item * (2 if problem.residual else 1),
        out_pixels * problem.hidden * problem.out_channels,
    )
    if not problem.projects:
        # Another kernel reads the result for its means, as a small one does behind the fused.
        filtering += out_pixels * problem.hidden * item
    matrix = device.fp32_flops
    if problem.dtype != torch.float32 or problem.tf32:
        matrix = device.matrix_flops(problem.dtype)
    kernels = [(filtering, out_pixels * problem.hidden * taps, device.fp32_flops)]
    kernels += [(*expansion, matrix)] if problem.expands else []
    kernels += [(*projection, matrix)] if problem.projects else []
    bandwidth = predict.COPY_SHARE * device.dram_bandwidth
    return sum(
        predict.LAUNCH + max(predict.LATENCY + moved / bandwidth, 2 * multiply_adds / rate)
        for moved, multiply_adds, rate in kernels
    )


def _problem(
    x: Tensor,
    hidden: int,
    out_channels: int,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    *,
    expands: bool,
    residual: bool,
) -> Problem:
    if len(padding) not in (2, 4) or min(padding) < 0:
        raise ValueError(
            f"inverted_residual: padding={list(padding)}: expected (vertical, horizontal) or (top, "
            "left, bottom, right), none negative"
        )
    batch, channels, height, width = x.shape
    # Tuned tables know symmetric padding by two numbers.
    before, after = tuple(padding[:2]), tuple(padding[-2:])
    return Problem(
        batch,
        channels,
        hidden,
        out_channels,
        height,
        width,
        kernel=(kernel_size[0], kernel_size[1]),
        stride=(stride[0], stride[1]),
        padding=before if before == after else before + after,
        expands=expands,
        residual=residual,
        dtype=x.dtype,
        tf32=_packing.rounds_to_tf32(x.dtype),
    )


def _problem_of(
    x: Tensor,
    expand: Tensor | None,
    expand_bias: Tensor | None,
    depthwise: Tensor,
    depthwise_bias: Tensor | None,
    project: Tensor | None,
    project_bias: Tensor | None,
    residual: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
) -> Problem:
    """Of the arguments of `inverted_residual`; without a projection, of its first half."""
    return _problem(
        x,
        depthwise.shape[0],
        0 if project is None else project.shape[0],
        depthwise.shape[2:],
        stride,
        padding,
        expands=expand is not None,
        residual=residual is not None,
    )


def problem(
    x: Tensor,
    expand: Tensor | None,
    expand_bias: Tensor | None,
    depthwise: Tensor,
    project: Tensor,
    project_bias: Tensor,
    residual: Tensor | None,
    hidden: int,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    expand_activation: str,
    depthwise_activation: str,
    activation: str,
    *,
    out: Tensor,
) -> Problem:
    """What the GPU operators choose their launch parameters by; arguments are those of `.out`."""
    del expand_bias, depthwise, project, project_bias
    del expand_activation, depthwise_activation, activation
    return _problem(
        x,
        hidden,
        out.shape[1],
        kernel_size,
        stride,
        padding,
        expands=expand is not None,
        residual=residual is not None,
    )


def squeeze_problem(
    x: Tensor,
    expand: Tensor | None,
    expand_bias: Tensor | None,
    depthwise: Tensor,
    hidden: int,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    expand_activation: str,
    depthwise_activation: str,
    *,
    out: Tensor,
    row_means: Tensor,
) -> Problem:
    """The same of the first half, `inverted_residual_squeeze`."""
    del expand_bias, depthwise, expand_activation, depthwise_activation, out, row_means
    return _problem(
        x,
        hidden,
        0,
        kernel_size,
        stride,
        padding,
        expands=expand is not None,
        residual=False,
    )


def _pair(name: str, value: int | Sequence[int]) -> tuple[int, int]:
    if isinstance(value, int):
        return value, value
    if len(value) != 2:
        raise ValueError(f"inverted_residual: {name}={value!r}: expected one number or two")
    return value[0], value[1]


def _validate(
    x: Tensor,
    expand: Tensor | None,
    expand_bias: Tensor | None,
    depthwise: Tensor,
    depthwise_bias: Tensor | None,
    project: Tensor | None,
    project_bias: Tensor | None,
    residual: Tensor | None,
    stride: tuple[int, int],
    padding: tuple[int, int],
    activations: Sequence[str],
) -> None:
    for activation in activations:
        if activation not in ACTIVATIONS:
            raise ValueError(
                f"inverted_residual: unknown activation {activation!r}; expected "
                f"{', '.join(ACTIVATIONS)}"
            )
    if x.dim() != 4 or min(x.shape[1:]) < 1:
        raise ValueError(
            f"inverted_residual: x has shape {tuple(x.shape)}, expected [N, C, H, W], of which "
            "only N may be zero"
        )
    if not x.dtype.is_floating_point:
        raise TypeError(f"inverted_residual: x is {x.dtype}, expected a floating-point dtype")
    for name, values, least in (("stride", stride, 1), ("padding", padding, 0)):
        if min(values) < least:
            raise ValueError(f"inverted_residual: {name}={values}: expected at least {least}")
    if expand is None and expand_bias is not None:
        raise ValueError("inverted_residual: expand_bias is given but expand is not")
    n, channels, *size = x.shape
    if expand is not None and (expand.dim() != 4 or expand.shape[0] < 1):
        raise ValueError(
            f"inverted_residual: expand has shape {tuple(expand.shape)}, expected "
            f"[E, {channels}, 1, 1]"
        )
    hidden = channels if expand is None else expand.shape[0]
    if depthwise.dim() != 4 or depthwise.shape[:2] != (hidden, 1):
        raise ValueError(
            f"inverted_residual: depthwise has shape {tuple(depthwise.shape)}, expected "
            f"[{hidden}, 1, kh, kw]"
        )
    out_size = output_size(size, depthwise.shape[2:], stride, padding)
    if min(out_size) < 1:
        raise ValueError(
            f"inverted_residual: a {depthwise.shape[2]}x{depthwise.shape[3]} kernel is larger than "
            f"the image {size[0]}x{size[1]} with padding {padding}"
        )
    if project is not None and (project.dim() != 4 or project.shape[0] < 1):
        raise ValueError(
            f"inverted_residual: project has shape {tuple(project.shape)}, expected "
            f"[O, {hidden}, 1, 1]"
        )
    out_channels = 0 if project is None else project.shape[0]
    expected: dict[str, tuple[Tensor | None, tuple[int, ...]]] = {
        "expand": (expand, (hidden, channels, 1, 1)),
        "expand_bias": (expand_bias, (hidden,)),
        "depthwise": (depthwise, tuple(depthwise.shape)),
        "depthwise_bias": (depthwise_bias, (hidden,)),
        "project": (project, (out_channels, hidden, 1, 1)),
        "project_bias": (project_bias, (out_channels,)),
        "residual": (residual, (n, out_channels, *out_size)),
    }
    for name, (tensor, shape) in expected.items():
        if tensor is None:
            continue
        if tensor.shape != shape:
            raise ValueError(
                f"inverted_residual: {name} has shape {tuple(tensor.shape)}, expected {shape}"
            )
        if tensor.dtype != x.dtype:
            raise TypeError(
                f"inverted_residual: {name} is {tensor.dtype} but x is {x.dtype}; cast one of them"
            )
        if tensor.device != x.device:
            raise ValueError(
                f"inverted_residual: {name} is on {tensor.device} but x is on {x.device}; move one "
                "of them"
            )


def _packed(
    x: Tensor,
    expand: Tensor | None,
    expand_bias: Tensor | None,
    depthwise: Tensor,
    depthwise_bias: Tensor | None,
) -> tuple[Tensor | None, Tensor]:
    return (
        None if expand is None else prepack_pointwise(expand, expand_bias, dtype=x.dtype),
        prepack_depthwise(depthwise, depthwise_bias),
    )


def _gpu_packed(
    x: Tensor,
    expand: Tensor | None,
    expand_bias: Tensor | None,
    depthwise: Tensor,
    depthwise_bias: Tensor | None,
) -> tuple[Tensor | None, Tensor | None, Tensor]:
    matrix = (None, None) if expand is None else prepack_gpu(expand, expand_bias, x.dtype)
    return (*matrix, prepack_depthwise(depthwise, depthwise_bias))


@torch.library.impl(_library, "inverted_residual", "CompositeExplicitAutograd")
def _inverted_residual(
    x: Tensor,
    expand: Tensor | None,
    expand_bias: Tensor | None,
    depthwise: Tensor,
    depthwise_bias: Tensor | None,
    project: Tensor,
    project_bias: Tensor | None,
    residual: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    expand_activation: str,
    depthwise_activation: str,
    activation: str,
    backend: str = "auto",
) -> Tensor:
    weights = expand, expand_bias, depthwise, depthwise_bias
    activations = expand_activation, depthwise_activation, activation
    call = _problem_of(x, *weights, project, project_bias, residual, stride, padding)
    chosen = backends.select(
        "inverted_residual", backend, x.device, x, residual, (), call, activations
    )
    if chosen in GPU_BACKENDS:
        return getattr(torch.ops.cvfast, f"inverted_residual_{chosen}")(
            x,
            *_gpu_packed(x, *weights),
            *prepack_gpu(project, project_bias, x.dtype),
            residual,
            depthwise.shape[0],
            project.shape[0],
            depthwise.shape[2:],
            stride,
            padding,
            *activations,
        )
    if chosen == "cpu":
        return torch.ops.cvfast.inverted_residual_cpu(
            x,
            *_packed(x, *weights),
            prepack_pointwise(project, project_bias, dtype=x.dtype),
            residual,
            depthwise.shape[0],
            project.shape[0],
            depthwise.shape[2:],
            stride,
            padding,
            *activations,
        )
    y = reference(x, *weights, project, project_bias, residual, stride, padding, *activations)
    return y.contiguous(memory_format=torch.channels_last)


@torch.library.impl(_library, "inverted_residual_squeeze", "CompositeExplicitAutograd")
def _inverted_residual_squeeze(
    x: Tensor,
    expand: Tensor | None,
    expand_bias: Tensor | None,
    depthwise: Tensor,
    depthwise_bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    expand_activation: str,
    depthwise_activation: str,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    weights = expand, expand_bias, depthwise, depthwise_bias
    activations = expand_activation, depthwise_activation
    call = _problem_of(x, *weights, None, None, None, stride, padding)
    chosen = backends.select("inverted_residual", backend, x.device, x, None, (), call, activations)
    if chosen in GPU_BACKENDS:
        return getattr(torch.ops.cvfast, f"inverted_residual_squeeze_{chosen}")(
            x,
            *_gpu_packed(x, *weights),
            depthwise.shape[0],
            depthwise.shape[2:],
            stride,
            padding,
            *activations,
        )
    if chosen == "cpu":
        return torch.ops.cvfast.inverted_residual_squeeze_cpu(
            x,
            *_packed(x, *weights),
            depthwise.shape[0],
            depthwise.shape[2:],
            stride,
            padding,
            *activations,
        )
    d, means = squeeze_reference(x, *weights, stride, padding, *activations)
    return (
        d.contiguous(memory_format=torch.channels_last),
        means.contiguous(memory_format=torch.channels_last),
    )


def _empty(x: Tensor, channels: int, size: Sequence[int]) -> Tensor:
    return torch.empty(
        (x.shape[0], channels, *size),
        dtype=x.dtype,
        device=x.device,
        memory_format=torch.channels_last,
    )


def _empty_squeeze(x: Tensor, hidden: int, size: Sequence[int]) -> tuple[Tensor, Tensor]:
    return _empty(x, hidden, size), _empty(x, hidden, (size[0], 1))


def _gpu_out(backend: str, *arguments: Any, out: Tensor, launch: Any = None) -> None:
    """One call of a GPU operator; `launch` None: the parameters of the tuned table or heuristic."""
    call = problem(*arguments, out=out)
    if launch is None:
        at = devices.for_tensor(out)
        launch = table.choose("inverted_residual", backend, call, "forward", at)
    if backend == "triton":
        from cvfast.kernels import inverted_residual as kernels

        kernels.forward(*arguments[:7], call, launch, arguments[-3:], out)
    else:
        torch.ops.cvfast.inverted_residual_cuda_launch(*arguments, launch.as_ints(), out=out)


def _gpu_squeeze_out(
    backend: str, *arguments: Any, out: Tensor, row_means: Tensor, launch: Any = None
) -> None:
    """One call of a GPU operator, as `_gpu_out`."""
    call = squeeze_problem(*arguments, out=out, row_means=row_means)
    if launch is None:
        at = devices.for_tensor(out)
        launch = table.choose("inverted_residual", backend, call, "forward", at)
    if backend == "triton":
        from cvfast.kernels import inverted_residual as kernels

        kernels.squeeze(*arguments[:4], call, launch, arguments[-2:], out, row_means)
    else:
        torch.ops.cvfast.inverted_residual_squeeze_cuda_launch(
            *arguments, launch.as_ints(), out=out, row_means=row_means
        )


def _gpu_functional(backend: str, x: Tensor, *arguments: Any) -> Tensor:
    before, out_channels, after = arguments[:7], arguments[7], arguments[8:]
    out = _empty(x, out_channels, output_size(x.shape[2:], *after[:3]))
    _gpu_out(backend, x, *before, *after, out=out)
    return out


def _gpu_squeeze_functional(backend: str, x: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    hidden, *geometry = arguments[3:7]
    out, row_means = _empty_squeeze(x, hidden, output_size(x.shape[2:], *geometry))
    _gpu_squeeze_out(backend, x, *arguments, out=out, row_means=row_means)
    return out, row_means


for _backend in GPU_BACKENDS:
    for _name, _run in (
        ("inverted_residual_{}", _gpu_functional),
        ("inverted_residual_{}.out", _gpu_out),
        ("inverted_residual_squeeze_{}", _gpu_squeeze_functional),
        ("inverted_residual_squeeze_{}.out", _gpu_squeeze_out),
    ):
        _library.impl(
            _name.format(_backend),
            functools.partial(_run, _backend),
            "CompositeExplicitAutograd",
        )


@torch.library.register_fake("cvfast::inverted_residual")
def _inverted_residual_fake(
    x: Tensor,
    expand: Tensor | None,
    expand_bias: Tensor | None,
    depthwise: Tensor,
    depthwise_bias: Tensor | None,
    project: Tensor,
    project_bias: Tensor | None,
    residual: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    *activations: str,
) -> Tensor:
    del expand, expand_bias, depthwise_bias, project_bias, residual, activations
    size = output_size(x.shape[2:], depthwise.shape[2:], stride, padding)
    return _empty(x, project.shape[0], size)


@torch.library.register_fake("cvfast::inverted_residual_squeeze")
def _inverted_residual_squeeze_fake(
    x: Tensor,
    expand: Tensor | None,
    expand_bias: Tensor | None,
    depthwise: Tensor,
    depthwise_bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    *activations: str,
) -> tuple[Tensor, Tensor]:
    del expand, expand_bias, depthwise_bias, activations
    size = output_size(x.shape[2:], depthwise.shape[2:], stride, padding)
    return _empty_squeeze(x, depthwise.shape[0], size)


def _packed_fake(x: Tensor, *arguments: Any) -> Tensor:
    *_, out_channels, kernel_size, stride, padding, _, _, _ = arguments
    return _empty(x, out_channels, output_size(x.shape[2:], kernel_size, stride, padding))


def _packed_squeeze_fake(x: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    *_, hidden, kernel_size, stride, padding, _, _ = arguments
    return _empty_squeeze(x, hidden, output_size(x.shape[2:], kernel_size, stride, padding))


def _out_fake(*arguments: Any, out: Tensor) -> None:
    del arguments, out


def _squeeze_out_fake(*arguments: Any, out: Tensor, row_means: Tensor) -> None:
    del arguments, out, row_means


_advice = 'call cvfast.ops.inverted_residual with backend="reference"'
_blocks, _halves = (
    [getattr(torch.ops.cvfast, f"{stem}_{backend}") for backend in ("cpu", *GPU_BACKENDS)]
    for stem in ("inverted_residual", "inverted_residual_squeeze")
)
_fakes: tuple[tuple[list[Any], Callable[..., Any], Callable[..., Any]], ...] = (
    (_blocks, _packed_fake, _out_fake),
    (_halves, _packed_squeeze_fake, _squeeze_out_fake),
)
for _operators, _fake, _fake_out in _fakes:
    for _operator in _operators:
        torch.library.register_fake(_operator.default, _fake)
        torch.library.register_fake(_operator.out, _fake_out)
for _operator in (
    torch.ops.cvfast.inverted_residual,
    torch.ops.cvfast.inverted_residual_squeeze,
    *_blocks,
    *_halves,
):
    for _overload in map(functools.partial(getattr, _operator), _operator.overloads()):
        _refusal = _gradient.refusal(_overload, _advice)
        _library.impl(_overload, _refusal, "Autograd", with_keyset=True)


def _block_flops(
    x_shape: Sequence[int],
    expand_shape: Sequence[int] | None,
    expand_bias_shape: Sequence[int] | None,
    depthwise_shape: Sequence[int],
    *args: Any,
    out_shape: Any,
    **kwargs: Any,
) -> int:
    # The first half has two outputs, and ends before the projection.
    squeeze = not isinstance(out_shape[0], int)
    _, channels, *size = out_shape[0] if squeeze else out_shape
    out_channels = 0 if squeeze else channels
    return flops(
        x_shape, depthwise_shape[0], out_channels, depthwise_shape[2:], size,
        expand=expand_shape is not None,
    )  # fmt: skip


def _packed_block_flops(
    x_shape: Sequence[int],
    expand_shape: Sequence[int] | None,
    *arguments: Any,
    out_shape: Sequence[int],
    **kwargs: Any,
) -> int:
    *_, hidden, out_channels, kernel_size, _, _, _, _, _ = arguments
    return flops(
        x_shape, hidden, out_channels, kernel_size, out_shape[2:], expand=expand_shape is not None
    )


def _packed_squeeze_flops(
    x_shape: Sequence[int],
    expand_shape: Sequence[int] | None,
    *arguments: Any,
    out_shape: Sequence[Sequence[int]],
    **kwargs: Any,
) -> int:
    *_, hidden, kernel_size, _, _, _, _ = arguments
    return flops(x_shape, hidden, 0, kernel_size, out_shape[0][2:], expand=expand_shape is not None)


_flops.register(torch.ops.cvfast.inverted_residual, _block_flops)
_flops.register(torch.ops.cvfast.inverted_residual_squeeze, _block_flops)
for _operator in _blocks:
    _flops.register(_operator, _packed_block_flops)
for _operator in _halves:
    _flops.register(_operator, _packed_squeeze_flops)


def example(
    problem: Problem,
    activation: str = "none",
    pass_: str = "forward",
    *,
    device: str | torch.device,
    seed: int = 0,
) -> Example:
    """Random inputs of a problem for the GPU kernels; see `cvfast.ops._example`.

    `activation` is that of the expansion and of the depthwise convolution, as in the MobileNets.
    """
    del pass_
    draw = functools.partial(_example.normal, dtype=problem.dtype, device=device)
    hidden, channels, out_channels = problem.hidden, problem.channels, problem.out_channels
    size = (problem.out_height, problem.out_width)
    x = draw((problem.batch, channels, problem.height, problem.width), seed=seed)

    def layer(seed: int, *shape: int) -> tuple[Tensor, Tensor]:
        """A weight, scaled so that outputs have about the variance of inputs, and a bias."""
        weight, bias = draw(shape, seed=seed), draw(shape[:1], seed=seed + 1)
        return weight / math.prod(shape[1:]) ** 0.5, bias

    none = (None, None)
    depthwise = layer(seed + 1, hidden, 1, *problem.kernel)
    expand = layer(seed + 3, hidden, channels, 1, 1) if problem.expands else none
    project = layer(seed + 5, out_channels, hidden, 1, 1) if problem.projects else none
    residual = None
    if problem.residual:
        residual = draw((problem.batch, out_channels, *size), seed=seed + 7)
    geometry = (problem.kernel, problem.stride, problem.padding, activation, activation)
    top, left, bottom, right = (*problem.padding, *problem.padding)[:4]

    def definition(
        x: Tensor,
        expand: Tensor | None,
        expand_bias: Tensor | None,
        depthwise: Tensor,
        depthwise_bias: Tensor,
        project: Tensor | None,
        project_bias: Tensor | None,
        residual: Tensor | None,
    ) -> list[Tensor]:
        if expand is not None:
            x = pointwise_reference(x, expand, expand_bias, activation=activation)
        padded = F.pad(x, (left, right, top, bottom))
        d, means = squeeze_reference(
            padded, None, None, depthwise, depthwise_bias, problem.stride, (0, 0), "none",
            activation,
        )  # fmt: skip
        if project is None:
            return [d, means]
        return [pointwise_reference(d, project, project_bias, residual=residual)]

    packed = (x, *_gpu_packed(x, expand[0], expand[1], depthwise[0], depthwise[1]))
    matrix = () if project[0] is None else prepack_gpu(project[0], project[1], problem.dtype)

    def kernel(backend: str, launch: Any) -> list[Tensor]:
        extension.load(backend)
        if not problem.projects:
            out, means = _empty_squeeze(x, hidden, size)
            _gpu_squeeze_out(
                backend, *packed, hidden, *geometry, out=out, row_means=means, launch=launch
            )
            return [out, means]
        out = _empty(x, out_channels, size)
        arguments = (*packed, *matrix, residual, hidden, *geometry, "none")
        _gpu_out(backend, *arguments, out=out, launch=launch)
        return [out]

    return Example((x, *expand, *depthwise, *project, residual), definition, kernel)
