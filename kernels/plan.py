"""Launches prepared once and started often, and what they check of images."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .jit import Kernel

Strides = tuple[int, int, int]


@dataclass(frozen=True)
class Plan:
    """A launch, but for its tensors."""

    op: str
    kernel: Kernel
    grid: tuple[int, ...]
    sizes: tuple[Any, ...]
    constants: dict[str, Any]
    options: dict[str, int]

    def start(self, *tensors: Tensor) -> None:
        """Launches the kernel.

        Raises:
            ValueError: if the tensors are on different devices.
        """
        if any(tensor.device != tensors[0].device for tensor in tensors):
            devices = ", ".join(str(tensor.device) for tensor in tensors)
            raise ValueError(f"{self.op}: the tensors are on different devices: {devices}")
        with torch.cuda.device_of(tensors[0]):
            self.kernel[self.grid](*tensors, *self.sizes, **self.constants, **self.options)


def strides(image: Tensor) -> Strides:
    """Of images, rows and pixels, in elements; 0 where there is but one."""
    n, h, w = (image.stride(i) if image.shape[i] > 1 else 0 for i in (0, 2, 3))
    return n, h, w


def check_image(
    op: str, name: str, image: Tensor, dtype: torch.dtype, shape: tuple[int, int, int, int]
) -> None:
    """Checks what kernels take for granted of an image [N, C, H, W].

    Raises:
        ValueError: naming it, if shape or dtype is another, or channels are not adjacent.
    """
    if image.shape != shape or image.dtype != dtype:
        raise ValueError(
            f"{op}: {name} is {image.dtype} {tuple(image.shape)}, expected {dtype} {shape}"
        )
    if shape[1] != 1 and image.stride(1) != 1:
        raise ValueError(
            f"{op}: {name} is not channels-last; convert it with "
            f"{name}.contiguous(memory_format=torch.channels_last)"
        )
