"""Networks that no list holds: drawn from the building blocks, optimised, compared with float64.

A network is drawn as a list of descriptions (`Block`), so that a failing example prints what to
build. A drawn block that does not fit, because the image has become too small for it, is left out.
"""

from __future__ import annotations

import copy
import math
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import cvfast
from cvfast import tolerance
from cvfast.testing import image, isa, isa_levels

from .conftest import randomize

ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "none": nn.Identity,
    "relu": nn.ReLU,
    "relu in place": lambda: nn.ReLU(inplace=True),
    "relu6": nn.ReLU6,
    "hardswish": nn.Hardswish,
    "hardsigmoid": nn.Hardsigmoid,
    "silu": nn.SiLU,
    "leaky": lambda: nn.LeakyReLU(0.1),
}


def conv(
    channels: int,
    out: int,
    kernel: tuple[int, int] = (1, 1),
    *,
    stride: int = 1,
    dilation: int = 1,
    groups: int = 1,
    same: bool = True,
    norm: bool = True,
    activation: str = "relu",
) -> nn.Sequential:
    """Convolution, batch norm, activation; `same` pads so that stride 1 keeps the size."""
    padding = tuple(dilation * (k // 2) if same else 0 for k in kernel)
    return nn.Sequential(
        nn.Conv2d(channels, out, kernel, stride, padding, dilation, groups, bias=not norm),
        nn.BatchNorm2d(out) if norm else nn.Identity(),
        ACTIVATIONS[activation](),
    )


@dataclass(frozen=True)
class Block(ABC):
    """Describes a part of a network."""

    @abstractmethod
    def build(self, channels: int) -> nn.Module:
        """The part, for an input of so many channels."""


@dataclass(frozen=True)
class Conv(Block):
    out: int
    kernel: tuple[int, int]
    stride: int
    dilation: int
    grouped: bool
    same: bool
    norm: bool
    activation: str

    def build(self, channels: int) -> nn.Module:
        return conv(
            channels,
            self.out,
            self.kernel,
            stride=self.stride,
            dilation=self.dilation,
            groups=math.gcd(channels, self.out) if self.grouped else 1,
            same=self.same,
            norm=self.norm,
            activation=self.activation,
        )


@dataclass(frozen=True)
class Depthwise(Block):
    kernel: tuple[int, int]
    stride: int
    dilation: int
    multiplier: int
    activation: str
    then_pointwise: int | None

    def build(self, channels: int) -> nn.Module:
        hidden = channels * self.multiplier
        layers = conv(
            channels,
            hidden,
            self.kernel,
            stride=self.stride,
            dilation=self.dilation,
            groups=channels,
            activation=self.activation,
        )
        if self.then_pointwise is not None:
            layers.append(conv(hidden, self.then_pointwise, activation=self.activation))
        return layers


class Gate(nn.Module):
    """Squeeze and excite."""

    def __init__(self, channels: int, sigmoid: type[nn.Module]) -> None:
        super().__init__()
        squeezed = max(1, channels // 4)
        self.reduce = nn.Conv2d(channels, squeezed, 1)
        self.expand = nn.Conv2d(squeezed, channels, 1)
        self.sigmoid = sigmoid()

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.reduce(x.mean((2, 3), keepdim=True)))
        return x * self.sigmoid(self.expand(y))


class Residual(nn.Module):
    def __init__(self, inner: nn.Module, shortcut: nn.Module, activation: str) -> None:
        super().__init__()
        self.inner, self.shortcut = inner, shortcut
        self.activation = ACTIVATIONS[activation]()

    def forward(self, x: Tensor) -> Tensor:
        return self.activation(self.inner(x) + self.shortcut(x))


@dataclass(frozen=True)
class InvertedResidual(Block):
    expansion: int
    out: int | None
    kernel: int
    stride: int
    gate: str
    activation: str

    def build(self, channels: int) -> nn.Module:
        out = self.out or channels
        hidden = channels * self.expansion
        layers = nn.Sequential()
        if self.expansion > 1:
            layers.append(conv(channels, hidden, activation=self.activation))
        layers.append(
            conv(
                hidden,
                hidden,
                (self.kernel, self.kernel),
                stride=self.stride,
                groups=hidden,
                activation=self.activation,
            )
        )
        if self.gate:
            layers.append(Gate(hidden, {"hard": nn.Hardsigmoid, "soft": nn.Sigmoid}[self.gate]))
        layers.append(conv(hidden, out, activation="none"))
        if self.stride > 1 or out != channels:
            return layers
        return Residual(layers, nn.Identity(), "none")


@dataclass(frozen=True)
class BasicBlock(Block):
    """Two convolutions, or one-three-one, and a shortcut."""

    out: int
    stride: int
    bottleneck: bool
    activation: str

    def build(self, channels: int) -> nn.Module:
        out, width = self.out, max(4, self.out // 2) if self.bottleneck else self.out
        first = (1, 1) if self.bottleneck else (3, 3)
        layers = [
            conv(channels, width, first, stride=1 if self.bottleneck else self.stride),
            conv(
                width,
                width,
                (3, 3),
                stride=self.stride if self.bottleneck else 1,
                activation="relu" if self.bottleneck else "none",
            ),
        ]
        if self.bottleneck:
            layers.append(conv(width, out, activation="none"))
        plain = self.stride == 1 and out == channels
        shortcut = (
            nn.Identity() if plain else conv(channels, out, stride=self.stride, activation="none")
        )
        return Residual(nn.Sequential(*layers), shortcut, self.activation)


class Dense(nn.Module):
    def __init__(self, layers: list[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor) -> Tensor:
        features = [x]
        for layer in self.layers:
            features.append(layer(torch.cat(features, 1)))
        return torch.cat(features, 1)


@dataclass(frozen=True)
class DenseBlock(Block):
    layers: int
    growth: int
    transition: bool

    def build(self, channels: int) -> nn.Module:
        width, layers = channels, []
        for _ in range(self.layers):
            layers.append(
                nn.Sequential(
                    nn.BatchNorm2d(width),
                    nn.ReLU(inplace=True),
                    conv(width, 4 * self.growth),
                    nn.Conv2d(4 * self.growth, self.growth, 3, padding=1, bias=False),
                )
            )
            width += self.growth
        block = nn.Sequential(Dense(layers))
        if self.transition:
            block.extend(
                [nn.BatchNorm2d(width), nn.ReLU(), nn.Conv2d(width, width // 2, 1), nn.AvgPool2d(2)]
            )
        return block


class Branches(nn.Module):
    def __init__(self, branches: list[nn.Module]) -> None:
        super().__init__()
        self.branches = nn.ModuleList(branches)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([branch(x) for branch in self.branches], 1)


@dataclass(frozen=True)
class Inception(Block):
    """Branches: "1", "3", "5", "7x1", "pool", "same" (the input itself); joined by channels."""

    branches: tuple[str, ...]
    width: int

    def build(self, channels: int) -> nn.Module:
        w = self.width
        makers: dict[str, Callable[[], nn.Module]] = {
            "1": lambda: conv(channels, w),
            "3": lambda: nn.Sequential(conv(channels, w), conv(w, 2 * w, (3, 3))),
            "5": lambda: nn.Sequential(conv(channels, w), conv(w, w + 1, (5, 5))),
            "7x1": lambda: nn.Sequential(conv(channels, w), conv(w, w, (1, 7)), conv(w, w, (7, 1))),
            "pool": lambda: nn.Sequential(nn.MaxPool2d(3, 1, 1), conv(channels, w)),
            "same": nn.Identity,
        }
        return Branches([makers[name]() for name in self.branches])


@dataclass(frozen=True)
class Pool(Block):
    kind: str
    kernel: tuple[int, int]
    stride: int
    padded: bool
    ceil_mode: bool
    count_include_pad: bool

    def build(self, channels: int) -> nn.Module:
        padding = tuple(k // 2 if self.padded else 0 for k in self.kernel)
        if self.kind == "max":
            return nn.MaxPool2d(self.kernel, self.stride, padding, ceil_mode=self.ceil_mode)
        return nn.AvgPool2d(
            self.kernel,
            self.stride,
            padding,
            ceil_mode=self.ceil_mode,
            count_include_pad=self.count_include_pad,
        )


@dataclass(frozen=True)
class Upsample(Block):
    kind: str

    def build(self, channels: int) -> nn.Module:
        if self.kind == "transposed":
            return nn.ConvTranspose2d(channels, max(1, channels // 2), 2, stride=2)
        if self.kind == "nearest":
            return nn.Upsample(scale_factor=2, mode="nearest")
        return nn.Upsample(scale_factor=2, mode="bilinear", align_corners=False)


class Skip(nn.Module):
    """Down, through `inner`, up again, beside the input: one level of a U-Net."""

    def __init__(self, inner: nn.Module, up: nn.Module) -> None:
        super().__init__()
        self.inner, self.up = inner, up

    def forward(self, x: Tensor) -> Tensor:
        y = self.up(self.inner(F.max_pool2d(x, 2)))
        y = F.pad(y, (0, x.shape[3] - y.shape[3], 0, x.shape[2] - y.shape[2]))
        return torch.cat([x, y], 1)


@dataclass(frozen=True)
class Level(Block):
    width: int
    then: bool

    def build(self, channels: int) -> nn.Module:
        w = self.width
        inner = nn.Sequential(conv(channels, w, (3, 3)), conv(w, w, (3, 3)))
        skip = Skip(inner, nn.ConvTranspose2d(w, channels, 2, stride=2))
        return nn.Sequential(skip, conv(2 * channels, w, (3, 3))) if self.then else skip


class Function(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "abs in place": lambda x: (x - 0.25).abs_(),
    "softmax": lambda x: x.softmax(1),
    "times its mean": lambda x: x * x.mean((2, 3), keepdim=True),
    "added to itself": lambda x: x + x,
    "transposed": lambda x: x.transpose(2, 3),
    "every other row": lambda x: x[:, :, ::2],
    "some channels": lambda x: x[:, 1:],
    "halves swapped": lambda x: torch.cat([t.relu() for t in x.chunk(2, 1)][::-1], 1),
    "shuffled": lambda x: x.roll(1, 1).contiguous(),
    "reflected": lambda x: F.pad(x, (1, 2, 0, 1), mode="reflect"),
    "normalised": lambda x: F.layer_norm(x, x.shape[-1:]),
    "doubled in depth": lambda x: torch.cat([x, x], 1),
}


@dataclass(frozen=True)
class Other(Block):
    """What cvfast has no kernel for."""

    function: str

    def build(self, channels: int) -> nn.Module:
        return Function(FUNCTIONS[self.function])


class Head(nn.Module):
    """What leaves the network."""

    def __init__(self, kind: str, channels: int) -> None:
        super().__init__()
        self.kind = kind
        self.linear = nn.Linear(channels, 7)

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, ...] | dict[str, Tensor]:
        if self.kind == "classes":
            return self.linear(F.adaptive_avg_pool2d(x, 1).flatten(1))
        if self.kind == "both":
            return {"features": x, "classes": self.linear(x.mean((2, 3)))}
        if self.kind == "views":
            return x[:, :1], x
        return x


@dataclass(frozen=True)
class Network:
    """A network and what it is called with: the example's shape, and another one."""

    channels: int
    blocks: tuple[Block, ...]
    head: str
    shapes: tuple[tuple[int, int, int], ...]

    def inputs(self) -> list[Tensor]:
        return [
            image((n, self.channels, h, w), seed=seed) for seed, (n, h, w) in enumerate(self.shapes)
        ]

    def build(self) -> nn.Module:
        """The blocks that fit, and the head; weights from a fixed seed; eval mode."""
        torch.manual_seed(0)
        shapes = [torch.Size((n, self.channels, h, w)) for n, h, w in self.shapes]
        layers = nn.Sequential()
        for block in self.blocks:
            layer = block.build(shapes[0][1])
            try:
                after = [_shape(layer, shape) for shape in shapes]
            except RuntimeError:
                continue
            if all(after) and max(shape.numel() for shape in after) < 1 << 18:
                layers.append(layer)
                shapes = after
        layers.append(Head(self.head, shapes[0][1]))
        return randomize(layers)


def _shape(layer: nn.Module, shape: torch.Size) -> torch.Size:
    """Of the output; raises RuntimeError where the layer does not fit."""
    on_meta = copy.deepcopy(layer).to("meta").eval()
    with torch.no_grad():
        after = on_meta(torch.empty(shape, device="meta")).shape
    if not all(after):
        raise RuntimeError("nothing is left of the image")
    return after


widths = st.sampled_from([1, 3, 8, 16, 17, 24, 32, 48])
strides = st.sampled_from([1, 1, 1, 2])
activations = st.sampled_from(list(ACTIVATIONS))
booleans = st.booleans()
kernels = st.sampled_from([(1, 1), (3, 3), (3, 3), (5, 5), (1, 7), (7, 1), (2, 3), (7, 7)])
odd_kernels = st.sampled_from([(3, 3), (3, 3), (5, 5), (1, 3)])

blocks: st.SearchStrategy[Block] = st.one_of(
    st.builds(
        Conv, widths, kernels, strides, st.sampled_from([1, 1, 2]), st.sampled_from([False, True]),
        booleans, booleans, activations,
    ),
    st.builds(
        Depthwise, odd_kernels, strides, st.sampled_from([1, 1, 2]), st.sampled_from([1, 1, 2]),
        activations, st.none() | widths,
    ),
    st.builds(
        InvertedResidual, st.sampled_from([1, 3, 6]), st.none() | widths, st.sampled_from([3, 5]),
        strides, st.sampled_from(["", "hard", "soft"]), st.sampled_from(["relu6", "hardswish"]),
    ),
    st.builds(BasicBlock, widths, strides, booleans, st.sampled_from(["relu", "none", "silu"])),
    st.builds(DenseBlock, st.integers(1, 3), st.sampled_from([4, 12, 32]), booleans),
    st.builds(
        Inception,
        st.lists(
            st.sampled_from(["1", "3", "5", "7x1", "pool", "same"]), min_size=2, max_size=4
        ).map(tuple),
        st.sampled_from([5, 8, 16]),
    ),
    st.builds(
        Pool, st.sampled_from(["max", "average"]), st.sampled_from([(2, 2), (3, 3), (3, 2)]),
        st.integers(1, 3), booleans, booleans, booleans,
    ),
    st.builds(Upsample, st.sampled_from(["transposed", "nearest", "bilinear"])),
    st.builds(Level, st.sampled_from([8, 16]), booleans),
    st.builds(Other, st.sampled_from(list(FUNCTIONS))),
)  # fmt: skip

sizes = st.tuples(st.integers(1, 3), st.integers(9, 40), st.integers(9, 40))

networks = st.builds(
    Network,
    st.sampled_from([3, 1, 16]),
    st.lists(blocks, min_size=2, max_size=6).map(tuple),
    st.sampled_from(["classes", "both", "features", "views"]),
    st.tuples(sizes, sizes),
)


def leaves(outputs: Tensor | tuple[Tensor, ...] | dict[str, Tensor]) -> list[Tensor]:
    if isinstance(outputs, Tensor):
        return [outputs]
    return list(outputs.values() if isinstance(outputs, dict) else outputs)


@torch.no_grad()
def check(network: Network, dtype: torch.dtype, level: str | None) -> None:
    model, inputs = network.build(), network.inputs()
    eager, exact = copy.deepcopy(model).to(dtype), copy.deepcopy(model).double()
    before = [x.clone() for x in inputs]
    with isa(level) if level else nullcontext(), warnings.catch_warnings():
        warnings.filterwarnings("error", message="cvfast", category=RuntimeWarning)
        optimized = cvfast.optimize(model, inputs[0], dtype=dtype if dtype.itemsize < 4 else None)
        results = [leaves(optimized(x)) for x in inputs]
        kept = [[t.clone() for t in tensors] for tensors in results]
        for x, tensors in zip(inputs, results, strict=True):
            baseline = leaves(eager(x.to(dtype)))
            for ours, its, truth in zip(tensors, baseline, leaves(exact(x.double())), strict=True):
                verdict = tolerance.check(
                    ours, truth, its.float(), dtype=dtype, k=tolerance.K_NETWORK
                )
                assert verdict, str(verdict)

        again = [leaves(optimized(x)) for x in inputs]
        assert same(results, kept), "a later call changed an earlier result"
        assert same(again, kept), "the same input gave another result"
        assert same([inputs], [before]), "an input was changed"

        # Results belong to their caller: writing to them reaches neither inputs nor weights.
        for x, tensors in zip(inputs, again, strict=True):
            for ours, its in zip(tensors, leaves(model(x)), strict=True):
                if not share_memory(its, x):
                    assert not share_memory(ours, x), "a result lies in its input's memory"
                    ours.fill_(float("nan"))
        assert same([leaves(optimized(x)) for x in inputs], kept), "results lie in memory of cvfast"


def same(a: list[list[Tensor]], b: list[list[Tensor]]) -> bool:
    return all(
        torch.equal(s.nan_to_num(), t.nan_to_num()) and torch.equal(s.isnan(), t.isnan())
        for pair in zip(a, b, strict=True)
        for s, t in zip(*pair, strict=True)
    )


def share_memory(a: Tensor, b: Tensor) -> bool:
    return a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()


levels = st.sampled_from([None, None, *isa_levels()])
dtypes = st.sampled_from([torch.float32, torch.float32, torch.bfloat16])
profile = {
    "deadline": None,
    "suppress_health_check": [HealthCheck.too_slow, HealthCheck.data_too_large],
}


@settings(max_examples=20, derandomize=True, phases=[Phase.generate], **profile)
@given(networks, dtypes, levels)
def test_random_networks(network: Network, dtype: torch.dtype, level: str | None) -> None:
    check(network, dtype, level)


@pytest.mark.slow
@settings(max_examples=500, **profile)
@given(networks, dtypes, levels)
def test_many_random_networks(network: Network, dtype: torch.dtype, level: str | None) -> None:
    check(network, dtype, level)
