"""Folding of batch normalisation into the convolution before it."""

from __future__ import annotations

import torch
from torch import Tensor


def fold_batch_norm(
    weight: Tensor,
    bias: Tensor | None,
    running_mean: Tensor,
    running_var: Tensor,
    bn_weight: Tensor | None,
    bn_bias: Tensor | None,
    eps: float,
    *,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """Weight and bias of the convolution that equals `batch_norm(conv(x))` at inference.

    With s = bn_weight / sqrt(running_var + eps): weight * s, and (bias - running_mean) * s +
    bn_bias (Ioffe & Szegedy, 2015, algorithm 2). Computed in float64, cast after.

    Args:
        weight: [C_out, C_in / groups, kh, kw].
        bias: [C_out] or None, which counts as zeros.
        running_mean, running_var: [C_out].
        bn_weight, bn_bias: [C_out], or None for ones and zeros.
        dtype: of the result; default the weight's.

    Raises:
        ValueError: if a vector does not have C_out entries.
    """
    channels = weight.shape[0]
    vectors = {
        "bias": bias,
        "running_mean": running_mean,
        "running_var": running_var,
        "bn_weight": bn_weight,
        "bn_bias": bn_bias,
    }
    for name, vector in vectors.items():
        if vector is not None and vector.shape != (channels,):
            raise ValueError(
                f"fold_batch_norm: {name} has shape {tuple(vector.shape)}, expected ({channels},) "
                "to match weight's first dimension"
            )
    scale = torch.rsqrt(running_var.double() + eps)
    if bn_weight is not None:
        scale = scale * bn_weight.double()
    shift = -running_mean.double() if bias is None else bias.double() - running_mean.double()
    shift = shift * scale
    if bn_bias is not None:
        shift = shift + bn_bias.double()
    folded = weight.double() * scale.reshape(-1, *[1] * (weight.dim() - 1))
    dtype = weight.dtype if dtype is None else dtype
    return folded.to(dtype), shift.to(dtype)
