"""What a forward pass may write to a module besides tensors: attributes and new buffers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


class Attributes:
    """The attributes and buffers that all modules of a tree have now, by reference."""

    def __init__(self, root: nn.Module) -> None:
        self._saved = [
            (module, dict(module.__dict__), dict(module._buffers)) for module in root.modules()
        ]

    def restore(self) -> list[nn.Module]:
        """Put back what was replaced, added or removed since; returns the modules concerned."""
        changed: list[nn.Module] = []
        for module, attributes, buffers in self._saved:
            for now, before in ((module.__dict__, attributes), (module._buffers, buffers)):
                keys = [key for key in before.keys() | now.keys() if _differs(now, before, key)]
                if keys:
                    changed.append(module)
                for key in keys:
                    if key in before:
                        now[key] = before[key]
                    else:
                        del now[key]
        return changed


def _differs(now: dict[str, Any], before: dict[str, Any], key: str) -> bool:
    missing = object()
    return now.get(key, missing) is not before.get(key, missing)


@contextmanager
def undone(module: nn.Module) -> Iterator[None]:
    """Put back what runs of ``module`` write to it: buffers, as batch norms do, and attributes."""
    attributes = Attributes(module)
    before = [(buffer, buffer.clone()) for buffer in module.buffers() if not buffer.is_inference()]
    try:
        yield
    finally:
        attributes.restore()
        for buffer, value in before:
            # Batch norm writes its running statistics without counting a version.
            if not torch.equal(buffer, value):
                with torch.no_grad():
                    buffer.copy_(value)
