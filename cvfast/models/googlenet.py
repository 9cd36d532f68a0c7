"""GoogLeNet (Inception v1) with its auxiliary heads.

Szegedy et al. 2014, "Going Deeper with Convolutions", arXiv:1409.4842, Table 1 and Figure 3.
`googlenet` has torchvision's state-dict keys and its 3x3 third branch; `googlenet_5x5` has the
5x5 branch of the paper. Both carry batch normalisation, which the paper did not have yet.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor


class BasicConv2d(nn.Module):
    """Convolution without bias, batch normalisation, ReLU.

    Args:
        in_channels: channels of the input, shape (N, in_channels, H, W).
        out_channels: channels of the output.
        bn_eps: epsilon of the batch normalisation (torchvision's Inceptions use 1e-3).
        **kwargs: passed to `torch.nn.Conv2d` (kernel_size, stride, padding, ...).
    """

    def __init__(
        self, in_channels: int, out_channels: int, *, bn_eps: float = 1e-5, **kwargs: Any
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, bias=False, **kwargs)
        self.bn = nn.BatchNorm2d(out_channels, eps=bn_eps)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.bn(self.conv(x)))


class InceptionModule(nn.Module):
    """Four parallel branches of one spatial size, joined along the channels.

    arXiv:1409.4842, Figure 2(b). (N, in_channels, H, W) to
    (N, ch1x1 + ch3x3 + ch5x5 + pool_proj, H, W).

    Args:
        in_channels: channels of the input.
        ch1x1: width of the 1x1 branch.
        ch3x3red, ch3x3: widths of the 1x1 reduction and of the 3x3 after it.
        ch5x5red, ch5x5: widths of the 1x1 reduction and of the 5x5 after it.
        pool_proj: width of the 1x1 after the 3x3 max-pooling.
        branch3_kernel: kernel of the third branch; 3 gives torchvision's network
            (https://github.com/pytorch/vision/issues/906).
        bn_eps: epsilon of every batch normalisation.
    """

    def __init__(
        self,
        in_channels: int,
        ch1x1: int,
        ch3x3red: int,
        ch3x3: int,
        ch5x5red: int,
        ch5x5: int,
        pool_proj: int,
        *,
        branch3_kernel: int = 5,
        bn_eps: float = 1e-5,
    ) -> None:
        super().__init__()

        def conv(c_in: int, c_out: int, k: int) -> BasicConv2d:
            return BasicConv2d(c_in, c_out, kernel_size=k, padding=k // 2, bn_eps=bn_eps)

        self.branch1 = conv(in_channels, ch1x1, 1)
        self.branch2 = nn.Sequential(conv(in_channels, ch3x3red, 1), conv(ch3x3red, ch3x3, 3))
        self.branch3 = nn.Sequential(
            conv(in_channels, ch5x5red, 1), conv(ch5x5red, ch5x5, branch3_kernel)
        )
        self.branch4 = nn.Sequential(
            nn.MaxPool2d(3, stride=1, padding=1), conv(in_channels, pool_proj, 1)
        )

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.branch1(x), self.branch2(x), self.branch3(x), self.branch4(x)], 1)


class AuxiliaryHead(nn.Module):
    """Side classifier of GoogLeNet: pool to 4x4, 1x1 convolution, two linear layers.

    arXiv:1409.4842, section 5. (N, in_channels, H, W) to (N, num_classes). The pooling adapts,
    so that any input size works; at 224x224 it sees 14x14.
    """

    def __init__(
        self, in_channels: int, num_classes: int, dropout: float = 0.7, bn_eps: float = 1e-3
    ) -> None:
        super().__init__()
        self.conv = BasicConv2d(in_channels, 128, kernel_size=1, bn_eps=bn_eps)
        self.fc1 = nn.Linear(128 * 4 * 4, 1024)
        self.fc2 = nn.Linear(1024, num_classes)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(F.adaptive_avg_pool2d(x, (4, 4)))
        x = F.relu(self.fc1(torch.flatten(x, 1)), inplace=True)
        return self.fc2(self.dropout(x))


class GoogLeNetOutputs(NamedTuple):
    """What GoogLeNet returns in training; each of shape (N, num_classes)."""

    logits: Tensor
    aux_logits2: Tensor
    aux_logits1: Tensor


def imagenet_to_inception(x: Tensor) -> Tensor:
    """From ImageNet mean and standard deviation to the [-1, 1] range of the TensorFlow nets."""
    mean_std = ((0.485, 0.229), (0.456, 0.224), (0.406, 0.225))
    scale = x.new_tensor([std / 0.5 for _, std in mean_std]).view(3, 1, 1)
    shift = x.new_tensor([(mean - 0.5) / 0.5 for mean, _ in mean_std]).view(3, 1, 1)
    return x * scale + shift


class GoogLeNet(nn.Module):
    """GoogLeNet (arXiv:1409.4842, Table 1).

    Args:
        num_classes: width of the classifiers.
        aux_logits: build the two auxiliary heads. They run in training mode only.
        transform_input: take input normalised with ImageNet's mean and standard deviation and
            bring it to [-1, 1], as weights ported from TensorFlow need.
        init_weights: truncated normal with standard deviation 0.01; PyTorch's default if False.
        branch3_kernel: 5 for the paper's third branch, 3 for torchvision's.
        dropout, dropout_aux: rates before the last layer of the trunk and of the heads.

    Input (N, 3, H, W), H and W at least 15. In evaluation, and without heads, the output is a
    tensor (N, num_classes); in training with heads, a `GoogLeNetOutputs`.
    """

    def __init__(
        self,
        num_classes: int = 1000,
        *,
        aux_logits: bool = True,
        transform_input: bool = False,
        init_weights: bool = True,
        branch3_kernel: int = 5,
        dropout: float = 0.2,
        dropout_aux: float = 0.7,
    ) -> None:
        super().__init__()
        eps = 1e-3

        def inception(in_channels: int, *widths: int) -> InceptionModule:
            return InceptionModule(in_channels, *widths, branch3_kernel=branch3_kernel, bn_eps=eps)

        self.transform_input = transform_input
        self.conv1 = BasicConv2d(3, 64, kernel_size=7, stride=2, padding=3, bn_eps=eps)
        self.maxpool1 = nn.MaxPool2d(3, stride=2, ceil_mode=True)
        self.conv2 = BasicConv2d(64, 64, kernel_size=1, bn_eps=eps)
        self.conv3 = BasicConv2d(64, 192, kernel_size=3, padding=1, bn_eps=eps)
        self.maxpool2 = nn.MaxPool2d(3, stride=2, ceil_mode=True)
        self.inception3a = inception(192, 64, 96, 128, 16, 32, 32)
        self.inception3b = inception(256, 128, 128, 192, 32, 96, 64)
        self.maxpool3 = nn.MaxPool2d(3, stride=2, ceil_mode=True)
        self.inception4a = inception(480, 192, 96, 208, 16, 48, 64)
        self.inception4b = inception(512, 160, 112, 224, 24, 64, 64)
        self.inception4c = inception(512, 128, 128, 256, 24, 64, 64)
        self.inception4d = inception(512, 112, 144, 288, 32, 64, 64)
        self.inception4e = inception(528, 256, 160, 320, 32, 128, 128)
        self.maxpool4 = nn.MaxPool2d(2, stride=2, ceil_mode=True)
        self.inception5a = inception(832, 256, 160, 320, 32, 128, 128)
        self.inception5b = inception(832, 384, 192, 384, 48, 128, 128)
        self.aux1 = AuxiliaryHead(512, num_classes, dropout_aux) if aux_logits else None
        self.aux2 = AuxiliaryHead(528, num_classes, dropout_aux) if aux_logits else None
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.dropout = nn.Dropout(dropout)
        self.fc = nn.Linear(1024, num_classes)
        if init_weights:
            for m in self.modules():
                if isinstance(m, (nn.Conv2d, nn.Linear)):
                    nn.init.trunc_normal_(m.weight, std=0.01)

    def drop_aux_heads(self) -> GoogLeNet:
        """Remove the auxiliary heads, for deployment; returns the model."""
        self.aux1 = self.aux2 = None
        return self

    def forward(self, x: Tensor) -> Tensor | GoogLeNetOutputs:
        if self.transform_input:
            x = imagenet_to_inception(x)
        x = self.maxpool1(self.conv1(x))
        x = self.maxpool2(self.conv3(self.conv2(x)))
        x = self.maxpool3(self.inception3b(self.inception3a(x)))
        x = self.inception4a(x)
        aux1 = self.aux1(x) if self.training and self.aux1 is not None else None
        x = self.inception4d(self.inception4c(self.inception4b(x)))
        aux2 = self.aux2(x) if self.training and self.aux2 is not None else None
        x = self.maxpool4(self.inception4e(x))
        x = self.inception5b(self.inception5a(x))
        logits = self.fc(self.dropout(torch.flatten(self.avgpool(x), 1)))
        if aux1 is not None and aux2 is not None:
            return GoogLeNetOutputs(logits, aux2, aux1)
        return logits


def auxiliary_loss(
    outputs: Tensor | tuple[Tensor, ...], target: Tensor, weight: float = 0.3
) -> Tensor:
    """Cross entropy of the logits plus `weight` times that of every auxiliary output.

    ``L = L_final + 0.3 (L_aux1 + L_aux2)`` of arXiv:1409.4842, section 5.

    Args:
        outputs: a tensor (N, classes), or a tuple whose first entry is the final logits and
            whose others are auxiliary logits (`GoogLeNetOutputs`, `InceptionOutputs`).
        target: class indices (N,), int64.
        weight: factor of the auxiliary losses.
    """
    if isinstance(outputs, Tensor):
        return F.cross_entropy(outputs, target)
    final, *aux = (F.cross_entropy(o, target) for o in outputs)
    return final + weight * sum(aux)


def googlenet(**kwargs: Any) -> GoogLeNet:
    """GoogLeNet in torchvision's form: 3x3 in the third branch."""
    kwargs.setdefault("branch3_kernel", 3)
    return GoogLeNet(**kwargs)


def googlenet_5x5(**kwargs: Any) -> GoogLeNet:
    """GoogLeNet with the 5x5 third branch of arXiv:1409.4842."""
    return GoogLeNet(**kwargs)
