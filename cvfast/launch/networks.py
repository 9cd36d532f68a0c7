"""What the networks of `cvfast.models` compute, step by step, as the planner would fuse it.

A network is run on the meta device, where tensors have shapes and no memory, and PyTorch's
operators are recorded. `layers` finds in them the convolutions with what belongs to them.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeGuard

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from cvfast.models import default_input_size, get_model

_ACTIVATIONS = {"relu": "relu", "hardtanh": "relu6", "hardswish": "hardswish"}
_BATCH_NORMS = ("native_batch_norm", "_native_batch_norm_legit_no_training")


@dataclass(eq=False)
class Step:
    """One operator of a network at batch 1.

    Attributes:
        name: of the operator, such as "convolution"; in-place ones are called like the others.
        args: as the operator got them.
        shape: of the result.
        sources: the steps that made the tensors among `args`, None for inputs and weights.
        users: the steps that read the result.
    """

    name: str
    args: tuple[Any, ...]
    shape: tuple[int, ...]
    sources: list[Step | None]
    users: list[Step] = field(default_factory=list)

    @property
    def user(self) -> Step | None:
        """The only reader; None if there is none or several."""
        return self.users[0] if len(self.users) == 1 else None


class _Recorder(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.steps: list[Step] = []
        self._made: dict[int, Step] = {}
        self._kept: list[Any] = []  # so that no two tensors share an id

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        first = result[0] if isinstance(result, (tuple, list)) else result
        if not isinstance(first, Tensor):
            return result
        tensors: list[Tensor] = []
        for value in args:
            values = value if isinstance(value, (tuple, list)) else (value,)
            tensors += [one for one in values if isinstance(one, Tensor)]
        step = Step(
            name=func.overloadpacket.__name__.rstrip("_"),
            args=args,
            shape=tuple(first.shape),
            sources=[self._made.get(id(tensor)) for tensor in tensors],
        )
        for source in dict.fromkeys(step.sources):
            if source is not None:
                source.users.append(step)
        self.steps.append(step)
        self._made[id(first)] = step
        self._kept += [args, result]
        return result


@functools.cache
def steps(name: str) -> tuple[Step, ...]:
    """What a network computes for one image of the size it was published for, in order."""
    with torch.device("meta"):
        network = get_model(name).eval()
        image = torch.empty(1, *default_input_size(name))
    recorder = _Recorder()
    with torch.no_grad(), recorder:
        network(image)
    return tuple(recorder.steps)


@dataclass(frozen=True)
class Layer:
    """A convolution, linear layer or pooling at batch 1 with what a kernel does besides.

    Attributes:
        kind: "conv", "depthwise", "transposed", "linear", "max", "average" or "mean" (over all
            pixels of an image).
        channels, height, width: of the image, before padding; of a linear layer one pixel.
        out_channels: of the result.
        kernel, stride, dilation: (vertical, horizontal).
        padding: (vertical, horizontal), or (top, left, bottom, right) where these differ.
        ceil_mode: of a pooling.
        two_sources: the image is two, side by side along the channels, that only this layer reads
            so; `channels` counts both.
        prologue: a batch norm and a ReLU that are no other convolution's come before.
        gate: the channels of the image are multiplied by the numbers of a squeeze-excite.
        residual: an image is added to the result.
        activation: "none", "relu", "relu6" or "hardswish", behind everything else.
    """

    kind: str
    channels: int
    height: int
    width: int
    out_channels: int
    kernel: tuple[int, int] = (1, 1)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, ...] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    ceil_mode: bool = False
    two_sources: bool = False
    prologue: bool = False
    gate: bool = False
    residual: bool = False
    activation: str = "none"

    @property
    def pointwise(self) -> bool:
        """Whether it is a product of pixels and a matrix."""
        return self.kind == "linear" or (
            self.kind == "conv" and self.kernel == (1, 1) and self.padding == (0, 0)
        )


@dataclass(frozen=True)
class Block:
    """An inverted residual or separable block.

    Attributes:
        expand: its first pointwise convolution, or None.
        depthwise: its depthwise one.
        project: its last pointwise one; None where squeeze-excite stands before it.
    """

    expand: Layer | None
    depthwise: Layer
    project: Layer | None


@functools.cache
def layers(name: str) -> tuple[Layer, ...]:
    """The convolutions, linear layers and poolings of a network, in order."""
    return tuple(layer for step in steps(name) if (layer := _layer(step)) is not None)


@functools.cache
def blocks(name: str) -> tuple[Block, ...]:
    """The inverted residuals and separable blocks of a network, in order."""
    found = []
    for step in steps(name):
        layer = _layer(step)
        if layer is None or layer.kind != "depthwise":
            continue
        before, after = _before(step), _last(step).user
        expand = None if before is None else _layer(before)
        project = None if after is None else _layer(after)
        found.append(
            Block(
                expand if expand is not None and expand.pointwise else None,
                layer,
                project if project is not None and project.pointwise else None,
            )
        )
    return tuple(found)


Branch = tuple[Layer, ...]
"""Layers that read each other, first to last."""


@functools.cache
def modules(name: str) -> tuple[tuple[tuple[Branch, ...], ...], ...]:
    """The Inception modules of a network, in order, each as levels: what may run side by side.

    A level holds convolutions, and poolings with the pointwise convolution that alone reads them.
    The first reads the module's image, the others what those before wrote.
    """
    nested = {s for step in steps(name) if step.name == "cat" for s in step.sources}
    found = []
    for step in steps(name):
        if step.name != "cat" or step in nested:
            continue
        levels: list[dict[tuple[Step, ...], None]] = []
        for chain in _chains(step):
            for depth, together in enumerate(_grouped(chain)):
                if depth == len(levels):
                    levels.append({})
                levels[depth][together] = None
        found.append(tuple(tuple(map(_layers_of, level)) for level in levels))
    return tuple(found)


def _chains(step: Step) -> Iterator[list[Step]]:
    """The convolutions and poolings of each branch that ends in a concatenation, first to last."""
    for source in step.sources:
        if source is None:
            continue
        if source.name == "cat":
            yield from _chains(source)
            continue
        chain: list[Step] = []
        at: Step | None = source
        # The module's image is read by every branch, what is within by two at most.
        while at is not None and at.name != "cat" and len(at.users) < 3:
            if _layer(at) is not None:
                chain.append(at)
            at = at.sources[0]
        yield chain[::-1]


def _grouped(chain: Sequence[Step]) -> Iterator[tuple[Step, ...]]:
    """A chain in pieces: a pooling with the pointwise convolution behind it, else single ones.

    A pooling that no such convolution reads, as where a module halves its image, is left out.
    """
    pooling: Step | None = None
    for step in chain:
        if step.name != "convolution":
            pooling = step
        elif pooling is None:
            yield (step,)
        else:
            yield (pooling, step)
            pooling = None


def _layers_of(together: Sequence[Step]) -> Branch:
    return tuple(layer for step in together if (layer := _layer(step)) is not None)


def _layer(step: Step) -> Layer | None:
    match step.name:
        case "convolution":
            return _convolution(step)
        case "addmm":
            out, inputs = step.shape[1], step.args[1].shape[1]
            return Layer("linear", inputs, 1, 1, out, activation=_activation(_last(step)))
        case "max_pool2d_with_indices" | "avg_pool2d":
            names = ["kernel", "stride", "padding", "dilation", "ceil_mode"]
            if step.name == "avg_pool2d":
                names.remove("dilation")
            _, channels, height, width = step.args[0].shape
            given = dict(zip(names, step.args[1:], strict=False))
            return Layer(
                "average" if step.name == "avg_pool2d" else "max",
                channels,
                height,
                width,
                out_channels=channels,
                kernel=_pair(given["kernel"]),
                stride=_pair(given.get("stride") or given["kernel"]),
                padding=_pair(given.get("padding", (0, 0))),
                ceil_mode=given.get("ceil_mode", False),
            )
        case "mean" if len(step.args[0].shape) == 4:
            _, channels, height, width = step.args[0].shape
            return Layer("mean", channels, height, width, out_channels=channels)
    return None


def _convolution(step: Step) -> Layer:
    x, weight, _, stride, padding, dilation, transposed, _, groups = step.args
    source = step.sources[0]
    height, width = x.shape[2:]
    padding = _pair(padding)
    if source is not None and source.name == "constant_pad_nd":
        left, right, top, bottom = (*source.args[1], 0, 0)[:4]
        height, width = height - top - bottom, width - left - right
        even = top == bottom and left == right
        padding = (top, left) if even else (top, left, bottom, right)
    depthwise = groups == x.shape[1] > 1
    last, residual = _last_linear(step)
    return Layer(
        kind="transposed" if transposed else "depthwise" if depthwise else "conv",
        channels=x.shape[1],
        height=height,
        width=width,
        out_channels=step.shape[1],
        kernel=_pair(weight.shape[2:]),
        stride=_pair(stride),
        padding=padding,
        dilation=_pair(dilation),
        two_sources=_only_read(source, "cat") and len(source.sources) == 2,
        prologue=_prologue(source),
        gate=_only_read(source, "mul"),
        residual=residual,
        activation=_activation(last),
    )


def _pair(values: Sequence[int]) -> tuple[int, int]:
    return (values[0], values[1]) if len(values) > 1 else (values[0], values[0])


def _normed(step: Step) -> Step:
    """The batch norm that is folded into a convolution, or the convolution itself."""
    user = step.user
    return user if user is not None and user.name in _BATCH_NORMS else step


def _last_linear(step: Step) -> tuple[Step, bool]:
    """The last step of a convolution before its activation, and whether an image is added."""
    last = _normed(step)
    user = last.user
    if user is not None and user.name == "add" and user.sources and user.shape == last.shape:
        # Where both are convolutions, the sum belongs to the first.
        makers = [one for one in user.sources if one is not None and _is_convolution(one)]
        if makers and makers[0] is last:
            return user, True
    return last, False


def _is_convolution(step: Step) -> bool:
    source = step.sources[0] if step.name in _BATCH_NORMS else step
    return source is not None and source.name == "convolution" and step.user is not None


def _activation(last: Step) -> str:
    return "none" if last.user is None else _ACTIVATIONS.get(last.user.name, "none")


def _last(step: Step) -> Step:
    """The last step of a layer, its activation included."""
    last = _last_linear(step)[0]
    return last if _activation(last) == "none" else last.users[0]


def _before(step: Step) -> Step | None:
    """The convolution whose result only this one reads, behind norm, activation and padding."""
    source = step.sources[0]
    while source is not None and source.user is not None:
        if source.name == "convolution":
            return source
        source = source.sources[0]
    return None


def _only_read(source: Step | None, name: str) -> TypeGuard[Step]:
    return source is not None and source.name == name and source.user is not None


def _prologue(source: Step | None) -> bool:
    if source is None or source.name != "relu" or source.sources[0] is None:
        return False
    norm = source.sources[0]
    if norm.name not in _BATCH_NORMS:
        return False
    maker = norm.sources[0]
    return maker is None or maker.name != "convolution" or maker.user is not norm
