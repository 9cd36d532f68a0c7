"""Verify: an optimised module against its original, by :mod:`cvfast.tolerance`."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields, is_dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from cvfast import tolerance

from .attributes import undone
from .gate import GATE
from .lower import Program


class VerificationError(RuntimeError):
    """An optimised network disagrees with its original; the message names the first layer."""


@dataclass
class Verification:
    """Outcome for one set of inputs.

    ``error``, ``baseline_error`` and ``limit`` are relative root-mean-square errors to float64:
    ours, eager PyTorch's in the same dtype, and what the policy allows. ``first_disagreement``
    names a module when not ok.
    """

    ok: bool
    error: float
    baseline_error: float
    limit: float
    max_error: float
    shapes: list[list[int]]
    message: str = ""
    first_disagreement: str = ""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __bool__(self) -> bool:
        return self.ok

    def __str__(self) -> str:
        if self.ok:
            return (
                f"verified: error {self.error:.1e}, eager's {self.baseline_error:.1e}, "
                f"limit {self.limit:.1e}"
            )
        where = (
            f"; first disagreement at {self.first_disagreement}" if self.first_disagreement else ""
        )
        return f"FAILED: {self.message}{where}"


def verify(
    run: Callable[..., Any],
    eager: nn.Module,
    original: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Verification:
    """Compare ``run`` with ``eager``, in the dtype it runs in, and ``original`` in float64."""
    inputs = (args, kwargs)
    shapes = [list(leaf.shape) for leaf in pytree.tree_leaves(inputs) if isinstance(leaf, Tensor)]
    random_state = torch.random.get_rng_state()

    def outputs(network: Callable[..., Any], convert: Callable[[Any], Any]) -> list[Any]:
        torch.random.set_rng_state(random_state)
        copies = pytree.tree_map(lambda v: v.clone() if isinstance(v, Tensor) else v, inputs)
        positional, keywords = convert(copies)
        with undone(eager):
            return _leaves(network(*positional, **keywords))

    with torch.no_grad():
        actual = outputs(run, lambda tree: tree)
        # The root's hooks are its caller's to run.
        with GATE.shared():
            baseline = outputs(eager.forward, lambda tree: tree)
        try:
            with GATE.shared():
                truth = outputs(_in_float64(original).forward, _double)
            judge = _judge
        except Exception:
            # A network with a dtype of its own choosing has no float64 run.
            truth, judge = baseline, _judge_by_eager
    if not len(actual) == len(baseline) == len(truth):
        inf = float("inf")
        message = f"{len(actual)} outputs, expected {len(baseline)}"
        return Verification(False, inf, 0.0, 0.0, inf, shapes, message)
    verdicts = [judge(*leaves) for leaves in zip(actual, baseline, truth, strict=True)]
    worst = max(verdicts, key=lambda v: (not v.ok, v.error / v.limit if v.limit else v.error))
    return Verification(
        all(verdicts),
        worst.error,
        worst.baseline_error,
        worst.limit,
        worst.max_error,
        shapes,
        worst.message,
    )


def compare_layers(
    program: Program, module: nn.Module, original: nn.Module, flat: Sequence[Any]
) -> list[tuple[str, tolerance.Verdict]]:
    """The verdict on every site's output, in the order of execution."""
    names = {id(site.source): site.row.module for site in program.sites}
    values = _Recorder(program.module, {site.result for site in program.sites})
    with torch.no_grad():
        values.run(*flat)
        eager = _evaluate(program, module, flat, double=False)
        truth = _evaluate(program, original, flat, double=True)
    return [
        (
            names[id(site.source)],
            _judge(values.recorded[site.result], eager[site.source], truth[site.source]),
        )
        for site in program.sites
    ]


class _Recorder(fx.Interpreter):
    """Keeps copies of chosen values, since later steps may overwrite them in place."""

    def __init__(self, module: fx.GraphModule, wanted: set[fx.Node]) -> None:
        super().__init__(module)
        self.wanted = wanted
        self.recorded: dict[fx.Node, Tensor] = {}

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if n in self.wanted:
            self.recorded[n] = value.clone()
        return value


def _evaluate(
    program: Program, module: nn.Module, flat: Sequence[Any], *, double: bool
) -> dict[fx.Node, Any]:
    """Values of all nodes of the captured graph, in float64 or as captured."""
    capture = program.capture
    convert = _double if double else (lambda value: value)
    values: dict[fx.Node, Any] = dict(zip(capture.inputs, convert(list(flat)), strict=True))
    for node in capture.graph.nodes:
        if node.op == "placeholder" and node not in values:
            values[node] = convert(capture.resolve(module, node.name))
        elif node.op == "call_function":
            args = fx.map_arg(node.args, values.__getitem__)
            kwargs = fx.map_arg(node.kwargs, values.__getitem__)
            values[node] = node.target(*args, **kwargs)
    return values


def _judge(actual: Any, baseline: Any, truth: Any) -> tolerance.Verdict:
    if isinstance(actual, Tensor) and isinstance(baseline, Tensor):
        return tolerance.check(actual, truth, baseline, k=tolerance.K_NETWORK)
    same = bool(actual == baseline)
    return tolerance.Verdict(same, message="" if same else f"got {actual!r}, expected {baseline!r}")


def _judge_by_eager(actual: Any, baseline: Any, truth: Any) -> tolerance.Verdict:
    """Without a float64 run: eager counts as the truth, and half its digits must agree."""
    if not (isinstance(baseline, Tensor) and baseline.is_floating_point()):
        return _judge(actual, baseline, truth)
    allowed = torch.finfo(baseline.dtype).eps ** 0.5
    off_by_allowance = baseline.double() * (1 + allowed)
    return tolerance.check(actual, baseline.double(), off_by_allowance.to(baseline.dtype), k=1.0)


def _leaves(tree: Any) -> list[Any]:
    """Tensors and other values in ``tree``, also inside dataclasses and arrays."""
    found: list[Any] = []
    for leaf in pytree.tree_leaves(tree):
        if is_dataclass(leaf) and not isinstance(leaf, type):
            found += _leaves([getattr(leaf, entry.name) for entry in fields(leaf)])
        elif hasattr(leaf, "__array__") and not isinstance(leaf, Tensor):
            found.append(torch.as_tensor(leaf))
        else:
            found.append(leaf)
    return found


def _in_float64(module: nn.Module) -> nn.Module:
    return copy.deepcopy(module).double()


def _double(tree: Any) -> Any:
    def convert(value: Any) -> Any:
        return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value

    return pytree.tree_map(convert, tree)
