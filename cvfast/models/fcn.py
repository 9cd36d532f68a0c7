"""FCN with a dilated ResNet-50 backbone.

Long, Shelhamer and Darrell 2014, "Fully Convolutional Networks for Semantic Segmentation",
arXiv:1411.4038; the backbone keeps an eighth of the input's size by dilation (Chen et al. 2017,
arXiv:1706.05587, section 3.1). State-dict keys are torchvision's.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from .resnet import ResNet, resnet50


class ResNetBackbone(nn.ModuleDict):
    """The trunk of a ResNet: image to the feature maps of stages 3 and 4."""

    def __init__(self, resnet: ResNet) -> None:
        super().__init__(
            {name: m for name, m in resnet.named_children() if name not in ("avgpool", "fc")}
        )

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        features = {}
        for name, module in self.items():
            x = module(x)
            features[name] = x
        return {"aux": features["layer3"], "out": features["layer4"]}


class FCNHead(nn.Sequential):
    """3x3 to a quarter of the channels, BN, ReLU, dropout, 1x1 to the classes."""

    def __init__(self, in_channels: int, num_classes: int) -> None:
        width = in_channels // 4
        super().__init__(
            nn.Conv2d(in_channels, width, 3, padding=1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.Dropout(0.1),
            nn.Conv2d(width, num_classes, 1),
        )


class FCN(nn.Module):
    """Fully convolutional network.

    Args:
        backbone: module that returns a dict with "out" (N, 2048, h, w) and "aux"
            (N, 1024, h, w).
        num_classes: channels of the mask.
        aux_loss: build an auxiliary head on the third stage.

    Input (N, 3, H, W); output an OrderedDict of logits "out" (N, num_classes, H, W), with the
    auxiliary head also "aux" of that shape, resized bilinearly.
    """

    def __init__(self, backbone: nn.Module, num_classes: int = 21, aux_loss: bool = False) -> None:
        super().__init__()
        self.backbone = backbone
        self.classifier = FCNHead(2048, num_classes)
        self.aux_classifier = FCNHead(1024, num_classes) if aux_loss else None

    def forward(self, x: Tensor) -> OrderedDict[str, Tensor]:
        size = x.shape[-2:]
        features = self.backbone(x)
        masks = OrderedDict(out=self.classifier(features["out"]))
        if self.aux_classifier is not None:
            masks["aux"] = self.aux_classifier(features["aux"])
        for name, mask in masks.items():
            masks[name] = F.interpolate(mask, size=size, mode="bilinear", align_corners=False)
        return masks


def fcn_resnet50(**kwargs: Any) -> FCN:
    """FCN with a ResNet-50 whose last two stages are dilated; 21 classes (PASCAL VOC)."""
    return FCN(ResNetBackbone(resnet50(dilate=(False, True, True))), **kwargs)
