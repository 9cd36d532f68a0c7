from __future__ import annotations

import pytest
import torch

from cvfast import tolerance


def noisy(error: float, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    truth = torch.randn(1000, dtype=torch.float64)
    return truth, (truth + error * torch.randn(1000, dtype=torch.float64)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_as_good_as_pytorch_passes_and_much_worse_fails(dtype: torch.dtype) -> None:
    eps = torch.finfo(dtype).eps
    truth, baseline = noisy(4 * eps, dtype)
    other = (truth + 4 * eps * torch.randn(1000, dtype=torch.float64)).to(dtype)
    worse = (truth + 16 * eps * torch.randn(1000, dtype=torch.float64)).to(dtype)
    assert tolerance.check(other, truth, baseline)
    verdict = tolerance.check(worse, truth, baseline)
    assert not verdict
    assert verdict.error > verdict.limit > verdict.baseline_error
    assert "relative error" in str(verdict)


def test_one_wrong_element_among_many_fails() -> None:
    truth, baseline = noisy(1e-6)
    actual = baseline.clone()
    actual[17] += 1e-3
    verdict = tolerance.check(actual, truth, baseline)
    assert not verdict
    assert "1 of 1000 elements" in str(verdict)


def test_exact_baseline_leaves_room_for_one_rounding() -> None:
    truth = torch.randn(100, dtype=torch.float64).float().double()
    exact = truth.float()
    assert tolerance.check(torch.nextafter(exact, torch.tensor(9.0)), truth, exact)
    assert not tolerance.check(exact * (1 + 1e-5), truth, exact)


def test_nan_and_infinity_must_stand_where_they_belong() -> None:
    truth = torch.tensor([1.0, float("nan"), float("inf")], dtype=torch.float64)
    right = truth.float()
    assert tolerance.check(right, truth, right)
    for wrong in ([float("nan")] * 3, [1.0, 2.0, float("inf")], [1.0, float("nan"), -float("inf")]):
        verdict = tolerance.check(torch.tensor(wrong), truth, right)
        assert not verdict
        assert "NaN or infinite" in str(verdict)


def test_overflow_of_the_dtype_is_no_error() -> None:
    truth = torch.tensor([1e6, 1.0], dtype=torch.float64)
    half = truth.half()
    assert tolerance.check(half, truth, half)
    # PyTorch overflowed on the way, the kernel did not.
    assert tolerance.check(
        torch.tensor([6.0]).half(), torch.tensor([6.0]).double(), torch.tensor([torch.inf]).half()
    )


def test_empty_integer_and_mismatched_tensors() -> None:
    empty = torch.empty(0, 3)
    assert tolerance.check(empty, empty.double(), empty)
    counts = torch.tensor([1, 2, 3])
    assert tolerance.check(counts, counts, counts)
    assert not tolerance.check(counts + 1, counts, counts)
    assert not tolerance.check(counts > 1, counts > 2, counts > 2)
    assert "shape" in str(tolerance.check(empty, torch.empty(0, 2), empty))
    assert "dtype" in str(tolerance.check(counts.float(), counts.double(), counts.double()))


def test_tiny_and_huge_errors_do_not_leave_the_range_of_the_arithmetic() -> None:
    for size in (1e-200, 1e200):
        truth = torch.full((4,), size, dtype=torch.float64)
        assert tolerance.check(truth, truth, truth)
        assert not tolerance.check(truth * 1.5, truth, truth)


def test_a_baseline_that_is_garbage_is_no_yardstick() -> None:
    truth = torch.randn(64, 64, dtype=torch.float64)
    garbage = torch.randn(64, 64)
    assert not tolerance.check(2 * truth.float(), truth, garbage)
    assert tolerance.check(truth.float(), truth, garbage)
