"""Fused kernels for convolutional networks, proved equal to plain PyTorch and measured by it."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from cvfast.optimize import optimize
from cvfast.version import __version__

if TYPE_CHECKING:
    from cvfast import models, ops, testing
    from cvfast.models import get_model, list_models

# Public name -> module that defines it: imported at first use, so that `import cvfast` stays fast.
_LAZY = {
    "get_model": "cvfast.models",
    "list_models": "cvfast.models",
    "models": "cvfast.models",
    "ops": "cvfast.ops",
    "testing": "cvfast.testing",
}

__all__ = [
    "__version__",
    "get_model",
    "list_models",
    "models",
    "ops",
    "optimize",
    "testing",
]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'cvfast' has no attribute {name!r}")
    module = importlib.import_module(_LAZY[name])
    return module if module.__name__ == f"cvfast.{name}" else getattr(module, name)


def __dir__() -> list[str]:
    return sorted(__all__)
