"""Depthwise convolution with bias and activation; batch norm is folded before (`fold_batch_norm`).

out[n, c·m + j] = activation(bias[c·m + j] + x[n, c] ⋆ weight[c·m + j, 0]), with m the depth
multiplier: the cross-correlation of `torch.nn.functional.conv2d(..., groups=C)`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cvfast import backends
from cvfast.backends import Reason
from cvfast.ops import _flops

ACTIVATIONS = ("none", "relu", "relu6", "hardswish")

KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_PANEL = 16  # kDepthwisePanel of csrc/cpu/depthwise.h

_library = torch.library.Library("cvfast", "FRAGMENT")
_library.define(
    "depthwise(Tensor x, Tensor weight, Tensor? bias, int[2] stride, int[2] padding, "
    "int[2] dilation, str activation) -> Tensor",
    tags=[torch.Tag.needs_fixed_stride_order, torch.Tag.pt2_compliant_tag],
)
_library.define(
    "depthwise_prepacked(Tensor x, Tensor packed, int[2] kernel_size, int[2] stride, "
    "int[2] padding, int[2] dilation, str activation) -> Tensor",
    tags=[torch.Tag.needs_fixed_stride_order, torch.Tag.pt2_compliant_tag],
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
        x: [N, C, H, W]. The `cpu` kernel takes float32, bfloat16 and float16 in channels-last
            layout (adjacent channels; images, rows and pixels may lie apart, as in a channel
            slice). Any other layout, dtype or device runs on the reference.
        weight: [m·C, 1, kh, kw], m the depth multiplier; dtype of x.
        bias: [m·C] or None.
        stride, padding, dilation: one number, or (vertical, horizontal). Padding is with zeros.
        activation: "none", "relu", "relu6" or "hardswish".
        backend: "auto", "reference" or "cpu".

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
    return torch.ops.cvfast.depthwise(x, weight, bias, stride, padding, dilation, activation)


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


@backends.register("depthwise", "cpu")
def _cpu_check(x: Tensor) -> Reason | None:
    if x.device.type != "cpu":
        return Reason("device", f"x is on {x.device}, the kernel runs on the CPU")
    if x.dtype not in KERNEL_DTYPES:
        return Reason("dtype", f"x is {x.dtype}; the kernel takes float32, bfloat16, float16")
    if x.shape[1] != 1 and x.stride(1) != 1:
        return Reason(
            "layout",
            "x is not channels-last (stride 1 along C); convert it once with "
            "x.contiguous(memory_format=torch.channels_last)",
        )
    return None


def prepack(weight: Tensor, bias: Tensor | None = None, *, multiplier: int = 1) -> Tensor:
    """Weights in the layout that `cvfast::depthwise_prepacked` reads; carries no gradient.

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
    rows = weight.detach().to(torch.float32).reshape(-1, taps)
    if bias is None:
        rows = F.pad(rows, (0, 1))
    else:
        rows = torch.cat([rows, bias.detach().to(torch.float32).unsqueeze(1)], dim=1)
    steps = rows.reshape(-1, multiplier, taps + 1).transpose(0, 1)
    steps = F.pad(steps, (0, 0, 0, -steps.shape[1] % _PANEL))
    return steps.reshape(multiplier, -1, _PANEL, taps + 1).transpose(2, 3).contiguous()


def output_size(
    size: Sequence[int],
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> tuple[int, int]:
    """(H', W') of a convolution over an image of `size` (H, W)."""
    h, w = (
        (size[i] + 2 * padding[i] - dilation[i] * (kernel_size[i] - 1) - 1) // stride[i] + 1
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
) -> Tensor:
    if backends.supports("depthwise", "cpu", x) is None:
        packed = prepack(weight, bias, multiplier=weight.shape[0] // x.shape[1])
        return torch.ops.cvfast.depthwise_prepacked(
            x, packed, weight.shape[2:], stride, padding, dilation, activation
        )
    y = reference(x, weight, bias, stride, padding, dilation, activation)
    return y.contiguous(memory_format=torch.channels_last)


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
) -> Tensor:
    del bias, activation
    return _fake_output(x, weight.shape[0], weight.shape[2:], stride, padding, dilation)


@torch.library.register_fake("cvfast::depthwise_prepacked")
def _depthwise_prepacked_fake(
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


def _depthwise_prepacked_autograd(keyset: Any, x: Tensor, packed: Tensor, *args: Any) -> Tensor:
    if torch.is_grad_enabled() and (x.requires_grad or packed.requires_grad):
        raise RuntimeError(
            "cvfast::depthwise_prepacked has no gradient: call cvfast.ops.depthwise, or run under "
            "torch.no_grad()"
        )
    with torch._C._AutoDispatchBelowAutograd():
        return torch.ops.cvfast.depthwise_prepacked.default.redispatch(
            keyset & torch._C._after_autograd_keyset, x, packed, *args
        )


_library.impl("depthwise_prepacked", _depthwise_prepacked_autograd, "Autograd", with_keyset=True)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, bias, ctx.stride, ctx.padding, ctx.dilation, ctx.activation = inputs
    # ReLU and ReLU6 read their mask off the output, which the next layer keeps alive anyway;
    # hard-swish is not monotonic, so its input is recomputed.
    kept = output if ctx.activation in ("relu", "relu6") else None
    recompute = ctx.activation == "hardswish"
    needs_x = ctx.needs_input_grad[1] or recompute
    needs_weight = ctx.needs_input_grad[0] or recompute
    ctx.has_bias = bias is not None
    ctx.x_shape, ctx.weight_shape = x.shape, weight.shape
    ctx.save_for_backward(
        x if needs_x else None,
        weight if needs_weight else None,
        bias if recompute else None,
        kept,
    )


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    x, weight, bias, output = ctx.saved_tensors
    match ctx.activation:
        case "relu":
            grad = torch.ops.aten.threshold_backward(grad, output, 0)
        case "relu6":
            grad = torch.ops.aten.hardtanh_backward(grad, output, 0, 6)
        case "hardswish":
            y = reference(x, weight, bias, ctx.stride, ctx.padding, ctx.dilation, "none")
            grad = torch.ops.aten.hardswish_backward(grad, y)
    needs_x, needs_weight, needs_bias = ctx.needs_input_grad[:3]
    grad_x, grad_weight, grad_bias = torch.ops.aten.convolution_backward(
        grad,
        # convolution_backward reads no more than the shape of what it does not need.
        grad.new_empty(1).expand(ctx.x_shape) if x is None else x,
        grad.new_empty(1).expand(ctx.weight_shape) if weight is None else weight,
        [ctx.weight_shape[0]] if ctx.has_bias else None,
        ctx.stride,
        ctx.padding,
        ctx.dilation,
        False,
        [0, 0],
        ctx.x_shape[1],
        [needs_x, needs_weight, needs_bias and ctx.has_bias],
    )
    return grad_x, grad_weight, grad_bias, None, None, None, None


torch.library.register_autograd("cvfast::depthwise", _backward, setup_context=_setup_context)


def _depthwise_flops(
    x_shape: Sequence[int],
    weight_shape: Sequence[int],
    *args: Any,
    out_shape: Sequence[int],
    **kwargs: Any,
) -> int:
    return flops(weight_shape[2:], out_shape)


def _depthwise_prepacked_flops(
    x_shape: Sequence[int],
    packed_shape: Sequence[int],
    kernel_size: Sequence[int],
    *args: Any,
    out_shape: Sequence[int],
    **kwargs: Any,
) -> int:
    return flops(kernel_size, out_shape)


_flops.register(torch.ops.cvfast.depthwise, _depthwise_flops)
_flops.register(torch.ops.cvfast.depthwise_prepacked, _depthwise_prepacked_flops)
