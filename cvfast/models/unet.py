"""U-Net.

Ronneberger, Fischer and Brox 2015, "U-Net: Convolutional Networks for Biomedical Image
Segmentation", arXiv:1505.04597, Figure 1; with padded convolutions, so that the mask has the size
of the image, and batch normalisation.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor


class DoubleConv(nn.Module):
    """Twice 3x3 convolution, BN, ReLU: (N, in_ch, H, W) to (N, out_ch, H, W)."""

    def __init__(self, in_ch: int, out_ch: int) -> None:
        super().__init__()
        self.conv = nn.Sequential(
            nn.Conv2d(in_ch, out_ch, 3, padding=1, bias=False),
            nn.BatchNorm2d(out_ch),
            nn.ReLU(inplace=True),
            nn.Conv2d(out_ch, out_ch, 3, padding=1, bias=False),
            nn.BatchNorm2d(out_ch),
            nn.ReLU(inplace=True),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


class UNet(nn.Module):
    """U-Net of four levels, 64 to 1024 channels.

    Args:
        n_channels: channels of the image.
        n_classes: channels of the mask.

    Input (N, n_channels, H, W) with H and W multiples of 16 (ValueError otherwise), output
    logits (N, n_classes, H, W). Weights start as N(0, 2 / fan-in), section 3 of the paper.
    """

    def __init__(self, n_channels: int = 3, n_classes: int = 1) -> None:
        super().__init__()
        self.inc = DoubleConv(n_channels, 64)
        self.down1 = nn.Sequential(nn.MaxPool2d(2), DoubleConv(64, 128))
        self.down2 = nn.Sequential(nn.MaxPool2d(2), DoubleConv(128, 256))
        self.down3 = nn.Sequential(nn.MaxPool2d(2), DoubleConv(256, 512))
        self.down4 = nn.Sequential(nn.MaxPool2d(2), DoubleConv(512, 1024))
        self.up1_trans = nn.ConvTranspose2d(1024, 512, kernel_size=2, stride=2)
        self.up1_conv = DoubleConv(1024, 512)
        self.up2_trans = nn.ConvTranspose2d(512, 256, kernel_size=2, stride=2)
        self.up2_conv = DoubleConv(512, 256)
        self.up3_trans = nn.ConvTranspose2d(256, 128, kernel_size=2, stride=2)
        self.up3_conv = DoubleConv(256, 128)
        self.up4_trans = nn.ConvTranspose2d(128, 64, kernel_size=2, stride=2)
        self.up4_conv = DoubleConv(128, 64)
        self.outc = nn.Conv2d(64, n_classes, kernel_size=1)
        for m in self.modules():
            if isinstance(m, nn.Conv2d):
                nn.init.kaiming_normal_(m.weight, nonlinearity="relu")
            elif isinstance(m, nn.ConvTranspose2d):
                # With kernel = stride every output pixel reads one pixel of each input channel.
                nn.init.normal_(m.weight, std=math.sqrt(2 / m.in_channels))

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[-2:]
        if height % 16 != 0 or width % 16 != 0:
            raise ValueError(
                f"U-Net halves height and width four times and needs multiples of 16, got "
                f"{height}x{width}: pad or resize the image"
            )
        x1 = self.inc(x)
        x2 = self.down1(x1)
        x3 = self.down2(x2)
        x4 = self.down3(x3)
        x = self.down4(x4)
        x = self.up1_conv(torch.cat([self.up1_trans(x), x4], 1))
        x = self.up2_conv(torch.cat([self.up2_trans(x), x3], 1))
        x = self.up3_conv(torch.cat([self.up3_trans(x), x2], 1))
        x = self.up4_conv(torch.cat([self.up4_trans(x), x1], 1))
        return self.outc(x)


def unet(**kwargs: Any) -> UNet:
    """U-Net (arXiv:1505.04597)."""
    return UNet(**kwargs)
