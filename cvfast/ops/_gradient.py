"""Operators without a gradient say so, instead of returning a result cut off the graph."""

from __future__ import annotations

from collections.abc import Callable
from itertools import chain
from typing import Any

import torch
from torch import Tensor


def refusal(op: Any, advice: str) -> Callable[..., Any]:
    """The autograd kernel of `op`: an error where a gradient is asked for, which gives `advice`.

    Register with `with_keyset=True`.
    """

    def refuse_or_redispatch(keyset: Any, *args: Any, **kwargs: Any) -> Any:
        tensors = (a for a in chain(args, kwargs.values()) if isinstance(a, Tensor))
        if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
            raise RuntimeError(
                f"{op.name()} has no gradient: {advice}, or run under torch.no_grad()"
            )
        with torch._C._AutoDispatchBelowAutograd():
            return op.redispatch(keyset & torch._C._after_autograd_keyset, *args, **kwargs)

    return refuse_or_redispatch
