"""How images lie in memory, and what a launch consists of but for its tensors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

Strides = tuple[int, int, int]


@dataclass(frozen=True)
class Plan:
    """A launch, but for its tensors.

    Attributes:
        grid: programs.
        sizes: numbers that are no constants of the compiled kernel, in its order.
        constants: those that are, by name.
        options: num_warps and num_stages.
    """

    grid: tuple[int]
    sizes: tuple[int, ...]
    constants: dict[str, Any]
    options: dict[str, int]


def strides(image: Tensor) -> Strides:
    """Of images, rows and pixels, in elements; 0 where there is but one."""
    n, h, w = (image.stride(i) if image.shape[i] > 1 else 0 for i in (0, 2, 3))
    return n, h, w
