"""Models by name."""

from __future__ import annotations

import pytest
import torch
import torch.nn as nn

from cvfast.models import default_input_size, get_model, list_models, model_info


def test_list_models_is_sorted_and_takes_a_shell_pattern() -> None:
    names = list_models()
    assert names == sorted(names)
    assert len(set(names)) == len(names)
    assert list_models("mobilenet*") == [
        "mobilenet_v1",
        "mobilenet_v2",
        "mobilenet_v3_large",
        "mobilenet_v3_small",
    ]
    assert list_models("densenet1?1") == ["densenet121", "densenet161"]
    assert list_models("nothing*") == []


@pytest.mark.parametrize("name", list_models())
def test_every_name_builds_in_training_mode(name: str) -> None:
    with torch.device("meta"):
        model = get_model(name)
    assert isinstance(model, nn.Module)
    assert model.training


@pytest.mark.parametrize(
    ("name", "hint"), [("resnet5", "resnet50"), ("mobilenetv2", "mobilenet_v2"), ("u_net", "unet")]
)
def test_an_unknown_name_suggests_close_ones(name: str, hint: str) -> None:
    for call in (get_model, model_info, default_input_size):
        with pytest.raises(ValueError, match=f"unknown model '{name}': did you mean .*{hint}"):
            call(name)


def test_an_unknown_name_like_no_other_points_to_the_list() -> None:
    with pytest.raises(ValueError, match="list_models"):
        get_model("zzz")


def test_an_argument_that_the_network_lacks_is_named() -> None:
    with pytest.raises(TypeError, match="width"):
        get_model("resnet18", width=2)


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("resnet50", 224),
        ("inception_v3", 299),
        ("unet", 256),
        ("fcn_resnet50", 520),
        ("cifar_plain20", 32),
        ("highway19", 32),
        ("efficientnet_lite0", 224),
    ],
)
def test_default_input_size(name: str, size: int) -> None:
    assert default_input_size(name) == (3, size, size)
