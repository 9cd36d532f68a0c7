"""Launch parameters of the pooling kernel: `triton`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

PASSES = ("forward",)


def output_size(
    size: Sequence[int],
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    ceil_mode: bool,
) -> tuple[int, int]:
    """(H', W') of the pooled image; in ceil_mode no window starts beyond the image's end."""
    sizes = []
    for i in (0, 1):
        free = size[i] + 2 * padding[i] - dilation[i] * (kernel_size[i] - 1) - 1
        count = (free + (stride[i] - 1 if ceil_mode else 0)) // stride[i] + 1
        if ceil_mode and (count - 1) * stride[i] >= size[i] + padding[i]:
            count -= 1
        sizes.append(count)
    return sizes[0], sizes[1]


@dataclass(frozen=True)
class Problem:
    """The geometry of one call, which is all that launch parameters may depend on.

    Attributes:
        batch, channels, height, width: of the image x.
        kind: "max" or "avg".
        kernel, stride, padding, dilation: (vertical, horizontal).
        ceil_mode: the last window may reach beyond the padded image.
        count_include_pad: a mean counts the padding's zeros.
        divisor: what a mean's sum is divided by; 0: the pixels of its window.
        prologue: a batch norm and ReLU stand before the mean.
        dtype: of x.
    """

    batch: int
    channels: int
    height: int
    width: int
    kind: str
    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    ceil_mode: bool = False
    count_include_pad: bool = True
    divisor: int = 0
    prologue: bool = False
    dtype: torch.dtype = torch.float16

    SIZES: ClassVar = ("batch", "channels", "height", "width")
    """Fields in which a tuned entry may differ from the problem it is used for."""

    @property
    def out_height(self) -> int:
        return self._out_size[0]

    @property
    def out_width(self) -> int:
        return self._out_size[1]

    @property
    def _out_size(self) -> tuple[int, int]:
        return output_size(
            (self.height, self.width), self.kernel, self.stride, self.padding, self.dilation,
            self.ceil_mode,
        )  # fmt: skip

    @property
    def taps(self) -> int:
        """Pixels of a window."""
        return self.kernel[0] * self.kernel[1]

    def flops(self) -> int:
        """Comparisons or additions: one for each pixel of each window."""
        return self.batch * self.channels * self.out_height * self.out_width * self.taps

    def bytes(self) -> int:
        """Least traffic: the image read once, the pooled one written once."""
        pixels = self.height * self.width + self.out_height * self.out_width
        scales = 8 * self.channels if self.prologue else 0
        return self.batch * self.channels * pixels * self.dtype.itemsize + scales

    def describe(self) -> str:
        """One line, such as "max 3x3 at 1x64x112x112, stride 2, float16"."""
        (kh, kw), (vertical, horizontal) = self.kernel, self.stride
        parts = [
            f"{self.kind} {kh}x{kw} at {self.batch}x{self.channels}x{self.height}x{self.width}",
            f"stride {vertical if vertical == horizontal else self.stride}",
        ]
        if self.prologue:
            parts.append("behind a batch norm")
        return ", ".join([*parts, str(self.dtype).removeprefix("torch.")])


GENERAL = (
    (Problem(2, 13, 17, 19, "max", (3, 3), (2, 2), (1, 1), ceil_mode=True), "none"),
    (Problem(2, 64, 15, 14, "max", (2, 3), (1, 2), (1, 0), dilation=(2, 1)), "none"),
    (Problem(2, 24, 20, 21, "avg", (3, 3), (1, 1), (1, 1), count_include_pad=False), "none"),
    (Problem(2, 32, 14, 14, "avg", (2, 2), (2, 2), prologue=True), "none"),
    (Problem(2, 40, 17, 17, "avg", (7, 7), (3, 3), (3, 3), divisor=5), "none"),
)
"""Calls that reach what those of the networks do not."""
