"""Operators without a gradient say so, instead of returning a result cut off the graph."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils import _pytree as pytree


def refusal(op: Any, advice: str) -> Callable[..., Any]:
    """The autograd kernel of `op`: an error where a gradient is asked for, which gives `advice`.

    Register with `with_keyset=True`.
    """

    def refuse_or_redispatch(keyset: Any, *args: Any, **kwargs: Any) -> Any:
        tensors = filter(torch.is_tensor, pytree.tree_leaves((args, kwargs)))
        if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
            raise RuntimeError(
                f"{op.name()} has no gradient: {advice}, or run under torch.no_grad()"
            )
        with torch._C._AutoDispatchBelowAutograd():
            return op.redispatch(keyset & torch._C._after_autograd_keyset, *args, **kwargs)

    return refuse_or_redispatch
