"""Pooling: the largest or the mean of each window, and the mean of a whole image.

`cvfast::pool_cpu` is `max_pool2d` or `avg_pool2d` of `torch.nn.functional`, and
`cvfast::global_pool_cpu` is `adaptive_avg_pool2d(x, 1)`, on channels-last images. Means take a
batch norm and ReLU before them (scale, shift): DenseNet's. The overloads `.out` write into a given
image, for example a channel slice of a wider one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cvfast.ops import _gradient

KINDS = ("max", "avg")

_TAGS = [torch.Tag.needs_fixed_stride_order, torch.Tag.pt2_compliant_tag]
_POOL = (
    "Tensor x, str kind, int[2] kernel_size, int[2] stride, int[2] padding, int[2] dilation, "
    "bool ceil_mode, bool count_include_pad, int? divisor_override, Tensor? scale=None, "
    "Tensor? shift=None"
)
_GLOBAL_POOL = "Tensor x, Tensor? scale=None, Tensor? shift=None"

_library = torch.library.Library("cvfast", "FRAGMENT")
for _name, _arguments in (("pool_cpu", _POOL), ("global_pool_cpu", _GLOBAL_POOL)):
    _library.define(f"{_name}({_arguments}) -> Tensor", tags=_TAGS)
    _library.define(f"{_name}.out({_arguments}, *, Tensor(a!) out) -> ()", tags=_TAGS)


def reference(
    x: Tensor,
    kind: str,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int] = (0, 0),
    dilation: Sequence[int] = (1, 1),
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
) -> Tensor:
    """What `cvfast::pool_cpu` computes, in plain PyTorch: any device, dtype and layout.

    Args:
        x: [N, C, H, W]; the kernel takes float32, bfloat16 and float16, channels-last (adjacent
            channels; images, rows and pixels may lie apart).
        kind: "max" or "avg".
        kernel_size, stride, padding, dilation: (vertical, horizontal) each; dilation is for "max".
        ceil_mode: the last window may reach beyond the padded image.
        count_include_pad, divisor_override: for "avg", as in PyTorch.
        scale, shift: [C] each, float32 for the kernel, or both None; for "avg": x becomes
            relu(scale · x + shift).

    Returns:
        [N, C, H', W'] in the dtype of x.
    """
    if kind == "max":
        return F.max_pool2d(
            x, tuple(kernel_size), tuple(stride), tuple(padding), tuple(dilation), ceil_mode
        )
    return F.avg_pool2d(
        scaled(x, scale, shift),
        tuple(kernel_size),
        tuple(stride),
        tuple(padding),
        ceil_mode,
        count_include_pad,
        divisor_override,
    )


def global_reference(x: Tensor, scale: Tensor | None = None, shift: Tensor | None = None) -> Tensor:
    """What `cvfast::global_pool_cpu` computes: the mean over H and W, [N, C, 1, 1]."""
    return scaled(x, scale, shift).mean((2, 3), keepdim=True)


def scaled(x: Tensor, scale: Tensor | None, shift: Tensor | None) -> Tensor:
    """relu(scale · x + shift), or x itself where there are none."""
    if scale is None or shift is None:
        return x
    return F.relu(x * scale.to(x.dtype)[:, None, None] + shift.to(x.dtype)[:, None, None])


def output_size(
    size: Sequence[int],
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    ceil_mode: bool,
) -> tuple[int, int]:
    """(H', W') of the pooled image; in ceil_mode no window starts beyond the image's end."""
    sizes = []
    for i in (0, 1):
        free = size[i] + 2 * padding[i] - dilation[i] * (kernel_size[i] - 1) - 1
        count = (free + (stride[i] - 1 if ceil_mode else 0)) // stride[i] + 1
        if ceil_mode and (count - 1) * stride[i] >= size[i] + padding[i]:
            count -= 1
        sizes.append(count)
    return sizes[0], sizes[1]


def bytes_moved(
    x_shape: Sequence[int], out_shape: Sequence[int], dtype: torch.dtype = torch.float32
) -> int:
    """Least traffic: the image read once, the pooled one written once."""
    return (torch.Size(x_shape).numel() + torch.Size(out_shape).numel()) * dtype.itemsize


def _empty(x: Tensor, height: int, width: int) -> Tensor:
    return torch.empty(
        (x.shape[0], x.shape[1], height, width),
        dtype=x.dtype,
        device=x.device,
        memory_format=torch.channels_last,
    )


@torch.library.register_fake("cvfast::pool_cpu")
def _pool_fake(
    x: Tensor,
    kind: str,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    ceil_mode: bool,
    *rest: Any,
    **more: Any,
) -> Tensor:
    del kind, rest, more
    return _empty(x, *output_size(x.shape[2:], kernel_size, stride, padding, dilation, ceil_mode))


@torch.library.register_fake("cvfast::global_pool_cpu")
def _global_pool_fake(
    x: Tensor, scale: Tensor | None = None, shift: Tensor | None = None
) -> Tensor:
    del scale, shift
    return _empty(x, 1, 1)


def _out_fake(*arguments: Any, out: Tensor, **more: Any) -> None:
    del arguments, out, more


for _name, _advice in (
    ("pool_cpu", "call torch.nn.functional.max_pool2d or avg_pool2d"),
    ("global_pool_cpu", "call torch.nn.functional.adaptive_avg_pool2d"),
):
    torch.library.register_fake(f"cvfast::{_name}.out", _out_fake)
    for _overload in ("default", "out"):
        _op = getattr(getattr(torch.ops.cvfast, _name), _overload)
        _library.impl(_op, _gradient.refusal(_op, _advice), "Autograd", with_keyset=True)
