"""Memory layouts: image kernels take channels-last (NHWC) memory under a logical NCHW shape."""

from __future__ import annotations

import torch
from torch import Tensor


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
