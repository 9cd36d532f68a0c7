"""Activations of kernel epilogues, under the names that ``torch.nn.functional`` gives them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

_FUNCTIONS: dict[str, Callable[..., Tensor]] = {
    "none": lambda x: x,
    "relu": F.relu,
    "relu6": F.relu6,
    "hardswish": F.hardswish,
    "hardsigmoid": F.hardsigmoid,
    "silu": F.silu,
    "sigmoid": F.sigmoid,
    "tanh": F.tanh,
    "leaky_relu": lambda x, slope: F.leaky_relu(x, slope),
    "gelu": lambda x, approximate: F.gelu(x, approximate=approximate),
}


@dataclass(frozen=True)
class Activation:
    """An elementwise function: its name in ``torch.nn.functional`` and its parameters.

    ``leaky_relu`` takes its negative slope, ``gelu`` its approximation (``"none"`` or ``"tanh"``);
    the others take none.
    """

    name: str = "none"
    parameters: tuple[float | str, ...] = ()

    def __post_init__(self) -> None:
        if self.name not in _FUNCTIONS:
            raise ValueError(
                f"activation must be one of {', '.join(_FUNCTIONS)}; got {self.name!r}"
            )

    def __call__(self, x: Tensor) -> Tensor:
        return _FUNCTIONS[self.name](x, *self.parameters)

    def __bool__(self) -> bool:
        return self.name != "none"

    def __str__(self) -> str:
        return self.name


NONE = Activation()

_aten = torch.ops.aten

_IN_PLACE: dict[str, Callable[..., Tensor]] = {
    "none": lambda x: x,
    "relu": _aten.relu_.default,
    "relu6": lambda x: _aten.hardtanh_.default(x, 0.0, 6.0),
    "hardswish": _aten.hardswish_.default,
    "hardsigmoid": _aten.hardsigmoid_.default,
    "silu": _aten.silu_.default,
    "sigmoid": _aten.sigmoid_.default,
    "tanh": _aten.tanh_.default,
    "leaky_relu": _aten.leaky_relu_.default,
    "gelu": lambda x, approximate: _aten.gelu_.default(x, approximate=approximate),
}


def activate_(x: Tensor, name: str, parameters: tuple[float | str, ...] = ()) -> Tensor:
    """Overwrite ``x`` with the activation of it; returns ``x``."""
    return _IN_PLACE[name](x, *parameters)
