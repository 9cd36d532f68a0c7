"""The operators that programs call: ``cvfast::<op>_<backend>``."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from cvfast.ops import conv, depthwise, elementwise, inverted_residual, layout, pointwise, pool
from cvfast.ops import upconv as upconv

# These define the operators.
__all__ = [
    "conv", "depthwise", "elementwise", "inverted_residual", "layout", "pointwise", "pool",
    "upconv",
]  # fmt: skip

BACKENDS = ("cpu", "triton", "cuda")


def operator(op: str, backend: str) -> Any:
    """The functional form: it allocates its result."""
    return getattr(torch.ops.cvfast, f"{op}_{backend}").default


def backends_of(op: str) -> tuple[str, ...]:
    """The backends that have a kernel for ``op``."""
    return tuple(b for b in BACKENDS if hasattr(torch.ops.cvfast, f"{op}_{b}"))


def operators(op: str) -> list[Any]:
    """``op`` on every backend that has it."""
    return [operator(op, backend) for backend in backends_of(op)]


def split_name(target: Any) -> tuple[str, str]:
    """``("pointwise", "triton")`` for ``cvfast::pointwise_triton`` and its variants."""
    op, _, backend = target._schema.name.removeprefix("cvfast::").rpartition("_")
    return op, backend


def arguments(node: fx.Node) -> dict[str, Any]:
    """All arguments of an operator's call by name, defaults filled in."""
    given: dict[str, Any] = {}
    for index, argument in enumerate(node.target._schema.arguments):  # type: ignore[union-attr]
        default = argument.default_value if argument.has_default_value() else None
        given[argument.name] = (
            node.args[index] if index < len(node.args) else node.kwargs.get(argument.name, default)
        )
    return given
