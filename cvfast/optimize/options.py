"""Options of :func:`cvfast.optimize`, checked."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

if TYPE_CHECKING:
    from cvfast.perf.devices import Device

FilterFn = Callable[[nn.Module, str], bool]

BACKENDS = ("auto", "reference", "onednn", "cpu", "triton", "cuda")
_MEMORY_FORMATS = ("auto", "channels_last", "contiguous")
_TORCH_FORMATS = {torch.channels_last: "channels_last", torch.contiguous_format: "contiguous"}


@dataclass(frozen=True)
class Options:
    """See :func:`cvfast.optimize`; ``memory_format`` becomes the name of a layout or ``"auto"``.

    ``target`` is a GPU to plan for that need not be there (:func:`cvfast.optimize.plan`).
    """

    dtype: torch.dtype | None = None
    backend: str = "auto"
    memory_format: str | torch.memory_format = "auto"
    select: str = "heuristic"
    filter_fn: FilterFn | None = None
    on_unsupported: str = "skip"
    verify: str = "auto"
    dry_run: bool = False
    winograd: str = "F2"
    outputs: str = "copy"
    target: Device | None = None

    def __post_init__(self) -> None:
        _one_of("backend", self.backend, BACKENDS)
        _one_of("select", self.select, ("heuristic", "measure"))
        _one_of("on_unsupported", self.on_unsupported, ("skip", "raise"))
        _one_of("winograd", self.winograd, ("F2", "F4", "off"))
        _one_of("outputs", self.outputs, ("copy", "alias"))
        _one_of("verify", self.verify, ("auto", "layers", "off"))
        if isinstance(self.memory_format, torch.memory_format):
            name = _TORCH_FORMATS.get(self.memory_format, self.memory_format)
            object.__setattr__(self, "memory_format", name)
        _one_of("memory_format", self.memory_format, _MEMORY_FORMATS)
        if self.dtype is not None and not (
            isinstance(self.dtype, torch.dtype) and self.dtype.is_floating_point
        ):
            raise TypeError(
                f"dtype must be a floating-point torch.dtype or None; got {self.dtype!r}"
            )


def _one_of(name: str, value: object, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}; got {value!r}")
