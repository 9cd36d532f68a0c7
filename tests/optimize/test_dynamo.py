"""``torch.compile(model, backend="cvfast")``."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import nn

from cvfast.optimize import dynamo
from cvfast.optimize.module import OptimizedModule

from .conftest import ConvNet, randomize


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def bound(monkeypatch: pytest.MonkeyPatch) -> list[OptimizedModule]:
    """Every network that the backend optimised."""
    made: list[OptimizedModule] = []

    def record(*args: object) -> OptimizedModule:
        made.append(OptimizedModule(*args))
        return made[-1]

    monkeypatch.setattr(dynamo, "OptimizedModule", record)
    return made


def test_the_name_is_registered_by_the_installed_package() -> None:
    from importlib.metadata import entry_points

    (found,) = entry_points(group="torch_dynamo_backends", name="cvfast")
    assert found.load() is dynamo.cvfast


def test_inference_runs_on_fused_kernels_at_any_size(
    net: nn.Module, bound: list[OptimizedModule]
) -> None:
    compiled = torch.compile(net, backend=dynamo.cvfast, fullgraph=True)
    with torch.no_grad():
        for shape in ((1, 3, 16, 16), (2, 3, 20, 16), (2, 3, 24, 18)):
            x = torch.randn(shape)
            torch.testing.assert_close(compiled(x), net(x))
    assert all(module.report.coverage == 1.0 for module in bound)
    assert bound


def test_written_and_replaced_weights_are_followed(
    net: nn.Module, bound: list[OptimizedModule]
) -> None:
    compiled = torch.compile(net, backend=dynamo.cvfast)
    x = torch.randn(1, 3, 16, 16)
    with torch.no_grad():
        compiled(x)
        for parameter in net.parameters():
            parameter.mul_(1.5)
        torch.testing.assert_close(compiled(x), net(x))
        net.load_state_dict(randomize(ConvNet(), seed=7).state_dict())
        torch.testing.assert_close(compiled(x), net(x))
        net.head.weight = nn.Parameter(torch.randn(5, 16))
        torch.testing.assert_close(compiled(x), net(x))


def test_instances_of_one_class_are_bound_once_each(bound: list[OptimizedModule]) -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(4, 4, 3, padding=1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.conv(x).relu()

    blocks = nn.Sequential(*(Block() for _ in range(3))).eval()
    compiled = nn.Sequential(*(torch.compile(block, backend=dynamo.cvfast) for block in blocks))
    x = torch.randn(1, 4, 8, 8)
    with torch.no_grad():
        for _ in range(3):
            torch.testing.assert_close(compiled(x), blocks(x))
    assert len(bound) == 3


def test_training_gets_its_gradients(net: nn.Module, bound: list[OptimizedModule]) -> None:
    x = torch.randn(4, 3, 16, 16)
    net.train()
    compiled = torch.compile(net, backend=dynamo.cvfast)
    compiled(x).square().sum().backward()
    ours = {name: p.grad.clone() for name, p in net.named_parameters()}
    net.zero_grad()
    net(x).square().sum().backward()
    for name, parameter in net.named_parameters():
        torch.testing.assert_close(ours[name], parameter.grad, rtol=1e-4, atol=1e-5)
    assert not bound


def test_batch_norm_in_training_mode_without_gradients_updates_once(net: nn.Module) -> None:
    net.train()
    twin = ConvNet()
    twin.load_state_dict(net.state_dict())
    x = torch.randn(4, 3, 16, 16)
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(net, backend=dynamo.cvfast)(x), twin(x))
    for (name, ours), theirs in zip(net.named_buffers(), twin.buffers(), strict=True):
        torch.testing.assert_close(ours, theirs, msg=name)
