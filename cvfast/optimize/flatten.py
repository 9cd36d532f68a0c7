"""Flatten: a lowered program, for inputs of one size, as plans of the engine.

Consecutive steps that have a kernel become one plan. What has none stays a call of torch: on the
CPU between two plans, for a GPU inside the plan, where that can be, so that one graph holds it all.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch
from torch import Tensor, fx

from cvfast.engine import nodes, passes
from cvfast.engine.gpu import GpuPlan
from cvfast.engine.nodes import Graph, Image, Packed, View
from cvfast.engine.plan import Plan
from cvfast.engine.target import Target
from cvfast.ops.activation import activate_
from cvfast.ops.conv import OneDnnWeight, conv_onednn
from cvfast.ops.elementwise import ACTIVATIONS as ELEMENTWISE_ACTIVATIONS
from cvfast.ops.layout import channels_innermost, channels_last, is_channels_last, restore_layout
from cvfast.ops.pointwise import KERNEL_DTYPES, prepack_gpu
from cvfast.ops.pointwise import prepack as prepack_pointwise
from cvfast.ops.upconv import prepack_gpu as prepack_upconv

from . import operators
from .match import read_activation
from .report import Execution

aten = torch.ops.aten


class Unsupported(Exception):
    """A step that the engine has no kernel for."""


@dataclass
class Segment:
    """Steps that become one plan: ``inputs`` and ``outputs`` are the program's nodes that go in and
    come out, ``images`` what they and those between are in the graph; ``results`` are the images
    that come out, with their strides."""

    graph: Graph = field(default_factory=lambda: Graph([], [], []))
    images: dict[fx.Node, Image] = field(default_factory=dict)
    members: list[fx.Node] = field(default_factory=list)
    inputs: list[fx.Node] = field(default_factory=list)
    outputs: list[fx.Node] = field(default_factory=list)
    results: list[tuple[Image, tuple[int, int, int, int]]] = field(default_factory=list)


@dataclass(frozen=True)
class _Input:
    """A tensor that a plan takes: the node, and the strides it was planned for, if it was."""

    node: fx.Node
    shape: torch.Size
    strides: tuple[int, ...] | None

    def fetch(self, env: dict[fx.Node, Any]) -> Tensor:
        value: Tensor = env[self.node]
        if self.strides is not None and value.stride() != self.strides:
            laid_out = torch.empty_strided(self.shape, self.strides, dtype=value.dtype)
            value = laid_out.copy_(value)
        return value.view(*value.shape, 1, 1) if value.dim() == 2 else value


class PlannedCall:
    """Runs a segment's plan in an environment of the program's values.

    With ``in_place`` the results of a GPU's plan are handed out where it computed them.
    """

    def __init__(
        self, segment: Segment, meta: dict[fx.Node, Any], plan: Plan | GpuPlan, in_place: bool
    ) -> None:
        self.plan = plan
        self.in_place = in_place
        self.device = plan.device if isinstance(plan, GpuPlan) else torch.device("cpu")
        self.inputs = [
            _Input(n, meta[n].shape, None if isinstance(plan, GpuPlan) else meta[n].stride())
            for n in segment.inputs
        ]
        wanted = [image for image, _ in segment.results]
        self.outputs = [(image.shape, strides, image.dtype) for image, strides in segment.results]
        # Of each result, the tensor it is and its shape; several may be one tensor in other shapes.
        self.results = [
            (node, wanted.index(segment.images[node]), meta[node].shape) for node in segment.outputs
        ]

    def arguments(self, env: dict[fx.Node, Any]) -> tuple[list[Tensor], list[Tensor]]:
        inputs = [taken.fetch(env) for taken in self.inputs]
        device = self.device
        return inputs, [
            torch.empty_strided(s, t, dtype=d, device=device) for s, t, d in self.outputs
        ]

    def store(self, env: dict[fx.Node, Any], outputs: list[Tensor]) -> None:
        for node, index, shape in self.results:
            env[node] = outputs[index].view(shape)

    def __call__(self, env: dict[fx.Node, Any]) -> None:
        if self.in_place and isinstance(self.plan, GpuPlan):
            outputs = self.plan.run_in_place([taken.fetch(env) for taken in self.inputs])
        else:
            inputs, outputs = self.arguments(env)
            self.plan.run(inputs, outputs)
        self.store(env, outputs)


@dataclass(frozen=True)
class TorchCall:
    """An operator that the engine has no kernel for."""

    node: fx.Node

    def __call__(self, env: dict[fx.Node, Any]) -> None:
        node = self.node
        args = fx.map_arg(node.args, env.__getitem__)
        kwargs = fx.map_arg(node.kwargs, env.__getitem__)
        target: Any = node.target
        env[node] = target(*args, **kwargs)


class Schedule:
    """A program for inputs of one size and layout; safe to run from several threads."""

    def __init__(
        self,
        steps: list[PlannedCall | TorchCall],
        placeholders: list[fx.Node],
        constants: dict[fx.Node, Any],
        output: Any,
    ) -> None:
        self.steps = steps
        self.placeholders = placeholders
        self.constants = constants
        self.output = output
        self.frees = _last_uses(steps, output)

    @property
    def plans(self) -> list[Plan | GpuPlan]:
        return [step.plan for step in self.steps if isinstance(step, PlannedCall)]

    def run(self, flat: Sequence[Any]) -> list[Any]:
        env = dict(self.constants)
        env.update(zip(self.placeholders, flat, strict=True))
        for step, frees in zip(self.steps, self.frees, strict=True):
            step(env)
            for node in frees:
                del env[node]
        return [env[value] if isinstance(value, fx.Node) else value for value in self.output]

    def describe(self) -> Execution:
        plans = self.plans
        steps = [node for plan in plans for node in plan.graph.nodes]
        torch_steps = sum(isinstance(node, nodes.TorchOp) for node in steps)
        return Execution(
            plans=len(plans),
            steps=len(steps) - torch_steps,
            torch_calls=len(self.steps) - len(plans) + torch_steps,
            stages=tuple(
                (stage.end - stage.begin, stage.groups)
                for plan in plans
                for stage in plan.stages
                if stage.groups > 1
            ),
            arena_bytes=sum(plan.arena_bytes for plan in plans),
            bytes_copied=sum(plan.bytes_copied for plan in plans),
            bytes_kept=sum(plan.bytes_kept for plan in plans),
        )

    def profile(self, flat: Sequence[Any]) -> list[dict[str, Any]]:
        """Run, and say what each step of the plans was and took."""
        env = dict(self.constants)
        env.update(zip(self.placeholders, flat, strict=True))
        rows: list[dict[str, Any]] = []
        for step in self.steps:
            if isinstance(step, PlannedCall):
                inputs, outputs = step.arguments(env)
                rows += step.plan.profile(inputs, outputs)
                step.store(env, outputs)
            else:
                step(env)
        return rows


def _last_uses(steps: list[PlannedCall | TorchCall], output: Any) -> list[list[fx.Node]]:
    """Of each step, the values that nothing after it reads."""
    kept: set[fx.Node] = set()
    fx.map_arg(output, kept.add)
    frees: list[list[fx.Node]] = []
    for step in reversed(steps):
        if isinstance(step, TorchCall):
            touched = [*step.node.all_input_nodes, step.node]
        else:
            touched = [i.node for i in step.inputs] + [node for node, _, _ in step.results]
        last = [n for n in dict.fromkeys(touched) if n not in kept and n.op == "call_function"]
        kept.update(touched)
        frees.append(last)
    return frees[::-1]


def flatten(
    module: fx.GraphModule,
    flat: Sequence[Any],
    target: Target,
    names: dict[fx.Node, str],
    packed: dict[Any, Any],
) -> Schedule | None:
    """The schedule of ``module`` for inputs like ``flat``, or None if no step of it has a kernel.

    ``names`` names nodes in profiles; ``packed`` keeps what is packed here, for other sizes.
    """
    return _Flattener(module, flat, target, names, packed).build()


class _Flattener:
    def __init__(
        self,
        module: fx.GraphModule,
        flat: Sequence[Any],
        target: Target,
        names: dict[fx.Node, str],
        packed: dict[Any, Any],
    ) -> None:
        self.module = module
        self.target = target
        self.names = names
        self.packed = packed
        self.placeholders = [n for n in module.graph.nodes if n.op == "placeholder"]
        self.constants: dict[fx.Node, Any] = {}
        self.meta = self._propagate(flat)
        self.segment = Segment()
        self.steps: list[Segment | TorchCall] = []
        self.padded: dict[fx.Node, tuple[fx.Node, tuple[int, int, int, int]]] = {}

    def build(self) -> Schedule | None:
        output: Any = None
        for node in self.module.graph.nodes:
            if node.op == "output":
                output = node.args[0]
            elif node.op == "call_function" and node not in self.constants:
                self._add(node)
        self._close()
        if not any(isinstance(step, Segment) for step in self.steps):
            return None
        self._find_outputs(output)
        steps: list[PlannedCall | TorchCall] = []
        for step in self.steps:
            if isinstance(step, TorchCall):
                steps.append(step)
                continue
            passes.fuse(step.graph, self.target)
            steps.append(PlannedCall(step, self.meta, self._plan(step.graph), self.target.in_place))
        return Schedule(steps, self.placeholders, self._used_constants(output), output)

    def _plan(self, graph: Graph) -> Plan | GpuPlan:
        if self.target.gpu is None:
            return Plan(graph, self.target.threads)
        return GpuPlan(graph, self.target.memory)

    def _used_constants(self, output: Any) -> dict[fx.Node, Any]:
        used: set[fx.Node] = set()
        fx.map_arg(output, used.add)
        for step in self.steps:
            if isinstance(step, TorchCall):
                used.update(step.node.all_input_nodes)
        return {node: value for node, value in self.constants.items() if node in used}

    def _propagate(self, flat: Sequence[Any]) -> dict[fx.Node, Any]:
        """The value of every node, tensors without memory; fills ``constants``."""
        inputs = map(_without_memory, flat)
        meta: dict[fx.Node, Any] = dict(zip(self.placeholders, inputs, strict=True))
        for node in self.module.graph.nodes:
            if node.op == "get_attr":
                value = getattr(self.module, node.target)
                if self.target.memory.type == "meta":
                    value = _without_memory(value)
                self.constants[node] = value
                meta[node] = _without_memory(value)
            elif node.op == "call_function":
                args = fx.map_arg(node.args, meta.__getitem__)
                kwargs = fx.map_arg(node.kwargs, meta.__getitem__)
                if node.target is conv_onednn:
                    meta[node] = _onednn_result(*args)
                else:
                    meta[node] = node.target(*args, **kwargs)
                if isinstance(meta[node], (int, float, bool)):
                    self.constants[node] = meta[node]
        return meta

    def _add(self, node: fx.Node) -> None:
        translate = _TRANSLATORS.get(node.target)
        try:
            split = node.target in _SPLITS
            if translate is None or not (split or _is_plannable(self.meta[node])):
                raise Unsupported
            image = translate(self, node)
        except Unsupported:
            try:
                image = self._torch_op(node)
            except Unsupported:
                self._close()
                self.steps.append(TorchCall(node))
                return
        if image is not None:
            self.segment.images[node] = image
        self.segment.members.append(node)

    def _torch_op(self, node: fx.Node) -> Image:
        """An operator without a kernel as a step of the plan, where a CUDA graph can hold it."""
        operator_: Any = node.target
        operator_ = _OUT_OF_PLACE.get(operator_, operator_)
        random = torch.Tag.nondeterministic_seeded in getattr(operator_, "tags", ())
        if self.target.gpu is None or random or not _is_plannable(self.meta[node]):
            raise Unsupported

        def operand(source: fx.Node) -> Any:
            if source in self.constants:
                return self.constants[source]
            return View(self.image(source), self.shape(source))

        given = fx.map_arg((node.args, node.kwargs), operand)
        return self.emit(node, nodes.TorchOp(self.new(node), operator_, *given))

    def _close(self) -> None:
        segment, self.segment = self.segment, Segment()
        if segment.graph.nodes:
            self.steps.append(segment)
        else:  # nothing but other names for what went in
            self.steps += [TorchCall(node) for node in segment.members]

    def _find_outputs(self, output: Any) -> None:
        """What a segment hands out: what other segments, torch or the caller read."""
        segments = [step for step in self.steps if isinstance(step, Segment)]
        wanted: set[fx.Node] = set()
        fx.map_arg(output, wanted.add)
        for step in self.steps:
            wanted.update(step.inputs if isinstance(step, Segment) else step.node.all_input_nodes)
        for segment in segments:
            graph = segment.graph
            segment.outputs = [node for node in segment.members if node in wanted]
            for node in segment.outputs:
                image = self._output_image(segment, node)
                if image not in graph.outputs:
                    graph.outputs.append(image)
            # As they are handed out; in a GPU's own memory they may come to lie otherwise.
            segment.results = [(image, image.memory_strides()) for image in graph.outputs]
            read = {image.root()[0] for step in graph.nodes for image in step.reads()}
            pairs = list(zip(segment.inputs, graph.inputs, strict=True))
            segment.inputs = [node for node, image in pairs if image in read]
            graph.inputs = [image for image in graph.inputs if image in read]
            if self.target.gpu is not None:  # they lie in the plan's own memory
                for image, strides in segment.results if self.target.in_place else ():
                    image.strides = strides
                continue
            for number, image in enumerate((*graph.inputs, *graph.outputs)):
                image.strides = image.memory_strides()
                image.external = number

    def _output_image(self, segment: Segment, node: fx.Node) -> Image:
        """The image of ``node`` in memory that can be handed out."""
        image = segment.images[node]
        own = any(step.out is image for step in segment.graph.nodes)
        if own and image.parent is None:
            return image
        copy = Image(image.shape, image.dtype)
        step = nodes.Copy(copy, image, name=node.name, backend=self.target.backend)
        segment.graph.nodes.append(step)
        segment.images[node] = copy
        return copy

    # What translators use.

    def shape(self, node: Any) -> tuple[int, ...]:
        if not isinstance(node, fx.Node):
            raise Unsupported
        return tuple(self.meta[node].shape)

    def image(self, node: Any) -> Image:
        """The image of a value, which becomes an input of the segment if it is not made in it."""
        if not isinstance(node, fx.Node) or node in self.padded:
            raise Unsupported
        if node not in self.segment.images:
            value = self.meta[node]
            if not _is_plannable(value) or node in self.constants:
                raise Unsupported
            image = Image(_four(value.shape), value.dtype)
            if self.target.gpu is None:
                image.strides = (*value.stride(), 1, 1)[:4]
            self.segment.images[node] = image
            self.segment.inputs.append(node)
            self.segment.graph.inputs.append(image)
        return self.segment.images[node]

    def channels_last_image(self, node: Any) -> Image:
        image = self.image(node)
        if image.channels_adjacent():
            return image
        if len(self.shape(node)) != 4:
            raise Unsupported
        copy = self.emit(node, nodes.Copy(Image(image.shape, image.dtype), image))
        self.segment.images[node] = copy
        return copy

    def padded_image(self, node: fx.Node, padding: Sequence[int]) -> tuple[Image, tuple[int, ...]]:
        """A kernel's source and padding, with that of an ``aten.pad`` before it included."""
        source, (top, left, bottom, right) = self.padded.get(node, (node, (0, 0, 0, 0)))
        image = self.channels_last_image(source)
        if not (top or left or bottom or right):
            return image, tuple(padding)
        vertical, horizontal = padding
        all_sides = (top + vertical, left + horizontal, bottom + vertical, right + horizontal)
        return image, all_sides

    def new(self, node: fx.Node) -> Image:
        value = self.meta[node]
        return Image(_four(value.shape), value.dtype)

    def constant(self, node: Any) -> Any:
        if node is None:
            return None
        if not isinstance(node, fx.Node) or node not in self.constants:
            raise Unsupported
        return self.constants[node]

    def pack(self, node: fx.Node, make: Callable[[], Any]) -> Any:
        """What ``make`` packs for ``node``, once for all sizes."""
        if node not in self.packed:
            self.packed[node] = make()
        return self.packed[node]

    def prepack(self, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Packed:
        """A matrix as the target's pointwise kernels read it."""
        if self.target.gpu is None:
            return (prepack_pointwise(weight, bias, dtype=dtype),)
        return prepack_gpu(weight, bias, dtype)

    def packed_site(self, given: dict[str, Any]) -> Packed:
        """What lowering packed for a site, from the arguments of its kernel's call."""
        names = ("packed", "weight", "bias")
        return tuple(self.constant(given[name]) for name in names if name in given)

    def emit(self, node: fx.Node, step: nodes.Node, backend: str = "") -> Image:
        """Append a step, by the target's own backend if no other is named."""
        step.name = self.names.get(node, node.name)
        step.backend = backend or self.target.backend
        self.segment.graph.nodes.append(step)
        return step.out


def _without_memory(value: Any) -> Any:
    if not isinstance(value, Tensor) or value.is_mkldnn:
        return value
    return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")


def _onednn_result(x: Tensor, weight: OneDnnWeight, *rest: Any) -> Tensor:
    del rest
    shape = weight.output_shape(x.shape)
    return torch.empty(shape, dtype=x.dtype, device="meta", memory_format=torch.channels_last)


def _is_plannable(value: Any) -> bool:
    return (
        isinstance(value, Tensor)
        and value.dtype in KERNEL_DTYPES
        and value.dim() in (2, 4)
        and value.numel() > 0
    )


def _four(shape: Sequence[int]) -> tuple[int, int, int, int]:
    n, c, h, w = (*shape, 1, 1)[:4]
    return n, c, h, w


_Translator = Callable[[_Flattener, fx.Node], "Image | None"]
_TRANSLATORS: dict[Any, _Translator] = {}


def _translates(*targets: Any) -> Callable[[_Translator], _Translator]:
    def register(translate: _Translator) -> _Translator:
        for target in targets:
            _TRANSLATORS[target] = translate
        return translate

    return register


def _arguments(node: fx.Node) -> list[Any]:
    """All arguments of an operator, defaults filled in."""
    return list(operators.arguments(node).values())


def _backend(node: fx.Node) -> str:
    return operators.split_name(node.target)[1]


def _pair(values: Sequence[int]) -> tuple[int, int]:
    return int(values[0]), int(values[-1])


@_translates(*operators.operators("pointwise"))
def _pointwise(f: _Flattener, node: fx.Node) -> Image:
    given = operators.arguments(node)
    if any(given[name] is not None for name in ("gate", "scale", "shift")):
        raise Unsupported
    image, residual = f.channels_last_image(given["x"]), given["residual"]
    added = None if residual is None else f.channels_last_image(residual)
    step = nodes.Pointwise(
        f.new(node), image, f.packed_site(given), _pair(given["stride"]), residual=added,
        activation=given["activation"],
    )  # fmt: skip
    return f.emit(node, step, _backend(node))


@_translates(*operators.operators("conv"))
def _conv(f: _Flattener, node: fx.Node) -> Image:
    given = operators.arguments(node)
    if given["x2"] is not None:
        raise Unsupported
    image, sides = f.padded_image(given["x"], given["padding"])
    residual = given["residual"]
    added = None if residual is None else f.channels_last_image(residual)
    step = nodes.Conv(
        f.new(node), image, f.packed_site(given), added, None, _pair(given["kernel_size"]),
        _pair(given["stride"]), sides, _pair(given["dilation"]), given["activation"],
    )  # fmt: skip
    return f.emit(node, step, _backend(node))


@_translates(*operators.operators("depthwise"))
def _depthwise(f: _Flattener, node: fx.Node) -> Image:
    x, packed, kernel, stride, padding, dilation, activation = _arguments(node)
    image, sides = f.padded_image(x, padding)
    step = nodes.Depthwise(
        f.new(node), image, f.constant(packed), _pair(kernel), _pair(stride), sides,
        _pair(dilation), activation,
    )  # fmt: skip
    return f.emit(node, step, _backend(node))


@_translates(channels_last, channels_innermost)
def _to_channels_last(f: _Flattener, node: fx.Node) -> Image | None:
    source: Any = node.args[0]
    if source in f.padded:
        f.padded[node] = f.padded[source]
        return None
    return f.channels_last_image(source)


@_translates(restore_layout)
def _restore_layout(f: _Flattener, node: fx.Node) -> Image:
    given: Any = node.args
    image, like = f.image(given[0]), f.meta[given[1]]
    contiguous = like.is_contiguous() or not is_channels_last(like)
    if contiguous and image.channels_adjacent() and image.channels > 1:
        copy = f.new(node)
        _, c, h, w = copy.shape
        copy.strides = (c * h * w, h * w, w, 1)
        return f.emit(node, nodes.Copy(copy, image))
    return image


@_translates(aten.pad.default, aten.constant_pad_nd.default)
def _pad(f: _Flattener, node: fx.Node) -> None:
    x, pads, *how = _arguments(node)
    mode, value = how if node.target is aten.pad.default else ("constant", *how)
    pads = [f.constants[p] if isinstance(p, fx.Node) else p for p in pads]
    readers = list(node.users)
    while any(user.target in (channels_last, channels_innermost) for user in readers):
        readers = [
            after
            for user in readers
            for after in (
                user.users if user.target in (channels_last, channels_innermost) else (user,)
            )
        ]
    f.image(x)
    if (
        mode != "constant"
        or value not in (None, 0, 0.0)
        or len(pads) != 4
        or min(pads) < 0
        or not readers
        or any(user.target not in _PADDING_KERNELS for user in readers)
        or x in f.padded
    ):
        raise Unsupported
    left, right, top, bottom = pads
    f.padded[node] = (x, (top, left, bottom, right))


_PADDING_KERNELS = {*operators.operators("conv"), *operators.operators("depthwise")}


@_translates(activate_)
def _activate(f: _Flattener, node: fx.Node) -> Image:
    given: Any = node.args
    x, name = given[:2]
    if name not in ELEMENTWISE_ACTIVATIONS:
        raise Unsupported
    return f.emit(node, nodes.Elementwise(f.new(node), f.channels_last_image(x), activation=name))


def _activation(f: _Flattener, node: fx.Node) -> Image:
    found = read_activation(node, _OUT_OF_PLACE.get(node.target))
    if found is None or found.name not in ELEMENTWISE_ACTIVATIONS:
        raise Unsupported
    image = f.channels_last_image(node.args[0])
    return f.emit(node, nodes.Elementwise(f.new(node), image, activation=found.name))


_OUT_OF_PLACE: dict[Any, Any] = {
    getattr(aten, f"{name}_").default: getattr(aten, name).default
    for name in (
        "relu", "relu6", "hardtanh", "hardswish", "hardsigmoid", "sigmoid", "silu", "clamp",
    )
}  # fmt: skip
for _target in (*_OUT_OF_PLACE, *_OUT_OF_PLACE.values()):
    _TRANSLATORS[_target] = _activation


@_translates(aten.add.Tensor, aten.mul.Tensor, aten.add_.Tensor, aten.mul_.Tensor)
def _binary(f: _Flattener, node: fx.Node) -> Image:
    left, right, *alpha = _arguments(node)
    op = "add" if "add" in str(node.target) else "mul"
    if alpha and alpha[0] != 1:
        raise Unsupported
    shape = f.shape(node)
    if len(shape) != 4 or len(f.shape(left)) != 4 or len(f.shape(right)) != 4:
        raise Unsupported
    if f.shape(left) != shape:
        left, right = right, left
    gate = (shape[0], shape[1], 1, 1)
    if f.shape(left) != shape or f.shape(right) not in (shape, gate):
        raise Unsupported
    if f.meta[left].dtype != f.meta[node].dtype or f.meta[right].dtype != f.meta[node].dtype:
        raise Unsupported
    x, y = f.channels_last_image(left), f.channels_last_image(right)
    return f.emit(node, nodes.Elementwise(f.new(node), x, y, op))


@_translates(aten.cat.default)
def _concat(f: _Flattener, node: fx.Node) -> Image:
    parts, dim = _arguments(node)
    shapes = [f.shape(part) for part in parts]
    rank = len(shapes[0])
    if dim % rank != 1 or any(len(s) != rank for s in shapes):
        raise Unsupported
    if any(f.meta[part].dtype != f.meta[node].dtype for part in parts):
        raise Unsupported
    images = [f.channels_last_image(part) for part in parts]
    return f.emit(node, nodes.Concat(f.new(node), images))


@_translates(aten.batch_norm.default)
def _batch_norm(f: _Flattener, node: fx.Node) -> Image:
    x, *constants, training, _, eps, _ = _arguments(node)
    if training or len(f.shape(x)) != 4:
        raise Unsupported
    weight, bias, mean, var = (f.constant(c) for c in constants)
    if mean is None or var is None:
        raise Unsupported

    def fold() -> tuple[Tensor, Tensor]:
        scale = (var.double() + eps).rsqrt()
        if weight is not None:
            scale = scale * weight.double()
        shift = -mean.double() * scale
        if bias is not None:
            shift = shift + bias.double()
        return scale.float(), shift.float()

    image = f.channels_last_image(x)
    scale, shift = f.pack(node, fold)
    return f.emit(node, nodes.Elementwise(f.new(node), image, scale=scale, shift=shift))


@_translates(aten.max_pool2d.default)
def _max_pool(f: _Flattener, node: fx.Node) -> Image:
    x, kernel, stride, padding, dilation, ceil_mode = _arguments(node)
    step = nodes.Pool(
        f.new(node), f.channels_last_image(x), "max", _pair(kernel), _pair(stride or kernel),
        _pair(padding), _pair(dilation), ceil_mode,
    )  # fmt: skip
    return f.emit(node, step)


@_translates(aten.avg_pool2d.default)
def _avg_pool(f: _Flattener, node: fx.Node) -> Image:
    x, kernel, stride, padding, ceil_mode, count_include_pad, divisor = _arguments(node)
    step = nodes.Pool(
        f.new(node), f.channels_last_image(x), "avg", _pair(kernel), _pair(stride or kernel),
        _pair(padding), ceil_mode=ceil_mode, count_include_pad=count_include_pad,
        divisor_override=divisor,
    )  # fmt: skip
    return f.emit(node, step)


@_translates(aten.adaptive_avg_pool2d.default)
def _global_pool(f: _Flattener, node: fx.Node) -> Image:
    if f.shape(node)[2:] != (1, 1) or len(f.shape(node)) != 4:
        raise Unsupported
    return f.emit(node, nodes.GlobalPool(f.new(node), f.channels_last_image(node.args[0])))


@_translates(aten.mean.dim)
def _mean(f: _Flattener, node: fx.Node) -> Image:
    x, dims, _, dtype = _arguments(node)
    if len(f.shape(x)) != 4 or dtype not in (None, f.meta[x].dtype):
        raise Unsupported
    if sorted(d % 4 for d in dims) != [2, 3]:
        raise Unsupported
    return f.emit(node, nodes.GlobalPool(f.new(node), f.channels_last_image(x)))


@_translates(
    aten.flatten.using_ints, aten.reshape.default, aten.squeeze.default, aten.squeeze.dim,
    aten.squeeze.dims, aten.unsqueeze.default,
)  # fmt: skip
def _other_name(f: _Flattener, node: fx.Node) -> Image:
    """Shapes that differ in single pixels only."""
    before, after = f.shape(node.args[0]), f.shape(node)
    if len(before) not in (2, 4) or _four(before) != _four(after):
        raise Unsupported
    return f.channels_last_image(node.args[0])


@_translates(aten.slice.Tensor)
def _slice(f: _Flattener, node: fx.Node) -> Image:
    x, dim, start, _, step = _arguments(node)
    if f.shape(x) == f.shape(node):
        return f.channels_last_image(x)
    if dim != 1 or step != 1 or len(f.shape(x)) != 4:
        raise Unsupported
    begin = start or 0
    if not isinstance(begin, int):
        raise Unsupported
    image = f.channels_last_image(x)
    begin = min(max(begin + image.channels if begin < 0 else begin, 0), image.channels)
    part = f.new(node)
    part.parent, part.channel = image, begin
    return part


@_translates(aten.linear.default)
def _linear(f: _Flattener, node: fx.Node) -> Image:
    x, weight, bias = _arguments(node)
    if len(f.shape(x)) != 2:
        raise Unsupported
    weights, biases = f.constant(weight), f.constant(bias)
    dtype = f.meta[node].dtype
    if weights.dtype != dtype:
        raise Unsupported
    image = f.channels_last_image(x)
    packed = f.pack(node, lambda: f.prepack(weights, biases, dtype))
    return f.emit(node, nodes.Pointwise(f.new(node), image, packed))


@_translates(aten.conv_transpose2d.input)
def _transposed(f: _Flattener, node: fx.Node) -> Image:
    x, weight, bias, stride, padding, output_padding, groups, dilation = _arguments(node)
    weights, biases = f.constant(weight), f.constant(bias)
    dtype = f.meta[node].dtype
    kernel = tuple(weights.shape[2:])
    if (
        _pair(stride) != kernel
        or _pair(padding) != (0, 0)
        or _pair(output_padding) != (0, 0)
        or groups != 1
        or prod(_pair(dilation)) != 1
        or weights.dtype != dtype
        or len(f.shape(node)) != 4
    ):
        raise Unsupported
    image = f.channels_last_image(x)

    def pack() -> list[Packed]:
        if f.target.gpu is not None:
            return [prepack_upconv(weights, biases, dtype)]
        return [
            f.prepack(weights[:, :, r, c].t().contiguous(), biases, dtype)
            for r in range(kernel[0])
            for c in range(kernel[1])
        ]

    step = nodes.TransposedConv(f.new(node), image, f.pack(node, pack), kernel)
    return f.emit(node, step)


_SPLITS = {aten.split.Tensor, aten.split_with_sizes.default, aten.chunk.default}


@_translates(*_SPLITS)
def _split(f: _Flattener, node: fx.Node) -> None:
    x, _, dim = _arguments(node)
    if dim != 1 or not _is_plannable(f.meta[x]):
        raise Unsupported
    if any(user.target is not operator.getitem for user in node.users):
        raise Unsupported
    f.channels_last_image(x)


@_translates(operator.getitem)
def _getitem(f: _Flattener, node: fx.Node) -> Image:
    """A part of an image that was split along the channels."""
    split, index = node.args
    if not isinstance(split, fx.Node) or split.target not in _SPLITS:
        raise Unsupported
    part = f.new(node)
    part.parent = f.channels_last_image(split.args[0])
    part.channel = sum(piece.shape[1] for piece in f.meta[split][:index])
    return part
