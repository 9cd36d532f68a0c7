"""Launch parameters of the kernel of Inception modules: `triton`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch

PASSES = ("forward",)

KINDS = ("conv", "max", "avg", "avg_inside")
"""What a branch does: a convolution, or a 1x1 convolution of the largest or the mean of each
window; the mean counts the padding's zeros, or the pixels inside the image only."""

_PANEL = 16


class Branch(NamedTuple):
    """One of the convolutions of a call.

    Attributes:
        channels, height, width: of the image that it reads.
        parts: output channels, of each of the images that it writes.
        kind: of `KINDS`.
        kernel, stride, padding: of the convolution, or of the windows; (vertical, horizontal).
    """

    channels: int
    height: int
    width: int
    parts: tuple[int, ...]
    kind: str = "conv"
    kernel: tuple[int, int] = (1, 1)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)

    @property
    def out_height(self) -> int:
        return self._positions(0, self.height)

    @property
    def out_width(self) -> int:
        return self._positions(1, self.width)

    def _positions(self, axis: int, size: int) -> int:
        return (size + 2 * self.padding[axis] - self.kernel[axis]) // self.stride[axis] + 1

    @property
    def taps(self) -> int:
        """Pixels that the product walks over; a window is one by then."""
        return self.kernel[0] * self.kernel[1] if self.kind == "conv" else 1

    @property
    def columns(self) -> int:
        """Packed output channels: each part is padded to a multiple of 16."""
        return sum(-(-channels // _PANEL) * _PANEL for channels in self.parts)

    def describe(self) -> str:
        """Such as "192-(64+96+16) 1x1"."""
        parts = "+".join(map(str, self.parts))
        kind = "" if self.kind == "conv" else f"{self.kind} "
        widths = f"{self.channels}-{parts if len(self.parts) == 1 else f'({parts})'}"
        stride = "" if self.stride == (1, 1) else f"/{self.stride[0]}"
        return f"{widths} {kind}{self.kernel[0]}x{self.kernel[1]}{stride}"


@dataclass(frozen=True)
class Problem:
    """The geometry of one call, which is all that launch parameters may depend on.

    Attributes:
        batch: of every image.
        branches: see `Branch`.
        dtype: of every image.
        tf32: whether float32 products may be rounded to TF32.
    """

    batch: int
    branches: tuple[Branch, ...]
    dtype: torch.dtype = torch.float16
    tf32: bool = False

    SIZES: ClassVar = ("batch",)
    """Fields in which a tuned entry may differ from the problem it is used for."""

    def __post_init__(self) -> None:
        # Tables of tuned launches know tuples only.
        object.__setattr__(self, "branches", tuple(Branch(*branch) for branch in self.branches))

    def pixels(self, branch: Branch) -> int:
        """Of what a branch writes, over all images."""
        return self.batch * branch.out_height * branch.out_width

    def flops(self) -> int:
        """Multiplications and additions of the convolutions, and one for each pixel of a window."""
        count = 0
        for branch in self.branches:
            count += 2 * self.pixels(branch) * branch.taps * branch.channels * sum(branch.parts)
            if branch.kind != "conv":
                window = branch.kernel[0] * branch.kernel[1]
                count += self.pixels(branch) * branch.channels * window
        return count

    def bytes(self) -> int:
        """Least traffic: every image and weight read or written once. Branches that read images of
        one shape are taken to read the same one."""
        images = {(b.channels, b.height, b.width) for b in self.branches}
        elements = self.batch * sum(c * h * w for c, h, w in images)
        elements += sum(self.pixels(b) * sum(b.parts) for b in self.branches)
        elements += sum(b.taps * b.channels * b.columns for b in self.branches)
        return elements * self.dtype.itemsize + 4 * sum(b.columns for b in self.branches)

    def describe(self) -> str:
        """One line."""
        parts = " | ".join(branch.describe() for branch in self.branches)
        first = self.branches[0]
        size = f"{self.batch}x{first.height}x{first.width}"
        return (
            f"{parts} at {size}, {'tf32' if self.tf32 else str(self.dtype).removeprefix('torch.')}"
        )


GENERAL = (
    (
        Problem(
            2,
            (
                Branch(13, 9, 7, (5, 18)),
                Branch(13, 9, 7, (11,), "max", (3, 3), (1, 1), (1, 1)),
            ),
        ),
        "relu",
    ),
    (
        Problem(
            2,
            (
                Branch(24, 17, 17, (40,), "conv", (5, 5), (1, 1), (2, 2)),
                Branch(32, 17, 17, (24,), "conv", (1, 7), (1, 1), (0, 3)),
                Branch(64, 17, 17, (33,), "avg", (3, 3), (1, 1), (1, 1)),
                Branch(64, 17, 17, (16,), "avg_inside", (3, 3), (1, 1), (1, 1)),
            ),
        ),
        "none",
    ),
)
"""Calls that reach what those of the networks do not."""
