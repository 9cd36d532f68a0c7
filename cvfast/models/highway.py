"""Convolutional Highway networks for CIFAR.

Srivastava, Greff and Schmidhuber 2015, "Highway Networks", arXiv:1505.00387, and "Training Very
Deep Networks", arXiv:1507.06228. They are the gated predecessors that He et al. 2015
(arXiv:1512.03385, Table 6) set beside ResNet: 19 layers with 2.3 M and 32 layers with 1.25 M
parameters.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor


class HighwayConv2d(nn.Module):
    """Convolutional highway layer: ``y = T(x) * H(x) + (1 - T(x)) * x``.

    arXiv:1505.00387, eq. 3, with H a convolution + ReLU and T a convolution + sigmoid.
    (N, C, H, W) to the same shape.

    Args:
        channels: C, of the input and of the output.
        kernel_size: odd kernel size of both convolutions.
        gate_bias: initial bias of T. Negative, so that the layer at first carries its input
            (arXiv:1505.00387, section 2.2).
    """

    def __init__(self, channels: int, kernel_size: int = 3, gate_bias: float = -2.0) -> None:
        super().__init__()
        self.transform = nn.Conv2d(channels, channels, kernel_size, padding=kernel_size // 2)
        self.gate = nn.Conv2d(channels, channels, kernel_size, padding=kernel_size // 2)
        nn.init.kaiming_normal_(self.transform.weight, nonlinearity="relu")
        nn.init.zeros_(self.transform.bias)  # type: ignore[arg-type]
        nn.init.kaiming_normal_(self.gate.weight, nonlinearity="sigmoid")
        nn.init.constant_(self.gate.bias, gate_bias)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        t = torch.sigmoid(self.gate(x))
        return t * F.relu(self.transform(x)) + (1 - t) * x


class HighwayNet(nn.Module):
    """Stages of 3x3 highway layers, halved by max-pooling; then 1x1, global average, classifier.

    A layer that changes the width is a plain convolution + ReLU, since a highway layer needs
    input and output of one shape.

    Args:
        stages: for every stage the width of each of its 3x3 layers.
        num_classes: width of the classifier.
        gate_bias: initial bias of the transform gates, see `HighwayConv2d`.

    Input (N, 3, 32, 32), output (N, num_classes). Other sizes work too.
    """

    def __init__(
        self, stages: Sequence[Sequence[int]], num_classes: int = 10, gate_bias: float = -2.0
    ) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels = 3
        for i, widths in enumerate(stages):
            if i > 0:
                layers.append(nn.MaxPool2d(2))
            for width in widths:
                if width == channels:
                    layers.append(HighwayConv2d(width, 3, gate_bias))
                    continue
                conv = nn.Conv2d(channels, width, 3, padding=1)
                nn.init.kaiming_normal_(conv.weight, nonlinearity="relu")
                nn.init.zeros_(conv.bias)  # type: ignore[arg-type]
                layers += [conv, nn.ReLU(inplace=True)]
                channels = width
        layers.append(HighwayConv2d(channels, 1, gate_bias))
        self.features = nn.Sequential(*layers)
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.fc = nn.Linear(channels, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(torch.flatten(self.avgpool(self.features(x)), 1))


def highway19(**kwargs: Any) -> HighwayNet:
    """Highway network of 19 layers and 2.3 M parameters (arXiv:1512.03385, Table 6).

    The widths are those of FitNet 4 (Romero et al. 2014, arXiv:1412.6550), the network that the
    authors compare with.
    """
    return HighwayNet(((32, 32, 32, 48, 48), (80,) * 6, (128,) * 6), **kwargs)


def highway32(**kwargs: Any) -> HighwayNet:
    """Highway network of 32 layers and 1.25 M parameters (arXiv:1512.03385, Table 6).

    Depth and parameter count are the published ones; the widths are chosen to meet them.
    """
    return HighwayNet(((32,) * 10, (48,) * 10, (64,) * 10), **kwargs)
