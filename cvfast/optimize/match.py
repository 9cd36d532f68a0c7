"""Match: finds convolution sites (convolution, batch norm, addition, activation) in a captured
graph.

A step joins a site only if the value before it has no other reader, so a convolution that is used
twice, a batch norm behind two convolutions or an output that is read again each keep their own
arithmetic.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from cvfast.ops.activation import NONE, Activation

from .capture import Capture, shape_hint

aten = torch.ops.aten

CONV2D = {aten.conv2d.default, aten.conv2d.padding}

OTHER_CONVOLUTIONS = {
    aten.conv1d.default,
    aten.conv1d.padding,
    aten.conv3d.default,
    aten.conv3d.padding,
    aten.conv_transpose1d.default,
    aten.conv_transpose2d.input,
    aten.conv_transpose3d.input,
}


@dataclass(frozen=True)
class Geometry:
    """Hyper-parameters of a convolution, each (vertical, horizontal)."""

    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    groups: int


@dataclass(frozen=True)
class BatchNorm:
    """A batch norm at inference: its node and the constants it reads."""

    node: fx.Node
    weight: fx.Node | None
    bias: fx.Node | None
    mean: fx.Node
    var: fx.Node
    eps: float


@dataclass
class Site:
    """A convolution and what follows it, to be computed by one kernel call.

    ``last`` is the node whose value the call yields; ``absorbed`` are the elementwise steps from
    the convolution (excluded) to ``last``. ``skip`` says why the site must stay as it is.
    """

    module: str
    conv: fx.Node
    geometry: Geometry
    source: fx.Node
    weight: fx.Node
    bias: fx.Node | None
    batch_norm: BatchNorm | None = None
    residual: fx.Node | None = None
    activation: Activation = NONE
    absorbed: tuple[fx.Node, ...] = ()
    skip: tuple[str, str] | None = None

    @property
    def last(self) -> fx.Node:
        return self.absorbed[-1] if self.absorbed else self.conv

    @property
    def dtype(self) -> torch.dtype:
        dtype: torch.dtype = self.conv.meta["val"].dtype
        return dtype

    @property
    def device(self) -> torch.device:
        device: torch.device = self.conv.meta["val"].device
        return device

    @property
    def constants(self) -> list[fx.Node]:
        """What the site's packed weights are computed from."""
        nodes = [self.weight, self.bias]
        if (norm := self.batch_norm) is not None:
            nodes += [norm.weight, norm.bias, norm.mean, norm.var]
        return [node for node in nodes if node is not None]

    @property
    def is_depthwise(self) -> bool:
        """One input channel per group (with any depth multiplier)."""
        return self.geometry.groups > 1 and self.geometry.groups == shape_hint(self.source)[1]

    @property
    def is_pointwise(self) -> bool:
        """A 1x1 convolution without groups or padding, of any stride."""
        geometry = self.geometry
        return geometry.kernel == (1, 1) and geometry.padding == (0, 0) and geometry.groups == 1

    @property
    def pattern(self) -> str:
        """For the report: ``depthwise+bn+relu6``."""
        parts = ["depthwise" if self.is_depthwise else "conv"]
        if self.batch_norm is not None:
            parts.append("bn")
        if self.residual is not None:
            parts.append("add")
        if self.activation:
            parts.append(self.activation.name)
        return "+".join(parts)


@dataclass(frozen=True)
class Leftover:
    """An operator of interest that no site takes, and why."""

    module: str
    pattern: str
    reason: str
    detail: str
    node: fx.Node


def find_sites(capture: Capture) -> tuple[list[Site], list[Leftover]]:
    """All 2-D convolutions of the graph as sites, and the operators that stay outside them."""
    taken: set[fx.Node] = set()
    sites: list[Site] = []
    order = {node: i for i, node in enumerate(capture.graph.nodes)}
    for node in capture.graph.nodes:
        if _is_site(node) and node not in capture.constant_nodes:
            site = _grow(capture, node, taken, order)
            taken.update(site.absorbed)
            sites.append(site)
    leftovers = [
        leftover
        for node in capture.graph.nodes
        if node not in taken and node not in capture.constant_nodes
        if (leftover := _leftover(capture, node)) is not None
    ]
    return sites, leftovers


def _is_site(node: fx.Node) -> bool:
    """Whether ``node`` is a 2-D convolution of a batch; ``conv2d`` also takes a single image."""
    return node.target in CONV2D and len(shape_hint(_node(node.args[0]))) == 4


def _grow(capture: Capture, conv: fx.Node, taken: set[fx.Node], order: dict[fx.Node, int]) -> Site:
    source, weight, bias = _node(conv.args[0]), _node(conv.args[1]), _argument(conv, 2)
    site = Site(capture.owners[conv], conv, _geometry(conv), source, weight, bias)
    if not capture.constant_nodes.issuperset(site.constants):
        site.skip = ("dynamic_weight", "the weight is computed from the input")
        return site
    if _uneven(conv, site.geometry):
        site.skip = ("no_kernel", 'padding="same" with this kernel pads the two sides unevenly')
        return site
    absorbed: list[fx.Node] = []

    def next_step() -> fx.Node | None:
        value = absorbed[-1] if absorbed else conv
        users = list(value.users)
        alone = len(users) == 1 and users[0].op == "call_function" and users[0] not in taken
        return users[0] if alone else None

    step = next_step()
    if step is not None:
        site.batch_norm = _batch_norm(capture, step, conv)
        if site.batch_norm is not None:
            absorbed.append(step)
            step = next_step()
    if step is not None and not site.is_depthwise:
        residual = _residual(step, absorbed[-1] if absorbed else conv)
        if (
            residual is not None
            and residual not in capture.constant_nodes
            and order[residual] < order[step]
        ):
            site.residual = residual
            absorbed.append(step)
            step = next_step()
    if step is not None:
        activation = read_activation(step)
        if activation is not None:
            site.activation = activation
            absorbed.append(step)
    site.absorbed = tuple(absorbed)
    return site


def read_activation(node: fx.Node, target: Any = None) -> Activation | None:
    """The activation that ``node`` applies to its first argument, or None. ``target`` replaces an
    operator that works in place."""
    if not isinstance(node.args[0] if node.args else None, fx.Node):
        return None
    target = target or node.target
    if target is aten.hardtanh.default:
        low, high = _argument(node, 1, -1.0), _argument(node, 2, 1.0)
        return Activation("relu6") if (low, high) == (0, 6) else None
    if target is aten.clamp.default:
        low, high = _argument(node, 1), _argument(node, 2)
        return {(0, 6): Activation("relu6"), (0, None): Activation("relu")}.get((low, high))
    if target is aten.leaky_relu.default:
        return Activation("leaky_relu", (float(_argument(node, 1, 0.01)),))
    if target is aten.gelu.default:
        return Activation("gelu", (str(node.kwargs.get("approximate", "none")),))
    return _PLAIN_ACTIVATIONS.get(target)


_PLAIN_ACTIVATIONS: dict[Any, Activation] = {
    aten.relu.default: Activation("relu"),
    aten.relu6.default: Activation("relu6"),
    aten.hardswish.default: Activation("hardswish"),
    aten.hardsigmoid.default: Activation("hardsigmoid"),
    aten.silu.default: Activation("silu"),
    aten.sigmoid.default: Activation("sigmoid"),
    aten.tanh.default: Activation("tanh"),
}


def _node(value: Any) -> fx.Node:
    assert isinstance(value, fx.Node)
    return value


def _argument(node: fx.Node, index: int, default: Any = None) -> Any:
    """Argument ``index`` of an operator call by its schema, positional or keyword."""
    if len(node.args) > index:
        return node.args[index]
    name = node.target._schema.arguments[index].name  # type: ignore[union-attr]
    return node.kwargs.get(name, default)


def _pair(value: Sequence[int]) -> tuple[int, int]:
    return (value[0], value[-1])


def _geometry(conv: fx.Node) -> Geometry:
    kernel = shape_hint(_node(conv.args[1]))[2:]
    stride = _pair(_argument(conv, 3, (1, 1)))
    dilation = _pair(_argument(conv, 5, (1, 1)))
    padding = _argument(conv, 4, (0, 0))
    if padding == "valid":
        padding = (0, 0)
    elif padding == "same":
        padding = tuple(d * (k - 1) // 2 for k, d in zip(kernel, dilation, strict=True))
    return Geometry(_pair(kernel), stride, _pair(padding), dilation, _argument(conv, 6, 1))


def _uneven(conv: fx.Node, geometry: Geometry) -> bool:
    reach = (d * (k - 1) for k, d in zip(geometry.kernel, geometry.dilation, strict=True))
    return _argument(conv, 4) == "same" and any(r % 2 for r in reach)


def _batch_norm(capture: Capture, node: fx.Node, value: fx.Node) -> BatchNorm | None:
    """``node`` as a batch norm of ``value`` that can be folded, or None."""
    if node.target is not aten.batch_norm.default or node.args[0] is not value:
        return None
    weight, bias, mean, var, training, _, eps = node.args[1:8]
    if training or mean is None or var is None:
        return None
    nodes = [n for n in (weight, bias, mean, var) if n is not None]
    if not all(n in capture.constant_nodes for n in nodes):
        return None
    return BatchNorm(node, weight, bias, _node(mean), _node(var), float(eps))  # type: ignore[arg-type]


def _residual(node: fx.Node, value: fx.Node) -> fx.Node | None:
    if (
        node.target is not aten.add.Tensor
        or node.kwargs.get("alpha", 1) != 1
        or len(node.args) != 2
    ):
        return None
    left, right = node.args
    if left is right:
        return None
    other = right if left is value else left
    if not isinstance(other, fx.Node) or not isinstance(other.meta.get("val"), torch.Tensor):
        return None
    mine, theirs = value.meta["val"], other.meta["val"]
    same = (
        mine.dtype == theirs.dtype
        and mine.device == theirs.device
        and tuple(mine.shape) == tuple(theirs.shape)
    )
    return other if same else None


def _leftover(capture: Capture, node: fx.Node) -> Leftover | None:
    if node.target in OTHER_CONVOLUTIONS or (node.target in CONV2D and not _is_site(node)):
        name = node.target._schema.name.removeprefix("aten::")
        return Leftover(
            capture.owners[node], name, "no_kernel", f"cvfast has no {name} kernel", node
        )
    if node.target is aten.batch_norm.default:
        reason, detail = _why_not_folded(node)
        return Leftover(capture.owners[node], "bn", reason, detail, node)
    return None


def _why_not_folded(node: fx.Node) -> tuple[str, str]:
    source = _node(node.args[0])
    if node.args[3] is None:
        return "bn_no_running_stats", "the batch norm normalises with the statistics of each batch"
    if node.args[5]:
        return "bn_training", "the batch norm is in training mode"
    if source.target not in CONV2D:
        return "bn_standalone", "the batch norm does not follow a convolution"
    if len(source.users) > 1:
        return "output_read_twice", "the convolution's output has another reader"
    return "dynamic_weight", "weights or statistics are computed from the input"
