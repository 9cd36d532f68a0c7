"""Registers FLOP formulas with `torch.utils.flop_counter` without importing it.

That module imports triton. A formula is registered at once if the module is there already, and
otherwise as soon as somebody imports it.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import torch

_MODULE = "torch.utils.flop_counter"
_pending: list[tuple[Any, Callable[..., int]]] = []


class _LoaderThenRegister(Loader):
    def __init__(self, loader: Loader) -> None:
        self.loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self.loader.exec_module(module)
        for target, formula in _pending:
            module.register_flop_formula(target)(formula)
        _pending.clear()


class _Finder(MetaPathFinder):
    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != _MODULE:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            spec.loader = _LoaderThenRegister(spec.loader)
        return spec


def register(target: torch._ops.OpOverloadPacket, formula: Callable[..., int]) -> None:
    """Makes `FlopCounterMode` count `target` by `formula(*argument shapes, out_shape=...)`."""
    module = sys.modules.get(_MODULE)
    if module is not None:
        module.register_flop_formula(target)(formula)
        return
    if not _pending:
        sys.meta_path.insert(0, _Finder())
    _pending.append((target, formula))
