"""Memory layouts: image kernels take channels-last (NHWC) memory under a logical NCHW shape.

`cvfast::copy_layout_cpu.out(x, out=out)` copies an image [N, C, H, W] of float32, bfloat16 or
float16 into another of any strides, and so does `cvfast::copy_layout_triton`;
`cvfast::to_channels_last_cpu(x)` copies it into a fresh channels-last one.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cvfast.launch import table
from cvfast.launch.copy_layout import Problem
from cvfast.ops import _example, _gradient
from cvfast.perf import devices

KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

_TAGS = [torch.Tag.needs_fixed_stride_order, torch.Tag.pt2_compliant_tag]

_library = torch.library.Library("cvfast", "FRAGMENT")
_library.define("to_channels_last_cpu(Tensor x) -> Tensor", tags=_TAGS)
_library.define("to_channels_last_cpu.out(Tensor x, *, Tensor(a!) out) -> ()", tags=_TAGS)
for _backend in ("cpu", "triton"):
    _name = f"copy_layout_{_backend}.out"
    _library.define(f"{_name}(Tensor x, *, Tensor(a!) out) -> ()", tags=_TAGS)


def is_channels_last(x: Tensor) -> bool:
    """Whether the 4-D ``x`` is dense in channels-last order; sizes of 1 do not count."""
    return x.is_contiguous(memory_format=torch.channels_last)


def channels_last(x: Tensor) -> Tensor:
    """``x`` itself when it is dense channels-last, else a channels-last copy."""
    return x.contiguous(memory_format=torch.channels_last)


def channels_innermost(x: Tensor) -> Tensor:
    """``x`` itself when its channels are adjacent, as in a channel slice, else a dense copy."""
    return x if x.stride(1) == 1 else x.contiguous(memory_format=torch.channels_last)


def restore_layout(out: Tensor, x: Tensor) -> Tensor:
    """``out`` in the layout of an eager network: contiguous unless the input ``x`` was not."""
    if x.is_contiguous() or not is_channels_last(x):
        return out.contiguous()
    return out


def copy_layout_problem(x: Tensor, *, out: Tensor) -> Problem:
    """What `cvfast::copy_layout_triton` chooses its launch parameters by; arguments are its.

    Raises:
        ValueError: for tensors that differ in anything but strides, or that are no images.
    """
    same = x.shape == out.shape and x.dtype == out.dtype and x.device == out.device
    if x.dim() != 4 or x.dtype not in KERNEL_DTYPES or not same:
        raise ValueError(
            f"cvfast::copy_layout_triton: x is {x.dtype} {list(x.shape)} on {x.device}, out "
            f"{out.dtype} {list(out.shape)} on {out.device}; expected the same for both: float32, "
            "bfloat16 or float16 [N, C, H, W]"
        )
    n, c, h, w = x.shape
    return Problem(n, c, h, w, _adjacent(x), _adjacent(out), x.dtype)


def _adjacent(image: Tensor) -> str:
    """What lies next to each other in memory."""
    _, c, h, w = image.shape
    _, channel, row, pixel = image.stride()
    if channel == 1 or c == 1:
        return "channels"
    planes = (pixel == 1 or w == 1) and (row == w or h == 1)
    return "pixels" if planes else "neither"


def _run(x: Tensor, *, out: Tensor, launch: Any = None) -> None:
    from cvfast.kernels import copy_layout

    call = copy_layout_problem(x, out=out)
    if launch is None:
        launch = table.choose("copy_layout", "triton", call, "forward", devices.for_tensor(x))
    copy_layout.forward(x, out, call, launch)


@torch.library.impl(_library, "copy_layout_triton.out", "CompositeExplicitAutograd")
def _copy_layout_triton_out(x: Tensor, *, out: Tensor) -> None:
    _run(x, out=out)


def copy_layout_example(
    problem: Problem, activation: str, *, device: str | torch.device, seed: int = 0
) -> _example.Example:
    """Random inputs of `problem`; see :class:`cvfast.ops._example.Example`."""
    del activation
    shape = (problem.batch, problem.channels, problem.height, problem.width)
    values = _example.normal(shape, problem.dtype, device=device, seed=seed)
    x = _laid_out(values, problem.source)

    def kernel(backend: str, launch: Any) -> Tensor:
        del backend
        out = _laid_out(torch.empty_like(values), problem.target)
        _run(x, out=out, launch=launch)
        return out

    return _example.Example((x,), torch.clone, kernel)


def _laid_out(values: Tensor, adjacent: str) -> Tensor:
    """`values` in a layout of which `_adjacent` says so."""
    if adjacent == "neither":
        n, c, h, w = values.shape
        wide = values.new_empty((n, 2 * c, h, 2 * w))
        return wide[:, ::2, :, ::2].copy_(values)
    layout = torch.channels_last if adjacent == "channels" else torch.contiguous_format
    return values.contiguous(memory_format=layout)


@torch.library.register_fake("cvfast::to_channels_last_cpu")
def _to_channels_last_fake(x: Tensor) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


def _out_fake(x: Tensor, *, out: Tensor) -> None:
    del x, out


for _op in (
    torch.ops.cvfast.to_channels_last_cpu.default,
    torch.ops.cvfast.to_channels_last_cpu.out,
    torch.ops.cvfast.copy_layout_cpu.out,
    torch.ops.cvfast.copy_layout_triton.out,
):
    if _op._overloadname == "out":
        torch.library.register_fake(_op, _out_fake)
    _refusal = _gradient.refusal(_op, "call torch.Tensor.contiguous")
    _library.impl(_op, _refusal, "Autograd", with_keyset=True)
