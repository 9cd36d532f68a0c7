"""Launch parameters of the global pooling kernel: `triton`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

PASSES = ("forward",)


@dataclass(frozen=True)
class Problem:
    """The geometry of one call, which is all that launch parameters may depend on.

    Attributes:
        batch, channels, height, width: of the image x.
        prologue: a batch norm and ReLU stand before the mean.
        dtype: of x.
    """

    batch: int
    channels: int
    height: int
    width: int
    prologue: bool = False
    dtype: torch.dtype = torch.float16

    SIZES: ClassVar = ("batch", "channels", "height", "width")
    """Fields in which a tuned entry may differ from the problem it is used for."""

    @property
    def pixels(self) -> int:
        """Of an image."""
        return self.height * self.width

    def flops(self) -> int:
        """Additions: one for each element."""
        return self.batch * self.channels * self.pixels

    def bytes(self) -> int:
        """Least traffic: the image read once, its means written once."""
        scales = 8 * self.channels if self.prologue else 0
        return self.batch * self.channels * (self.pixels + 1) * self.dtype.itemsize + scales

    def describe(self) -> str:
        """One line, such as "mean of 1x1280x7x7, float16"."""
        shape = f"{self.batch}x{self.channels}x{self.height}x{self.width}"
        behind = ", behind a batch norm" if self.prologue else ""
        return f"mean of {shape}{behind}, {str(self.dtype).removeprefix('torch.')}"


GENERAL = (
    (Problem(3, 13, 5, 9), "none"),
    (Problem(2, 1024, 7, 7, prologue=True), "none"),
    (Problem(1, 16, 112, 112), "none"),
)
"""Calls that reach what those of the networks do not."""
