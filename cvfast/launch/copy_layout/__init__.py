"""Launch parameters of the kernel that copies images from layout to layout: `triton`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

PASSES = ("forward",)


@dataclass(frozen=True)
class Problem:
    """The geometry of one call, which is all that launch parameters may depend on.

    Attributes:
        batch, channels, height, width: of the image.
        source, target: which elements of x and of the copy are adjacent: "channels", "pixels" of a
            plane without gaps, or "neither".
        dtype: of both.
    """

    batch: int
    channels: int
    height: int
    width: int
    source: str = "channels"
    target: str = "channels"
    dtype: torch.dtype = torch.float16

    SIZES: ClassVar = ("batch", "channels", "height", "width")
    """Fields in which a tuned entry may differ from the problem it is used for."""

    @property
    def pixels(self) -> int:
        """Of all images."""
        return self.batch * self.height * self.width

    def flops(self) -> int:
        return 0

    def bytes(self) -> int:
        """The image read once and written once."""
        return 2 * self.pixels * self.channels * self.dtype.itemsize

    def describe(self) -> str:
        """One line, such as "copy of 1x3x224x224, pixels to channels, float16"."""
        shape = f"{self.batch}x{self.channels}x{self.height}x{self.width}"
        dtype = str(self.dtype).removeprefix("torch.")
        return f"copy of {shape}, {self.source} to {self.target}, {dtype}"


GENERAL = (
    (Problem(2, 13, 5, 9, "neither", "channels"), "none"),
    (Problem(1, 3, 224, 224, "pixels", "channels"), "none"),
    (Problem(1, 21, 64, 64, "channels", "pixels"), "none"),
    (Problem(1, 96, 28, 28), "none"),
)
"""Calls that reach what those of the networks do not."""
