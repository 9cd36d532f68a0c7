"""What this machine can do at most, measured."""

from __future__ import annotations

import time

import torch
import torch.nn.functional as F


@torch.no_grad()
def peak_flops(dtype: torch.dtype = torch.float32, *, seconds: float = 0.5) -> float:
    """FLOP/s that the FMA units sustain on the CPU, on torch's current threads.

    The best run of a dense 3×3 convolution, 8×128×28×28 channels-last, in `seconds`: oneDNN's
    register tiles bring it within some 5 % of the units' limit. A matrix product is no measure of
    it: torch hands float32 products to MKL, which reaches half the rate on some AMD processors.
    """
    x = torch.rand(8, 128, 28, 28).to(dtype=dtype, memory_format=torch.channels_last)
    weight = torch.rand(128, 128, 3, 3).to(dtype=dtype, memory_format=torch.channels_last)
    flops = 2 * x.numel() * 128 * 9
    F.conv2d(x, weight, padding=1)
    best = float("inf")
    deadline = time.perf_counter() + seconds
    while (start := time.perf_counter()) < deadline:
        F.conv2d(x, weight, padding=1)
        best = min(best, time.perf_counter() - start)
    return flops / best
