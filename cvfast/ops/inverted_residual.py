"""Inverted residual (MobileNet v2, v3): expansion, depthwise convolution, projection, in one pass.

hidden = expand_activation(expand · x + expand_bias)
d = depthwise_activation(hidden ⋆ depthwise + depthwise_bias)
out = activation(project · d + project_bias + residual)

Without the expansion, hidden = x: MobileNet v1's separable convolution, and the first block of v2.
Blocks with squeeze-excite stop at d (`inverted_residual_squeeze`), whose means decide the gate; the
projection behind the gate is a `pointwise`. Batch norm is folded before (`fold_batch_norm`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cvfast import backends
from cvfast.backends import Reason
from cvfast.ops import _flops, _gradient
from cvfast.ops.activation import Activation
from cvfast.ops.depthwise import prepack as prepack_depthwise
from cvfast.ops.pointwise import ACTIVATIONS, KERNEL_DTYPES
from cvfast.ops.pointwise import prepack as prepack_pointwise
from cvfast.ops.pointwise import reference as pointwise_reference

_TAGS = [torch.Tag.needs_fixed_stride_order, torch.Tag.pt2_compliant_tag]
_WEIGHTS = "Tensor? expand, Tensor? expand_bias, Tensor depthwise, Tensor? depthwise_bias"
_GEOMETRY = "int[2] stride, int[2] padding, str expand_activation, str depthwise_activation"
_PACKED_GEOMETRY = (
    "int[2] kernel_size, int[2] stride, int[] padding, str expand_activation, "
    "str depthwise_activation"
)
_BLOCK = "Tensor x, Tensor? expand, Tensor depthwise, Tensor project, Tensor? residual, int hidden"
_SQUEEZE = "Tensor x, Tensor? expand, Tensor depthwise, int hidden"

_library = torch.library.Library("cvfast", "FRAGMENT")
for _schema in (
    f"inverted_residual(Tensor x, {_WEIGHTS}, Tensor project, Tensor? project_bias, "
    f"Tensor? residual, {_GEOMETRY}, str activation) -> Tensor",
    f"inverted_residual_squeeze(Tensor x, {_WEIGHTS}, {_GEOMETRY}) -> (Tensor, Tensor)",
    f"inverted_residual_cpu({_BLOCK}, int out_channels, {_PACKED_GEOMETRY}, str activation) "
    "-> Tensor",
    f"inverted_residual_cpu.out({_BLOCK}, {_PACKED_GEOMETRY}, str activation, "
    "*, Tensor(a!) out) -> ()",
    f"inverted_residual_squeeze_cpu({_SQUEEZE}, {_PACKED_GEOMETRY}) -> (Tensor, Tensor)",
    f"inverted_residual_squeeze_cpu.out({_SQUEEZE}, {_PACKED_GEOMETRY}, "
    "*, Tensor(a!) out, Tensor(b!) row_means) -> ()",
):
    _library.define(_schema, tags=_TAGS)
# What csrc/cuda/bindings.cpp implements; `launch` comes from cvfast.launch.inverted_residual.cuda.
_UNPACKED_HALF = "Tensor x, Tensor? expand, Tensor? expand_bias, Tensor depthwise"
for _schema in (
    f"inverted_residual_cuda_launch({_UNPACKED_HALF}, Tensor project, Tensor project_bias, "
    f"Tensor? residual, int hidden, {_PACKED_GEOMETRY}, str activation, int[] launch, "
    "*, Tensor(a!) out) -> ()",
    f"inverted_residual_squeeze_cuda_launch({_UNPACKED_HALF}, int hidden, {_PACKED_GEOMETRY}, "
    "int[] launch, *, Tensor(a!) out, Tensor(b!) row_means) -> ()",
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
        x: [N, C, H, W]. The `cpu` kernel takes float32, bfloat16 and float16 in channels-last
            layout (adjacent channels; images, rows and pixels may lie apart, as in a channel
            slice), where no gradient is asked for. Everything else runs on the reference.
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
        backend: "auto", "reference" or "cpu".

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
    chosen = backends.select("inverted_residual", backend, x.device, x, residual, weights)
    run = reference if chosen == "reference" else torch.ops.cvfast.inverted_residual
    return run(x, *weights, residual, stride, padding, *activations)


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
    chosen = backends.select("inverted_residual", backend, x.device, x, None, weights)
    if chosen == "reference":
        return squeeze_reference(x, *weights, stride, padding, *activations)
    return torch.ops.cvfast.inverted_residual_squeeze(x, *weights, stride, padding, *activations)


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


@backends.register("inverted_residual", "cpu")
def _cpu_check(
    x: Tensor, residual: Tensor | None = None, weights: Sequence[Tensor | None] = ()
) -> Reason | None:
    if x.device.type != "cpu":
        return Reason("device", f"x is on {x.device}, the kernel runs on the CPU")
    if x.dtype not in KERNEL_DTYPES:
        return Reason("dtype", f"x is {x.dtype}; the kernel takes float32, bfloat16, float16")
    for name, tensor in (("x", x), ("residual", residual)):
        if tensor is not None and tensor.shape[1] != 1 and tensor.stride(1) != 1:
            return Reason(
                "layout",
                f"{name} is not channels-last (stride 1 along C); convert it once with "
                f"{name}.contiguous(memory_format=torch.channels_last)",
            )
    if torch.is_grad_enabled() and any(
        t is not None and t.requires_grad for t in (x, residual, *weights)
    ):
        return Reason("gradient", "the kernel has no gradient; run it under torch.no_grad()")
    return None


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
    pixels = height * width if expands else out_height * out_width
    spared = n * pixels * hidden * dtype.itemsize
    bands = -(-threads // max(n, 1))
    least_height = _LEAST_SQUEEZE_HEIGHT if squeeze else _LEAST_HEIGHT
    return spared > _LEAST_BYTES[expands] and out_height >= max(least_height, bands * _LEAST_BAND)


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
) -> Tensor:
    weights = expand, expand_bias, depthwise, depthwise_bias
    activations = expand_activation, depthwise_activation, activation
    if backends.supports("inverted_residual", "cpu", x, residual) is None:
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
) -> tuple[Tensor, Tensor]:
    weights = expand, expand_bias, depthwise, depthwise_bias
    activations = expand_activation, depthwise_activation
    if backends.supports("inverted_residual", "cpu", x) is None:
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


@torch.library.register_fake("cvfast::inverted_residual_cpu")
def _inverted_residual_cpu_fake(
    x: Tensor,
    expand: Tensor | None,
    depthwise: Tensor,
    project: Tensor,
    residual: Tensor | None,
    hidden: int,
    out_channels: int,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    *activations: str,
) -> Tensor:
    del expand, depthwise, project, residual, hidden, activations
    return _empty(x, out_channels, output_size(x.shape[2:], kernel_size, stride, padding))


@torch.library.register_fake("cvfast::inverted_residual_squeeze_cpu")
def _inverted_residual_squeeze_cpu_fake(
    x: Tensor,
    expand: Tensor | None,
    depthwise: Tensor,
    hidden: int,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    *activations: str,
) -> tuple[Tensor, Tensor]:
    del expand, depthwise, activations
    size = output_size(x.shape[2:], kernel_size, stride, padding)
    return _empty_squeeze(x, hidden, size)


@torch.library.register_fake("cvfast::inverted_residual_cpu.out")
def _inverted_residual_cpu_out_fake(*arguments: Any, out: Tensor) -> None:
    del arguments, out


@torch.library.register_fake("cvfast::inverted_residual_squeeze_cpu.out")
def _inverted_residual_squeeze_cpu_out_fake(
    *arguments: Any, out: Tensor, row_means: Tensor
) -> None:
    del arguments, out, row_means


for _name, _overloads in (
    ("inverted_residual", ("default",)),
    ("inverted_residual_squeeze", ("default",)),
    ("inverted_residual_cpu", ("default", "out")),
    ("inverted_residual_squeeze_cpu", ("default", "out")),
):
    for _overload in _overloads:
        _op = getattr(getattr(torch.ops.cvfast, _name), _overload)
        _advice = 'call cvfast.ops.inverted_residual with backend="reference"'
        _library.impl(_op, _gradient.refusal(_op, _advice), "Autograd", with_keyset=True)


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
    depthwise_shape: Sequence[int],
    project_shape: Sequence[int],
    residual_shape: Sequence[int] | None,
    hidden: int,
    out_channels: int,
    kernel_size: Sequence[int],
    *args: Any,
    out_shape: Sequence[int],
    **kwargs: Any,
) -> int:
    return flops(
        x_shape, hidden, out_channels, kernel_size, out_shape[2:], expand=expand_shape is not None
    )


def _packed_squeeze_flops(
    x_shape: Sequence[int],
    expand_shape: Sequence[int] | None,
    depthwise_shape: Sequence[int],
    hidden: int,
    kernel_size: Sequence[int],
    *args: Any,
    out_shape: Sequence[Sequence[int]],
    **kwargs: Any,
) -> int:
    return flops(x_shape, hidden, 0, kernel_size, out_shape[0][2:], expand=expand_shape is not None)


_flops.register(torch.ops.cvfast.inverted_residual, _block_flops)
_flops.register(torch.ops.cvfast.inverted_residual_squeeze, _block_flops)
_flops.register(torch.ops.cvfast.inverted_residual_cpu, _packed_block_flops)
_flops.register(torch.ops.cvfast.inverted_residual_squeeze_cpu, _packed_squeeze_flops)
