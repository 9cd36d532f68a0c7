"""State dicts against torchvision's (golden file) and parameter counts against the papers'."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn as nn

from cvfast.models import MobileNetV1, get_model

GOLDEN = json.loads(Path(__file__).with_name("torchvision_state_dicts.json").read_text())


def parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def golden_shapes(entries: dict[str, list[int]]) -> Iterator[tuple[str, list[int]]]:
    for key, shape in entries.items():
        if not key.endswith(".*"):
            yield key, shape
            continue
        for tensor in ("weight", "bias", "running_mean", "running_var"):
            yield key[:-1] + tensor, shape
        yield key[:-1] + "num_batches_tracked", []


@pytest.mark.parametrize(
    "network", GOLDEN["networks"], ids=lambda n: "-".join([n["name"], *map(str, n["kwargs"])])
)
def test_keys_shapes_and_order_are_torchvisions(network: dict[str, Any]) -> None:
    with torch.device("meta"):
        model = get_model(network["name"], **network["kwargs"])
    shapes = [(key, list(tensor.shape)) for key, tensor in model.state_dict().items()]
    assert shapes == list(golden_shapes(network["state_dict"]))


# torchvision's documentation of its weights ("num_params"); with the auxiliary heads where the
# published weights have them.
TORCHVISION_COUNTS = {
    "resnet18": 11_689_512,
    "resnet34": 21_797_672,
    "resnet50": 25_557_032,
    "resnet101": 44_549_160,
    "resnet152": 60_192_808,
    "inception_v3": 27_161_264,
    "mobilenet_v2": 3_504_872,
    "mobilenet_v3_large": 5_483_032,
    "mobilenet_v3_small": 2_542_856,
    "densenet121": 7_978_856,
    "densenet161": 28_681_000,
    "densenet169": 14_149_480,
    "densenet201": 20_013_928,
}


@pytest.mark.parametrize("name", TORCHVISION_COUNTS)
def test_parameter_count_is_torchvisions(name: str) -> None:
    with torch.device("meta"):
        assert parameters(get_model(name)) == TORCHVISION_COUNTS[name]


def test_parameter_counts_with_and_without_auxiliary_heads() -> None:
    with torch.device("meta"):
        assert parameters(get_model("googlenet", aux_logits=False)) == 6_624_904
        assert parameters(get_model("googlenet")) == 13_004_888
        assert parameters(get_model("fcn_resnet50", aux_loss=True)) == 35_322_218


# In millions, as the papers print them.
PUBLISHED_MILLIONS = {
    "cifar_resnet20": (0.27, 0.005),  # arXiv:1512.03385, Table 6
    "cifar_resnet32": (0.46, 0.005),
    "cifar_resnet44": (0.66, 0.005),
    "cifar_resnet56": (0.85, 0.005),
    "cifar_resnet110": (1.7, 0.05),
    "highway19": (2.3, 0.05),  # arXiv:1512.03385, Table 6
    "highway32": (1.25, 0.01),
    "mobilenet_v1": (4.2, 0.05),  # arXiv:1704.04861, Table 6
    "efficientnet_lite0": (4.7, 0.05),  # tensorflow/tpu, efficientnet/lite
}


@pytest.mark.parametrize("name", PUBLISHED_MILLIONS)
def test_parameter_count_is_the_published_one(name: str) -> None:
    millions, rounding = PUBLISHED_MILLIONS[name]
    with torch.device("meta"):
        assert parameters(get_model(name)) / 1e6 == pytest.approx(millions, abs=rounding)


@pytest.mark.parametrize(
    ("width_mult", "millions"), [(1.0, 4.2), (0.75, 2.6), (0.5, 1.3), (0.25, 0.5)]
)
def test_mobilenet_v1_width_multiplier(width_mult: float, millions: float) -> None:
    with torch.device("meta"):  # arXiv:1704.04861, Table 6
        count = parameters(MobileNetV1(width_mult=width_mult))
    assert round(count / 1e6, 1) == millions


@pytest.mark.parametrize("depth", [20, 32, 44, 56])
def test_a_plain_cifar_network_has_the_parameters_of_its_resnet(depth: int) -> None:
    with torch.device("meta"):  # option A shortcuts are free of parameters
        plain, resnet = get_model(f"cifar_plain{depth}"), get_model(f"cifar_resnet{depth}")
    shapes = [{k: v.shape for k, v in m.state_dict().items()} for m in (plain, resnet)]
    assert shapes[0] == shapes[1]


@pytest.mark.parametrize("depth", [18, 34])
def test_a_plain_network_lacks_only_the_projections(depth: int) -> None:
    with torch.device("meta"):
        plain, resnet = get_model(f"plain{depth}"), get_model(f"resnet{depth}")
    missing = set(resnet.state_dict()) - set(plain.state_dict())
    assert missing
    assert all(".downsample." in key for key in missing)
    assert set(plain.state_dict()) < set(resnet.state_dict())


@pytest.mark.parametrize(
    ("name", "layers"),
    [
        ("resnet18", 18),
        ("plain34", 34),
        ("resnet152", 152),
        ("cifar_resnet56", 56),
        ("highway19", 19),
        ("highway32", 32),
        ("densenet121", 121),
        ("googlenet", 22),
    ],
)
def test_the_depth_is_the_one_in_the_name(name: str, layers: int) -> None:
    kwargs = {"aux_logits": False} if name == "googlenet" else {}
    with torch.device("meta"):
        model = get_model(name, **kwargs)
    depth = 0
    inception_depth = 2  # a reduction and the convolution after it
    for path, m in model.named_modules():
        if "inception" in path:
            depth += inception_depth if path.endswith("branch1") else 0
        elif isinstance(m, (nn.Conv2d, nn.Linear)) and "downsample" not in path:
            depth += "gate" not in path
    assert depth == layers
