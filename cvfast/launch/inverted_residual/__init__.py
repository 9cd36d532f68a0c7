"""Launch parameters of the inverted residual's kernels: `triton` and `cuda`, a module each."""

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
        hidden: channels of the depthwise convolution; `channels` where there is no expansion.
        out_channels: of the projection; 0 without one (the first half of a block with
            squeeze-excite, which ends at the depthwise convolution and its means).
        kernel, stride: of the depthwise convolution, (vertical, horizontal).
        padding: (vertical, horizontal), or (top, left, bottom, right).
        expands: whether there is an expansion.
        residual: whether an image is added to the projection.
        dtype: of x.
        tf32: whether float32 products may be rounded to TF32.
    """

    batch: int
    channels: int
    hidden: int
    out_channels: int
    height: int
    width: int
    kernel: tuple[int, int]
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, ...] = (0, 0)
    expands: bool = True
    residual: bool = False
    dtype: torch.dtype = torch.float16
    tf32: bool = False

    SIZES: ClassVar = ("batch", "channels", "hidden", "out_channels", "height", "width")
    """Fields in which a tuned entry may differ from the problem it is used for."""

    @property
    def projects(self) -> bool:
        """Whether there is a projection."""
        return self.out_channels > 0

    @property
    def out_height(self) -> int:
        return self._positions(0, self.height)

    @property
    def out_width(self) -> int:
        return self._positions(1, self.width)

    def _positions(self, axis: int, size: int) -> int:
        padding = self.padding[axis] + self.padding[axis - 2]
        return (size + padding - self.kernel[axis]) // self.stride[axis] + 1

    def flops(self) -> int:
        """Multiplications and additions, the expansion computed once."""
        out_pixels = self.batch * self.out_height * self.out_width
        count = out_pixels * self.hidden * (self.kernel[0] * self.kernel[1] + self.out_channels)
        if self.expands:
            count += self.batch * self.height * self.width * self.channels * self.hidden
        return 2 * count

    def bytes(self) -> int:
        """Least traffic: every image and weight read or written once, the means aside."""
        pixels, out_pixels = self.height * self.width, self.out_height * self.out_width
        images = pixels * self.channels
        images += out_pixels * (self.out_channels * (2 if self.residual else 1) or self.hidden)
        inner = (self.channels if self.expands else 0) + self.out_channels
        biases = (self.hidden if self.expands else 0) + self.out_channels
        taps = self.kernel[0] * self.kernel[1] + 1
        weights = self.hidden * inner * self.dtype.itemsize + 4 * (self.hidden * taps + biases)
        return self.batch * images * self.dtype.itemsize + weights

    def describe(self) -> str:
        """One line, such as "24-144-24 3x3 at 1x56x56, residual, float16"."""
        widths = [self.channels, self.hidden][0 if self.expands else 1 :]
        if self.projects:
            widths.append(self.out_channels)
        (kh, kw), (vertical, horizontal) = self.kernel, self.stride
        stride = f", stride {vertical}" if vertical == horizontal else f", stride {self.stride}"
        parts = (
            f"{'-'.join(map(str, widths))} {kh}x{kw} at {self.batch}x{self.height}x{self.width}"
            f"{'' if self.stride == (1, 1) else stride}"
            f"{', residual' if self.residual else ''}"
        )
        return f"{parts}, {'tf32' if self.tf32 else str(self.dtype).removeprefix('torch.')}"


GENERAL = (
    (Problem(2, 11, 37, 13, 9, 10, (3, 3), (1, 1), (1, 1)), "relu"),
    (Problem(2, 24, 72, 40, 28, 28, (5, 5), (2, 2), (1, 1, 2, 2)), "hardswish"),
    (Problem(2, 40, 240, 40, 14, 14, (5, 5), (1, 1), (2, 2), residual=True), "relu6"),
    (Problem(2, 64, 64, 128, 28, 28, (3, 3), (2, 2), (1, 1), expands=False), "relu"),
    (Problem(2, 16, 72, 0, 28, 28, (3, 3), (2, 2), (1, 1)), "relu"),
)
"""Calls that networks do not make, each with its activation; for `cvfast kernels`."""
