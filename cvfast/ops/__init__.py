"""The fused operators: one module per column, each with its reference, shapes and gradients."""

from __future__ import annotations

from cvfast.ops.depthwise import depthwise
from cvfast.ops.fold import fold_batch_norm
from cvfast.ops.pointwise import pointwise

__all__ = ["depthwise", "fold_batch_norm", "pointwise"]
