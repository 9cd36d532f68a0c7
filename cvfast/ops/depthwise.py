"""Depthwise convolution with bias and activation; batch norm is folded before (`fold_batch_norm`).

out[n, c·m + j] = activation(bias[c·m + j] + x[n, c] ⋆ weight[c·m + j, 0]), with m the depth
multiplier: the cross-correlation of `torch.nn.functional.conv2d(..., groups=C)`.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cvfast import backends, extension
from cvfast.backends import Reason
from cvfast.launch import table
from cvfast.launch.depthwise import Problem
from cvfast.ops import _example, _flops, _gradient
from cvfast.ops._example import Example
from cvfast.perf import devices

ACTIVATIONS = ("none", "relu", "relu6", "hardswish")

KERNEL_BACKENDS = ("cpu", "triton", "cuda")
KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_PANEL = 16  # kDepthwisePanel of csrc/common/depthwise.h

_TAGS = [torch.Tag.needs_fixed_stride_order, torch.Tag.pt2_compliant_tag]
_GEOMETRY = "int[2] stride, int[2] padding, int[2] dilation, str activation"
_PACKED = f"Tensor x, Tensor packed, int[2] kernel_size, {_GEOMETRY}"
_GRAD_INPUT = (
    "Tensor grad, Tensor? output, Tensor packed, int[2] image_size, int[2] kernel_size, "
    f"{_GEOMETRY}"
)
_GRAD_WEIGHT = f"Tensor grad, Tensor? output, Tensor x, int[2] kernel_size, {_GEOMETRY}"

_library = torch.library.Library("cvfast", "FRAGMENT")
_library.define(
    f'depthwise(Tensor x, Tensor weight, Tensor? bias, {_GEOMETRY}, str backend="auto") -> Tensor',
    tags=_TAGS,
)
_library.define(
    "depthwise_backward(Tensor grad, Tensor? output, Tensor? x, Tensor? weight, SymInt[] x_size, "
    f"SymInt[] weight_size, {_GEOMETRY}, bool[3] needs, str backend) -> Tensor[]",
    tags=_TAGS,
)
for _backend in KERNEL_BACKENDS:
    _library.define(f"depthwise_{_backend}({_PACKED}) -> Tensor", tags=_TAGS)
    _library.define(f"depthwise_{_backend}.out({_PACKED}, *, Tensor(a!) out) -> ()", tags=_TAGS)
# What csrc/cuda/bindings.cpp implements; `launch` comes from cvfast.launch.depthwise.cuda.
_library.define(f"depthwise_cuda_launch({_PACKED}, int[] launch) -> Tensor")
_library.define(f"depthwise_cuda_launch.out({_PACKED}, int[] launch, *, Tensor(a!) out) -> ()")
_library.define(f"depthwise_backward_input_cuda_launch({_GRAD_INPUT}, int[] launch) -> Tensor")
_library.define(f"depthwise_backward_weight_cuda_launch({_GRAD_WEIGHT}, int[] launch) -> Tensor")
_library.define(
    "depthwise_cuda_shared_bytes(int kernel, int stride, int element_size, str pass_, "
    "int[] launch) -> int"
)


def depthwise(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    activation: str = "none",
    backend: str = "auto",
) -> Tensor:
    """Depthwise convolution, bias and activation in one pass; differentiable.

    Args:
        x: [N, C, H, W]. The kernels take float32, bfloat16 and float16 in channels-last layout
            (adjacent channels; images, rows and pixels may lie apart, as in a channel slice). Any
            other layout, dtype or device runs on the reference.
        weight: [m·C, 1, kh, kw], m the depth multiplier; dtype of x.
        bias: [m·C] or None.
        stride, padding, dilation: one number, or (vertical, horizontal). Padding is with zeros.
        activation: "none", "relu", "relu6" or "hardswish".
        backend: "auto", "reference", "cpu", "triton" or "cuda"; the gradient runs on it too, except
            on "cpu", whose gradient is PyTorch's.

    Returns:
        [N, m·C, H', W'] in the dtype of x: channels-last from the kernel, else as PyTorch lays it
        out.

    Raises:
        ValueError: for arguments that do not fit together, or an unknown activation or backend.
        TypeError: for dtypes that differ or are not floating point.
        cvfast.backends.Unsupported: if the `backend` that was asked for cannot serve the call.
    """
    stride = pair("stride", stride)
    padding = pair("padding", padding)
    dilation = pair("dilation", dilation)
    _validate(x, weight, bias, stride, padding, dilation, activation)
    chosen = backends.select("depthwise", backend, x.device, x)
    if chosen == "reference":
        return reference(x, weight, bias, stride, padding, dilation, activation)
    return torch.ops.cvfast.depthwise(
        x, weight, bias, stride, padding, dilation, activation, chosen
    )


def reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    activation: str,
) -> Tensor:
    """The definition in plain PyTorch: any device, dtype and layout."""
    y = F.conv2d(x, weight, bias, tuple(stride), tuple(padding), tuple(dilation), groups=x.shape[1])
    return apply_activation(y, activation)


def apply_activation(y: Tensor, activation: str) -> Tensor:
    """`activation` of `ACTIVATIONS` applied to y, as PyTorch computes it."""
    match activation:
        case "none":
            return y
        case "relu":
            return F.relu(y)
        case "relu6":
            return F.relu6(y)
        case "hardswish":
            return F.hardswish(y)
    raise ValueError(f"unknown activation {activation!r}; expected {', '.join(ACTIVATIONS)}")


def _check(backend: str, x: Tensor) -> Reason | None:
    if (reason := backends.wrong_device(backend, x.device)) is not None:
        return reason
    if x.dtype not in KERNEL_DTYPES:
        return Reason("dtype", f"x is {x.dtype}; the kernel takes float32, bfloat16, float16")
    return backends.wrong_layout(x)


for _backend in KERNEL_BACKENDS:
    backends.register("depthwise", _backend)(functools.partial(_check, _backend))


def prepack(weight: Tensor, bias: Tensor | None = None, *, multiplier: int = 1) -> Tensor:
    """Weights in the layout that every kernel reads; carries no gradient.

    Args:
        weight: [m·C, 1, kh, kw], any floating dtype.
        bias: [m·C] or None, which counts as zeros.
        multiplier: the depth multiplier m.

    Returns:
        float32 [m, ceil(C / 16), kh·kw + 1, 16]: panels of 16 channels, the bias after the taps,
        zeros beyond the last channel.

    Raises:
        ValueError: if weight is not depthwise or m does not divide its output channels.
    """
    if weight.dim() != 4 or weight.shape[1] != 1 or weight.shape[0] % multiplier:
        raise ValueError(
            f"depthwise.prepack: weight has shape {tuple(weight.shape)}, expected "
            f"[{multiplier}·C, 1, kh, kw]"
        )
    taps = weight.shape[2] * weight.shape[3]
    channels = weight.shape[0] // multiplier
    packed = weight.new_zeros(
        (multiplier, -(-channels // _PANEL), taps + 1, _PANEL), dtype=torch.float32
    )
    steps = weight.detach().reshape(channels, multiplier, taps).permute(1, 2, 0)
    _copy_to_panels(packed[:, :, :taps], steps)
    if bias is not None:
        shift = bias.detach().reshape(channels, multiplier, 1).permute(1, 2, 0)
        _copy_to_panels(packed[:, :, taps:], shift)
    return packed


def _copy_to_panels(panels: Tensor, rows: Tensor) -> None:
    """rows [m, t, C] into panels [m, ceil(C / 16), t, 16]."""
    # Two views instead of padding: on a GPU each operator is a launch.
    whole = rows.shape[2] // _PANEL
    if whole:
        panels[:, :whole].copy_(
            rows[..., : whole * _PANEL].unflatten(2, (whole, _PANEL)).movedim(2, 1)
        )
    if rest := rows.shape[2] % _PANEL:
        panels[:, whole, :, :rest].copy_(rows[..., -rest:])


def unpack(packed: Tensor, channels: int, kernel_size: Sequence[int]) -> tuple[Tensor, Tensor]:
    """What `prepack` packed.

    Args:
        packed: float32 [m, ceil(C / 16), kh·kw + 1, 16].
        channels: C.
        kernel_size: (kh, kw).

    Returns:
        weight [m·C, 1, kh, kw] and bias [m·C], float32.
    """
    multiplier, _, rows, _ = packed.shape
    flat = packed.permute(1, 3, 0, 2).flatten(0, 1)[:channels].reshape(multiplier * channels, rows)
    weight = flat[:, :-1].reshape(-1, 1, *kernel_size)
    return weight, flat[:, -1]


def output_size(
    size: Sequence[int],
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> tuple[int, int]:
    """(H', W') of a convolution over an image of `size` (H, W).

    `padding` is (vertical, horizontal) or, as `cvfast::depthwise_cpu` takes it too, (top, left,
    bottom, right).
    """
    before, after = padding[:2], padding[-2:]
    h, w = (
        (size[i] + before[i] + after[i] - dilation[i] * (kernel_size[i] - 1) - 1) // stride[i] + 1
        for i in (0, 1)
    )
    return h, w


def flops(kernel_size: Sequence[int], out_shape: Sequence[int]) -> int:
    """Multiplications and additions, as `torch.utils.flop_counter` counts a convolution."""
    n, c, h, w = out_shape
    return 2 * n * c * h * w * kernel_size[0] * kernel_size[1]


def bytes_moved(
    x_shape: Sequence[int],
    kernel_size: Sequence[int],
    out_shape: Sequence[int],
    dtype: torch.dtype = torch.float32,
) -> int:
    """Least traffic: x and weights read once, output written once; packed weights are float32."""
    n, c, h, w = x_shape
    out_n, out_c, out_h, out_w = out_shape
    activations = n * c * h * w + out_n * out_c * out_h * out_w
    return activations * dtype.itemsize + 4 * out_c * (kernel_size[0] * kernel_size[1] + 1)


def pair(name: str, value: int | Sequence[int]) -> tuple[int, int]:
    """(vertical, horizontal) from one number or two.

    Raises:
        ValueError: naming the argument, if it is neither.
    """
    if isinstance(value, int):
        return value, value
    if len(value) != 2:
        raise ValueError(f"depthwise: {name}={value!r}: expected one number or two")
    return value[0], value[1]


def _validate(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    activation: str,
) -> None:
    if activation not in ACTIVATIONS:
        raise ValueError(
            f"depthwise: unknown activation {activation!r}; expected {', '.join(ACTIVATIONS)}"
        )
    if x.dim() != 4:
        raise ValueError(f"depthwise: x has shape {tuple(x.shape)}, expected [N, C, H, W]")
    channels = x.shape[1]
    if weight.dim() != 4 or weight.shape[1] != 1:
        raise ValueError(
            f"depthwise: weight has shape {tuple(weight.shape)}, expected [m·C, 1, kh, kw]"
        )
    if channels == 0 or weight.shape[0] == 0 or weight.shape[0] % channels:
        raise ValueError(
            f"depthwise: weight has {weight.shape[0]} output channels, expected a positive "
            f"multiple of x's {channels}"
        )
    if bias is not None and bias.shape != (weight.shape[0],):
        raise ValueError(
            f"depthwise: bias has shape {tuple(bias.shape)}, expected ({weight.shape[0]},)"
        )
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None and tensor.dtype != x.dtype:
            raise TypeError(
                f"depthwise: {name} is {tensor.dtype} but x is {x.dtype}; cast one of them"
            )
        if tensor is not None and tensor.device != x.device:
            raise ValueError(
                f"depthwise: {name} is on {tensor.device} but x is on {x.device}; move one of them"
            )
    if not x.dtype.is_floating_point:
        raise TypeError(f"depthwise: x is {x.dtype}, expected a floating-point dtype")
    for name, values, least in (
        ("stride", stride, 1),
        ("padding", padding, 0),
        ("dilation", dilation, 1),
    ):
        if min(values) < least:
            raise ValueError(f"depthwise: {name}={values}: expected at least {least}")
    height, width = output_size(x.shape[2:], weight.shape[2:], stride, padding, dilation)
    if height < 1 or width < 1:
        raise ValueError(
            f"depthwise: a {weight.shape[2]}x{weight.shape[3]} kernel with dilation {dilation} is "
            f"larger than the image {x.shape[2]}x{x.shape[3]} with padding {padding}"
        )


@torch.library.impl(_library, "depthwise", "CompositeExplicitAutograd")
def _depthwise(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    activation: str,
    backend: str = "auto",
) -> Tensor:
    chosen = backends.select("depthwise", backend, x.device, x)
    if chosen == "reference":
        y = reference(x, weight, bias, stride, padding, dilation, activation)
        return y.contiguous(memory_format=torch.channels_last)
    packed = prepack(weight, bias, multiplier=weight.shape[0] // x.shape[1])
    return prepacked_op(chosen)(x, packed, weight.shape[2:], stride, padding, dilation, activation)


def prepacked_op(backend: str) -> Any:
    """The operator of a kernel that reads packed weights:
    (x, packed, kernel_size, stride, padding, dilation, activation) → y; it has no gradient."""
    return getattr(torch.ops.cvfast, f"depthwise_{backend}").default


def _problem(
    x_size: Sequence[int],
    dtype: torch.dtype,
    multiplier: int,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> Problem:
    if len(padding) not in (2, 4) or min(padding) < 0:
        raise ValueError(
            f"depthwise: padding={list(padding)}: expected (vertical, horizontal) or (top, left, "
            "bottom, right), none negative"
        )
    batch, channels, height, width = x_size
    # Tuned tables know symmetric padding by two numbers.
    before, after = tuple(padding[:2]), tuple(padding[-2:])
    return Problem(
        batch,
        channels,
        height,
        width,
        kernel=(kernel_size[0], kernel_size[1]),
        stride=(stride[0], stride[1]),
        padding=before if before == after else before + after,
        dilation=(dilation[0], dilation[1]),
        multiplier=multiplier,
        dtype=dtype,
    )


def problem(
    x: Tensor,
    packed: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    activation: str,
    out: Tensor | None = None,
) -> Problem:
    """What the GPU operators choose their launch parameters by; arguments are theirs."""
    del activation, out
    return _problem(x.shape, x.dtype, packed.shape[0], kernel_size, stride, padding, dilation)


def _gpu_forward(
    backend: str,
    x: Tensor,
    packed: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    activation: str,
    *,
    out: Tensor | None = None,
) -> Tensor:
    geometry = (kernel_size, stride, padding, dilation)
    call = problem(x, packed, *geometry, activation)
    launch = table.choose("depthwise", backend, call, "forward", devices.for_tensor(x))
    if backend == "triton":
        from cvfast.kernels import depthwise as kernels

        return kernels.forward(x, packed, call, launch, activation, out)
    arguments = (x, packed, *geometry, activation, launch.as_ints())
    if out is None:
        return torch.ops.cvfast.depthwise_cuda_launch(*arguments)
    torch.ops.cvfast.depthwise_cuda_launch.out(*arguments, out=out)
    return out


def _gpu_out(*arguments: Any, out: Tensor) -> None:
    _gpu_forward(*arguments, out=out)


for _backend in ("triton", "cuda"):
    for _name, _run in (("", _gpu_forward), (".out", _gpu_out)):
        _library.impl(
            f"depthwise_{_backend}{_name}",
            functools.partial(_run, _backend),
            "CompositeExplicitAutograd",
        )


def _fake_output(
    x: Tensor,
    channels: int,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> Tensor:
    height, width = output_size(x.shape[2:], kernel_size, stride, padding, dilation)
    return torch.empty(
        (x.shape[0], channels, height, width),
        dtype=x.dtype,
        device=x.device,
        memory_format=torch.channels_last,
    )


@torch.library.register_fake("cvfast::depthwise")
def _depthwise_fake(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    activation: str,
    backend: str = "auto",
) -> Tensor:
    del bias, activation, backend
    return _fake_output(x, weight.shape[0], weight.shape[2:], stride, padding, dilation)


def _prepacked_fake(
    x: Tensor,
    packed: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    activation: str,
) -> Tensor:
    del activation
    return _fake_output(x, packed.shape[0] * x.shape[1], kernel_size, stride, padding, dilation)


for _backend in KERNEL_BACKENDS:
    torch.library.register_fake(f"cvfast::depthwise_{_backend}", _prepacked_fake)
    _library.impl(
        f"depthwise_{_backend}",
        _gradient.refusal(prepacked_op(_backend), "call cvfast.ops.depthwise"),
        "Autograd",
        with_keyset=True,
    )


def _out_fake(*arguments: Any, out: Tensor) -> None:
    del arguments, out


for _backend in KERNEL_BACKENDS:
    torch.library.register_fake(f"cvfast::depthwise_{_backend}.out", _out_fake)
    _library.impl(
        f"depthwise_{_backend}.out",
        _gradient.refusal(
            getattr(torch.ops.cvfast, f"depthwise_{_backend}").out, "call cvfast.ops.depthwise"
        ),
        "Autograd",
        with_keyset=True,
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, bias, *ctx.geometry, activation, backend = inputs
    # ReLU and ReLU6 read their mask off the output, which the next layer keeps alive anyway;
    # hard-swish is not monotonic, so its input is recomputed.
    kept = output if activation in ("relu", "relu6") else None
    recompute = activation == "hardswish"
    needs_x = ctx.needs_input_grad[1] or recompute
    needs_weight = ctx.needs_input_grad[0] or recompute
    ctx.activation, ctx.has_bias = activation, bias is not None
    ctx.backend = backends.select("depthwise", backend, x.device, x)
    ctx.x_size, ctx.weight_size = x.shape, weight.shape
    ctx.save_for_backward(
        kept,
        x if needs_x else None,
        weight if needs_weight else None,
        bias if recompute else None,
    )


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    output, x, weight, bias = ctx.saved_tensors
    needs = [*ctx.needs_input_grad[:2], ctx.has_bias and ctx.needs_input_grad[2]]
    activation = ctx.activation
    if activation == "hardswish":
        before = torch.ops.cvfast.depthwise(x, weight, bias, *ctx.geometry, "none", ctx.backend)
        grad, activation = torch.ops.aten.hardswish_backward(grad, before), "none"
    sizes = (ctx.x_size, ctx.weight_size)
    arguments: Any = (grad, output, x, weight, *sizes, *ctx.geometry, activation, needs)
    if ctx.backend in ("triton", "cuda"):
        computed = torch.ops.cvfast.depthwise_backward(*arguments, ctx.backend)
        grads = iter(computed)
        found = tuple(next(grads) if needed else None for needed in needs)
    else:
        found = _aten_backward(*arguments)
    return *found, *(None for _ in ctx.geometry), None, None


torch.library.register_autograd("cvfast::depthwise", _backward, setup_context=_setup_context)


def _through_activation(grad: Tensor, output: Tensor | None, activation: str) -> Tensor:
    """The gradient before the activation, whose `output` tells where it was flat."""
    match activation:
        case "relu":
            return torch.ops.aten.threshold_backward(grad, output, 0)
        case "relu6":
            return torch.ops.aten.hardtanh_backward(grad, output, 0, 6)
    return grad


def _aten_backward(
    grad: Tensor,
    output: Tensor | None,
    x: Tensor | None,
    weight: Tensor | None,
    x_size: Sequence[int],
    weight_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    activation: str,
    needs: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    return torch.ops.aten.convolution_backward(
        _through_activation(grad, output, activation),
        # convolution_backward reads no more than the shape of what it does not need.
        grad.new_empty(1).expand(x_size) if x is None else x,
        grad.new_empty(1).expand(weight_size) if weight is None else weight,
        [weight_size[0]],
        stride,
        padding,
        dilation,
        False,
        [0, 0],
        x_size[1],
        needs,
    )


@torch.library.impl(_library, "depthwise_backward", "CompositeExplicitAutograd")
def _gpu_backward(
    grad: Tensor,
    output: Tensor | None,
    x: Tensor | None,
    weight: Tensor | None,
    x_size: Sequence[int],
    weight_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    activation: str,
    needs: Sequence[bool],
    backend: str,
) -> list[Tensor]:
    """Gradients of x, weight and bias: those that `needs` asks for, in this order."""
    multiplier, kernel_size = weight_size[0] // x_size[1], weight_size[2:]
    geometry = (kernel_size, stride, padding, dilation)
    problem = _problem(x_size, grad.dtype, multiplier, *geometry)
    device = devices.for_tensor(grad)
    if grad.shape[1] != 1 and grad.stride(1) != 1:
        grad = grad.contiguous(memory_format=torch.channels_last)
    grads = []
    if needs[0]:
        assert weight is not None
        packed = prepack(weight, multiplier=multiplier)
        launch = table.choose("depthwise", backend, problem, "backward_input", device)
        if backend == "triton":
            from cvfast.kernels import depthwise as kernels

            grad_x = kernels.backward_input(grad, output, packed, problem, launch, activation)
        else:
            grad_x = torch.ops.cvfast.depthwise_backward_input_cuda_launch(
                grad, output, packed, x_size[2:], *geometry, activation, launch.as_ints()
            )
        grads.append(grad_x)
    if needs[1]:
        launch = table.choose("depthwise", backend, problem, "backward_weight", device)
        if backend == "triton":
            from cvfast.kernels import depthwise as kernels

            sums = kernels.backward_weight(grad, output, x, problem, launch, activation)
        else:
            sums = torch.ops.cvfast.depthwise_backward_weight_cuda_launch(
                grad, output, x, *geometry, activation, launch.as_ints()
            )
        # Copies, since results of an operator may not share memory.
        grad_weight, grad_bias = (
            grad.new_empty(g.shape).copy_(g) for g in unpack(sums, x_size[1], kernel_size)
        )
        grads += [grad_weight, grad_bias] if needs[2] else [grad_weight]
    elif needs[2]:
        grads.append(_through_activation(grad, output, activation).sum((0, 2, 3)))
    return grads


@torch.library.register_fake("cvfast::depthwise_backward")
def _gpu_backward_fake(
    grad: Tensor,
    output: Tensor | None,
    x: Tensor | None,
    weight: Tensor | None,
    x_size: Sequence[int],
    weight_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    activation: str,
    needs: Sequence[bool],
    backend: str,
) -> list[Tensor]:
    grads = [
        grad.new_empty(x_size).contiguous(memory_format=torch.channels_last),
        grad.new_empty(weight_size),
        grad.new_empty(weight_size[:1]),
    ]
    return [g for g, needed in zip(grads, needs, strict=True) if needed]


_library.impl(
    "depthwise_backward",
    _gradient.refusal(
        torch.ops.cvfast.depthwise_backward.default,
        'for second derivatives, call cvfast.ops.depthwise with backend="reference"',
    ),
    "Autograd",
    with_keyset=True,
)


def _depthwise_flops(
    x_shape: Sequence[int],
    weight_shape: Sequence[int],
    *args: Any,
    out_shape: Sequence[int],
    **kwargs: Any,
) -> int:
    return flops(weight_shape[2:], out_shape)


def _prepacked_flops(
    x_shape: Sequence[int],
    packed_shape: Sequence[int],
    kernel_size: Sequence[int],
    *args: Any,
    out_shape: Sequence[int],
    **kwargs: Any,
) -> int:
    return flops(kernel_size, out_shape)


_flops.register(torch.ops.cvfast.depthwise, _depthwise_flops)
for _backend in KERNEL_BACKENDS:
    _flops.register(getattr(torch.ops.cvfast, f"depthwise_{_backend}"), _prepacked_flops)


def example(
    problem: Problem,
    activation: str = "none",
    pass_: str = "forward",
    *,
    device: str | torch.device,
    seed: int = 0,
) -> Example:
    """Random inputs of a problem for the GPU kernels of `pass_`; see `cvfast.ops._example`.

    With an activation, gradients are of whole numbers, which every dtype computes exactly: beside a
    kink, a rounding error would decide whether they pass.
    """
    exact = pass_ != "forward" and activation != "none"
    out_size = (problem.batch, problem.out_channels, problem.out_height, problem.out_width)
    sizes = (
        (problem.batch, problem.channels, problem.height, problem.width),
        (problem.out_channels, 1, *problem.kernel),
        (problem.out_channels,),
        out_size,
    )
    draw = _example.whole if exact else _example.normal
    x, weight, bias, grad = (
        draw(size, problem.dtype, device=device, seed=seed + i) for i, size in enumerate(sizes)
    )
    geometry = (problem.stride, problem.padding, problem.dilation, activation)
    packed = prepack(weight, bias, multiplier=problem.multiplier)
    output = None
    if activation != "none":
        output = reference(x, weight, bias, *geometry).contiguous(memory_format=torch.channels_last)

    def definition(x: Tensor, weight: Tensor, bias: Tensor, grad: Tensor) -> list[Tensor]:
        if pass_ == "forward":
            return [reference(x, weight, bias, *geometry)]
        x, weight, bias = (t.detach().requires_grad_() for t in (x, weight, bias))
        with torch.enable_grad():
            y = reference(x, weight, bias, *geometry)
            gradients = torch.autograd.grad(y, (x, weight, bias), grad)
        return list(gradients[:1] if pass_ == "backward_input" else gradients[1:])

    def kernel(backend: str, launch: Any) -> list[Tensor]:
        extension.load(backend)
        if launch is None:
            at = devices.for_tensor(x)
            launch = table.choose("depthwise", backend, problem, pass_, at)
        tensors = {
            "forward": (x, packed),
            "backward_input": (grad, output, packed),
            "backward_weight": (grad, output, x),
        }[pass_]
        if backend == "triton":
            from cvfast.kernels import depthwise as kernels

            result = getattr(kernels, pass_)(*tensors, problem, launch, activation)
        else:
            name = "depthwise" if pass_ == "forward" else f"depthwise_{pass_}"
            size = [(problem.height, problem.width)] if pass_ == "backward_input" else []
            launched = getattr(torch.ops.cvfast, f"{name}_cuda_launch")
            result = launched(*tensors, *size, problem.kernel, *geometry, launch.as_ints())
        if pass_ != "backward_weight":
            return [result]
        return [t.to(problem.dtype) for t in unpack(result, problem.channels, problem.kernel)]

    return Example((x, weight, bias, grad), definition, kernel)
