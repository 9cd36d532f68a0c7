"""Measured choice between the unfused path of a site and the kernels that can compute it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from cvfast.perf.gpu_timing import interleave_cuda
from cvfast.perf.timing import interleave, ratio

from .capture import shape_hint
from .match import Site

_UNFUSED = "unfused"


def choose(
    candidates: dict[str, Callable[[], Any]], unfused: Callable[[], Any], device: torch.device
) -> tuple[str | None, float]:
    """The fastest candidate and its gain over ``unfused``; None where nothing is faster."""
    variants = {_UNFUSED: unfused, **candidates}
    bounds: dict[str, Any] = {"min_rounds": 3, "min_time": 0.01, "max_time": 0.5, "burst": 5}
    if device.type == "cuda":
        # A layer reads what the one before has just written, so L2 is left as it is.
        with torch.cuda.device(device):
            timings = interleave_cuda(variants, cold_l2=False, **bounds)
    else:
        timings = interleave(variants, settle=0.0, **bounds)
    gains = {name: ratio(timings[_UNFUSED], timings[name]) for name in candidates}
    best = max(gains, key=gains.__getitem__)
    return (best if gains[best] > 1 else None), gains[best]


def random_inputs(site: Site, channels_last: bool) -> dict[fx.Node, Tensor]:
    """Random source and residual of the example's shape, in the program's layout."""
    nodes = [site.source, site.residual]
    layout = torch.channels_last if channels_last else torch.contiguous_format
    return {
        node: torch.randn(shape_hint(node), dtype=torch.float32, device=site.device).to(
            site.dtype, memory_format=layout
        )
        for node in nodes
        if node is not None
    }


def unfused_runner(
    site: Site, inputs: dict[fx.Node, Tensor], constants: dict[fx.Node, Tensor]
) -> Callable[[], Any]:
    """A closure that runs the site's own ATen operators."""
    steps: Sequence[fx.Node] = (site.conv, *site.absorbed)

    def run() -> Any:
        values: dict[fx.Node, Any] = {**inputs, **constants}
        with torch.no_grad():
            for node in steps:
                args = fx.map_arg(node.args, values.__getitem__)
                kwargs = fx.map_arg(node.kwargs, values.__getitem__)
                values[node] = node.target(*args, **kwargs)  # type: ignore[operator]
        return values[site.last]

    return run


def kernel_runner(
    site: Site,
    inputs: dict[fx.Node, Tensor],
    emit: Callable[[fx.Graph, list[fx.Node], fx.Node, fx.Node | None], fx.Node],
    packed: Sequence[Any],
) -> Callable[[], Any]:
    """A closure that runs one kernel call, compiled as it will be in the program."""
    graph = fx.Graph()
    root = nn.Module()
    names = ["packed", "bias"]
    for name, tensor in zip(names, (*packed, None), strict=False):
        setattr(root, name, tensor)
    x = graph.placeholder("x")
    residual = graph.placeholder("residual") if site.residual is not None else None
    constants = [graph.create_node("get_attr", name) for name in names]
    graph.output(emit(graph, constants, x, residual))
    forward = fx.GraphModule(root, graph).forward
    tensors = [inputs[node] for node in (site.source, site.residual) if node is not None]

    def run() -> Any:
        with torch.no_grad():
            return forward(*tensors)

    return run
