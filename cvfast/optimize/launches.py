"""Launches: the GPU kernels that one run of a program starts, counted from its graph."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor, fx

from cvfast.launch import table
from cvfast.launch.depthwise import Problem
from cvfast.launch.depthwise import cuda as cuda_depthwise
from cvfast.launch.depthwise import triton as triton_depthwise
from cvfast.ops.activation import activate_
from cvfast.ops.conv import bytes_moved as conv_bytes
from cvfast.ops.conv import conv_torch
from cvfast.ops.conv import flops as conv_flops
from cvfast.ops.depthwise import bytes_moved as depthwise_bytes
from cvfast.ops.depthwise import flops as depthwise_flops
from cvfast.ops.depthwise import prepacked_op
from cvfast.ops.layout import channels_innermost, channels_last, restore_layout
from cvfast.perf.devices import Device

from .capture import hint, shape_hint
from .lower import Program

_DEPTHWISE = {prepacked_op(backend): backend for backend in ("triton", "cuda")}
_PARAMETERS = {"triton": triton_depthwise, "cuda": cuda_depthwise}


@dataclass(frozen=True)
class Launch:
    """One kernel on the GPU, for the example inputs.

    Attributes:
        module: qualified name of the site it belongs to; empty outside of sites.
        kernel: "depthwise/cuda", or what PyTorch runs: "aten::add", "cudnn::conv".
        config: launch parameters, where the kernel is cvfast's.
        grid: thread blocks, where the kernel is cvfast's.
        bytes: moved at least: each input read once, the output written once.
        flops: of convolutions and linear layers, a multiply-add counted as two.
    """

    module: str
    kernel: str
    bytes: int
    flops: int = 0
    config: str = ""
    grid: tuple[int, int, int] | None = None

    def roof(self, device: Device) -> float:
        """Seconds that the bytes take at `device`'s memory bandwidth."""
        return self.bytes / device.dram_bandwidth


def launches(program: Program, device: Device) -> list[Launch]:
    """What one run of ``program`` starts on ``device``, in order.

    An operator of PyTorch counts as one kernel, a convolution's bias, addition and activation as
    one each, as PyTorch runs them; views count as none. Conversions of layout count only where they
    are certain.
    """
    names = {site.result: site.row.module for site in program.sites}
    return [
        launch
        for node in program.module.graph.nodes
        if node.op == "call_function"
        for launch in _of_node(node, names.get(node, ""), program.module, device)
    ]


def _of_node(
    node: fx.Node, module: str, constants: fx.GraphModule, device: Device
) -> Iterator[Launch]:
    target: Any = node.target
    if target in _DEPTHWISE:
        yield _depthwise(node, module, _DEPTHWISE[target], device)
    elif target is conv_torch:
        yield from _convolution(node, module, constants)
    elif target is activate_:
        yield Launch(module, f"aten::{node.args[1]}_", 2 * _bytes(node))
    elif target is channels_last or (target is channels_innermost and _converts(node)):
        yield Launch(module, "layout copy", 2 * _bytes(node))
    elif target not in (channels_innermost, restore_layout) and not _is_free(node):
        read = sum(_bytes(source) for source in node.all_input_nodes)
        yield Launch(module, _name(target), read + _bytes(node), _flops(node))


def _depthwise(node: fx.Node, module: str, backend: str, device: Device) -> Launch:
    arguments: Any = node.args
    x, _packed, kernel, stride, padding, dilation, _activation = arguments
    n, c, h, w = shape_hint(x)
    out = shape_hint(node)
    problem = Problem(
        n, c, h, w, tuple(kernel), tuple(stride), tuple(padding), tuple(dilation),
        multiplier=out[1] // c, dtype=node.meta["val"].dtype,
    )  # fmt: skip
    launch = table.choose("depthwise", backend, problem, "forward", device)
    return Launch(
        module,
        f"depthwise/{backend}",
        depthwise_bytes((n, c, h, w), kernel, out, problem.dtype),
        depthwise_flops(kernel, out),
        str(launch),
        _PARAMETERS[backend].grid(problem, launch, "forward"),
    )


def _convolution(node: fx.Node, module: str, constants: fx.GraphModule) -> Iterator[Launch]:
    arguments: Any = node.args
    x, weight, bias, residual, *_, activation, _parameters = arguments
    out, itemsize = shape_hint(node), node.meta["val"].dtype.itemsize
    weight_shape = getattr(constants, weight.target).shape
    size = prod(out) * itemsize
    moved = conv_bytes(shape_hint(x), weight_shape, out, itemsize)
    yield Launch(module, "cudnn::conv", moved, conv_flops(shape_hint(x), weight_shape, out))
    if getattr(constants, bias.target) is not None:
        yield Launch(module, "aten::add_ (bias)", 2 * size)
    if residual is not None:
        yield Launch(module, "aten::add_", 3 * size)
    if activation != "none":
        yield Launch(module, f"aten::{activation}_", 2 * size)


def _converts(node: fx.Node) -> bool:
    """Whether the node certainly changes a layout: that of one of the program's inputs."""
    source = node.args[0]
    assert isinstance(source, fx.Node)
    if source.op != "placeholder" or shape_hint(source)[1] == 1:
        return False
    return hint(source.meta["val"].stride(1)) != 1


def _is_free(node: fx.Node) -> bool:
    """Whether the node computes no tensor of its own: views, sizes, elements of tuples."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return True
    if node.target in (operator.getitem,) or not _tensors(node):
        return True
    schema = node.target._schema
    return any(r.alias_info is not None and not r.alias_info.is_write for r in schema.returns)


def _name(target: Any) -> str:
    return str(target._schema.name)


def _flops(node: fx.Node) -> int:
    """Of an operator that the program took over as it was."""
    aten = torch.ops.aten
    if node.target not in (aten.linear.default, aten.conv2d.default):
        return 0
    source, weight = node.args[:2]
    assert isinstance(source, fx.Node) and isinstance(weight, fx.Node)
    if node.target is aten.conv2d.default:
        return conv_flops(shape_hint(source), shape_hint(weight), shape_hint(node))
    return 2 * prod(shape_hint(node)) * shape_hint(weight)[1]


def _tensors(node: fx.Node) -> list[Tensor]:
    value = node.meta.get("val")
    values = value if isinstance(value, list | tuple) else [value]
    return [v for v in values if isinstance(v, Tensor)]


def _bytes(node: fx.Node) -> int:
    return sum(prod(map(hint, t.shape)) * t.dtype.itemsize for t in _tensors(node))
