"""Python threads that share one optimised network get what each would get alone, to the bit."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor

import cvfast
from cvfast.testing import image, threads

from .test_random_networks import (
    BasicBlock,
    DenseBlock,
    Inception,
    InvertedResidual,
    Network,
    Pool,
    leaves,
)

CALLERS, CALLS = 4, 15
SHAPES = [(1 + i % 3, 3, 24 + 3 * (i % 5), 40 - 2 * (i % 7)) for i in range(12)]
NETWORK = Network(
    channels=3,
    blocks=(
        BasicBlock(out=16, stride=2, bottleneck=False, activation="relu"),
        InvertedResidual(
            expansion=3, out=24, kernel=3, stride=1, gate="hard", activation="hardswish"
        ),
        DenseBlock(layers=2, growth=12, transition=False),
        Pool("max", (3, 3), 2, padded=True, ceil_mode=False, count_include_pad=False),
        Inception(branches=("1", "3", "pool"), width=8),
    ),
    head="both",
    shapes=((1, 24, 40),),
)


@pytest.mark.parametrize(
    ("count", "dtype", "warm"),
    [
        (1, torch.float32, False),  # the first calls, which capture and plan, race
        (2, torch.float32, True),
        (2, torch.bfloat16, False),
    ],
)
def test_threads_with_inputs_and_shapes_of_their_own(
    count: int, dtype: torch.dtype, warm: bool
) -> None:
    model = NETWORK.build()
    inputs = [image(shape, seed=seed) for seed, shape in enumerate(SHAPES)]
    half = dtype if dtype is torch.bfloat16 else None
    together = threading.Barrier(CALLERS)

    def call(optimized: torch.nn.Module, x: Tensor) -> list[Tensor]:
        with torch.no_grad():
            return leaves(optimized(x))

    with threads(count):
        alone = cvfast.optimize(model, inputs[0], dtype=half)
        expected = [call(alone, x) for x in inputs]
        shared = cvfast.optimize(model, inputs[0] if warm else None, dtype=half)

        def work(caller: int) -> None:
            together.wait()
            kept = []
            for i in range(CALLS):
                which = (5 * caller + i) % len(inputs)
                kept.append((which, call(shared, inputs[which])))
            for which, results in kept:  # only now: nobody may have written to them meanwhile
                for actual, alone in zip(results, expected[which], strict=True):
                    assert torch.equal(actual, alone), f"caller {caller}, {SHAPES[which]}"

        with ThreadPoolExecutor(CALLERS) as pool:
            list(pool.map(work, range(CALLERS)))
