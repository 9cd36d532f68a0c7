"""Launch parameters of the transposed convolution's GPU kernels: `triton`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

PASSES = ("forward",)

_PANEL = 16


@dataclass(frozen=True)
class Problem:
    """The geometry of one call, which is all that launch parameters may depend on.

    Attributes:
        batch, channels, height, width: of the image x.
        out_channels: of the result.
        kernel: (vertical, horizontal), which is the stride too.
        dtype: of the images.
        tf32: whether float32 products may be rounded to TF32.
    """

    batch: int
    channels: int
    height: int
    width: int
    out_channels: int
    kernel: tuple[int, int]
    dtype: torch.dtype = torch.float16
    tf32: bool = False

    SIZES: ClassVar = ("batch", "channels", "height", "width", "out_channels")
    """Fields in which a tuned entry may differ from the problem it is used for."""

    @property
    def taps(self) -> int:
        return self.kernel[0] * self.kernel[1]

    @property
    def pixels(self) -> int:
        """Of x, in all images."""
        return self.batch * self.height * self.width

    @property
    def columns(self) -> int:
        """Output channels with the padding of the packed weights."""
        return -(-self.out_channels // _PANEL) * _PANEL

    def flops(self) -> int:
        """Multiplications and additions."""
        return 2 * self.pixels * self.channels * self.out_channels * self.taps

    def bytes(self) -> int:
        """Least traffic: every image and weight read or written once."""
        images = self.pixels * (self.channels + self.taps * self.out_channels)
        weights = self.taps * self.channels * self.columns
        return (images + weights) * self.dtype.itemsize + 4 * self.columns

    def describe(self) -> str:
        """One line, such as "1024-512 2x2 at 1x16x16, float16"."""
        dtype = "tf32" if self.tf32 else str(self.dtype).removeprefix("torch.")
        return (
            f"{self.channels}-{self.out_channels} {self.kernel[0]}x{self.kernel[1]} "
            f"at {self.batch}x{self.height}x{self.width}, {dtype}"
        )


# Odd channels, unequal sides.
GENERAL = (
    (Problem(2, 19, 9, 7, 21, (2, 2)), "none"),
    (Problem(1, 64, 8, 8, 32, (3, 1)), "none"),
)
"""Calls that networks do not make, each with its activation; for `cvfast kernels`."""
