"""What kernels do to a result before they store it, and to its gradient after they load it."""

from __future__ import annotations

import triton.language as tl

from .jit import jit


@jit
def activate(x, ACTIVATION: tl.constexpr):
    """`ACTIVATION` of float32 x, as PyTorch computes it: NaN stays NaN."""
    tl.static_assert(
        ACTIVATION == "none"
        or ACTIVATION == "relu"
        or ACTIVATION == "relu6"
        or ACTIVATION == "hardswish"
        or ACTIVATION == "hardsigmoid"
        or ACTIVATION == "sigmoid"
        or ACTIVATION == "silu"
    )
    if ACTIVATION == "relu":
        x = tl.maximum(x, 0.0, tl.PropagateNan.ALL)
    elif ACTIVATION == "relu6":
        x = _clamp6(x)
    elif ACTIVATION == "hardswish":
        x = x * _clamp6(x + 3.0) * (1.0 / 6.0)
    elif ACTIVATION == "hardsigmoid":
        x = _clamp6(x + 3.0) * (1.0 / 6.0)
    elif ACTIVATION == "sigmoid":
        x = 1.0 / (1.0 + tl.exp(-x))
    elif ACTIVATION == "silu":
        x = x / (1.0 + tl.exp(-x))
    return x


@jit
def _clamp6(x):
    return tl.minimum(tl.maximum(x, 0.0, tl.PropagateNan.ALL), 6.0, tl.PropagateNan.ALL)


@jit
def gradient(grad, output, ACTIVATION: tl.constexpr):
    """The gradient before `ACTIVATION` (none, relu, relu6) from that behind it and its output.

    As `aten.threshold_backward` and `aten.hardtanh_backward`: where the output is NaN, it passes.
    """
    tl.static_assert(ACTIVATION == "relu" or ACTIVATION == "relu6")
    if ACTIVATION == "relu":
        grad = tl.where(output <= 0.0, 0.0, grad)
    else:
        grad = tl.where((output <= 0.0) | (output >= 6.0), 0.0, grad)
    return grad
