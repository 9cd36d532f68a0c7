"""Launch parameters of the convolution's GPU kernels: `triton`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

PASSES = ("forward",)

_PANEL = 16
FEW_CHANNELS = 16
"""Images of fewer channels are read tap by tap and channel by channel (`Problem.flat`)."""


@dataclass(frozen=True)
class Problem:
    """The geometry of one call, which is all that launch parameters may depend on.

    Attributes:
        batch, channels, height, width: of the image x.
        out_channels: of the result.
        kernel, stride, dilation: (vertical, horizontal).
        padding: (vertical, horizontal), or (top, left, bottom, right).
        channels2: of the image x2, whose channels come after those of x; 0 without one.
        residual: whether an image is added.
        dtype: of the images.
        tf32: whether float32 products may be rounded to TF32.
    """

    batch: int
    channels: int
    height: int
    width: int
    out_channels: int
    kernel: tuple[int, int]
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, ...] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    channels2: int = 0
    residual: bool = False
    dtype: torch.dtype = torch.float16
    tf32: bool = False

    SIZES: ClassVar = ("batch", "channels", "height", "width", "out_channels", "channels2")
    """Fields in which a tuned entry may differ from the problem it is used for."""

    @property
    def out_height(self) -> int:
        return self._positions(0, self.height)

    @property
    def out_width(self) -> int:
        return self._positions(1, self.width)

    def _positions(self, axis: int, size: int) -> int:
        reach = self.dilation[axis] * (self.kernel[axis] - 1) + 1
        padding = self.padding[axis] + self.padding[axis - 2]
        return (size + padding - reach) // self.stride[axis] + 1

    @property
    def taps(self) -> int:
        return self.kernel[0] * self.kernel[1]

    @property
    def pixels(self) -> int:
        """Of the result, in all images."""
        return self.batch * self.out_height * self.out_width

    @property
    def columns(self) -> int:
        """Output channels with the padding of the packed weights."""
        return -(-self.out_channels // _PANEL) * _PANEL

    @property
    def flat(self) -> bool:
        """Whether the kernel walks over taps and channels as one axis: with the 3 channels of a
        photograph, blocks of channels would be mostly padding."""
        return self.channels < FEW_CHANNELS and not self.channels2

    def flops(self) -> int:
        """Multiplications and additions."""
        channels = self.channels + self.channels2
        return 2 * self.pixels * self.out_channels * self.taps * channels

    def bytes(self) -> int:
        """Least traffic: every image and weight read or written once."""
        channels = self.channels + self.channels2
        images = self.batch * channels * self.height * self.width
        images += self.pixels * self.out_channels * (2 if self.residual else 1)
        weights = self.taps * channels * self.columns
        return (images + weights) * self.dtype.itemsize + 4 * self.columns

    def describe(self) -> str:
        """One line, such as "64-128 3x3 at 1x56x56, stride 2, residual, float16"."""
        (kh, kw), second = self.kernel, f"+{self.channels2}" if self.channels2 else ""
        parts = [
            f"{self.channels}{second}-{self.out_channels} {kh}x{kw} "
            f"at {self.batch}x{self.height}x{self.width}"
        ]
        for name in ("stride", "dilation"):
            vertical, horizontal = getattr(self, name)
            if (vertical, horizontal) != (1, 1):
                same = vertical == horizontal
                parts.append(f"{name} {vertical if same else f'{vertical}x{horizontal}'}")
        if self.residual:
            parts.append("residual")
        return ", ".join([*parts, "tf32" if self.tf32 else str(self.dtype).removeprefix("torch.")])


# Two sources, odd channels, asymmetric padding, dilation, few channels and each activation.
GENERAL = (
    (Problem(2, 64, 28, 28, 64, (3, 3), padding=(1, 1), channels2=32), "relu"),
    (Problem(2, 19, 17, 13, 21, (3, 3), padding=(1, 1), residual=True), "hardswish"),
    (Problem(2, 40, 16, 16, 48, (3, 3), (2, 2), (0, 0, 1, 1)), "relu6"),
    (Problem(1, 512, 28, 28, 512, (3, 3), padding=(4, 4), dilation=(4, 4)), "hardsigmoid"),
    (Problem(2, 3, 32, 32, 24, (3, 3), (2, 2), (1, 1)), "none"),
)
"""Calls that networks do not make, each with its activation; for `cvfast kernels`."""
