"""MobileNet v1, v2 and v3.

Howard et al. 2017, arXiv:1704.04861 (v1, Table 1); Sandler et al. 2018, arXiv:1801.04381
(v2, Table 2); Howard et al. 2019, arXiv:1905.02244 (v3, Tables 1 and 2).
State-dict keys of v2 and v3 are torchvision's.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn as nn
from torch import Tensor


class DepthwiseSeparableConv(nn.Module):
    """Depthwise 3x3 and pointwise 1x1, each with BN and ReLU: the atom of MobileNet v1.

    arXiv:1704.04861, Figure 3 right. (N, in_ch, H, W) to
    (N, out_ch, ceil(H / stride), ceil(W / stride)); ``9 * in_ch + in_ch * out_ch`` weights
    beside those of BN.
    """

    def __init__(self, in_ch: int, out_ch: int, stride: int = 1) -> None:
        super().__init__()
        self.depthwise = nn.Sequential(
            nn.Conv2d(in_ch, in_ch, 3, stride, padding=1, groups=in_ch, bias=False),
            nn.BatchNorm2d(in_ch),
            nn.ReLU(inplace=True),
        )
        self.pointwise = nn.Sequential(
            nn.Conv2d(in_ch, out_ch, 1, bias=False),
            nn.BatchNorm2d(out_ch),
            nn.ReLU(inplace=True),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.pointwise(self.depthwise(x))


class InvertedResidual(nn.Module):
    """Expand 1x1, depthwise 3x3, project 1x1 without activation: the block of MobileNet v2.

    arXiv:1801.04381, Table 1. (N, in_ch, H, W) to
    (N, out_ch, ceil(H / stride), ceil(W / stride)); the input is added when both shapes agree.

    Args:
        in_ch: channels of the input.
        out_ch: channels of the output.
        stride: stride of the depthwise convolution, 1 or 2.
        expand_ratio: hidden channels over `in_ch`, t of the paper.
    """

    def __init__(self, in_ch: int, out_ch: int, stride: int, expand_ratio: float) -> None:
        super().__init__()
        if stride not in (1, 2):
            raise ValueError(f"stride of an inverted residual must be 1 or 2, got {stride}")
        self.stride = stride
        self.use_res_connect = stride == 1 and in_ch == out_ch
        self.conv = nn.Sequential(*self._layers(in_ch, int(in_ch * expand_ratio), out_ch, stride))

    def _layers(self, in_ch: int, hidden: int, out_ch: int, stride: int) -> list[nn.Module]:
        return [
            nn.Conv2d(in_ch, hidden, 1, bias=False),
            nn.BatchNorm2d(hidden),
            nn.ReLU6(inplace=True),
            nn.Conv2d(hidden, hidden, 3, stride, padding=1, groups=hidden, bias=False),
            nn.BatchNorm2d(hidden),
            nn.ReLU6(inplace=True),
            nn.Conv2d(hidden, out_ch, 1, bias=False),
            nn.BatchNorm2d(out_ch),
        ]

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(x) if self.use_res_connect else self.conv(x)


InvertedResidualBlock = InvertedResidual


class ConvBNActivation(nn.Sequential):
    """Convolution without bias, batch normalisation and, unless None, an activation.

    Padded so that stride 1 keeps height and width for odd kernels.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int = 3,
        stride: int = 1,
        groups: int = 1,
        *,
        norm: Callable[[int], nn.Module] = nn.BatchNorm2d,
        activation: Callable[..., nn.Module] | None = nn.ReLU,
    ) -> None:
        layers: list[nn.Module] = [
            nn.Conv2d(
                in_channels,
                out_channels,
                kernel_size,
                stride,
                padding=(kernel_size - 1) // 2,
                groups=groups,
                bias=False,
            ),
            norm(out_channels),
        ]
        if activation is not None:
            layers.append(activation(inplace=True))
        super().__init__(*layers)


class NestedInvertedResidual(InvertedResidual):
    """`InvertedResidual` in torchvision's state-dict layout, with no expansion where t = 1."""

    def _layers(self, in_ch: int, hidden: int, out_ch: int, stride: int) -> list[nn.Module]:
        layers: list[nn.Module] = [
            ConvBNActivation(hidden, hidden, 3, stride, groups=hidden, activation=nn.ReLU6),
            nn.Conv2d(hidden, out_ch, 1, bias=False),
            nn.BatchNorm2d(out_ch),
        ]
        if hidden != in_ch:
            layers.insert(0, ConvBNActivation(in_ch, hidden, 1, activation=nn.ReLU6))
        return layers


class SqueezeExcitation(nn.Module):
    """Channel gate: global average, 1x1, ReLU, 1x1, hard sigmoid, product.

    Hu et al. 2017, arXiv:1709.01507, Figure 2; the hard sigmoid is arXiv:1905.02244's,
    section 5.2. (N, channels, H, W) to the same shape.
    """

    def __init__(self, channels: int, squeeze_channels: int) -> None:
        super().__init__()
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc1 = nn.Conv2d(channels, squeeze_channels, 1)
        self.fc2 = nn.Conv2d(squeeze_channels, channels, 1)
        self.activation = nn.ReLU()
        self.scale_activation = nn.Hardsigmoid()

    def forward(self, x: Tensor) -> Tensor:
        gate = self.fc2(self.activation(self.fc1(self.avgpool(x))))
        return self.scale_activation(gate) * x


class BneckConfig(NamedTuple):
    """A row of arXiv:1905.02244, Table 1 or 2, before the width multiplier."""

    kernel: int
    expanded: int
    out: int
    use_se: bool
    activation: type[nn.ReLU] | type[nn.Hardswish]
    stride: int


def _bn_v3(channels: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, eps=1e-3, momentum=0.01)


class InvertedResidualV3(nn.Module):
    """Inverted residual of MobileNet v3: k = 3 or 5, optional squeeze-excite after the depthwise.

    arXiv:1905.02244, Figure 4. (N, in_ch, H, W) to
    (N, out_ch, ceil(H / stride), ceil(W / stride)). No expansion where hidden equals in_ch.
    """

    def __init__(
        self,
        in_ch: int,
        hidden: int,
        out_ch: int,
        *,
        kernel: int,
        stride: int,
        use_se: bool,
        activation: type[nn.ReLU] | type[nn.Hardswish],
    ) -> None:
        super().__init__()
        self.use_res_connect = stride == 1 and in_ch == out_ch
        layers: list[nn.Module] = []
        if hidden != in_ch:
            layers.append(ConvBNActivation(in_ch, hidden, 1, norm=_bn_v3, activation=activation))
        layers.append(
            ConvBNActivation(
                hidden, hidden, kernel, stride, groups=hidden, norm=_bn_v3, activation=activation
            )
        )
        if use_se:
            layers.append(SqueezeExcitation(hidden, make_divisible(hidden // 4)))
        layers.append(ConvBNActivation(hidden, out_ch, 1, norm=_bn_v3, activation=None))
        self.block = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        out = self.block(x)
        if self.use_res_connect:
            out += x
        return out


def make_divisible(channels: float, divisor: int = 8) -> int:
    """Nearest multiple of `divisor`, at least `divisor` and at least 90 % of `channels`.

    The rounding of the width multiplier in the MobileNet v2 and v3 reference code.
    """
    rounded = max(divisor, int(channels + divisor / 2) // divisor * divisor)
    return rounded if rounded >= 0.9 * channels else rounded + divisor


def _check_width(width_mult: float) -> None:
    if width_mult <= 0:
        raise ValueError(f"width_mult must be positive, got {width_mult}")


def _init_fan_out(model: nn.Module) -> None:
    """torchvision's MobileNet initialisation: He over the fan-out, linear layers N(0, 0.01)."""
    for m in model.modules():
        if isinstance(m, nn.Conv2d):
            nn.init.kaiming_normal_(m.weight, mode="fan_out")
            if m.bias is not None:
                nn.init.zeros_(m.bias)
        elif isinstance(m, nn.Linear):
            nn.init.normal_(m.weight, 0, 0.01)
            nn.init.zeros_(m.bias)


class MobileNetV1(nn.Module):
    """MobileNet v1 (arXiv:1704.04861, Table 1).

    Args:
        num_classes: width of the classifier.
        width_mult: alpha of section 3.3; every width becomes ``max(8, int(alpha * width))``.

    Input (N, 3, H, W), output (N, num_classes). Weights start as He normal over the fan-in,
    which for a depthwise convolution counts the one channel that its filter reads.
    """

    def __init__(self, num_classes: int = 1000, width_mult: float = 1.0) -> None:
        super().__init__()
        _check_width(width_mult)

        def width(channels: int) -> int:
            return max(8, int(channels * width_mult))

        layers: list[nn.Module] = [ConvBNActivation(3, width(32), 3, stride=2)]
        in_ch = width(32)
        rows = [(64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2)]
        rows += [(512, 1)] * 5 + [(1024, 2), (1024, 1)]
        for out, stride in rows:
            layers.append(DepthwiseSeparableConv(in_ch, width(out), stride))
            in_ch = width(out)
        self.features = nn.Sequential(*layers)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(in_ch, num_classes)
        for m in self.modules():
            if isinstance(m, nn.Conv2d):
                nn.init.kaiming_normal_(m.weight, nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(torch.flatten(self.avgpool(self.features(x)), 1))


class MobileNetV2(nn.Module):
    """MobileNet v2 (arXiv:1801.04381, Table 2).

    Args:
        num_classes: width of the classifier.
        width_mult: multiplies every width; below 1 the last 1x1 keeps its 1280 channels.
        dropout: rate before the classifier.

    Input (N, 3, H, W), output (N, num_classes).
    """

    def __init__(
        self, num_classes: int = 1000, width_mult: float = 1.0, dropout: float = 0.2
    ) -> None:
        super().__init__()
        _check_width(width_mult)
        in_ch = make_divisible(32 * width_mult)
        features: list[nn.Module] = [ConvBNActivation(3, in_ch, 3, 2, activation=nn.ReLU6)]
        for t, c, n, s in (
            (1, 16, 1, 1),
            (6, 24, 2, 2),
            (6, 32, 3, 2),
            (6, 64, 4, 2),
            (6, 96, 3, 1),
            (6, 160, 3, 2),
            (6, 320, 1, 1),
        ):
            out_ch = make_divisible(c * width_mult)
            for i in range(n):
                features.append(NestedInvertedResidual(in_ch, out_ch, s if i == 0 else 1, t))
                in_ch = out_ch
        last = make_divisible(1280 * max(1.0, width_mult))
        features.append(ConvBNActivation(in_ch, last, 1, activation=nn.ReLU6))
        self.features = nn.Sequential(*features)
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.classifier = nn.Sequential(nn.Dropout(dropout), nn.Linear(last, num_classes))
        _init_fan_out(self)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(torch.flatten(self.avgpool(self.features(x)), 1))


class MobileNetV3(nn.Module):
    """MobileNet v3 (arXiv:1905.02244, Tables 1 and 2).

    Args:
        rows: the bneck rows of the table.
        last_channel: width of the hidden linear layer, before the width multiplier.
        num_classes: width of the classifier.
        width_mult: multiplies every width.
        dropout: rate before the classifier.

    Input (N, 3, H, W), output (N, num_classes).
    """

    def __init__(
        self,
        rows: tuple[BneckConfig, ...],
        last_channel: int,
        num_classes: int = 1000,
        width_mult: float = 1.0,
        dropout: float = 0.2,
    ) -> None:
        super().__init__()
        _check_width(width_mult)

        def width(channels: int) -> int:
            return make_divisible(channels * width_mult)

        in_ch = width(16)
        features: list[nn.Module] = [
            ConvBNActivation(3, in_ch, 3, 2, norm=_bn_v3, activation=nn.Hardswish)
        ]
        for row in rows:
            features.append(
                InvertedResidualV3(
                    in_ch,
                    width(row.expanded),
                    width(row.out),
                    kernel=row.kernel,
                    stride=row.stride,
                    use_se=row.use_se,
                    activation=row.activation,
                )
            )
            in_ch = width(row.out)
        features.append(ConvBNActivation(in_ch, 6 * in_ch, 1, norm=_bn_v3, activation=nn.Hardswish))
        self.features = nn.Sequential(*features)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Sequential(
            nn.Linear(6 * in_ch, width(last_channel)),
            nn.Hardswish(inplace=True),
            nn.Dropout(dropout, inplace=True),
            nn.Linear(width(last_channel), num_classes),
        )
        _init_fan_out(self)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(torch.flatten(self.avgpool(self.features(x)), 1))


_RE, _HS = nn.ReLU, nn.Hardswish

_V3_LARGE = (
    BneckConfig(3, 16, 16, False, _RE, 1),
    BneckConfig(3, 64, 24, False, _RE, 2),
    BneckConfig(3, 72, 24, False, _RE, 1),
    BneckConfig(5, 72, 40, True, _RE, 2),
    BneckConfig(5, 120, 40, True, _RE, 1),
    BneckConfig(5, 120, 40, True, _RE, 1),
    BneckConfig(3, 240, 80, False, _HS, 2),
    BneckConfig(3, 200, 80, False, _HS, 1),
    BneckConfig(3, 184, 80, False, _HS, 1),
    BneckConfig(3, 184, 80, False, _HS, 1),
    BneckConfig(3, 480, 112, True, _HS, 1),
    BneckConfig(3, 672, 112, True, _HS, 1),
    BneckConfig(5, 672, 160, True, _HS, 2),
    BneckConfig(5, 960, 160, True, _HS, 1),
    BneckConfig(5, 960, 160, True, _HS, 1),
)

_V3_SMALL = (
    BneckConfig(3, 16, 16, True, _RE, 2),
    BneckConfig(3, 72, 24, False, _RE, 2),
    BneckConfig(3, 88, 24, False, _RE, 1),
    BneckConfig(5, 96, 40, True, _HS, 2),
    BneckConfig(5, 240, 40, True, _HS, 1),
    BneckConfig(5, 240, 40, True, _HS, 1),
    BneckConfig(5, 120, 48, True, _HS, 1),
    BneckConfig(5, 144, 48, True, _HS, 1),
    BneckConfig(5, 288, 96, True, _HS, 2),
    BneckConfig(5, 576, 96, True, _HS, 1),
    BneckConfig(5, 576, 96, True, _HS, 1),
)


def mobilenet_v1(**kwargs: Any) -> MobileNetV1:
    """MobileNet v1 (arXiv:1704.04861)."""
    return MobileNetV1(**kwargs)


def mobilenet_v2(**kwargs: Any) -> MobileNetV2:
    """MobileNet v2 (arXiv:1801.04381)."""
    return MobileNetV2(**kwargs)


def mobilenet_v3_large(**kwargs: Any) -> MobileNetV3:
    """MobileNet v3-Large (arXiv:1905.02244, Table 1)."""
    return MobileNetV3(_V3_LARGE, last_channel=1280, **kwargs)


def mobilenet_v3_small(**kwargs: Any) -> MobileNetV3:
    """MobileNet v3-Small (arXiv:1905.02244, Table 2)."""
    return MobileNetV3(_V3_SMALL, last_channel=1024, **kwargs)
