"""``torch.compile(model, backend="cvfast")``, found through an entry point."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, fx, nn

from .module import OptimizedModule
from .options import Options

MAX_BINDINGS = 64
"""Sets of parameters and buffers that one graph is kept bound to."""


def cvfast(graph: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
    """Run a Dynamo graph on fused kernels at inference, and as it is where gradients are recorded.

    Parameters and buffers, which Dynamo passes as inputs, are bound at the first call and packed;
    they are packed anew when a later call brings others or they were written to.
    """
    del example_inputs  # fake tensors; the real ones come with the first call
    bindings: dict[tuple[int, ...], _Bound] = {}

    def run(*args: Any) -> Any:
        if torch.is_grad_enabled() and any(isinstance(a, Tensor) and a.requires_grad for a in args):
            return graph.forward(*args)
        # Instances of one class share a graph. A binding keeps its tensors, so ids stay theirs.
        key = tuple(id(a) for a in args if _is_state(a))
        if key not in bindings:
            if len(bindings) >= MAX_BINDINGS:
                bindings.clear()
            bindings[key] = _Bound(graph, args)
        return bindings[key](args)

    return run


class _Bound:
    """A graph whose parameters and buffers became its own, run by an :class:`OptimizedModule`."""

    def __init__(self, graph: fx.GraphModule, args: Sequence[Any]) -> None:
        self.constants = {i: a for i, a in enumerate(args) if _is_state(a)}
        network = _bind(graph, self.constants)
        self.module = OptimizedModule(network.eval(), Options())
        # The tensors belong to the user's model, who may write to them at any time.
        self.module._exposure.handed_out = True

    def __call__(self, args: Sequence[Any]) -> Any:
        with torch.no_grad():
            return self.module(*(a for i, a in enumerate(args) if i not in self.constants))


def _is_state(value: Any) -> bool:
    """Whether Dynamo passes ``value`` because a module owns it."""
    if isinstance(value, nn.Parameter):
        return True
    return (
        isinstance(value, Tensor) and getattr(value, "_dynamo_static_input_type", None) is not None
    )


def _bind(graph: fx.GraphModule, constants: dict[int, Tensor]) -> fx.GraphModule:
    """A copy of ``graph`` in which the inputs ``constants`` are attributes; tensors are shared."""
    bound = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    attributes: dict[str, Any] = {}
    position = 0
    for node in graph.graph.nodes:
        if node.op == "placeholder" and position in constants:
            name = f"constant_{position}"
            attributes[name] = constants[position]
            copies[node] = bound.create_node("get_attr", name)
        else:
            copies[node] = bound.node_copy(node, copies.__getitem__)
        if node.op in ("get_attr", "call_module"):
            attributes[node.target] = attrgetter(node.target)(graph)
        position += node.op == "placeholder"
    return fx.GraphModule(attributes, bound)
