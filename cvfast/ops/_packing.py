"""What the operators of the GPU's matrix kernels share: packed weights, which products round."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

PANEL = 16
"""Output channels are padded to a multiple of this, so that every row of weights is aligned."""


def columns(matrices: Tensor, bias: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Weights as the kernels read them; carry no gradient.

    Args:
        matrices: [..., C, K], any floating dtype: a column for each of K output channels.
        bias: [K] or None, which counts as zeros.
        dtype: of the images.

    Returns:
        contiguous [..., C, N] in `dtype` and bias [N] in float32, N being K rounded up to a
        multiple of `PANEL`; zeros beyond the last channel.
    """
    rest = -matrices.shape[-1] % PANEL
    packed = F.pad(matrices.detach().to(dtype), (0, rest)).contiguous()
    if bias is None:
        return packed, packed.new_zeros(packed.shape[-1], dtype=torch.float32)
    return packed, F.pad(bias.detach().to(torch.float32), (0, rest))


def check(
    packer: str, weight: Tensor, bias: Tensor | None, shape: Sequence[int], dtype: torch.dtype
) -> None:
    """Whether `weight` and `bias` are what :func:`columns` made of matrices for this call.

    Args:
        packer: where they come from, such as "conv.prepack_gpu".
        shape: [..., C, N] of the weight.
        dtype: of the images.

    Raises:
        ValueError: naming what differs; the kernel would read beyond its memory.
    """
    op = packer.split(".")[0]
    for name, tensor, wanted, kind in (
        ("weight", weight, tuple(shape), dtype),
        ("bias", bias, tuple(shape[-1:]), torch.float32),
    ):
        if tensor is None:
            continue
        if tuple(tensor.shape) != wanted or tensor.dtype != kind or not tensor.is_contiguous():
            raise ValueError(
                f"{op}: the packed {name} is {tensor.dtype} {tuple(tensor.shape)}, expected "
                f"contiguous {kind} {wanted} from cvfast.ops.{packer}"
            )


def rounds_to_tf32(dtype: torch.dtype) -> bool:
    """Whether products of images of `dtype` are rounded to TF32, as PyTorch's convolutions are."""
    return dtype == torch.float32 and torch.backends.cudnn.allow_tf32
