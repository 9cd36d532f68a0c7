"""Launches: the GPU kernels that one run starts, counted from plans and from graphs."""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import import_module
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx

from cvfast.engine.gpu import GpuPlan
from cvfast.engine.nodes import Call, Copy, Node, TorchOp
from cvfast.launch import table
from cvfast.ops.activation import activate_
from cvfast.ops.conv import bytes_moved as conv_bytes
from cvfast.ops.conv import conv_torch
from cvfast.ops.conv import flops as conv_flops
from cvfast.ops.layout import channels_innermost, channels_last, restore_layout
from cvfast.perf.devices import Device

from . import operators
from .capture import Capture, hint
from .flatten import PlannedCall, Schedule
from .lower import Program
from .match import CONV2D

aten = torch.ops.aten

CONCAT = "aten::cat"
CONCAT_COPY = "copy_layout/concat"
"""What joins images: PyTorch's operator, and a plan's copy of a part that lies elsewhere."""


@dataclass(frozen=True)
class Launch:
    """One kernel on the GPU, for the example inputs.

    Attributes:
        module: qualified name of the module it comes from; empty where there is none.
        kernel: "depthwise/cuda", or what PyTorch runs: "aten::add", "cudnn::conv".
        bytes: moved at least: each input read once, the output written once.
        flops: of convolutions and linear layers, a multiply-add counted as two.
        shape: what it computes, in words.
        config: launch parameters, where the kernel is cvfast's.
        grid: thread blocks, where the kernel is cvfast's.
        dtype: of what it computes, such as "float16".
    """

    module: str
    kernel: str
    bytes: int
    flops: int = 0
    shape: str = ""
    config: str = ""
    grid: tuple[int, ...] | None = None
    dtype: str = "float32"

    def roof(self, device: Device) -> float:
        """Seconds that `device` takes at least, by its memory's bandwidth and its matrix units."""
        rate = device.matrix_flops(getattr(torch, self.dtype))
        return max(self.bytes / device.dram_bandwidth, self.flops / rate)


def launches(program: Program, schedule: Schedule | None, device: Device) -> list[Launch]:
    """What one run of ``program`` starts on ``device``, in order.

    ``schedule`` is its plans, in any memory; without one the program runs operator by operator.
    Operators of PyTorch count as in :func:`eager_launches`.
    """
    if schedule is None:
        return list(_of_graph(program.module.graph, program.names, program.module))
    found: list[Launch] = []
    for step in schedule.steps:
        if isinstance(step, PlannedCall):
            found += _of_plan(step, device)
        else:
            found += _of_node(step.node, program.names.get(step.node, ""), program.module)
    return found


def eager_launches(capture: Capture) -> list[Launch]:
    """What PyTorch starts to run the captured network, operator by operator.

    An operator counts as one kernel, a convolution's bias as another; views count as none.
    Conversions of layout count only where they are certain.
    """
    wanted = [node for node in capture.graph.nodes if node not in capture.constant_nodes]
    return list(_of_graph(capture.graph, capture.owners, None, wanted))


def _of_plan(step: PlannedCall, device: Device) -> Iterator[Launch]:
    plan = step.plan
    assert isinstance(plan, GpuPlan)
    for image in plan.graph.inputs:
        yield Launch("", "copy in", 2 * image.bytes, dtype=_name(image.dtype))
    for node, call in plan.calls():
        yield from _of_call(node, call, device)
    for image in plan.graph.outputs:
        yield Launch("", "copy out", 2 * image.bytes, dtype=_name(image.dtype))


def _of_call(node: Node, call: Call, device: Device) -> Iterator[Launch]:
    if isinstance(node, TorchOp):
        target, arguments, _ = call.arguments
        out = call.outputs["out"]
        yield from _of_torch(node.name, target, arguments, out)
        yield Launch(node.name, "aten::copy_", 2 * _bytes(out), dtype=_name(out.dtype))
        return
    op, backend = operators.split_name(call.operator)
    home = _HOMES.get(op, _Home(op, "problem", op))
    make = getattr(import_module(f"cvfast.ops.{home.module}"), home.function)
    problem = make(*call.arguments, **call.outputs)
    launch = table.choose(home.launch, backend, problem, "forward", device)
    joins = isinstance(node, Copy) and node.is_part
    yield Launch(
        node.name,
        CONCAT_COPY if joins else f"{op}/{backend}",
        problem.bytes(),
        problem.flops(),
        problem.describe(),
        str(launch),
        table.parameters(home.launch, backend).grid(problem, launch, "forward"),
        _name(problem.dtype),
    )


class _Home(NamedTuple):
    """Where an operator's geometry is: the module of cvfast.ops, the function there that turns the
    arguments of the out-variant into a problem, and the package of cvfast.launch."""

    module: str
    function: str
    launch: str


_HOMES = {
    "global_pool": _Home("pool", "global_problem", "global_pool"),
    "copy_layout": _Home("layout", "copy_layout_problem", "copy_layout"),
    "inverted_residual_squeeze": _Home("inverted_residual", "squeeze_problem", "inverted_residual"),
}
"""Of operators that do not have all of it under their own name."""


def _of_graph(
    graph: fx.Graph,
    names: dict[fx.Node, str],
    constants: fx.GraphModule | None,
    nodes: Sequence[fx.Node] | None = None,
) -> Iterator[Launch]:
    for node in graph.nodes if nodes is None else nodes:
        if node.op == "call_function":
            yield from _of_node(node, names.get(node, ""), constants)


def _of_node(node: fx.Node, module: str, constants: fx.GraphModule | None) -> Iterator[Launch]:
    target: Any = node.target
    result = node.meta.get("val")
    if target is channels_last or (target is channels_innermost and _converts(node)):
        yield Launch(module, "layout copy", 2 * _bytes(result), dtype=_dtype(result))
    elif target not in (channels_last, channels_innermost, restore_layout):

        def value(source: fx.Node) -> Any:
            if source.op == "get_attr" and constants is not None:
                return getattr(constants, str(source.target))
            return source.meta.get("val")

        yield from _of_torch(module, target, fx.map_arg(node.args, value), result)


def _of_torch(
    module: str, target: Any, arguments: tuple[Any, ...], result: Any
) -> Iterator[Launch]:
    """The kernels that PyTorch runs for one operator."""
    if target is conv_torch:
        x, weight, bias, residual, *_, activation, _parameters = arguments
        yield from _convolution(module, x, weight, bias, result, residual, activation)
    elif target in CONV2D:
        x, weight, bias = (*arguments[:3], None)[:3]
        yield from _convolution(module, x, weight, bias, result)
    elif target is activate_:
        name = f"aten::{arguments[1]}_"
        yield Launch(module, name, 2 * _bytes(result), dtype=_dtype(result))
    elif not _is_free(target, arguments, result):
        moved = _bytes(arguments) + _bytes(result)
        kernel = str(target._schema.name)
        shape = " ".join("x".join(map(str, s)) for s in _shapes(arguments)[:2])
        yield Launch(
            module, kernel, moved, _flops(target, arguments, result), shape, dtype=_dtype(result)
        )


def _convolution(
    module: str,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    result: Tensor,
    residual: Tensor | None = None,
    activation: str = "none",
) -> Iterator[Launch]:
    dtype, size = _dtype(result), _bytes(result)
    x_shape, weight_shape, out_shape = _shapes((x, weight, result))
    yield Launch(
        module,
        "cudnn::conv",
        conv_bytes(x_shape, weight_shape, out_shape, result.dtype.itemsize),
        conv_flops(x_shape, weight_shape, out_shape),
        f"{'x'.join(map(str, x_shape))} {'x'.join(map(str, weight_shape))}",
        dtype=dtype,
    )
    if bias is not None:
        yield Launch(module, "aten::add_ (bias)", 2 * size, dtype=dtype)
    if residual is not None:
        yield Launch(module, "aten::add_", 3 * size, dtype=dtype)
    if activation != "none":
        yield Launch(module, f"aten::{activation}_", 2 * size, dtype=dtype)


def _converts(node: fx.Node) -> bool:
    """Whether the node certainly changes a layout: that of one of the program's inputs."""
    source = node.args[0]
    assert isinstance(source, fx.Node)
    value = source.meta["val"]
    if source.op != "placeholder" or hint(value.shape[1]) == 1:
        return False
    return hint(value.stride(1)) != 1


def _is_free(target: Any, arguments: tuple[Any, ...], result: Any) -> bool:
    """Whether an operator computes no tensor of its own: views, sizes, elements of tuples."""
    if not isinstance(target, torch._ops.OpOverload):
        return True
    if target is operator.getitem or not _tensors(result):
        return True
    if target is aten.dropout.default and not arguments[2]:
        return True
    returns = target._schema.returns
    return any(r.alias_info is not None and not r.alias_info.is_write for r in returns)


def _flops(target: Any, arguments: tuple[Any, ...], result: Any) -> int:
    if target not in (aten.linear.default, aten.conv_transpose2d.input):
        return 0
    x, weight = arguments[:2]
    if target is aten.linear.default:
        return 2 * prod(map(hint, result.shape)) * hint(weight.shape[1])
    return 2 * prod(map(hint, x.shape)) * prod(map(hint, weight.shape[1:]))


def _tensors(values: Any) -> list[Tensor]:
    if isinstance(values, Tensor):
        return [values]
    if isinstance(values, (list, tuple)):
        return [tensor for value in values for tensor in _tensors(value)]
    return []


def _shapes(values: Any) -> list[tuple[int, ...]]:
    return [tuple(map(hint, t.shape)) for t in _tensors(values)]


def _bytes(values: Any) -> int:
    return sum(prod(map(hint, t.shape)) * t.dtype.itemsize for t in _tensors(values))


def _dtype(values: Any) -> str:
    return _name(next((t.dtype for t in _tensors(values)), torch.float32))


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
