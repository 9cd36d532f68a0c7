from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import cvfast
from cvfast import env, tolerance
from cvfast.optimize import OptimizedModule


class ConvNet(nn.Module):
    """A stem, a depthwise layer, a residual pair and a classifier: every pattern once."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.stem = conv_bn(3, width, 3, stride=2, padding=1)
        self.depthwise = conv_bn(width, width, 3, padding=1, groups=width, activation=nn.ReLU6)
        self.expand = nn.Sequential(conv_bn(width, 2 * width, 1), nn.Conv2d(2 * width, width, 1))
        self.head = nn.Linear(width, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.depthwise(self.stem(x))
        x = torch.relu(x + self.expand(x))
        return self.head(x.mean((2, 3)))


def conv_bn(
    c: int, k: int, size: int, *, activation: Any = nn.ReLU, **kwargs: Any
) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(c, k, size, bias=False, **kwargs), nn.BatchNorm2d(k), activation(inplace=True)
    )


def randomize(model: nn.Module, seed: int = 0) -> nn.Module:
    """Statistics and affine parameters away from 0 and 1, so that a wrong fold shows; eval mode."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            for tensor, low, high in (
                (module.running_mean, -0.5, 0.5),
                (module.running_var, 0.5, 2.0),
                (module.weight, 0.5, 1.5),
                (module.bias, -0.5, 0.5),
            ):
                if tensor is not None:
                    tensor.data.uniform_(low, high, generator=generator)
    return model.eval()


def check_equal(optimized: nn.Module, model: nn.Module, *args: Any, **kwargs: Any) -> None:
    """Same structure and dtypes, and values within the policy for networks."""
    with torch.no_grad():
        actual, spec = pytree.tree_flatten(optimized(*args, **kwargs))
        baseline, expected_spec = pytree.tree_flatten(model(*args, **kwargs))
        double = pytree.tree_map(
            lambda t: t.double() if isinstance(t, Tensor) and t.is_floating_point() else t,
            (args, kwargs),
        )
        truth = pytree.tree_leaves(copy.deepcopy(model).double()(*double[0], **double[1]))
    assert spec == expected_spec
    for a, b, t in zip(actual, baseline, truth, strict=True):
        if isinstance(a, Tensor):
            verdict = tolerance.check(a, t, b, k=tolerance.K_NETWORK)
            assert verdict.ok, str(verdict)
            assert a.stride() == b.stride()
        else:
            assert a == b


@pytest.fixture(autouse=True)
def measured_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where this test's ``select="measure"`` keeps its choices; there is no such file yet."""
    path = tmp_path / "measured" / "choices.json"
    monkeypatch.setenv(env.MEASURED.name, str(path))
    return path


@pytest.fixture
def net() -> nn.Module:
    torch.manual_seed(0)
    return randomize(ConvNet())


@pytest.fixture
def optimize_and_check() -> Callable[..., OptimizedModule]:
    """Optimise on the first input, then compare on it and on the others."""

    def run(model: nn.Module, *inputs: Any, **options: Any) -> OptimizedModule:
        optimized = cvfast.optimize(model, inputs[0], **options)
        assert optimized.report.verification is not None and optimized.report.verification.ok
        for x in inputs:
            check_equal(optimized, model, *(x if isinstance(x, tuple) else (x,)))
        return optimized

    return run


def reasons(optimized: OptimizedModule) -> dict[str, str]:
    """Module name -> reason code of what was not fused."""
    return {row.module: row.reason for row in optimized.report.rows if row.status != "fused"}


def patterns(optimized: OptimizedModule) -> list[str]:
    """Patterns of what was fused, in order."""
    return [row.pattern for row in optimized.report.fused]
