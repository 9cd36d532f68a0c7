"""ResNet and the plain networks it is compared with.

Networks: He et al. 2015, "Deep Residual Learning for Image Recognition", arXiv:1512.03385:
ImageNet networks of Table 1 and Figure 3, CIFAR-10 networks of section 4.2 and Table 6.
Initialisation: He et al. 2015, "Delving Deep into Rectifiers", arXiv:1502.01852, section 2.2.
State-dict keys of the ImageNet residual networks are torchvision's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor


def conv3x3(in_planes: int, out_planes: int, stride: int = 1, dilation: int = 1) -> nn.Conv2d:
    """3x3 convolution without bias, padded so that stride 1 keeps height and width."""
    return nn.Conv2d(
        in_planes, out_planes, 3, stride, padding=dilation, dilation=dilation, bias=False
    )


def conv1x1(in_planes: int, out_planes: int, stride: int = 1) -> nn.Conv2d:
    """1x1 convolution without bias: the projection shortcut when strided."""
    return nn.Conv2d(in_planes, out_planes, 1, stride, bias=False)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut (arXiv:1512.03385, Figure 5 left).

    Args:
        inplanes: channels of the input, shape (N, inplanes, H, W).
        planes: channels of the output, shape (N, planes, ceil(H / stride), ceil(W / stride)).
        stride: stride of the first convolution.
        downsample: module that brings the shortcut to the output's shape; identity when None.
        dilation: dilation of both convolutions.
    """

    expansion = 1
    has_shortcut = True

    def __init__(
        self,
        inplanes: int,
        planes: int,
        stride: int = 1,
        downsample: nn.Module | None = None,
        dilation: int = 1,
    ) -> None:
        super().__init__()
        self.conv1 = conv3x3(inplanes, planes, stride, dilation)
        self.bn1 = nn.BatchNorm2d(planes)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = conv3x3(planes, planes, dilation=dilation)
        self.bn2 = nn.BatchNorm2d(planes)
        self.downsample = downsample

    def forward(self, x: Tensor) -> Tensor:
        identity = x if self.downsample is None else self.downsample(x)
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += identity
        return self.relu(out)


class PlainBlock(BasicBlock):
    """BasicBlock without its shortcut: two layers of a plain network."""

    has_shortcut = False

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        return self.relu(self.bn2(self.conv2(out)))


class Bottleneck(nn.Module):
    """1x1 shrink, 3x3, 1x1 expand, and a shortcut (arXiv:1512.03385, Figure 5 right).

    The stride sits on the 3x3 convolution as in torchvision, not on the first 1x1 of the paper.

    Args:
        inplanes: channels of the input, shape (N, inplanes, H, W).
        planes: channels of the 3x3; the output has ``4 * planes``.
        stride: stride of the 3x3 convolution.
        downsample: module that brings the shortcut to the output's shape; identity when None.
        dilation: dilation of the 3x3 convolution.
    """

    expansion = 4
    has_shortcut = True

    def __init__(
        self,
        inplanes: int,
        planes: int,
        stride: int = 1,
        downsample: nn.Module | None = None,
        dilation: int = 1,
    ) -> None:
        super().__init__()
        self.conv1 = conv1x1(inplanes, planes)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = conv3x3(planes, planes, stride, dilation)
        self.bn2 = nn.BatchNorm2d(planes)
        self.conv3 = conv1x1(planes, planes * self.expansion)
        self.bn3 = nn.BatchNorm2d(planes * self.expansion)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = downsample

    def forward(self, x: Tensor) -> Tensor:
        identity = x if self.downsample is None else self.downsample(x)
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        out += identity
        return self.relu(out)


def _he_init(model: nn.Module) -> None:
    """He normal over the fan-out (arXiv:1502.01852, eq. 14); BN starts as the identity."""
    for m in model.modules():
        if isinstance(m, nn.Conv2d):
            nn.init.kaiming_normal_(m.weight, mode="fan_out", nonlinearity="relu")


class ResNet(nn.Module):
    """ImageNet ResNet or plain network (arXiv:1512.03385, Table 1).

    Args:
        block: BasicBlock, Bottleneck or PlainBlock.
        layers: number of blocks in each of the four stages.
        num_classes: width of the classifier.
        zero_init_residual: start the last BN of every residual branch at zero, so that each
            block begins as the identity (Goyal et al. 2017, arXiv:1706.02677, section 5.1).
        dilate: for stages 2, 3 and 4, whether dilation replaces the stride (as FCN needs).

    Input (N, 3, H, W), output (N, num_classes).
    """

    def __init__(
        self,
        block: type[BasicBlock] | type[Bottleneck],
        layers: Sequence[int],
        num_classes: int = 1000,
        *,
        zero_init_residual: bool = False,
        dilate: Sequence[bool] = (False, False, False),
    ) -> None:
        super().__init__()
        if len(layers) != 4 or len(dilate) != 3:
            raise ValueError(
                "a ResNet has 4 stages: pass 4 numbers in `layers` and 3 flags in `dilate` "
                f"(the first stage has no stride), got {list(layers)} and {list(dilate)}"
            )
        self.conv1 = nn.Conv2d(3, 64, 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        stages: list[nn.Sequential] = []
        inplanes, dilation = 64, 1
        for i, blocks in enumerate(layers):
            planes, stride = 64 << i, 1 if i == 0 else 2
            first_dilation = dilation
            if i > 0 and dilate[i - 1]:
                dilation, stride = dilation * stride, 1
            outplanes = planes * block.expansion
            downsample = None
            if block.has_shortcut and (stride != 1 or inplanes != outplanes):
                downsample = nn.Sequential(
                    conv1x1(inplanes, outplanes, stride), nn.BatchNorm2d(outplanes)
                )
            first = block(inplanes, planes, stride, downsample, first_dilation)
            rest = (block(outplanes, planes, dilation=dilation) for _ in range(1, blocks))
            stages.append(nn.Sequential(first, *rest))
            inplanes = outplanes
        self.layer1, self.layer2, self.layer3, self.layer4 = stages
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.fc = nn.Linear(inplanes, num_classes)

        _he_init(self)
        if zero_init_residual:
            for m in self.modules():
                if isinstance(m, Bottleneck):
                    nn.init.zeros_(m.bn3.weight)
                elif isinstance(m, BasicBlock) and m.has_shortcut:
                    nn.init.zeros_(m.bn2.weight)

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        x = self.layer1(x)
        x = self.layer2(x)
        x = self.layer3(x)
        x = self.layer4(x)
        return self.fc(torch.flatten(self.avgpool(x), 1))


class ShortcutA(nn.Module):
    """Parameter-free shortcut of the CIFAR networks: stride 2, new channels zero.

    Option A of arXiv:1512.03385, section 3.3. (N, C, H, W) to
    (N, out_planes, ceil(H / 2), ceil(W / 2)).
    """

    def __init__(self, in_planes: int, out_planes: int) -> None:
        super().__init__()
        self.extra = out_planes - in_planes

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 0, self.extra))


class CifarResNet(nn.Module):
    """CIFAR ResNet or plain network of depth 6n + 2 (arXiv:1512.03385, section 4.2).

    Input (N, 3, 32, 32), output (N, num_classes). Other sizes work too.
    """

    def __init__(self, block: type[BasicBlock], n: int, num_classes: int = 10) -> None:
        super().__init__()
        if n < 1:
            raise ValueError(f"a CIFAR ResNet has depth 6n + 2 with n >= 1, got n = {n}")
        self.conv1 = conv3x3(3, 16)
        self.bn1 = nn.BatchNorm2d(16)
        self.relu = nn.ReLU(inplace=True)
        stages: list[nn.Sequential] = []
        inplanes = 16
        for planes in (16, 32, 64):
            widens = planes != inplanes
            downsample = ShortcutA(inplanes, planes) if widens and block.has_shortcut else None
            first = block(inplanes, planes, 2 if widens else 1, downsample)
            rest = (block(planes, planes) for _ in range(1, n))
            stages.append(nn.Sequential(first, *rest))
            inplanes = planes
        self.layer1, self.layer2, self.layer3 = stages
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.fc = nn.Linear(64, num_classes)
        _he_init(self)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.layer1(x)
        x = self.layer2(x)
        x = self.layer3(x)
        return self.fc(torch.flatten(self.avgpool(x), 1))


def resnet18(**kwargs: Any) -> ResNet:
    """ResNet-18 (arXiv:1512.03385, Table 1)."""
    return ResNet(BasicBlock, (2, 2, 2, 2), **kwargs)


def resnet34(**kwargs: Any) -> ResNet:
    """ResNet-34 (arXiv:1512.03385, Table 1)."""
    return ResNet(BasicBlock, (3, 4, 6, 3), **kwargs)


def resnet50(**kwargs: Any) -> ResNet:
    """ResNet-50 (arXiv:1512.03385, Table 1), stride on the 3x3."""
    return ResNet(Bottleneck, (3, 4, 6, 3), **kwargs)


def resnet101(**kwargs: Any) -> ResNet:
    """ResNet-101 (arXiv:1512.03385, Table 1), stride on the 3x3."""
    return ResNet(Bottleneck, (3, 4, 23, 3), **kwargs)


def resnet152(**kwargs: Any) -> ResNet:
    """ResNet-152 (arXiv:1512.03385, Table 1), stride on the 3x3."""
    return ResNet(Bottleneck, (3, 8, 36, 3), **kwargs)


def plain18(**kwargs: Any) -> ResNet:
    """ResNet-18 without shortcuts (arXiv:1512.03385, Table 2 and Figure 4 left)."""
    return ResNet(PlainBlock, (2, 2, 2, 2), **kwargs)


def plain34(**kwargs: Any) -> ResNet:
    """ResNet-34 without shortcuts (arXiv:1512.03385, Table 2 and Figure 4 left)."""
    return ResNet(PlainBlock, (3, 4, 6, 3), **kwargs)


def _cifar_depth(depth: int) -> int:
    if depth < 8 or depth % 6 != 2:
        raise ValueError(f"CIFAR networks have depth 6n + 2 (8, 14, 20, ...), got {depth}")
    return (depth - 2) // 6


def cifar_resnet(depth: int, **kwargs: Any) -> CifarResNet:
    """CIFAR ResNet of depth 20, 32, 44, 56, 110, ... (arXiv:1512.03385, Table 6)."""
    return CifarResNet(BasicBlock, _cifar_depth(depth), **kwargs)


def cifar_plain(depth: int, **kwargs: Any) -> CifarResNet:
    """Plain CIFAR network of depth 20, 32, 44, 56, ... (arXiv:1512.03385, Figure 6 left)."""
    return CifarResNet(PlainBlock, _cifar_depth(depth), **kwargs)
