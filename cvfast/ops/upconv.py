"""``upconv``: the transposed convolution whose stride is its kernel, as in U-Net's decoder.

Kernels of neighbouring pixels do not overlap: each pixel of the source becomes kh x kw pixels of
the result, a matrix product. Implementations: ``reference`` (plain PyTorch; any dtype, device and
layout) and ``triton`` (one launch on a GPU). On the CPU, the engine calls ``pointwise`` per tap.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cvfast import backends
from cvfast.backends import Reason
from cvfast.launch import table
from cvfast.launch.upconv import Problem
from cvfast.ops import _packing
from cvfast.perf import devices

from . import _example, _flops, _gradient
from ._example import Example

DTYPES = (torch.float32, torch.bfloat16, torch.float16)

_TAGS = [torch.Tag.needs_fixed_stride_order, torch.Tag.pt2_compliant_tag]
_OPERANDS = "Tensor x, Tensor weight, Tensor? bias, int[2] kernel_size"

_library = torch.library.Library("cvfast", "FRAGMENT")
_library.define(f"upconv_triton({_OPERANDS}, int out_channels) -> Tensor", tags=_TAGS)
_library.define(f"upconv_triton.out({_OPERANDS}, *, Tensor(a!) out) -> ()", tags=_TAGS)


def upconv(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, backend: str = "auto"
) -> Tensor:
    """Transposed convolution of one group whose stride is its kernel; packs the weight each time.

    out[n, k, y*R + r, x*S + s] = bias[k] + sum over c of x[n, c, y, x] * weight[c, k, r, s]. The
    kernel's sums are float32 in every dtype; float32 products are rounded to TF32 where
    ``torch.backends.cudnn.allow_tf32`` says so. Only the reference has a gradient, which ``"auto"``
    therefore takes where one is asked for.

    Args:
        x: [N, C, H, W]. The kernel takes float32, bfloat16 and float16, channels-last (adjacent
            channels; images, rows and pixels may lie apart, as in a channel slice).
        weight: [C, K, R, S], as of :class:`torch.nn.ConvTranspose2d`; dtype of ``x``.
        bias: [K] or None.
        backend: ``"auto"``, ``"reference"`` or ``"triton"``.

    Returns:
        [N, K, R*H, S*W]: channels-last from the kernel, else as PyTorch lays it out.

    Raises:
        ValueError: for arguments that do not fit together, or an unknown backend.
        TypeError: for dtypes that differ or are not floating point.
        cvfast.backends.Unsupported: if the ``backend`` that was asked for cannot serve the call.
    """
    _validate(x, weight, bias)
    tensors = (t for t in (x, weight, bias) if t is not None)
    if backend == "auto" and torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        backend = "reference"
    if backends.select("upconv", backend, x.device, x) == "reference":
        return reference(x, weight, bias)
    packed = prepack_gpu(weight, bias, x.dtype)
    fresh: Tensor = torch.ops.cvfast.upconv_triton(x, *packed, weight.shape[2:], weight.shape[1])
    return fresh


def reference(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """The definition in plain PyTorch: any device, dtype and layout."""
    return F.conv_transpose2d(x, weight, bias, stride=tuple(weight.shape[2:]))


@backends.register("upconv", "triton")
def _triton_check(x: Tensor) -> Reason | None:
    if (reason := backends.wrong_device("triton", x.device)) is not None:
        return reason
    if x.dtype not in DTYPES:
        return Reason("dtype", f"x is {x.dtype}; the kernel takes float32, bfloat16, float16")
    return backends.wrong_layout(x)


def prepack_gpu(weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Weights in the layout that ``cvfast::upconv_triton`` reads; carry no gradient.

    Args:
        weight: [C, K, R, S], any floating dtype.
        bias: [K] or None, which counts as zeros.
        dtype: of the images.

    Returns:
        weight [R*S, C, N] in ``dtype`` and bias [N] in float32, N being K rounded up to a multiple
        of 16; zeros beyond the last channel.

    Raises:
        ValueError: for a weight of another shape, or a dtype that the kernel does not take.
    """
    if weight.dim() != 4:
        raise ValueError(
            f"upconv.prepack_gpu: weight has shape {tuple(weight.shape)}, expected [C, K, R, S]"
        )
    if dtype not in DTYPES:
        raise ValueError(f"upconv.prepack_gpu: the kernel does not take images of {dtype}")
    return _packing.columns(weight.permute(2, 3, 0, 1).flatten(0, 1), bias, dtype)


def flops(x_shape: Sequence[int], out_shape: Sequence[int]) -> int:
    """Multiplications and additions: each element of the result is a sum over the channels."""
    n, k, p, q = out_shape
    return 2 * n * k * p * q * x_shape[1]


def bytes_moved(
    x_shape: Sequence[int], weight_shape: Sequence[int], out_shape: Sequence[int], itemsize: int
) -> int:
    """Bytes read and written when source, weights and result cross memory once."""
    n, c, h, w = x_shape
    out_n, k, p, q = out_shape
    weights = c * k * weight_shape[2] * weight_shape[3]
    return itemsize * (n * c * h * w + out_n * k * p * q + weights)


def _validate(x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    if x.dim() != 4:
        raise ValueError(f"upconv: x has shape {tuple(x.shape)}, expected [N, C, H, W]")
    if not x.dtype.is_floating_point:
        raise TypeError(f"upconv: x is {x.dtype}, expected a floating-point dtype")
    channels = x.shape[1]
    if weight.dim() != 4 or weight.shape[0] != channels or 0 in weight.shape:
        raise ValueError(
            f"upconv: weight has shape {tuple(weight.shape)}, expected [{channels}, K, R, S]"
        )
    if bias is not None and bias.shape != (weight.shape[1],):
        raise ValueError(
            f"upconv: bias has shape {tuple(bias.shape)}, expected ({weight.shape[1]},)"
        )
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None and tensor.dtype != x.dtype:
            raise TypeError(
                f"upconv: {name} is {tensor.dtype} but x is {x.dtype}; cast one of them"
            )
        if tensor is not None and tensor.device != x.device:
            raise ValueError(
                f"upconv: {name} is on {tensor.device} but x is on {x.device}; move one of them"
            )


def problem(
    x: Tensor, weight: Tensor, bias: Tensor | None, kernel_size: Sequence[int], *, out: Tensor
) -> Problem:
    """The launch parameters' view of a call of ``cvfast::upconv_triton.out``.

    Raises:
        ValueError: if shapes or layouts do not fit together.
        TypeError: for dtypes that differ.
    """
    out_shape = _output_shape(x, out.shape[1], kernel_size)
    if tuple(out.shape) != out_shape:
        raise ValueError(f"upconv: out has shape {tuple(out.shape)}, expected {out_shape}")
    if out.dtype != x.dtype:
        raise TypeError(f"upconv: out is {out.dtype} but x is {x.dtype}; cast one of them")
    for name, image in (("x", x), ("out", out)):
        if image.shape[1] != 1 and image.stride(1) != 1:
            raise ValueError(f"upconv: {name} is not channels-last (stride 1 along C)")
    batch, channels, height, width = x.shape
    call = Problem(
        batch,
        channels,
        height,
        width,
        out_channels=out.shape[1],
        kernel=(kernel_size[0], kernel_size[1]),
        dtype=x.dtype,
        tf32=_packing.rounds_to_tf32(x.dtype),
    )
    shape = (call.taps, call.channels, call.columns)
    _packing.check("upconv.prepack_gpu", weight, bias, shape, x.dtype)
    return call


def _output_shape(
    x: Tensor, out_channels: int, kernel_size: Sequence[int]
) -> tuple[int, int, int, int]:
    n, _, h, w = x.shape
    return n, out_channels, h * kernel_size[0], w * kernel_size[1]


def _empty(x: Tensor, out_channels: int, kernel_size: Sequence[int]) -> Tensor:
    return torch.empty(
        _output_shape(x, out_channels, kernel_size),
        dtype=x.dtype,
        device=x.device,
        memory_format=torch.channels_last,
    )


@torch.library.impl(_library, "upconv_triton.out", "CompositeExplicitAutograd")
def _triton_out(
    x: Tensor, weight: Tensor, bias: Tensor | None, kernel_size: Sequence[int], *, out: Tensor
) -> None:
    from cvfast.kernels import upconv as kernels

    call = problem(x, weight, bias, kernel_size, out=out)
    launch = table.choose("upconv", "triton", call, "forward", devices.for_tensor(x))
    if bias is None:
        bias = weight.new_zeros(weight.shape[2], dtype=torch.float32)
    kernels.forward(x, weight, bias, call, launch, out)


@torch.library.impl(_library, "upconv_triton", "CompositeExplicitAutograd")
def _triton(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    kernel_size: Sequence[int],
    out_channels: int,
) -> Tensor:
    out = _empty(x, out_channels, kernel_size)
    _triton_out(x, weight, bias, kernel_size, out=out)
    return out


@torch.library.register_fake("cvfast::upconv_triton")
def _triton_fake(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    kernel_size: Sequence[int],
    out_channels: int,
) -> Tensor:
    del weight, bias
    return _empty(x, out_channels, kernel_size)


@torch.library.register_fake("cvfast::upconv_triton.out")
def _triton_out_fake(*arguments: Any, out: Tensor) -> None:
    del arguments, out


for _overload in (torch.ops.cvfast.upconv_triton.default, torch.ops.cvfast.upconv_triton.out):
    _refusal = _gradient.refusal(_overload, "call cvfast.ops.upconv.reference")
    _library.impl(_overload, _refusal, "Autograd", with_keyset=True)


def _upconv_flops(x_shape: Sequence[int], *args: Any, out_shape: Sequence[int], **kw: Any) -> int:
    return flops(x_shape, out_shape)


_flops.register(torch.ops.cvfast.upconv_triton, _upconv_flops)


def example(
    problem: Problem, activation: str = "none", *, device: str | torch.device, seed: int = 0
) -> Example:
    """Random inputs of a problem for the GPU kernels; see :mod:`cvfast.ops._example`.

    Raises:
        ValueError: for an activation, which the operator does not have.
    """
    if activation != "none":
        raise ValueError(f"upconv: activation={activation!r}: expected none")
    x, weight, bias = (
        _example.normal(shape, problem.dtype, device=device, seed=seed + i)
        for i, shape in enumerate(
            (
                (problem.batch, problem.channels, problem.height, problem.width),
                (problem.channels, problem.out_channels, *problem.kernel),
                (problem.out_channels,),
            )
        )
    )
    packed = prepack_gpu(weight, bias, problem.dtype)

    def kernel(backend: str, launch: Any) -> Tensor:
        from cvfast.kernels import upconv as kernels

        if launch is None:
            launch = table.choose("upconv", backend, problem, "forward", devices.for_tensor(x))
        out = _empty(x, problem.out_channels, problem.kernel)
        kernels.forward(x, *packed, problem, launch, out)
        return out

    return Example((x, weight, bias), reference, kernel)
