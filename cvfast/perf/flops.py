"""FLOPs of a model, counted while it runs."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.utils.flop_counter import FlopCounterMode


def count(model: torch.nn.Module, args: Sequence[object]) -> int:
    """Floating-point operations of one forward pass (a multiply-add is two).

    Counts convolutions and matrix products, and every op with a formula registered in
    `torch.utils.flop_counter`; element-wise work counts as zero.
    """
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(*args)
    return int(counter.get_total_flops())
