"""``conv``: k x k convolution + bias + optional residual + activation, any groups.

Implementations: ``reference`` (plain PyTorch; any dtype, device and layout) and ``onednn`` (oneDNN
through PyTorch on the CPU: weights reordered into the library's blocked layout, bias, residual and
those activations fused that treat NaN as PyTorch does).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .activation import NONE, Activation, activate_

ONEDNN_DTYPES = (torch.float32, torch.bfloat16)

# oneDNN's relu, clip and hard-sigmoid turn NaN into a number and its erf-gelu turns Inf into NaN
# (observed with the oneDNN of torch 2.13); those run as a pass of their own over the result, which
# is still in cache.
_ONEDNN_ATTRIBUTE = {
    "hardswish": "hardswish",
    "silu": "swish",
    "sigmoid": "sigmoid",
    "tanh": "tanh",
}


def conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    stride: Sequence[int] = (1, 1),
    padding: Sequence[int] = (0, 0),
    dilation: Sequence[int] = (1, 1),
    groups: int = 1,
    residual: Tensor | None = None,
    activation: Activation = NONE,
) -> Tensor:
    """The reference: ``activation(conv2d(x, weight) + bias + residual)``.

    ``x`` [N, C, H, W], ``weight`` [K, C / groups, R, S], ``bias`` [K], ``residual`` [N, K, P, Q];
    one dtype, any layout. Errors are those of :func:`torch.nn.functional.conv2d`.
    """
    out = F.conv2d(x, weight, bias, tuple(stride), tuple(padding), tuple(dilation), groups)
    if residual is not None:
        out = out + residual
    return activation(out)


def onednn_unsupported(dtype: torch.dtype, device: torch.device) -> str | None:
    """Why oneDNN cannot serve this dtype on this device, or None where it can."""
    if device.type != "cpu":
        return f"oneDNN runs on the CPU, the input is on {device.type}"
    if not torch.backends.mkldnn.is_available():
        return "this PyTorch was built without oneDNN"
    if dtype not in ONEDNN_DTYPES:
        return f"oneDNN is used for float32 and bfloat16, not {str(dtype).removeprefix('torch.')}"
    if dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return "this CPU lacks the instructions that oneDNN's bfloat16 kernels need"
    return None


def fuses_activation(activation: str, residual: bool) -> bool:
    """Whether :func:`conv_onednn` applies ``activation`` without a pass of its own."""
    return activation == "none" or (not residual and activation in _ONEDNN_ATTRIBUTE)


class OneDnnWeight:
    """A convolution's weight in the opaque layouts that oneDNN prefers, one for each input shape.

    The preferred layout depends on the input's shape, and with another one a convolution may fall
    to a reference kernel: 960 -> 320 channels at 6 x 5 took 67 us with its own layout and 5,528 us
    with that of 7 x 7. Shapes that prefer the same layout share one copy. Safe to use from several
    threads.

    Args:
        weight: [K, C / groups, R, S], float32 or bfloat16; not kept.
        input_shape: (N, C, H, W) to pack for at once.
    """

    MAX_SHAPES = 64
    """Shapes remembered; beyond, all but the layout of the last are forgotten."""

    def __init__(
        self,
        weight: Tensor,
        input_shape: Sequence[int],
        *,
        stride: Sequence[int],
        padding: Sequence[int],
        dilation: Sequence[int],
        groups: int,
    ) -> None:
        self.stride, self.padding = list(stride), list(padding)
        self.dilation, self.groups = list(dilation), groups
        packed = self._reorder(weight.detach().to_mkldnn(), input_shape)
        self._layouts: dict[bytes, Tensor] = {_layout(packed): packed}
        self._packed: dict[Sequence[int], Tensor] = {torch.Size(input_shape): packed}

    def packed_for(self, shape: torch.Size) -> Tensor:
        """The weight in the layout for inputs of ``shape``."""
        packed = self._packed.get(shape)
        return self._pack(shape) if packed is None else packed

    def _pack(self, shape: torch.Size) -> Tensor:
        known = next(iter(self._layouts.values()))
        try:
            packed = self._reorder(known, shape)
        except RuntimeError:
            # torch 2.11 cannot reorder some packed weights; it then does so on each call.
            packed = known
        layout = _layout(packed)
        if len(self._packed) >= self.MAX_SHAPES:
            self._packed, self._layouts = {}, {layout: packed}
        packed = self._layouts.setdefault(layout, packed)
        self._packed[shape] = packed
        return packed

    def _reorder(self, weight: Tensor, shape: Sequence[int]) -> Tensor:
        packed: Tensor = torch._C._nn.mkldnn_reorder_conv2d_weight(  # type: ignore[call-arg]
            weight, self.padding, self.stride, self.dilation, self.groups, list(shape)
        )
        return packed


def _layout(packed: Tensor) -> bytes:
    """What tells oneDNN's layouts apart."""
    return bytes(torch.ops.mkldnn._get_mkldnn_serialized_md(packed).tolist())


def conv_onednn(
    x: Tensor,
    weight: OneDnnWeight,
    bias: Tensor | None,
    residual: Tensor | None,
    activation: str,
    parameters: tuple[float | str, ...] = (),
) -> Tensor:
    """:func:`conv` on a prepared weight; inference only (no gradient is recorded).

    The result is channels-last; a ``x`` that is not is converted inside on each call. ``residual``
    must have the result's shape.
    """
    ops = torch.ops.mkldnn
    packed = weight.packed_for(x.shape)
    geometry = (weight.padding, weight.stride, weight.dilation, weight.groups)
    # For a single pixel the strides do not tell the layout, and torch 2.11 fails to fuse the sum.
    if residual is not None and residual.shape[2:].numel() > 1:
        out: Tensor = ops._convolution_pointwise.binary(
            x, residual, packed, bias, *geometry, "add", 1.0, None, [], None
        )
    elif residual is not None:
        out = ops._convolution_pointwise.default(x, packed, bias, *geometry, "none", [], "")
        out.add_(residual)
    else:
        attribute = _ONEDNN_ATTRIBUTE.get(activation)
        if attribute is not None:
            activation = "none"
        out = ops._convolution_pointwise.default(
            x, packed, bias, *geometry, attribute or "none", [], ""
        )
    return activate_(out, activation, parameters)


def conv_torch(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    activation: str,
    parameters: tuple[float | str, ...] = (),
) -> Tensor:
    """:func:`conv` through ``torch.nn.functional.conv2d``, then in place; inference only."""
    out: Tensor = torch.ops.aten.conv2d.default(x, weight, bias, stride, padding, dilation, groups)
    if residual is not None:
        out.add_(residual)
    return activate_(out, activation, parameters)


def flops(x_shape: Sequence[int], weight_shape: Sequence[int], out_shape: Sequence[int]) -> int:
    """Operations of the convolution, a multiply-add counted as two, as by ``FlopCounterMode``."""
    n, k, p, q = out_shape
    _, c, r, s = weight_shape
    return 2 * n * k * p * q * c * r * s


def bytes_moved(
    x_shape: Sequence[int],
    weight_shape: Sequence[int],
    out_shape: Sequence[int],
    itemsize: int,
    passes: int = 0,
) -> int:
    """Bytes read and written when source, weights and result cross memory once.

    ``passes`` counts elementwise passes over the result that are not fused (batch norm, activation,
    addition); each reads and writes it once more.
    """
    from math import prod

    return itemsize * (prod(x_shape) + prod(weight_shape) + prod(out_shape) * (1 + 2 * passes))
