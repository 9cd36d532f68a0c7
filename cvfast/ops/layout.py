"""Memory layouts: image kernels take channels-last (NHWC) memory under a logical NCHW shape.

`cvfast::copy_layout_cpu.out(x, out=out)` copies an image [N, C, H, W] of float32, bfloat16 or
float16 into another of any strides; `cvfast::to_channels_last_cpu(x)` copies it into a fresh
channels-last one.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cvfast.ops import _gradient

_TAGS = [torch.Tag.needs_fixed_stride_order, torch.Tag.pt2_compliant_tag]

_library = torch.library.Library("cvfast", "FRAGMENT")
_library.define("to_channels_last_cpu(Tensor x) -> Tensor", tags=_TAGS)
_library.define("to_channels_last_cpu.out(Tensor x, *, Tensor(a!) out) -> ()", tags=_TAGS)
_library.define("copy_layout_cpu.out(Tensor x, *, Tensor(a!) out) -> ()", tags=_TAGS)


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


@torch.library.register_fake("cvfast::to_channels_last_cpu")
def _to_channels_last_fake(x: Tensor) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


def _out_fake(x: Tensor, *, out: Tensor) -> None:
    del x, out


for _op in (
    torch.ops.cvfast.to_channels_last_cpu.default,
    torch.ops.cvfast.to_channels_last_cpu.out,
    torch.ops.cvfast.copy_layout_cpu.out,
):
    if _op._overloadname == "out":
        torch.library.register_fake(_op, _out_fake)
    _refusal = _gradient.refusal(_op, "call torch.Tensor.contiguous")
    _library.impl(_op, _refusal, "Autograd", with_keyset=True)
