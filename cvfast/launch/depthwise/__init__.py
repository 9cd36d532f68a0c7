"""Launch parameters of the depthwise kernels: `triton` and `cuda`, a module each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

PASSES = ("forward", "backward_input", "backward_weight")


@dataclass(frozen=True)
class Problem:
    """The geometry of one call, which is all that launch parameters may depend on.

    Attributes:
        batch, channels, height, width: of the image x.
        multiplier: output channels per input channel.
        kernel, stride, dilation: (vertical, horizontal).
        padding: (vertical, horizontal), or (top, left, bottom, right).
        dtype: of x.
    """

    batch: int
    channels: int
    height: int
    width: int
    kernel: tuple[int, int]
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, ...] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    multiplier: int = 1
    dtype: torch.dtype = torch.float16

    SIZES: ClassVar = ("batch", "channels", "height", "width")
    """Fields in which a tuned entry may differ from the problem it is used for."""

    @property
    def out_height(self) -> int:
        return self._positions(0, self.height)

    @property
    def out_width(self) -> int:
        return self._positions(1, self.width)

    @property
    def out_channels(self) -> int:
        return self.channels * self.multiplier

    def _positions(self, axis: int, size: int) -> int:
        reach = self.dilation[axis] * (self.kernel[axis] - 1) + 1
        padding = self.padding[axis] + self.padding[axis - 2]
        return (size + padding - reach) // self.stride[axis] + 1

    def flops(self) -> int:
        """Multiplications and additions of the forward pass."""
        return 2 * self._outputs * self.kernel[0] * self.kernel[1]

    def bytes(self) -> int:
        """Least traffic of the forward pass: every image and weight read or written once."""
        images = self.batch * self.channels * self.height * self.width + self._outputs
        taps = self.kernel[0] * self.kernel[1]
        return images * self.dtype.itemsize + 4 * self.out_channels * (taps + 1)

    @property
    def _outputs(self) -> int:
        return self.batch * self.out_channels * self.out_height * self.out_width

    def describe(self) -> str:
        """One line: shape, kernel, stride, what is out of the ordinary, and dtype."""
        parts = [
            f"{self.batch}x{self.channels}x{self.height}x{self.width}",
            f"k{_short(self.kernel)}",
            f"s{_short(self.stride)}",
        ]
        if self.dilation != (1, 1):
            parts.append(f"d{_short(self.dilation)}")
        if self.multiplier != 1:
            parts.append(f"m{self.multiplier}")
        return " ".join([*parts, str(self.dtype).removeprefix("torch.")])


def _short(values: tuple[int, int]) -> str:
    return str(values[0]) if values[0] == values[1] else f"{values[0]}x{values[1]}"


# Odd channels, a depth multiplier, dilation, the largest kernel, unequal axes, and each activation.
GENERAL = (
    (Problem(2, 13, 17, 19, (3, 3), (1, 1), (1, 1)), "none"),
    (Problem(2, 24, 20, 20, (3, 3), (2, 2), (1, 1), multiplier=2), "relu"),
    (Problem(2, 64, 33, 33, (3, 3), (1, 1), (2, 2), (2, 2)), "relu6"),
    (Problem(2, 96, 28, 28, (7, 7), (1, 1), (3, 3)), "none"),
    (Problem(2, 96, 28, 28, (7, 7), (2, 2), (3, 3)), "none"),
    (Problem(2, 33, 15, 12, (3, 5), (2, 1), (1, 2)), "hardswish"),
)
