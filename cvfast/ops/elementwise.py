"""What networks do to images element by element, in one pass.

`cvfast::elementwise_cpu` computes activation((scale · x + shift) op y) on channels-last images: a
residual (op "add"), a squeeze-excite gate (op "mul"), a batch norm that no convolution took up
(scale, shift), an activation, or each of these. The overload `.out` writes into a given image, for
example a channel slice of a wider one; that may be x or y itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from cvfast.ops import _gradient
from cvfast.ops.activation import Activation

OPS = ("none", "add", "mul")
ACTIVATIONS = ("none", "relu", "relu6", "hardswish", "hardsigmoid", "sigmoid", "silu")

_TAGS = [torch.Tag.needs_fixed_stride_order, torch.Tag.pt2_compliant_tag]
_ARGUMENTS = "Tensor x, Tensor? y, str op, str activation, Tensor? scale=None, Tensor? shift=None"

_library = torch.library.Library("cvfast", "FRAGMENT")
_library.define(f"elementwise_cpu({_ARGUMENTS}) -> Tensor", tags=_TAGS)
_library.define(f"elementwise_cpu.out({_ARGUMENTS}, *, Tensor(a!) out) -> ()", tags=_TAGS)


def reference(
    x: Tensor,
    y: Tensor | None,
    op: str,
    activation: str = "none",
    scale: Tensor | None = None,
    shift: Tensor | None = None,
) -> Tensor:
    """What `cvfast::elementwise_cpu` computes, in plain PyTorch: any device, dtype and layout.

    Args:
        x: [N, C, H, W]; the kernel takes float32, bfloat16 and float16, channels-last (adjacent
            channels; images, rows and pixels may lie apart).
        y: of x's dtype and shape, or with 1 for N, or for H and W, or for all three; None for op
            "none".
        op: "none", "add" or "mul".
        activation: one of `ACTIVATIONS`.
        scale, shift: [C] each, float32 for the kernel, or both None.

    Returns:
        [N, C, H, W] in the dtype of x.

    Raises:
        ValueError: for an unknown op or activation.
    """
    if op not in OPS:
        raise ValueError(f"elementwise: unknown op {op!r}; expected {', '.join(OPS)}")
    if activation not in ACTIVATIONS:
        raise ValueError(
            f"elementwise: unknown activation {activation!r}; expected {', '.join(ACTIVATIONS)}"
        )
    if scale is not None and shift is not None:
        x = x * scale.to(x.dtype)[:, None, None] + shift.to(x.dtype)[:, None, None]
    if y is not None:
        x = x + y if op == "add" else x * y
    return Activation(activation)(x)


def bytes_moved(
    shape: Sequence[int], y_shape: Sequence[int] = (), dtype: torch.dtype = torch.float32
) -> int:
    """Least traffic: x and y (no y: ()) read once, the result written once."""
    y_size = torch.Size(y_shape).numel() if y_shape else 0
    return (2 * torch.Size(shape).numel() + y_size) * dtype.itemsize


@torch.library.register_fake("cvfast::elementwise_cpu")
def _elementwise_fake(x: Tensor, *rest: Any, **more: Any) -> Tensor:
    del rest, more
    return torch.empty(x.shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


@torch.library.register_fake("cvfast::elementwise_cpu.out")
def _elementwise_out_fake(*arguments: Any, out: Tensor, **more: Any) -> None:
    del arguments, out, more


for _overload in ("default", "out"):
    _op = getattr(torch.ops.cvfast.elementwise_cpu, _overload)
    _refusal = _gradient.refusal(_op, "compute it with torch's operators")
    _library.impl(_op, _refusal, "Autograd", with_keyset=True)
