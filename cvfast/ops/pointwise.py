"""Pointwise (1x1) convolution with what surrounds it in networks, in one pass.

out = activation(bias + residual + weight · (gate · relu(scale · x + shift))), each part optional:
scale and shift are the batch norm before a convolution (DenseNet), the gate is squeeze-excite's
(MobileNet v3), the residual is added before the activation (ResNet) or alone (MobileNet v2). Batch
norm behind the convolution is folded before (`fold_batch_norm`).
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
from cvfast.launch.pointwise import Problem
from cvfast.ops import _example, _flops, _gradient, _packing
from cvfast.ops._example import Example
from cvfast.ops.activation import Activation
from cvfast.perf import devices

ACTIVATIONS = ("none", "relu", "relu6", "hardswish", "hardsigmoid")

KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_PANEL = 16  # kPointwisePanel of csrc/cpu/pointwise.h

_TAGS = [torch.Tag.needs_fixed_stride_order, torch.Tag.pt2_compliant_tag]
_library = torch.library.Library("cvfast", "FRAGMENT")
_library.define(
    "pointwise(Tensor x, Tensor weight, Tensor? bias, Tensor? scale, Tensor? shift, Tensor? gate, "
    'Tensor? residual, int[2] stride, str activation, str backend="auto") -> Tensor',
    tags=_TAGS,
)
_library.define(
    "pointwise_cpu(Tensor x, Tensor packed, int out_channels, int[2] stride, Tensor? scale, "
    "Tensor? shift, Tensor? gate, Tensor? residual, str activation) -> Tensor",
    tags=_TAGS,
)
_library.define(
    "pointwise_cpu.out(Tensor x, Tensor packed, int[2] stride, Tensor? scale, Tensor? shift, "
    "Tensor? gate, Tensor? residual, str activation, *, Tensor(a!) out) -> ()",
    tags=_TAGS,
)
_SURROUNDINGS = (
    "int[2] stride, Tensor? scale, Tensor? shift, Tensor? gate, Tensor? residual, str activation"
)
_library.define(
    f"pointwise_triton(Tensor x, Tensor weight, Tensor bias, int out_channels, {_SURROUNDINGS}) "
    "-> Tensor",
    tags=_TAGS,
)
_library.define(
    f"pointwise_triton.out(Tensor x, Tensor weight, Tensor bias, {_SURROUNDINGS}, *, "
    "Tensor(a!) out) -> ()",
    tags=_TAGS,
)


def pointwise(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    stride: int | Sequence[int] = 1,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    gate: Tensor | None = None,
    residual: Tensor | None = None,
    activation: str = "none",
    backend: str = "auto",
) -> Tensor:
    """1x1 convolution with its surroundings in one pass; differentiable.

    Args:
        x: [N, C, H, W]. The kernels take float32, bfloat16 and float16 in channels-last
            layout (adjacent channels; images, rows and pixels may lie apart, as in a channel
            slice). Any other layout, dtype or device runs on the reference.
        weight: [O, C, 1, 1]; its dtype, and that of everything below, is x's.
        bias: [O] or None.
        stride: one number, or (vertical, horizontal).
        scale, shift: [C] each, together or not at all: x becomes relu(scale · x + shift).
        gate: [N, C] or None: multiplied into that.
        residual: [N, O, H', W'] or None: added before the activation.
        activation: "none", "relu", "relu6", "hardswish" or "hardsigmoid".
        backend: "auto", "reference", "cpu" or "triton"; the gradient is PyTorch's.

    Returns:
        [N, O, H', W'] in the dtype of x: channels-last from the kernel, else as PyTorch lays it
        out.

    Raises:
        ValueError: for arguments that do not fit together, or an unknown activation or backend.
        TypeError: for dtypes that differ or are not floating point.
        cvfast.backends.Unsupported: if the `backend` that was asked for cannot serve the call.
    """
    stride = _pair(stride)
    _validate(x, weight, bias, scale, shift, gate, residual, stride, activation)
    chosen = backends.select("pointwise", backend, x.device, x, gate, residual)
    if chosen == "reference":
        return reference(x, weight, bias, scale, shift, gate, residual, stride, activation)
    return torch.ops.cvfast.pointwise(
        x, weight, bias, scale, shift, gate, residual, stride, activation, chosen
    )


def reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    gate: Tensor | None = None,
    residual: Tensor | None = None,
    stride: Sequence[int] = (1, 1),
    activation: str = "none",
) -> Tensor:
    """The definition in plain PyTorch: any device, dtype and layout."""
    y = F.conv2d(_source(x, scale, shift, gate), weight, bias, tuple(stride))
    if residual is not None:
        y = y + residual
    return Activation(activation)(y)


def _source(x: Tensor, scale: Tensor | None, shift: Tensor | None, gate: Tensor | None) -> Tensor:
    """What is multiplied by the weights."""
    if scale is not None and shift is not None:
        x = F.relu(x * _per_channel(scale) + _per_channel(shift))
    return x if gate is None else x * gate[:, :, None, None]


def _per_channel(vector: Tensor) -> Tensor:
    return vector[:, None, None]


def _adjacent(t: Tensor) -> bool:
    return t.shape[1] == 1 or t.stride(1) == 1


def _check(
    backend: str, x: Tensor, gate: Tensor | None = None, residual: Tensor | None = None
) -> Reason | None:
    if (reason := backends.wrong_device(backend, x.device)) is not None:
        return reason
    if x.dtype not in KERNEL_DTYPES:
        return Reason("dtype", f"x is {x.dtype}; the kernel takes float32, bfloat16, float16")
    for name, tensor in (("x", x), ("residual", residual)):
        if tensor is not None and (reason := backends.wrong_layout(tensor, name)) is not None:
            return reason
    if gate is not None and not _adjacent(gate):
        return Reason("layout", "gate's channels are not adjacent; use gate.contiguous()")
    return None


for _backend in ("cpu", "triton"):
    backends.register("pointwise", _backend)(functools.partial(_check, _backend))


def prepack(weight: Tensor, bias: Tensor | None = None, *, dtype: torch.dtype) -> Tensor:
    """Weights in the layout that `cvfast::pointwise_cpu` reads; carries no gradient.

    Args:
        weight: [O, C, 1, 1] or [O, C], any floating dtype; rounded once, to bfloat16 for bfloat16
            images and to float32 for others.
        bias: [O] or None, which counts as zeros; kept in float32.
        dtype: of the images.

    Returns:
        Rows of 16 words, float32; int32, each word two bfloat16 weights, for bfloat16 images. Their
        order is described in csrc/cpu/pointwise.h.

    Raises:
        ValueError: if weight is not pointwise, or the kernel does not take the dtype.
    """
    if weight.dim() not in (2, 4) or weight.shape[2:].numel() != 1:
        raise ValueError(
            f"pointwise.prepack: weight has shape {tuple(weight.shape)}, expected [O, C, 1, 1]"
        )
    if dtype not in KERNEL_DTYPES:
        raise ValueError(f"pointwise.prepack: the kernel does not take images of {dtype}")
    weight = weight.detach().flatten(1)
    channels = weight.shape[0]
    if bias is None:
        bias = weight.new_zeros(channels)
    first = bias.detach().to(torch.float32).unsqueeze(1)
    if dtype == torch.bfloat16:
        pairs = F.pad(weight.to(torch.bfloat16), (0, weight.shape[1] % 2)).contiguous()
        words, first = pairs.view(torch.int32), first.contiguous().view(torch.int32)
    else:
        words = weight.to(torch.float32)
    rest = channels % _PANEL
    whole = channels - rest if rest <= _PANEL // 2 else channels
    panels = F.pad(torch.cat([first, words], 1)[:whole], (0, 0, 0, -whole % _PANEL))
    rows = [panels.reshape(-1, _PANEL, panels.shape[1]).transpose(1, 2).reshape(-1, _PANEL)]
    if whole < channels:
        half = torch.cat([F.pad(first, (0, 1)), F.pad(words, (0, words.shape[1] % 2))], 1)[whole:]
        half = F.pad(half, (0, 0, 0, _PANEL // 2 - half.shape[0]))
        rows.append(half.reshape(_PANEL // 2, -1, 2).transpose(0, 1).reshape(-1, _PANEL))
    return torch.cat(rows)


def prepack_gpu(weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Weights in the layout that the GPU kernels read; carry no gradient.

    Args:
        weight: [O, C, 1, 1] or [O, C], any floating dtype.
        bias: [O] or None, which counts as zeros.
        dtype: of the images.

    Returns:
        weight [C, N] in `dtype` and bias [N] in float32, N being O rounded up to a multiple of 16;
        zeros beyond the last channel.

    Raises:
        ValueError: if weight is not pointwise, or the kernels do not take the dtype.
    """
    if weight.dim() not in (2, 4) or weight.shape[2:].numel() != 1:
        raise ValueError(
            f"pointwise.prepack_gpu: weight has shape {tuple(weight.shape)}, expected [O, C, 1, 1]"
        )
    if dtype not in KERNEL_DTYPES:
        raise ValueError(f"pointwise.prepack_gpu: the kernels do not take images of {dtype}")
    return _packing.columns(weight.flatten(1).t(), bias, dtype)


def output_size(size: Sequence[int], stride: Sequence[int]) -> tuple[int, int]:
    """(H', W') of a strided pointwise convolution over an image of `size` (H, W)."""
    return (size[0] - 1) // stride[0] + 1, (size[1] - 1) // stride[1] + 1


def flops(in_channels: int, out_shape: Sequence[int]) -> int:
    """Multiplications and additions, as `torch.utils.flop_counter` counts a convolution."""
    n, c, h, w = out_shape
    return 2 * n * c * h * w * in_channels


def bytes_moved(
    in_channels: int,
    out_shape: Sequence[int],
    dtype: torch.dtype = torch.float32,
    *,
    residual: bool = False,
) -> int:
    """Least traffic: pixels that are read, packed weights, residual and output, once each."""
    n, c, h, w = out_shape
    images = n * h * w * (in_channels + c * (2 if residual else 1))
    weight_size = 2 if dtype == torch.bfloat16 else 4
    return images * dtype.itemsize + c * in_channels * weight_size + 4 * c


def _pair(stride: int | Sequence[int]) -> tuple[int, int]:
    if isinstance(stride, int):
        return stride, stride
    if len(stride) != 2:
        raise ValueError(f"pointwise: stride={stride!r}: expected one number or two")
    return stride[0], stride[1]


def _validate(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    gate: Tensor | None,
    residual: Tensor | None,
    stride: tuple[int, int],
    activation: str,
) -> None:
    if activation not in ACTIVATIONS:
        raise ValueError(
            f"pointwise: unknown activation {activation!r}; expected {', '.join(ACTIVATIONS)}"
        )
    if x.dim() != 4:
        raise ValueError(f"pointwise: x has shape {tuple(x.shape)}, expected [N, C, H, W]")
    if not x.dtype.is_floating_point:
        raise TypeError(f"pointwise: x is {x.dtype}, expected a floating-point dtype")
    if min(stride) < 1:
        raise ValueError(f"pointwise: stride={stride}: expected at least 1")
    n, channels, *size = x.shape
    if min(channels, *size) < 1:
        raise ValueError(f"pointwise: x has shape {tuple(x.shape)}: only N may be zero")
    if weight.dim() != 4 or weight.shape[0] < 1 or weight.shape[1:] != (channels, 1, 1):
        raise ValueError(
            f"pointwise: weight has shape {tuple(weight.shape)}, expected [O, {channels}, 1, 1]"
        )
    if (scale is None) != (shift is None):
        given, missing = ("scale", "shift") if shift is None else ("shift", "scale")
        raise ValueError(f"pointwise: {given} is given but {missing} is not; they come together")
    out_channels = weight.shape[0]
    expected: dict[str, tuple[Tensor | None, tuple[int, ...]]] = {
        "weight": (weight, (out_channels, channels, 1, 1)),
        "bias": (bias, (out_channels,)),
        "scale": (scale, (channels,)),
        "shift": (shift, (channels,)),
        "gate": (gate, (n, channels)),
        "residual": (residual, (n, out_channels, *output_size(size, stride))),
    }
    for name, (tensor, shape) in expected.items():
        if tensor is None:
            continue
        if tensor.shape != shape:
            raise ValueError(f"pointwise: {name} has shape {tuple(tensor.shape)}, expected {shape}")
        if tensor.dtype != x.dtype:
            raise TypeError(
                f"pointwise: {name} is {tensor.dtype} but x is {x.dtype}; cast one of them"
            )
        if tensor.device != x.device:
            raise ValueError(
                f"pointwise: {name} is on {tensor.device} but x is on {x.device}; move one of them"
            )


@torch.library.impl(_library, "pointwise", "CompositeExplicitAutograd")
def _pointwise(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    gate: Tensor | None,
    residual: Tensor | None,
    stride: Sequence[int],
    activation: str,
    backend: str = "auto",
) -> Tensor:
    chosen = backends.select("pointwise", backend, x.device, x, gate, residual)
    if chosen == "reference":
        y = reference(x, weight, bias, scale, shift, gate, residual, stride, activation)
        return y.contiguous(memory_format=torch.channels_last)
    around = (_kernel_vector(scale), _kernel_vector(shift), gate, residual, activation)
    size = (weight.shape[0], stride)
    if chosen == "triton":
        packed = prepack_gpu(weight, bias, x.dtype)
        return torch.ops.cvfast.pointwise_triton(x, *packed, *size, *around)
    return torch.ops.cvfast.pointwise_cpu(x, prepack(weight, bias, dtype=x.dtype), *size, *around)


def _kernel_vector(vector: Tensor | None) -> Tensor | None:
    return None if vector is None else vector.to(torch.float32).contiguous()


def _fake_output(x: Tensor, out_channels: int, stride: Sequence[int]) -> Tensor:
    return torch.empty(
        (x.shape[0], out_channels, *output_size(x.shape[2:], stride)),
        dtype=x.dtype,
        device=x.device,
        memory_format=torch.channels_last,
    )


@torch.library.register_fake("cvfast::pointwise")
def _pointwise_fake(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    gate: Tensor | None,
    residual: Tensor | None,
    stride: Sequence[int],
    activation: str,
    backend: str = "auto",
) -> Tensor:
    del bias, scale, shift, gate, residual, activation, backend
    return _fake_output(x, weight.shape[0], stride)


@torch.library.register_fake("cvfast::pointwise_cpu")
def _pointwise_cpu_fake(
    x: Tensor, packed: Tensor, out_channels: int, stride: Sequence[int], *rest: Any
) -> Tensor:
    del packed, rest
    return _fake_output(x, out_channels, stride)


@torch.library.register_fake("cvfast::pointwise_triton")
def _pointwise_triton_fake(
    x: Tensor, weight: Tensor, bias: Tensor, out_channels: int, stride: Sequence[int], *rest: Any
) -> Tensor:
    del weight, bias, rest
    return _fake_output(x, out_channels, stride)


@torch.library.register_fake("cvfast::pointwise_cpu.out")
@torch.library.register_fake("cvfast::pointwise_triton.out")
def _pointwise_out_fake(*arguments: Any, out: Tensor) -> None:
    del arguments, out


for _operator in (torch.ops.cvfast.pointwise_cpu, torch.ops.cvfast.pointwise_triton):
    for _name in ("default", "out"):
        _overload = getattr(_operator, _name)
        _refusal = _gradient.refusal(_overload, "call cvfast.ops.pointwise")
        _library.impl(_overload, _refusal, "Autograd", with_keyset=True)


def problem(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    stride: Sequence[int],
    scale: Tensor | None,
    shift: Tensor | None,
    gate: Tensor | None,
    residual: Tensor | None,
    activation: str,
    *,
    out: Tensor,
) -> Problem:
    """What `cvfast::pointwise_triton` chooses its launch parameters by; arguments are its."""
    del weight, bias, shift, activation
    batch, channels, height, width = x.shape
    return Problem(
        batch,
        channels,
        out.shape[1],
        height,
        width,
        stride=(stride[0], stride[1]),
        prologue=scale is not None,
        gate=gate is not None,
        residual=residual is not None,
        dtype=x.dtype,
        tf32=_packing.rounds_to_tf32(x.dtype),
    )


@torch.library.impl(_library, "pointwise_triton", "CompositeExplicitAutograd")
def _pointwise_triton(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    out_channels: int,
    stride: Sequence[int],
    *around: Any,
) -> Tensor:
    out = _fake_output(x, out_channels, stride)
    torch.ops.cvfast.pointwise_triton.out(x, weight, bias, stride, *around, out=out)
    return out


@torch.library.impl(_library, "pointwise_triton.out", "CompositeExplicitAutograd")
def _pointwise_triton_out(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    stride: Sequence[int],
    scale: Tensor | None,
    shift: Tensor | None,
    gate: Tensor | None,
    residual: Tensor | None,
    activation: str,
    *,
    out: Tensor,
) -> None:
    _launch(x, weight, bias, stride, scale, shift, gate, residual, activation, out)


def _launch(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    stride: Sequence[int],
    scale: Tensor | None,
    shift: Tensor | None,
    gate: Tensor | None,
    residual: Tensor | None,
    activation: str,
    out: Tensor,
    launch: Any = None,
) -> None:
    """The Triton kernel, with launch parameters of the tuned table or the heuristic by default."""
    from cvfast.kernels import pointwise as kernels

    _validate_packed(x, weight, bias, stride, scale, shift, gate, residual, out)
    call = problem(x, weight, bias, stride, scale, shift, gate, residual, activation, out=out)
    if launch is None:
        launch = table.choose("pointwise", "triton", call, "forward", devices.for_tensor(x))
    kernels.forward(x, weight, bias, scale, shift, gate, residual, out, call, launch, activation)


def _validate_packed(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    stride: Sequence[int],
    scale: Tensor | None,
    shift: Tensor | None,
    gate: Tensor | None,
    residual: Tensor | None,
    out: Tensor,
) -> None:
    """Checks what the kernel relies on, since it would read and write beyond memory otherwise."""
    n, channels, *size = x.shape
    padded = -(-out.shape[1] // _PANEL) * _PANEL
    out_shape = (n, out.shape[1], *output_size(size, stride))
    expected = {
        "weight": (weight, (channels, padded), x.dtype),
        "bias": (bias, (padded,), torch.float32),
        "scale": (scale, (channels,), torch.float32),
        "shift": (shift, (channels,), torch.float32),
        "gate": (gate, (n, channels), x.dtype),
        "residual": (residual, out_shape, x.dtype),
        "out": (out, out_shape, x.dtype),
    }
    for name, (tensor, shape, dtype) in expected.items():
        if tensor is None:
            continue
        if tuple(tensor.shape) != shape or tensor.dtype != dtype:
            raise ValueError(
                f"pointwise_triton: {name} is {tensor.dtype} {tuple(tensor.shape)}, expected "
                f"{dtype} {shape}; weights come from ops.pointwise.prepack_gpu"
            )
        if tensor.dim() == 1 or name == "weight":
            adjacent = tensor.is_contiguous()
        else:
            adjacent = _adjacent(tensor)
        if not adjacent:
            raise ValueError(f"pointwise_triton: {name}'s channels are not adjacent in memory")
    if not _adjacent(x):
        raise ValueError("pointwise_triton: x's channels are not adjacent in memory")
    if (scale is None) != (shift is None):
        raise ValueError("pointwise_triton: scale and shift come together")


def example(
    problem: Problem, activation: str, *, device: str | torch.device, seed: int = 0
) -> Example:
    """The kernel on random inputs: x, weight, bias, scale, shift, gate and residual, the last four
    as `problem` has them; see `cvfast.ops._example`."""
    dtype, channels, out_channels = problem.dtype, problem.channels, problem.out_channels

    def draw(number: int, *shape: int) -> Tensor:
        return _example.normal(shape, dtype, device=device, seed=seed + number)

    batch = problem.batch
    x = draw(0, batch, channels, problem.height, problem.width)
    weight = draw(1, out_channels, channels, 1, 1) / channels**0.5
    bias = draw(2, out_channels)
    scale = draw(3, channels) if problem.prologue else None
    shift = draw(4, channels) if problem.prologue else None
    gate = draw(5, batch, channels).sigmoid() if problem.gate else None
    out_size = (problem.out_height, problem.out_width)
    residual = draw(6, batch, out_channels, *out_size) if problem.residual else None

    def definition(x: Tensor, weight: Tensor, *rest: Tensor | None) -> Tensor:
        bias, scale, shift, gate, residual = rest
        return reference(x, weight, bias, scale, shift, gate, residual, problem.stride, activation)

    packed = prepack_gpu(weight, bias, dtype)
    vectors = _kernel_vector(scale), _kernel_vector(shift)

    def kernel(backend: str, launch: Any) -> Tensor:
        if not (status := extension.load(backend)):
            raise backends.Unsupported("pointwise", backend, Reason("no_extension", str(status)))
        out = _fake_output(x, out_channels, problem.stride)
        _launch(x, *packed, problem.stride, *vectors, gate, residual, activation, out, launch)
        return out

    return Example((x, weight, bias, scale, shift, gate, residual), definition, kernel)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, bias, scale, shift, gate, residual, ctx.stride, ctx.activation, _ = inputs
    # ReLU and ReLU6 read their mask off the output, which the next layer keeps alive anyway; the
    # hard activations need their input, which is recomputed.
    kept = output if ctx.activation in ("relu", "relu6") else None
    recompute = ctx.activation in ("hardswish", "hardsigmoid")
    prologue = scale is not None or gate is not None
    needs_source = ctx.needs_input_grad[1] or recompute or prologue
    needs_weight = any(ctx.needs_input_grad[i] for i in (0, 3, 4, 5)) or recompute
    ctx.has_bias, ctx.recompute = bias is not None, recompute
    ctx.x_shape, ctx.weight_shape = x.shape, weight.shape
    ctx.save_for_backward(
        x if needs_source else None,
        weight if needs_weight else None,
        bias if recompute else None,
        scale,
        shift,
        gate,
        residual if recompute else None,
        kept,
    )


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    x, weight, bias, scale, shift, gate, residual, output = ctx.saved_tensors
    aten = torch.ops.aten
    if ctx.recompute:
        y = reference(x, weight, bias, scale, shift, gate, residual, ctx.stride)
        if ctx.activation == "hardswish":
            grad = aten.hardswish_backward(grad, y)
        else:  # aten.hardsigmoid_backward has no derivative of its own
            grad = torch.where((y > -3) & (y < 3), grad / 6, 0)
    elif ctx.activation == "relu":
        grad = aten.threshold_backward(grad, output, 0)
    elif ctx.activation == "relu6":
        grad = aten.hardtanh_backward(grad, output, 0, 6)
    needs_x, needs_weight, needs_bias, needs_scale, needs_shift, needs_gate, needs_residual = (
        ctx.needs_input_grad[:7]
    )
    grad_source, grad_weight, grad_bias = aten.convolution_backward(
        grad,
        # convolution_backward reads no more than the shape of what it does not need.
        grad.new_empty(1).expand(ctx.x_shape) if x is None else _source(x, scale, shift, gate),
        grad.new_empty(1).expand(ctx.weight_shape) if weight is None else weight,
        [ctx.weight_shape[0]] if ctx.has_bias else None,
        ctx.stride,
        [0, 0],
        [1, 1],
        False,
        [0, 0],
        1,
        [needs_x or needs_scale or needs_shift or needs_gate, needs_weight, needs_bias],
    )
    grad_x, grad_scale, grad_shift, grad_gate = grad_source, None, None, None
    if gate is not None and grad_x is not None:
        if needs_gate:
            grad_gate = (grad_x * _source(x, scale, shift, None)).sum((2, 3))
        grad_x = grad_x * gate[:, :, None, None]
    if scale is not None and grad_x is not None:
        grad_x = aten.threshold_backward(grad_x, _source(x, scale, shift, None), 0)
        grad_scale = (grad_x * x).sum((0, 2, 3)) if needs_scale else None
        grad_shift = grad_x.sum((0, 2, 3)) if needs_shift else None
        grad_x = grad_x * _per_channel(scale)
    return (
        grad_x if needs_x else None,
        grad_weight,
        grad_bias if needs_bias else None,
        grad_scale,
        grad_shift,
        grad_gate,
        grad if needs_residual else None,
        None,
        None,
        None,
    )


torch.library.register_autograd("cvfast::pointwise", _backward, setup_context=_setup_context)


def _pointwise_flops(
    x_shape: Sequence[int], *args: Any, out_shape: Sequence[int], **kwargs: Any
) -> int:
    return flops(x_shape[1], out_shape)


_flops.register(torch.ops.cvfast.pointwise, _pointwise_flops)
_flops.register(torch.ops.cvfast.pointwise_cpu, _pointwise_flops)
_flops.register(torch.ops.cvfast.pointwise_triton, _pointwise_flops)
