"""Launch parameters of the elementwise kernel: `triton`."""

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
        op: "none", "add" or "mul": what joins x and y.
        gate: y has a single pixel per image.
        affine: x is scaled and shifted per channel.
        dtype: of x.
    """

    batch: int
    channels: int
    height: int
    width: int
    op: str = "none"
    gate: bool = False
    affine: bool = False
    dtype: torch.dtype = torch.float16

    SIZES: ClassVar = ("batch", "channels", "height", "width")
    """Fields in which a tuned entry may differ from the problem it is used for."""

    @property
    def pixels(self) -> int:
        """Of all images."""
        return self.batch * self.height * self.width

    def flops(self) -> int:
        """Multiplications and additions beside the activation's."""
        each = (self.op != "none") + 2 * self.affine
        return each * self.pixels * self.channels

    def bytes(self) -> int:
        """Least traffic: x and y read once, the result written once."""
        second = 0 if self.op == "none" else self.batch if self.gate else self.pixels
        scales = 8 * self.channels if self.affine else 0
        return (2 * self.pixels + second) * self.channels * self.dtype.itemsize + scales

    def describe(self) -> str:
        """One line, such as "add of 1x256x14x14, float16"."""
        what = "activation" if self.op == "none" else self.op
        shape = f"{self.batch}x{self.channels}x{self.height}x{self.width}"
        details = f"{', gate' if self.gate else ''}{', scaled' if self.affine else ''}"
        return f"{what} of {shape}{details}, {str(self.dtype).removeprefix('torch.')}"


GENERAL = (
    (Problem(2, 13, 5, 9, op="add", affine=True), "relu6"),
    (Problem(2, 72, 28, 28, op="mul", gate=True), "none"),
    (Problem(1, 256, 56, 56, op="add"), "relu"),
    (Problem(1, 64, 112, 112, affine=True), "silu"),
    (Problem(1, 16, 112, 112), "hardswish"),
)
"""Calls that reach what those of the networks do not."""
