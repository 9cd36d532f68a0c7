"""Reference networks in plain PyTorch, and the blocks they are made of.

Nothing here depends on the rest of cvfast: a file can be lifted out with those it imports.
"""

from __future__ import annotations

from .densenet import DenseBlock, DenseLayer, DenseNet
from .efficientnet_lite import EfficientNetLite0, MBConv
from .fcn import FCN
from .googlenet import (
    BasicConv2d,
    GoogLeNet,
    GoogLeNetOutputs,
    InceptionModule,
    auxiliary_loss,
)
from .highway import HighwayConv2d, HighwayNet
from .inception import Inception3, InceptionOutputs, factorize_5x5, factorize_asymmetric
from .mobilenet import (
    DepthwiseSeparableConv,
    InvertedResidual,
    InvertedResidualBlock,
    InvertedResidualV3,
    MobileNetV1,
    MobileNetV2,
    MobileNetV3,
    SqueezeExcitation,
)
from .preprocess import Preprocess
from .registry import ModelInfo, default_input_size, get_model, list_models, model_info
from .resnet import (
    BasicBlock,
    Bottleneck,
    CifarResNet,
    PlainBlock,
    ResNet,
    conv1x1,
    conv3x3,
)
from .unet import DoubleConv, UNet

__all__ = [
    "FCN",
    "BasicBlock",
    "BasicConv2d",
    "Bottleneck",
    "CifarResNet",
    "DenseBlock",
    "DenseLayer",
    "DenseNet",
    "DepthwiseSeparableConv",
    "DoubleConv",
    "EfficientNetLite0",
    "GoogLeNet",
    "GoogLeNetOutputs",
    "HighwayConv2d",
    "HighwayNet",
    "Inception3",
    "InceptionModule",
    "InceptionOutputs",
    "InvertedResidual",
    "InvertedResidualBlock",
    "InvertedResidualV3",
    "MBConv",
    "MobileNetV1",
    "MobileNetV2",
    "MobileNetV3",
    "ModelInfo",
    "PlainBlock",
    "Preprocess",
    "ResNet",
    "SqueezeExcitation",
    "UNet",
    "auxiliary_loss",
    "conv1x1",
    "conv3x3",
    "default_input_size",
    "factorize_5x5",
    "factorize_asymmetric",
    "get_model",
    "list_models",
    "model_info",
]
