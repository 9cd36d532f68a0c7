"""Capture: a module and example inputs -> an ATen graph that holds for other sizes too.

``torch.export`` traces the module with symbolic sizes. The graph is then normalised until a matcher
can read it: parameters and what is computed from parameters alone (weight norm, weight
standardisation) are *constants*, in-place operators are functional, and views are reshapes, so that
any memory format will do. What cannot be brought into that form raises :class:`CaptureError` with a
reason code for the report.
"""

from __future__ import annotations

import logging
import operator
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from .gate import GATE, Busy

aten = torch.ops.aten

DROPOUT = {
    aten.dropout.default,
    aten.dropout_.default,
    aten.feature_dropout.default,
    aten.feature_dropout_.default,
    aten.alpha_dropout.default,
    aten.alpha_dropout_.default,
}
IDENTITY = DROPOUT | {aten.alias.default, aten.detach.default}
"""Operators that return their first argument at inference (dropout with its ``train`` off)."""

MAX_SIZE_COMPLEXITY = 40
"""Operations in a symbolic size beyond which sizes are pinned: TensorFlow-style "same" padding
compounds them at every layer, and tracing EfficientNet-B0 that way took 45 s against 1 s with the
sizes pinned."""

LAYOUT_DEPENDENT = {
    aten.as_strided.default,
    aten.view_as_complex.default,
    aten.view.dtype,
}
"""Operators that fail, or mean something else, once activations are channels-last."""

TO_RESHAPE = {aten.view.default, aten._unsafe_view.default}


class CaptureError(Exception):
    """A module that cannot be captured whole; ``reason`` is the report's code.

    ``divisible``: whether a copy of it may run instead, its children captured one by one.
    """

    def __init__(self, reason: str, message: str, *, divisible: bool = True) -> None:
        super().__init__(message)
        self.reason = reason
        self.divisible = divisible


@dataclass(frozen=True)
class TensorSpec:
    """What a graph takes at one tensor input; a dimension is a size or a sympy expression."""

    dtype: torch.dtype
    device: torch.device
    dims: tuple[Any, ...]

    def __str__(self) -> str:
        dims = ", ".join(str(d) if isinstance(d, int) else "any" for d in self.dims)
        return f"{str(self.dtype).removeprefix('torch.')}[{dims}]"


@dataclass
class Capture:
    """A normalised ATen graph of one module, without its weights: copies of the module share it.

    ``constants`` maps placeholder names to what yields their value: a qualified name inside the
    module, or a tensor that the trace lifted. ``constant_nodes`` depend on nothing else. ``guards``
    are the conditions on sizes under which the graph holds. ``owners`` names the module whose
    forward issued a node.
    """

    graph: fx.Graph
    constants: dict[str, str | Tensor]
    constant_nodes: set[fx.Node]
    inputs: list[fx.Node]
    specs: list[Any]
    guards: list[Any]
    in_spec: pytree.TreeSpec
    out_spec: pytree.TreeSpec
    owners: dict[fx.Node, str] = field(default_factory=dict)

    def accepts(self, flat: Sequence[Any]) -> bool:
        """Whether the graph is valid for these flattened inputs: dtypes, devices, sizes."""
        bindings: dict[Any, int] = {}
        expressions: list[tuple[Any, int]] = []
        if len(flat) != len(self.specs):
            return False
        for value, spec in zip(flat, self.specs, strict=True):
            if not isinstance(spec, TensorSpec):
                if type(value) is not type(spec) or value != spec:
                    return False
                continue
            if (
                not isinstance(value, Tensor)
                or value.dtype != spec.dtype
                or value.device != spec.device
            ):
                return False
            if value.dim() != len(spec.dims):
                return False
            for size, dim in zip(value.shape, spec.dims, strict=True):
                if isinstance(dim, int):
                    if size != dim:
                        return False
                elif dim.is_Symbol:
                    if bindings.setdefault(dim, size) != size:
                        return False
                else:
                    expressions.append((dim, size))
        return all(dim.subs(bindings) == size for dim, size in expressions) and all(
            guard.subs(bindings) == True  # noqa: E712 - a sympy truth value; one with free symbols is not True
            for guard in self.guards
        )

    def resolve(self, module: nn.Module, name: str) -> Tensor:
        """The present value of a constant placeholder, read from ``module``."""
        source = self.constants[name]
        if isinstance(source, Tensor):
            return source
        owner, _, leaf = source.rpartition(".")
        value: Tensor = getattr(module.get_submodule(owner), leaf)
        return value.detach()

    def evaluate_constants(
        self, module: nn.Module, wanted: Sequence[fx.Node]
    ) -> dict[fx.Node, Tensor]:
        """Values of the constant nodes in ``wanted`` under the weights that ``module`` has now."""
        values: dict[fx.Node, Any] = {}
        needed = _ancestors(wanted)
        with torch.no_grad():
            for node in self.graph.nodes:
                if node not in needed:
                    continue
                if node.op == "placeholder":
                    values[node] = self.resolve(module, node.name)
                else:
                    args = fx.map_arg(node.args, values.__getitem__)
                    kwargs = fx.map_arg(node.kwargs, values.__getitem__)
                    values[node] = node.target(*args, **kwargs)
        return {node: values[node] for node in wanted}


def capture(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Capture:
    """Trace ``module`` and normalise the graph.

    Batch, height and width of every 4-D floating-point input are symbolic; whatever the module
    itself pins is pinned in the result's specs. Raises :class:`CaptureError`.
    """
    try:
        with GATE.exclusive():
            program = _export(module, *_distinct((args, kwargs)))
    except Busy as busy:
        raise CaptureError("busy", str(busy), divisible=False) from busy
    signature = program.graph_signature
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    output = graph.graph_copy(program.graph, copies)
    graph.output(output)

    lifted = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    constants: dict[str, str | Tensor] = dict(lifted)
    for name, target in signature.inputs_to_lifted_tensor_constants.items():
        constants[name] = program.constants[target]
    if signature.inputs_to_lifted_custom_objs:
        raise CaptureError("custom_object", "the network holds a TorchBind object")

    placeholders = [node for node in program.graph.nodes if node.op == "placeholder"]
    inputs = [copies[node] for node in placeholders if node.name not in constants]
    # graph_copy keeps names unique within the new graph, which is empty: they equal the program's.
    specs = [_spec(node.meta.get("val")) for node in placeholders if node.name not in constants]
    shape_env = _shape_env(placeholders)
    guards: list[Any] = []
    if shape_env is not None:
        if any(symbol in shape_env.var_to_range for symbol in shape_env.deferred_runtime_asserts):
            raise CaptureError("data_dependent", "a size depends on the data")
        guards = [_resolved(guard.expr, shape_env.replacements) for guard in shape_env.guards]

    _check_supported(graph)
    _drop_identities(graph)
    _functionalize(graph, {n for n in graph.nodes if n.op == "placeholder"})
    for node in graph.nodes:
        if node.target in TO_RESHAPE:
            node.target = aten.reshape.default
    _eliminate_dead(graph)

    constant_nodes = _constant_nodes(graph, constants)
    owners = {node: _owner(node) for node in graph.nodes if node.op == "call_function"}
    return Capture(
        graph=graph,
        constants=constants,
        constant_nodes=constant_nodes,
        inputs=inputs,
        specs=specs,
        guards=guards,
        in_spec=program.call_spec.in_spec,
        out_spec=program.call_spec.out_spec,
        owners=owners,
    )


def _distinct(tree: Any) -> Any:
    """``tree`` with a tensor that stands in several places copied: export would make them one."""
    seen: set[int] = set()

    def copy(value: Any) -> Any:
        if isinstance(value, Tensor) and id(value) in seen:
            return value.clone()
        seen.add(id(value))
        return value

    return pytree.tree_map(copy, tree)


def hint(size: Any) -> int:
    """The concrete value that a symbolic size had in the example inputs."""
    return int(size.node.hint) if isinstance(size, torch.SymInt) else int(size)


def shape_hint(node: fx.Node) -> tuple[int, ...]:
    """The shape of ``node``'s value for the example inputs."""
    return tuple(hint(size) for size in node.meta["val"].shape)


class _SizesTooComplex(Exception):
    """Raised inside a trace to give up symbolic sizes."""


class _SizeWatch(TorchFunctionMode):
    """Stops a trace whose symbolic sizes grow beyond what the solver handles in reasonable time."""

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor):
            for size in result.shape:
                if (
                    isinstance(size, torch.SymInt)
                    and size.node.expr.count_ops() > MAX_SIZE_COMPLEXITY
                ):
                    raise _SizesTooComplex
        return result


def _export(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> torch.export.ExportedProgram:
    """Export with symbolic batch, height, width; failing that batch alone; failing that none."""
    failure: Exception | None = None
    for symbolic in ((0, 2, 3), (0,), ()):
        try:
            return _export_once(module, args, kwargs, symbolic)
        except CaptureError:
            raise
        except Exception as error:
            failure = error
    assert failure is not None
    first = str(failure).strip().splitlines()
    raise CaptureError(
        "not_exportable", f"torch.export: {type(failure).__name__}: {first[0] if first else ''}"
    ) from failure


def _export_once(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], symbolic: tuple[int, ...]
) -> torch.export.ExportedProgram:
    import torch.fx.experimental._config as fx_config

    def dynamic(value: Any) -> Any:
        if isinstance(value, Tensor) and value.dim() == 4 and value.is_floating_point():
            return dict.fromkeys(symbolic, torch.export.Dim.AUTO)
        return None

    positional, keywords = pytree.tree_map(dynamic, (args, kwargs))
    shapes: Any = _by_parameter(module, positional)
    if kwargs:
        shapes = dict(zip(_positional_names(module, len(args)), positional, strict=True)) | keywords
    # Size-oblivious reasoning keeps batch 1 and 0 from being special, so one graph serves every
    # batch.
    settings = fx_config.patch(backed_size_oblivious=True)  # type: ignore[attr-defined]
    with torch.no_grad(), settings, _quiet(), _SizeWatch():
        return torch.export.export(
            module, args, kwargs or None, dynamic_shapes=shapes, strict=False
        )


def _by_parameter(module: nn.Module, positional: tuple[Any, ...]) -> tuple[Any, ...]:
    """What belongs to ``*args`` as one tuple, as export counts a function's parameters."""
    import inspect

    parameters = inspect.signature(module.forward).parameters.values()
    for index, parameter in enumerate(parameters):
        if parameter.kind is parameter.VAR_POSITIONAL:
            return (*positional[:index], positional[index:])
    return positional


def _positional_names(module: nn.Module, count: int) -> list[str]:
    import inspect

    names: list[str] = []
    for parameter in inspect.signature(module.forward).parameters.values():
        if parameter.kind is parameter.VAR_POSITIONAL:
            raise CaptureError("signature", "forward takes *args together with keyword arguments")
        names.append(parameter.name)
    return names[:count]


@contextmanager
def _quiet() -> Iterator[None]:
    """Export logs and warns about its own internals; its exceptions say enough."""
    loggers = [
        logging.getLogger(name)
        for name in ("torch.export", "torch.fx.experimental.symbolic_shapes")
    ]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _spec(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    dims = tuple(
        size.node.expr
        if isinstance(size, torch.SymInt) and not size.node.expr.is_Integer
        else int(size)
        for size in value.shape
    )
    return TensorSpec(value.dtype, value.device, dims)


def _shape_env(placeholders: Sequence[fx.Node]) -> Any:
    for node in placeholders:
        mode = getattr(node.meta.get("val"), "fake_mode", None)
        if mode is not None:
            return mode.shape_env
    return None


def _resolved(expression: Any, replacements: dict[Any, Any]) -> Any:
    """``expression`` with the symbols that the trace pinned to a size put in."""
    while found := expression.free_symbols & replacements.keys():
        expression = expression.subs({symbol: replacements[symbol] for symbol in found})
    return expression


def _schema(node: fx.Node) -> Any:
    return getattr(node.target, "_schema", None)


def _check_supported(graph: fx.Graph) -> None:
    for node in graph.nodes:
        if node.op in ("placeholder", "output"):
            continue
        if node.op != "call_function":
            raise CaptureError("control_flow", f"the graph holds a {node.op} node ({node.target})")
        if isinstance(node.target, torch._ops.HigherOrderOperator):
            raise CaptureError("control_flow", f"the graph holds {node.target}")
        tags = getattr(node.target, "tags", ())
        if node.target in DROPOUT and node.args[2]:
            raise CaptureError("training_mode", "dropout is active")
        if torch.Tag.nondeterministic_seeded in tags and node.target not in DROPOUT:
            raise CaptureError("random", f"{node.target} draws random numbers")
        if node.target in LAYOUT_DEPENDENT:
            raise CaptureError("as_strided", f"{node.target} depends on how memory is laid out")
        if node.target is aten.batch_norm.default and node.args[5] and node.args[3] is not None:
            raise CaptureError("bn_training", "a batch norm updates its running statistics")


def _drop_identities(graph: fx.Graph) -> None:
    for node in list(graph.nodes):
        if node.target in IDENTITY:
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
        elif node.target is aten._assert_tensor_metadata.default:
            graph.erase_node(node)


def _is_view(node: fx.Node) -> bool:
    """Whether the result may share memory with an argument."""
    if node.target is operator.getitem:
        return True
    schema = _schema(node)
    return schema is not None and any(r.alias_info is not None for r in schema.returns)


def _aliases(node: fx.Node) -> set[fx.Node]:
    """All nodes that may share memory with ``node``: what it is a view of, and views of that."""
    root = node
    while _is_view(root):
        root = root.args[0]  # type: ignore[assignment]
    family, stack = {root}, [root]
    while stack:
        for user in stack.pop().users:
            if user not in family and user.args and user.args[0] in family and _is_view(user):
                family.add(user)
                stack.append(user)
    return family


def _mutates(node: fx.Node) -> bool:
    schema = _schema(node)
    return schema is not None and schema.is_mutable


def _functional_overload(node: fx.Node) -> Callable[..., Any] | None:
    """``aten.relu_.default`` -> ``aten.relu.default``."""
    name = _schema(node).name.removeprefix("aten::")
    if not name.endswith("_"):
        return None
    functional = getattr(aten, name[:-1], None)
    return getattr(functional, node.target._overloadname, None)  # type: ignore[union-attr]


def _functionalize(graph: fx.Graph, placeholders: set[fx.Node]) -> None:
    """Make in-place operators functional where nothing else sees the memory that they write to.

    Refuses the rest (a mutated input or parameter, memory read through another view): those modules
    run as they are.
    """
    order = {node: i for i, node in enumerate(graph.nodes)}
    for node in list(graph.nodes):
        if node.op != "call_function" or not _mutates(node):
            continue
        base = node.args[0]
        functional = _functional_overload(node)
        if not isinstance(base, fx.Node) or functional is None:
            raise CaptureError("mutation", f"{node.target} has no functional form")
        family = _aliases(base)
        if not family.isdisjoint(placeholders):
            raise CaptureError("mutation", f"{node.target} writes to an input or a parameter")
        others = (alias for alias in family - {base} if order[alias] < order[node])
        if any(order[user] > order[node] for alias in others for user in alias.users):
            raise CaptureError("mutation", f"{node.target} writes to memory that is read elsewhere")
        with graph.inserting_before(node):
            result = graph.call_function(functional, node.args, node.kwargs)
        result.meta = node.meta.copy()
        order[result] = order[node]
        node.replace_all_uses_with(result)
        base.replace_all_uses_with(
            result,
            delete_user_cb=lambda user, at=order[node]: order[user] > at,  # type: ignore[misc]
        )
        graph.erase_node(node)


def _eliminate_dead(graph: fx.Graph) -> None:
    for node in reversed(list(graph.nodes)):
        if node.op != "call_function" or node.users:
            continue
        schema = _schema(node)
        if schema is None or schema.returns:  # an assertion returns nothing
            graph.erase_node(node)


def _constant_nodes(graph: fx.Graph, constants: dict[str, str | Tensor]) -> set[fx.Node]:
    found: set[fx.Node] = set()
    for node in graph.nodes:
        if node.op == "placeholder":
            if node.name in constants:
                found.add(node)
        elif (
            node.op == "call_function"
            and node.all_input_nodes
            and found.issuperset(node.all_input_nodes)
        ):
            found.add(node)
    return found


def _ancestors(nodes: Sequence[fx.Node]) -> set[fx.Node]:
    seen: set[fx.Node] = set()
    stack = list(nodes)
    while stack:
        node = stack.pop()
        if node not in seen:
            seen.add(node)
            stack.extend(node.all_input_nodes)
    return seen


def _owner(node: fx.Node) -> str:
    """Qualified name of the module whose forward issued ``node``."""
    stack = node.meta.get("nn_module_stack")
    if not stack:
        return ""
    path: str = next(reversed(stack.values()))[0]
    return path
