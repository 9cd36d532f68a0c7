"""The numbers policy: how far a fused result may lie from the truth.

The truth is the same computation in float64, and the yardstick is PyTorch's own error in the dtype
at hand: a kernel passes if its error is at most `K` times PyTorch's, plus a floor of `FLOOR_EPS`
units of rounding. This holds for the root mean square and for the largest error.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# A kernel that sums in another order than PyTorch draws another sample of the same rounding errors:
# their root mean squares differ by little, the largest of a few by up to about two. A kernel that
# accumulates in a narrower type, or drops a term, exceeds this at once. FlashAttention's tests use
# the same factor (Dao et al., 2022).
K = 2.0

# Through a whole network, folded batch norms and other summation orders compound over tens of
# layers, and eager's own error is one sample of what rounding can do: twice a kernel's factor.
K_NETWORK = 4.0

# PyTorch is no yardstick where it is wrong: oneDNN's bfloat16 depthwise convolution returns
# garbage for some shapes (x [3, 6, 15, 3], 3 x 5 kernel, multiplier 3; torch 2.13). Beyond this
# share of the result's magnitude its error widens the limit no further.
MAX_BASELINE = 0.1

# Where PyTorch happens to be exact (sums of one term, small integers), one rounding to nearest of
# the result and one of an intermediate must still pass: half a unit each, of the largest magnitude.
FLOOR_EPS = 1.0


@dataclass(frozen=True)
class Verdict:
    """The outcome of `check`; true if the result passed.

    Attributes:
        ok: within the limits, and NaN and infinities in the right places.
        error, baseline_error, limit: root mean square of (result - float64), of (PyTorch -
            float64), and what was allowed, relative to that of the float64 result itself.
        max_error, max_limit: the largest absolute error, and what was allowed.
        message: why it failed; empty if ok.
    """

    ok: bool
    error: float = 0.0
    baseline_error: float = 0.0
    limit: float = 0.0
    max_error: float = 0.0
    max_limit: float = 0.0
    message: str = ""

    def __bool__(self) -> bool:
        return self.ok

    def __str__(self) -> str:
        numbers = (
            f"relative error {self.error:.2e} (PyTorch {self.baseline_error:.2e}, "
            f"limit {self.limit:.2e})"
        )
        return numbers if self.ok else f"{self.message}; {numbers}"


def _classes(t: Tensor) -> Tensor:
    """0 finite, 1 NaN, 2 and 3 the infinities."""
    return torch.isnan(t) + 2 * torch.isposinf(t) + 3 * torch.isneginf(t)


def _rms(t: Tensor) -> float:
    # Scaled by the largest entry: squares of subnormal or huge errors leave float64's range.
    largest = t.abs().max().item()
    if largest == 0:
        return 0.0
    return largest * (t / largest).square().mean().sqrt().item()


def check(
    actual: Tensor,
    expected64: Tensor,
    baseline: Tensor,
    *,
    dtype: torch.dtype | None = None,
    k: float | None = None,
) -> Verdict:
    """Judges `actual` by the policy of this module.

    Args:
        actual: the result to judge.
        expected64: the same computed in float64.
        baseline: the same computed by PyTorch in the dtype of `actual`.
        dtype: precision that the error is judged at, where the result was widened afterwards;
            default the dtype of `actual`.
        k: multiple of PyTorch's error; default `K`.

    Tensors of integers and booleans must be equal. A NaN or an infinity must stand where PyTorch or
    the float64 result, rounded to the dtype, has the same.
    """
    if actual.shape != expected64.shape or actual.shape != baseline.shape:
        return Verdict(
            False,
            message=f"shape {tuple(actual.shape)}, expected {tuple(expected64.shape)}",
        )
    if actual.dtype != baseline.dtype:
        return Verdict(False, message=f"dtype {actual.dtype}, expected {baseline.dtype}")
    if actual.numel() == 0:
        return Verdict(True)
    if not actual.dtype.is_floating_point:
        wrong = int((actual != baseline).sum())
        message = f"{wrong} of {actual.numel()} elements differ" if wrong else ""
        return Verdict(wrong == 0, message=message)

    dtype = actual.dtype if dtype is None else dtype
    k = K if k is None else k
    kind = _classes(actual)
    allowed = _classes(baseline)
    misplaced = (kind != allowed) & (kind != _classes(expected64.to(dtype)))
    if misplaced.any():
        where = tuple(misplaced.nonzero()[0].tolist())
        return Verdict(
            False,
            error=float("inf"),
            message=(
                f"{int(misplaced.sum())} elements are NaN or infinite on one side only, the first "
                f"at {where}: got {actual[where].item()}, expected {expected64[where].item()}"
            ),
        )
    finite = (kind == 0) & (allowed == 0) & torch.isfinite(expected64)
    if not finite.any():
        return Verdict(True)
    truth = expected64[finite].double()
    error = actual[finite].double() - truth
    baseline_error = baseline[finite].double() - truth
    eps = torch.finfo(dtype).eps
    tiny = torch.finfo(dtype).tiny  # below it the spacing of numbers no longer shrinks

    scale = _rms(truth)
    rms, baseline_rms = _rms(error), _rms(baseline_error)
    peak = truth.abs().max().item()
    rms_limit = k * min(baseline_rms, MAX_BASELINE * scale) + FLOOR_EPS * eps * (scale + tiny)
    largest = error.abs().max().item()
    baseline_largest = min(baseline_error.abs().max().item(), MAX_BASELINE * peak)
    max_limit = k * baseline_largest + FLOOR_EPS * eps * (peak + tiny)
    unit = scale if scale > 0 else 1.0
    ok = rms <= rms_limit and largest <= max_limit
    message = ""
    if not ok:
        over = error.abs() > max_limit
        message = (
            f"{int(over.sum())} of {error.numel()} elements exceed the largest error allowed, "
            f"{max_limit:.2e}; the worst is off by {largest:.2e}"
            if over.any()
            else "root mean square error exceeds the limit"
        )
    return Verdict(
        ok, rms / unit, baseline_rms / unit, rms_limit / unit, largest, max_limit, message
    )
