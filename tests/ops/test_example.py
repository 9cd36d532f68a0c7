"""Examples of every operator: its kernels agree with its definition on them."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager

import pytest
import torch

from cvfast import inventory, tolerance
from cvfast.launch import calls, table
from cvfast.launch.depthwise import PASSES, Problem
from cvfast.ops import _example
from cvfast.ops.depthwise import bytes_moved, example, flops
from cvfast.perf import devices

PROBLEM = Problem(2, 5, 7, 6, (3, 5), (2, 1), (1, 2), multiplier=2, dtype=torch.bfloat16)


@pytest.mark.gpu_kernels
@pytest.mark.parametrize("backend", ["triton", "cuda"])
@pytest.mark.parametrize("activation", ["none", "relu6"])
@pytest.mark.parametrize("pass_", PASSES)
def test_depthwise(
    pass_: str,
    activation: str,
    backend: str,
    gpu_kernels: Callable[[str], AbstractContextManager[str]],
) -> None:
    with gpu_kernels(backend) as device, torch.backends.mkldnn.flags(enabled=False):
        one = example(PROBLEM, activation, pass_, device=device)
        usual = one.run(backend)
        truth, eager = one.reference(torch.float64), one.reference(PROBLEM.dtype)
        launch = table.parameters("depthwise", backend).heuristic(
            PROBLEM, pass_, devices.by_arch("sm_89")
        )
        for results in (usual, one.run(backend, launch)):
            for result, expected, baseline in zip(results, truth, eager, strict=True):
                assert tolerance.check(result, expected, baseline)
        other = example(PROBLEM, activation, pass_, device=device, seed=9).run(backend)
        assert not torch.equal(usual[0], other[0])


def test_depthwise_counts_its_work() -> None:
    x, out = (2, 5, 7, 6), (2, 10, PROBLEM.out_height, PROBLEM.out_width)
    assert PROBLEM.flops() == flops(PROBLEM.kernel, out)
    assert PROBLEM.bytes() == bytes_moved(x, PROBLEM.kernel, out, PROBLEM.dtype)


def test_numbers_are_those_of_their_seed() -> None:
    for draw in (_example.normal, _example.whole):
        first, again, other = (
            draw((2, 3, 4, 5), torch.float16, device="cpu", seed=seed) for seed in (1, 1, 2)
        )
        assert torch.equal(first, again)
        assert not torch.equal(first, other)
        assert first.is_contiguous(memory_format=torch.channels_last)
    assert _example.whole((1000,), torch.float32, device="cpu", seed=0).unique().tolist() == [
        -2, -1, 0, 1, 2,
    ]  # fmt: skip
    drawn = _example.normal((10000,), torch.float32, device="cpu", seed=0)
    assert math.isclose(drawn.std().item(), 1, abs_tol=0.05)


@pytest.mark.parametrize("op", calls.OPS)
def test_the_meta_device_gives_shapes(op: str) -> None:
    for call in (*calls.general_calls([op]), *calls.sample_calls([op])):
        results = inventory.example(call, device="meta").reference(call.problem.dtype)
        assert results
        for result in results:
            assert result.is_meta
            assert result.dtype == call.problem.dtype or result.dtype is torch.float32
            assert result.shape[0] == call.problem.batch or call.pass_ != "forward"
