"""The depthwise layers of the MobileNets at 224 × 224, derived from the papers' tables."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class DepthwiseLayer:
    """One depthwise layer: `channels` maps of `size` × `size`, padding k // 2."""

    model: str
    index: int
    channels: int
    size: int
    kernel: int
    stride: int
    activation: str

    @property
    def name(self) -> str:
        """E.g. `mobilenet_v2.03-144x56-k3s2-relu6`."""
        return (
            f"{self.model}.{self.index:02d}-{self.channels}x{self.size}"
            f"-k{self.kernel}s{self.stride}-{self.activation}"
        )

    @property
    def out_size(self) -> int:
        return (self.size - 1) // self.stride + 1

    def tensors(
        self, batch: int, dtype: torch.dtype = torch.float32, device: str = "cpu"
    ) -> tuple[Tensor, Tensor, Tensor]:
        """x (channels-last), weight and bias, drawn from N(0, 1) with a fixed seed."""
        generator = torch.Generator(device).manual_seed(0)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, device=device)

        x = normal(batch, self.channels, self.size, self.size)
        weight = normal(self.channels, 1, self.kernel, self.kernel)
        bias = normal(self.channels)
        return (
            x.to(dtype=dtype, memory_format=torch.channels_last),
            weight.to(dtype),
            bias.to(dtype),
        )


# Howard et al., 2017, table 1: (input channels, stride) of each separable block.
_V1 = [(32, 1), (64, 2), (128, 1), (128, 2), (256, 1), (256, 2)] + [(512, 1)] * 5
_V1 += [(512, 2), (1024, 1)]

# Sandler et al., 2018, table 2: (expansion, output channels, repeats, stride).
_V2 = [
    (1, 16, 1, 1),
    (6, 24, 2, 2),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
]

# Howard et al., 2019, tables 1 and 2: (kernel, expanded channels, activation, stride).
_V3_LARGE = [
    (3, 16, "relu", 1),
    (3, 64, "relu", 2),
    (3, 72, "relu", 1),
    (5, 72, "relu", 2),
    (5, 120, "relu", 1),
    (5, 120, "relu", 1),
    (3, 240, "hardswish", 2),
    (3, 200, "hardswish", 1),
    (3, 184, "hardswish", 1),
    (3, 184, "hardswish", 1),
    (3, 480, "hardswish", 1),
    (3, 672, "hardswish", 1),
    (5, 672, "hardswish", 2),
    (5, 960, "hardswish", 1),
    (5, 960, "hardswish", 1),
]
_V3_SMALL = [
    (3, 16, "relu", 2),
    (3, 72, "relu", 2),
    (3, 88, "relu", 1),
    (5, 96, "hardswish", 2),
    (5, 240, "hardswish", 1),
    (5, 240, "hardswish", 1),
    (5, 120, "hardswish", 1),
    (5, 144, "hardswish", 1),
    (5, 288, "hardswish", 2),
    (5, 576, "hardswish", 1),
    (5, 576, "hardswish", 1),
]


def _v2_layers() -> list[tuple[int, int, int, str]]:
    layers, channels = [], 32
    for expansion, out_channels, repeats, stride in _V2:
        for repeat in range(repeats):
            layers.append((3, expansion * channels, stride if repeat == 0 else 1, "relu6"))
            channels = out_channels
    return layers


def _chain(model: str, layers: list[tuple[int, int, int, str]]) -> list[DepthwiseLayer]:
    """Numbers the layers and follows the image size, 112 after every stem."""
    chain, size = [], 112
    for index, (kernel, channels, stride, activation) in enumerate(layers):
        layer = DepthwiseLayer(model, index, channels, size, kernel, stride, activation)
        chain.append(layer)
        size = layer.out_size
    return chain


def mobilenet_depthwise_layers() -> list[DepthwiseLayer]:
    """Every depthwise layer of MobileNet v1, v2, v3-small and v3-large, in order."""
    v3_small = [(k, c, s, act) for k, c, act, s in _V3_SMALL]
    v3_large = [(k, c, s, act) for k, c, act, s in _V3_LARGE]
    return [
        *_chain("mobilenet_v1", [(3, c, s, "relu") for c, s in _V1]),
        *_chain("mobilenet_v2", _v2_layers()),
        *_chain("mobilenet_v3_small", v3_small),
        *_chain("mobilenet_v3_large", v3_large),
    ]


def distinct(layers: list[DepthwiseLayer]) -> list[DepthwiseLayer]:
    """The first layer of each shape: repeats within and across networks dropped."""
    seen = {}
    for layer in layers:
        key = (layer.channels, layer.size, layer.kernel, layer.stride, layer.activation)
        seen.setdefault(key, layer)
    return list(seen.values())


@dataclass(frozen=True)
class Block:
    """An inverted residual or separable block on maps of `size` × `size`, padding k // 2.

    Attributes:
        hidden: channels of the depthwise convolution; with `expands` a pointwise makes them.
        out_channels: of the projection; None where squeeze-excite stands before it.
        activation: of expansion and depthwise convolution, and of a projection without expansion
            in MobileNet v1.
    """

    model: str
    in_channels: int
    hidden: int
    out_channels: int | None
    size: int
    kernel: int
    stride: int
    expands: bool
    activation: str

    @property
    def out_size(self) -> int:
        return (self.size - 1) // self.stride + 1

    @property
    def residual(self) -> bool:
        return self.expands and self.stride == 1 and self.in_channels == self.out_channels

    @property
    def last_activation(self) -> str:
        return self.activation if self.model == "mobilenet_v1" else "none"

    def __str__(self) -> str:
        widths = [self.in_channels] if self.expands else []
        widths += [self.hidden] if self.out_channels is None else [self.hidden, self.out_channels]
        return f"{'-'.join(map(str, widths))}@{self.size}-k{self.kernel}s{self.stride}"


# Howard et al., 2019, table 1: (output channels, squeeze-excite) of each block of _V3_LARGE.
_V3_LARGE_OUT = [(16, False), (24, False), (24, False), (40, True), (40, True), (40, True)]
_V3_LARGE_OUT += [(80, False)] * 4 + [(112, True)] * 2 + [(160, True)] * 3


def mobilenet_blocks() -> list[Block]:
    """Every distinct block of MobileNet v1, v2 and v3-large, in order."""
    widths = [*[channels for channels, _ in _V1][1:], 1024]
    v1 = [
        (3, channels, out, stride, "relu", False, False)
        for (channels, stride), out in zip(_V1, widths, strict=True)
    ]
    v2 = [
        (3, hidden, out, stride, activation, hidden != channels, False)
        for (_, hidden, stride, activation), (channels, out) in zip(
            _v2_layers(), _v2_widths(), strict=True
        )
    ]
    v3 = [
        (kernel, hidden, out, stride, activation, index > 0, squeeze)
        for index, ((kernel, hidden, activation, stride), (out, squeeze)) in enumerate(
            zip(_V3_LARGE, _V3_LARGE_OUT, strict=True)
        )
    ]
    blocks = []
    for model, rows in (("mobilenet_v1", v1), ("mobilenet_v2", v2), ("mobilenet_v3_large", v3)):
        channels, size = rows[0][1], 112
        for kernel, hidden, out, stride, activation, expands, squeeze in rows:
            block = Block(
                model, channels, hidden, None if squeeze else out, size, kernel, stride, expands,
                activation,
            )  # fmt: skip
            blocks.append(block)
            channels, size = out, block.out_size
    return list(dict.fromkeys(blocks))


def _v2_widths() -> list[tuple[int, int]]:
    """(input, output) channels of each block of MobileNet v2."""
    outs = [out for _, out, repeats, _ in _V2 for _ in range(repeats)]
    return list(zip([32, *outs], outs, strict=False))
