"""Outputs, batch statistics and gradients against torchvision and timm, where they import."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

from cvfast import zoo
from cvfast.models import get_model, list_models

try:
    torchvision = zoo.import_torchvision()
except ModuleNotFoundError:
    pytest.skip("torchvision is not installed", allow_module_level=True)

SIZES = {"inception_v3": 299}
NAMES = [n for n in list_models() if n in torchvision.models.list_models()]


def tensors(output: Tensor | tuple[Tensor, ...] | dict[str, Tensor]) -> list[Tensor]:
    if isinstance(output, Tensor):
        return [output]
    return list(output.values() if isinstance(output, dict) else output)


def assert_float32_equal(actual: Tensor, expected: Tensor) -> None:
    # Both run the same ATen operators in the same order: only a change of kernel may show.
    scale = expected.abs().max()
    assert torch.isfinite(scale)
    assert scale > 0
    assert (actual - expected).abs().max() <= 1e-6 * scale


def test_every_network_of_torchvision_is_covered() -> None:
    assert len(NAMES) == 15


@pytest.mark.parametrize("name", NAMES)
def test_agrees_with_torchvision(name: str) -> None:
    expected = zoo.load_model(f"torchvision:{name}")
    actual = get_model(name)
    actual.load_state_dict(expected.state_dict(), strict=True)
    size = SIZES.get(name, 64)
    x = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1))
    outputs = []
    for model in (actual, expected):
        torch.manual_seed(2)  # for dropout
        outputs.append(tensors(model.train()(x)))
    for a, e in zip(*outputs, strict=True):
        assert_float32_equal(a, e)
    for key, value in expected.state_dict().items():
        if "running" in key:  # momentum
            torch.testing.assert_close(actual.state_dict()[key], value, rtol=1e-5, atol=1e-30)
    with torch.inference_mode():
        outputs = [tensors(model.eval()(x)) for model in (actual, expected)]
    for a, e in zip(*outputs, strict=True):
        assert_float32_equal(a, e)


@pytest.mark.parametrize("name", ["googlenet", "inception_v3"])
def test_transform_input_agrees_with_torchvision(name: str) -> None:
    expected = zoo.load_model(f"torchvision:{name}", transform_input=True)
    actual = get_model(name, transform_input=True).eval()
    actual.load_state_dict(expected.state_dict())
    x = torch.randn(1, 3, 96, 96)
    with torch.inference_mode():
        assert_float32_equal(actual(x), expected(x))


def test_memory_efficient_densenet_has_the_same_gradients() -> None:
    plain = get_model("densenet121")
    frugal = get_model("densenet121", memory_efficient=True)
    frugal.load_state_dict(plain.state_dict())
    x = torch.randn(2, 3, 64, 64)
    for model in (plain, frugal):
        model(x).square().mean().backward()
    for (name, p), q in zip(plain.named_parameters(), frugal.parameters(), strict=True):
        torch.testing.assert_close(q.grad, p.grad, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("size", [224, 225, 97])
def test_efficientnet_lite0_agrees_with_timm(size: int) -> None:
    pytest.importorskip("timm")
    expected = zoo.load_model("timm:tf_efficientnet_lite0")
    actual = get_model("efficientnet_lite0").eval()
    # The two name their layers differently, in the same order.
    values = [copy.deepcopy(v) for v in expected.state_dict().values()]
    actual.load_state_dict(dict(zip(actual.state_dict(), values, strict=True)))
    x = torch.randn(1, 3, size, size)
    with torch.inference_mode():
        assert_float32_equal(actual(x), expected(x))
