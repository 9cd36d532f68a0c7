"""DenseNet.

Huang et al. 2016, "Densely Connected Convolutional Networks", arXiv:1608.06993, Table 1
(DenseNet-BC). `DenseLayer` and `DenseBlock` are the plain building blocks; the networks are made
of `_DenseLayer` and `_DenseBlock`, which compute the same under torchvision's state-dict keys.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint


class DenseLayer(nn.Module):
    """BN-ReLU-1x1 to ``4 * growth_rate`` channels, then BN-ReLU-3x3 to `growth_rate`.

    arXiv:1608.06993, section 3 (bottleneck layers). Takes the list of all earlier feature maps,
    each (N, *, H, W) and together `in_channels` wide; returns only the new features,
    (N, growth_rate, H, W).
    """

    def __init__(self, in_channels: int, growth_rate: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.relu = nn.ReLU(inplace=True)
        self.conv1 = nn.Conv2d(in_channels, 4 * growth_rate, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(4 * growth_rate)
        self.conv2 = nn.Conv2d(4 * growth_rate, growth_rate, 3, padding=1, bias=False)

    def forward(self, prev_features: Sequence[Tensor]) -> Tensor:
        out = self.conv1(self.relu(self.bn1(torch.cat(list(prev_features), 1))))
        return self.conv2(self.relu(self.bn2(out)))


class DenseBlock(nn.Module):
    """`num_layers` dense layers, each reading the output of all before it.

    arXiv:1608.06993, eq. 2. (N, in_channels, H, W) to
    (N, in_channels + num_layers * growth_rate, H, W), the input first and unchanged.
    """

    def __init__(self, num_layers: int, in_channels: int, growth_rate: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            DenseLayer(in_channels + i * growth_rate, growth_rate) for i in range(num_layers)
        )

    def forward(self, x: Tensor) -> Tensor:
        features = [x]
        for layer in self.layers:
            features.append(layer(features))
        return torch.cat(features, 1)


class _DenseLayer(nn.Module):
    """`DenseLayer` with torchvision's keys, bottleneck factor, dropout and checkpointing."""

    def __init__(
        self, in_channels: int, growth_rate: int, bn_size: int, drop_rate: float, recompute: bool
    ) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm2d(in_channels)
        self.relu1 = nn.ReLU(inplace=True)
        self.conv1 = nn.Conv2d(in_channels, bn_size * growth_rate, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(bn_size * growth_rate)
        self.relu2 = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(bn_size * growth_rate, growth_rate, 3, padding=1, bias=False)
        self.drop_rate = drop_rate
        self.recompute = recompute

    def _bottleneck(self, *prev_features: Tensor) -> Tensor:
        return self.conv1(self.relu1(self.norm1(torch.cat(prev_features, 1))))

    def forward(self, prev_features: Sequence[Tensor]) -> Tensor:
        if self.recompute and torch.is_grad_enabled():
            out = checkpoint(self._bottleneck, *prev_features, use_reentrant=False)
        else:
            out = self._bottleneck(*prev_features)
        out = self.conv2(self.relu2(self.norm2(out)))
        return F.dropout(out, self.drop_rate, self.training) if self.drop_rate > 0 else out


class _DenseBlock(nn.ModuleDict):
    """`DenseBlock` of `_DenseLayer`, named denselayer1, denselayer2, ..."""

    def __init__(self, num_layers: int, in_channels: int, growth_rate: int, *rest: Any) -> None:
        super().__init__(
            {
                f"denselayer{i + 1}": _DenseLayer(in_channels + i * growth_rate, growth_rate, *rest)
                for i in range(num_layers)
            }
        )

    def forward(self, x: Tensor) -> Tensor:
        features = [x]
        for layer in self.values():
            features.append(layer(features))
        return torch.cat(features, 1)


def _transition(in_channels: int, out_channels: int) -> nn.Sequential:
    """BN-ReLU-1x1 and 2x2 average pooling between dense blocks (arXiv:1608.06993, section 3)."""
    return nn.Sequential(
        OrderedDict(
            norm=nn.BatchNorm2d(in_channels),
            relu=nn.ReLU(inplace=True),
            conv=nn.Conv2d(in_channels, out_channels, 1, bias=False),
            pool=nn.AvgPool2d(2, stride=2),
        )
    )


class DenseNet(nn.Module):
    """DenseNet-BC with compression 0.5 (arXiv:1608.06993, Table 1).

    Args:
        growth_rate: k of the paper, channels that each layer adds.
        block_config: number of layers in each dense block.
        num_init_features: width of the stem.
        bn_size: width of the bottleneck over the growth rate.
        drop_rate: dropout after each dense layer.
        num_classes: width of the classifier.
        memory_efficient: in training, recompute the concatenation, its BN-ReLU and the 1x1 in
            the backward pass instead of keeping them (Pleiss et al. 2017, arXiv:1707.06990).

    Input (N, 3, H, W), H and W at least 29; output (N, num_classes).
    """

    def __init__(
        self,
        growth_rate: int = 32,
        block_config: Sequence[int] = (6, 12, 24, 16),
        num_init_features: int = 64,
        bn_size: int = 4,
        drop_rate: float = 0.0,
        num_classes: int = 1000,
        memory_efficient: bool = False,
    ) -> None:
        super().__init__()
        self.features = nn.Sequential(
            OrderedDict(
                conv0=nn.Conv2d(3, num_init_features, 7, stride=2, padding=3, bias=False),
                norm0=nn.BatchNorm2d(num_init_features),
                relu0=nn.ReLU(inplace=True),
                pool0=nn.MaxPool2d(3, stride=2, padding=1),
            )
        )
        channels = num_init_features
        for i, num_layers in enumerate(block_config, start=1):
            block = _DenseBlock(
                num_layers, channels, growth_rate, bn_size, drop_rate, memory_efficient
            )
            self.features.add_module(f"denseblock{i}", block)
            channels += num_layers * growth_rate
            if i < len(block_config):
                transition = _transition(channels, channels // 2)
                self.features.add_module(f"transition{i}", transition)
                channels //= 2
        self.features.add_module("norm5", nn.BatchNorm2d(channels))
        self.classifier = nn.Linear(channels, num_classes)
        for m in self.modules():
            if isinstance(m, nn.Conv2d):
                nn.init.kaiming_normal_(m.weight)
            elif isinstance(m, nn.Linear):
                nn.init.zeros_(m.bias)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.features(x), inplace=True)
        return self.classifier(torch.flatten(F.adaptive_avg_pool2d(x, (1, 1)), 1))


def densenet121(**kwargs: Any) -> DenseNet:
    """DenseNet-121 (arXiv:1608.06993, Table 1)."""
    return DenseNet(32, (6, 12, 24, 16), 64, **kwargs)


def densenet161(**kwargs: Any) -> DenseNet:
    """DenseNet-161, growth rate 48 (the authors' reference code)."""
    return DenseNet(48, (6, 12, 36, 24), 96, **kwargs)


def densenet169(**kwargs: Any) -> DenseNet:
    """DenseNet-169 (arXiv:1608.06993, Table 1)."""
    return DenseNet(32, (6, 12, 32, 32), 64, **kwargs)


def densenet201(**kwargs: Any) -> DenseNet:
    """DenseNet-201 (arXiv:1608.06993, Table 1)."""
    return DenseNet(32, (6, 12, 48, 32), 64, **kwargs)
