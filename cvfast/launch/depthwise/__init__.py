"""Launch parameters of the depthwise kernels: `triton` and `cuda`, a module each."""

from __future__ import annotations

from dataclasses import dataclass

import torch

PASSES = ("forward", "backward_input", "backward_weight")


@dataclass(frozen=True)
class Problem:
    """The geometry of one call, which is all that launch parameters may depend on.

    Attributes:
        batch, channels, height, width: of the image x.
        multiplier: output channels per input channel.
        kernel, stride, padding, dilation: (vertical, horizontal).
        dtype: of x.
    """

    batch: int
    channels: int
    height: int
    width: int
    kernel: tuple[int, int]
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    multiplier: int = 1
    dtype: torch.dtype = torch.float16

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
        return (size + 2 * self.padding[axis] - reach) // self.stride[axis] + 1
