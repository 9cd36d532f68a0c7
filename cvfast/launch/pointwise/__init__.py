"""Launch parameters of the pointwise kernel: `triton`."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch

PASSES = ("forward",)


@dataclass(frozen=True)
class Problem:
    """The geometry of one call, which is all that launch parameters may depend on.

    Attributes:
        batch, channels, height, width: of the image x.
        out_channels: of the result.
        stride: (vertical, horizontal).
        prologue: whether x becomes relu(scale · x + shift) first.
        gate: whether that is multiplied by a number per image and channel.
        residual: whether an image is added to the result.
        dtype: of x.
        tf32: whether float32 products may be rounded to TF32.
    """

    batch: int
    channels: int
    out_channels: int
    height: int
    width: int
    stride: tuple[int, int] = (1, 1)
    prologue: bool = False
    gate: bool = False
    residual: bool = False
    dtype: torch.dtype = torch.float16
    tf32: bool = False

    SIZES: ClassVar = ("batch", "channels", "out_channels", "height", "width")
    """Fields in which a tuned entry may differ from the problem it is used for."""

    @property
    def out_height(self) -> int:
        return (self.height - 1) // self.stride[0] + 1

    @property
    def out_width(self) -> int:
        return (self.width - 1) // self.stride[1] + 1

    @property
    def pixels(self) -> int:
        """Of the result, of all images."""
        return self.batch * self.out_height * self.out_width

    def flops(self) -> int:
        """Multiplications and additions of the matrix product."""
        return 2 * self.pixels * self.channels * self.out_channels

    def bytes(self) -> int:
        """Least traffic: pixels that are read, weights, residual and result, once each."""
        columns = self.channels + self.out_channels * (2 if self.residual else 1)
        elements = self.pixels * columns + self.channels * self.out_channels
        elements += self.batch * self.channels if self.gate else 0
        vectors = self.out_channels + (2 * self.channels if self.prologue else 0)
        return elements * self.dtype.itemsize + 4 * vectors

    def describe(self) -> str:
        """One line, such as "64->256 at 1x56x56, residual, float16"."""
        flags = [name for name in ("prologue", "gate", "residual") if getattr(self, name)]
        stride = [f"stride {self.stride[0]}x{self.stride[1]}"] if self.stride != (1, 1) else []
        dtype = "tf32" if self.tf32 else str(self.dtype).removeprefix("torch.")
        size = f"{self.channels}->{self.out_channels} at {self.batch}x{self.height}x{self.width}"
        return ", ".join([size, *stride, *flags, dtype])


_ODD = Problem(2, 37, 19, 9, 7)

GENERAL: tuple[tuple[Problem, str], ...] = (
    (_ODD, "none"),
    (replace(_ODD, stride=(2, 1), residual=True), "relu"),
    (Problem(8, 256, 128, 28, 28, prologue=True), "relu"),
    (Problem(8, 960, 160, 7, 7, gate=True, residual=True), "none"),
    (Problem(8, 64, 256, 56, 56, stride=(2, 2)), "relu6"),
    (Problem(1, 960, 1280, 1, 1), "hardswish"),
    (Problem(1, 960, 240, 1, 1), "hardsigmoid"),
)
"""Calls that reach every flag and activation, for a look at the compiled kernels."""
