"""How a photograph becomes the input of a network."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Preprocess:
    """Resize, centre crop and normalisation that a set of weights was trained with.

    Attributes:
        size: side of the square crop in pixels.
        crop_pct: size of the crop over the length of the resized shorter side.
        mean, std: per channel (red, green, blue), for pixels in [0, 1].
        interpolation: "bilinear" or "bicubic", both antialiased.
    """

    size: int = 224
    crop_pct: float = 0.875
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    interpolation: str = "bilinear"

    def __call__(self, image: Any) -> Tensor:
        """Photograph (H, W, 3), uint8 array or tensor, to (1, 3, size, size), float32.

        Raises:
            ValueError: the image has another shape or dtype.
        """
        pixels = torch.as_tensor(image)
        if pixels.ndim != 3 or pixels.shape[-1] != 3 or pixels.dtype != torch.uint8:
            raise ValueError(
                "expected an RGB image of shape (H, W, 3) and dtype uint8, got "
                f"{tuple(pixels.shape)} and {pixels.dtype}"
            )
        x = pixels.permute(2, 0, 1)[None].float() / 255
        x = self._crop(self._resize(x)).clamp(0, 1)
        mean, std = (torch.tensor(v).view(3, 1, 1) for v in (self.mean, self.std))
        return (x - mean) / std

    def _resize(self, x: Tensor) -> Tensor:
        """Shorter side to ``size / crop_pct``, ratio kept."""
        height, width = x.shape[-2:]
        scale = int(self.size / self.crop_pct) / min(height, width)
        target = (max(self.size, round(height * scale)), max(self.size, round(width * scale)))
        return F.interpolate(x, target, mode=self.interpolation, antialias=True)

    def _crop(self, x: Tensor) -> Tensor:
        top, left = ((n - self.size) // 2 for n in x.shape[-2:])
        return x[..., top : top + self.size, left : left + self.size]
