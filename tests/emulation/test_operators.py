"""The emulated library as cvfast loads it."""

from __future__ import annotations

import ctypes
from pathlib import Path

import pytest
import torch
from torch import Tensor

from cvfast import extension
from cvfast.ops.depthwise import depthwise

from . import Emulation, build

pytestmark = [
    pytest.mark.skipif(build.compiler() is None, reason="needs g++ or $CXX"),
    pytest.mark.usefixtures("gpu_kernels_on_cpu"),
    pytest.mark.filterwarnings("ignore:no tuned launch parameters"),
]


@pytest.fixture
def emulation(cuda_emulation: str) -> Emulation:
    return Emulation(Path(cuda_emulation))


def gradients(dtype: torch.dtype) -> list[Tensor]:
    """Output and gradients of one layer, on backend "cuda"."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 24, 15, 18, generator=generator).to(dtype, memory_format=torch.channels_last)
    weight = torch.randn(24, 1, 3, 3, generator=generator).to(dtype)
    bias = torch.randn(24, generator=generator).to(dtype)
    leaves = [t.requires_grad_() for t in (x, weight, bias)]
    y = depthwise(x, weight, bias, padding=1, activation="relu6", backend="cuda")
    y.backward(torch.ones_like(y))
    return [y.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)]


def test_cvfast_loads_the_emulation() -> None:
    status = extension.load("cuda")
    assert status, str(status)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_results_do_not_depend_on_the_order_of_threads(
    emulation: Emulation, dtype: torch.dtype
) -> None:
    before = emulation.statistics()
    with emulation.seed(0):
        expected = gradients(dtype)
    assert len(expected) == 4
    assert emulation.statistics().launches >= before.launches + 3
    for seed in (1, 2):
        with emulation.seed(seed):
            for got, want in zip(gradients(dtype), expected, strict=True):
                assert torch.equal(got, want)


def test_errors_reach_python(emulation: Emulation) -> None:
    with emulation.architecture("sm_89"):  # whose limit returns afterwards
        emulation.library.cvfast_emulation_architecture(b"sm_tiny", ctypes.c_size_t(64))
        with pytest.raises(RuntimeError, match="too much shared memory: sm_tiny allows"):
            gradients(torch.float32)
    assert gradients(torch.float32)


def test_an_activation_of_other_kernels_is_refused() -> None:
    x = torch.zeros(1, 16, 4, 4).to(memory_format=torch.channels_last)
    geometry = ([3, 3], [1, 1], [1, 1], [1, 1])
    with pytest.raises(RuntimeError, match="unknown activation 'hardsigmoid'"):
        torch.ops.cvfast.depthwise_cuda(x, torch.zeros(1, 1, 10, 16), *geometry, "hardsigmoid")
