"""What the GPU kernels ship for: the calls of the networks, and calls beyond them.

`COLUMNS` lists every operator with GPU kernels. Its launch package, `cvfast.launch.<op>`, has
`PASSES`, `Problem` and `GENERAL`: problems that reach what the networks do not, in float16, with
their activations.
"""

from __future__ import annotations

import functools
import importlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch

from cvfast.launch import (
    conv,
    copy_layout,
    depthwise,
    elementwise,
    global_pool,
    inception,
    inverted_residual,
    pointwise,
    pool,
    table,
    upconv,
)
from cvfast.launch.networks import blocks, layers, modules, steps
from cvfast.models import default_input_size

BATCHES = (1, 256)
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
SAMPLE_KINDS = 3
"""Kinds of problems of each operator in a sample."""


@dataclass(frozen=True)
class Call:
    """One call that a kernel is shipped for; `activation` is the one the kernel computes."""

    op: str
    problem: Any
    pass_: str
    activation: str

    def describe(self) -> str:
        """One line."""
        return f"{self.problem.describe()} {self.activation}"

    def backends(self) -> tuple[str, ...]:
        """Those that have a kernel for it."""
        return tuple(name for name in column(self.op).backends if self.served_by(name))

    def served_by(self, backend: str) -> bool:
        """Whether the backend has a kernel for it: it may say why not (`unsupported`)."""
        if backend not in column(self.op).backends:
            return False
        refusal = getattr(table.parameters(self.op, backend), "unsupported", None)
        return refusal is None or refusal(self.problem) is None


Problems = Iterator[tuple[Any, str]]
"""Problems at batch 1 in float16, each with its activation."""


@dataclass(frozen=True)
class Column:
    """An operator with GPU kernels.

    Attributes:
        op: the stem of its modules.
        backends: that have kernels of it.
        networks: those that call it.
        problems: what a network of that name calls it with.
        home: the module of `cvfast.ops` that holds it; None for that of its own name.
        matrix: its kernels multiply matrices.
    """

    op: str
    backends: tuple[str, ...]
    networks: tuple[str, ...]
    problems: Callable[[str], Problems]
    home: str | None = None
    matrix: bool = False

    @property
    def launch(self) -> Any:
        """Its launch package."""
        return importlib.import_module(f"cvfast.launch.{self.op}")

    @property
    def passes(self) -> tuple[str, ...]:
        return tuple(self.launch.PASSES)


_MOBILENETS = (
    "mobilenet_v2",
    "mobilenet_v1",
    "mobilenet_v3_small",
    "mobilenet_v3_large",
    "efficientnet_lite0",
)
_NETWORKS = (
    "resnet18",
    "resnet50",
    "densenet121",
    "googlenet",
    "inception_v3",
    "unet",
    "fcn_resnet50",
    *_MOBILENETS,
)


def _depthwise(name: str) -> Problems:
    for layer in layers(name):
        if layer.kind == "depthwise":
            yield (
                depthwise.Problem(
                    1,
                    layer.channels,
                    layer.height,
                    layer.width,
                    layer.kernel,
                    layer.stride,
                    layer.padding,
                    layer.dilation,
                    layer.out_channels // layer.channels,
                ),
                layer.activation,
            )


def _conv(name: str) -> Problems:
    for layer in layers(name):
        if layer.kind != "conv" or layer.pointwise:
            continue
        # What is concatenated are halves, a skip connection and what was upsampled to its size.
        second = layer.channels // 2 if layer.two_sources else 0
        yield (
            conv.Problem(
                1,
                layer.channels - second,
                layer.height,
                layer.width,
                layer.out_channels,
                layer.kernel,
                layer.stride,
                layer.padding,
                layer.dilation,
                second,
                layer.residual,
            ),
            layer.activation,
        )


def _upconv(name: str) -> Problems:
    for layer in layers(name):
        if layer.kind == "transposed" and layer.kernel == layer.stride:
            size = (layer.channels, layer.height, layer.width)
            yield upconv.Problem(1, *size, layer.out_channels, layer.kernel), "none"


def _pointwise(name: str) -> Problems:
    for layer in layers(name):
        if layer.pointwise:
            yield (
                pointwise.Problem(
                    1,
                    layer.channels,
                    layer.out_channels,
                    layer.height,
                    layer.width,
                    layer.stride,
                    prologue=layer.prologue,
                    gate=layer.gate,
                    residual=layer.residual,
                ),
                layer.activation,
            )


def _pool(name: str) -> Problems:
    for layer in layers(name):
        if layer.kind in ("max", "average"):
            yield (
                pool.Problem(
                    1,
                    layer.channels,
                    layer.height,
                    layer.width,
                    "max" if layer.kind == "max" else "avg",
                    layer.kernel,
                    layer.stride,
                    (layer.padding[0], layer.padding[1]),
                    ceil_mode=layer.ceil_mode,
                ),
                "none",
            )


def _global_pool(name: str) -> Problems:
    for layer in layers(name):
        if layer.kind == "mean":
            yield global_pool.Problem(1, layer.channels, layer.height, layer.width), "none"


def _inverted_residual(name: str) -> Problems:
    for block in blocks(name):
        first, project = block.expand or block.depthwise, block.project
        middle = block.depthwise
        yield (
            inverted_residual.Problem(
                1,
                first.channels,
                middle.channels,
                0 if project is None else project.out_channels,
                first.height,
                first.width,
                middle.kernel,
                middle.stride,
                middle.padding,
                expands=block.expand is not None,
                residual=project is not None and project.residual,
            ),
            middle.activation,
        )


def _elementwise(name: str) -> Problems:
    # What stays of a network where nothing takes it along: gates, and sums of two images.
    for step in steps(name):
        if step.name in ("add", "mul") and len(step.shape) == 4:
            gate = step.name == "mul"
            yield elementwise.Problem(*step.shape, op=step.name, gate=gate), "none"


def _copy_layout(name: str) -> Problems:
    image = default_input_size(name)
    yield copy_layout.Problem(1, *image, source="pixels", target="channels"), "none"


def _inception(name: str) -> Problems:
    for module in modules(name):
        for level in module:
            # Pointwise convolutions of one image are one product that writes several.
            alike: dict[tuple[Any, ...], tuple[int, ...]] = {}
            for *pooling, last in level:
                first = pooling[0] if pooling else last
                kind = {"max": "max", "average": "avg"}.get(first.kind, "conv")
                size = (first.channels, first.height, first.width)
                geometry = (kind, first.kernel, first.stride, first.padding)
                alike[size, geometry] = (*alike.get((size, geometry), ()), last.out_channels)
            branches = tuple(
                inception.Branch(channels, height, width, parts, *geometry)
                for ((channels, height, width), geometry), parts in alike.items()
            )
            if len(branches) > 1 or len(branches[0].parts) > 1:
                yield inception.Problem(1, branches), level[0][-1].activation


COLUMNS = (
    Column("depthwise", ("triton", "cuda"), _MOBILENETS, _depthwise),
    Column("pointwise", ("triton",), _NETWORKS, _pointwise, matrix=True),
    Column("conv", ("triton",), _NETWORKS, _conv, matrix=True),
    Column("upconv", ("triton",), ("unet",), _upconv, matrix=True),
    Column("pool", ("triton",), _NETWORKS, _pool),
    Column("global_pool", ("triton",), _NETWORKS, _global_pool, home="pool"),
    Column("inception", ("triton",), ("googlenet", "inception_v3"), _inception, matrix=True),
    Column("elementwise", ("triton",), _NETWORKS, _elementwise),
    Column("copy_layout", ("triton",), _NETWORKS, _copy_layout, home="layout"),
    Column("inverted_residual", ("triton", "cuda"), _MOBILENETS, _inverted_residual, matrix=True),
)
"""Every operator with GPU kernels."""

OPS = tuple(column.op for column in COLUMNS)
BACKENDS = tuple(dict.fromkeys(backend for column in COLUMNS for backend in column.backends))


def column(op: str) -> Column:
    """The column of an operator.

    Raises:
        ValueError: for an operator without GPU kernels.
    """
    found = next((one for one in COLUMNS if one.op == op), None)
    if found is None:
        raise ValueError(f"unknown operator {op!r}; choose from {', '.join(OPS)}")
    return found


def network_calls(ops: Sequence[str] = OPS, batches: Sequence[int] = BATCHES) -> tuple[Call, ...]:
    """What the networks call: distinct problems, at every batch, in every dtype and pass."""
    return tuple(call for op in ops for call in _network_calls(op, tuple(batches)))


@functools.cache
def _network_calls(op: str, batches: tuple[int, ...]) -> tuple[Call, ...]:
    calls: dict[Call, None] = {}
    one = column(op)
    for name in one.networks:
        for problem, activation in one.problems(name):
            for batch in batches:
                for case in in_every_dtype(replace(problem, batch=problem.batch * batch)):
                    calls.update(dict.fromkeys(_passes(op, case, activation)))
    return tuple(calls)


def general_calls(ops: Sequence[str] = OPS) -> tuple[Call, ...]:
    """The calls of `GENERAL` in every dtype and pass."""
    return tuple(
        call
        for op in ops
        for problem, activation in column(op).launch.GENERAL
        for case in in_every_dtype(problem)
        for call in _passes(op, case, activation)
    )


def sample_calls(ops: Sequence[str] = OPS) -> tuple[Call, ...]:
    """A few that reach most code, for a quick look.

    Of each operator and pass: of the kinds of problems that networks have most of, the largest in
    float16, of the first of them also in float32; and the first of `GENERAL`.
    """
    chosen: dict[Call, None] = {}
    for op in ops:
        for pass_ in column(op).passes:
            calls = [call for call in network_calls([op]) if call.pass_ == pass_]
            halves = [call for call in calls if call.problem.dtype is torch.float16]
            kinds = [kind for kind, _ in Counter(map(_kind, halves)).most_common(SAMPLE_KINDS)]
            singles = [call for call in calls if call.problem.dtype is torch.float32]
            for group, wanted in ((halves, kinds), (singles, kinds[:1])):
                for kind in wanted:
                    alike = [call for call in group if _kind(call) == kind]
                    chosen[max(alike, key=lambda call: call.problem.bytes())] = None
        problem, activation = column(op).launch.GENERAL[0]
        chosen.update(dict.fromkeys(_passes(op, problem, activation)))
    return tuple(chosen)


def in_every_dtype(problem: Any) -> Iterator[Any]:
    """A problem in all of `DTYPES`; where its kernel may round to TF32, with and without that."""
    rounds = any(field.name == "tf32" for field in fields(problem))
    for dtype in DTYPES:
        case = replace(problem, dtype=dtype)
        if rounds and dtype is torch.float32:
            yield replace(case, tf32=True)
        yield case


def _kind(call: Call) -> tuple[Any, ...]:
    """What a problem is but for its sizes and dtype."""
    ignored = {*call.problem.SIZES, "dtype", "tf32"}
    names = (field.name for field in fields(call.problem))
    return tuple(getattr(call.problem, name) for name in names if name not in ignored)


def _passes(op: str, problem: Any, activation: str) -> Iterator[Call]:
    for pass_ in column(op).passes:
        # Only these two are undone within the backward kernels.
        fused = pass_ == "forward" or activation in ("relu", "relu6")
        yield Call(op, problem, pass_, activation if fused else "none")
