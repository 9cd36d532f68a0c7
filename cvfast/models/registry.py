"""The reference networks by name."""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch.nn as nn

from .densenet import densenet121, densenet161, densenet169, densenet201
from .efficientnet_lite import efficientnet_lite0
from .fcn import fcn_resnet50
from .googlenet import googlenet, googlenet_5x5
from .highway import highway19, highway32
from .inception import inception_v3
from .mobilenet import mobilenet_v1, mobilenet_v2, mobilenet_v3_large, mobilenet_v3_small
from .resnet import (
    cifar_plain,
    cifar_resnet,
    plain18,
    plain34,
    resnet18,
    resnet34,
    resnet50,
    resnet101,
    resnet152,
)
from .unet import unet


@dataclass(frozen=True)
class ModelInfo:
    """A registered network.

    Attributes:
        factory: builds the network from keyword arguments.
        input_size: height and width in pixels that the publication uses; channels are 3.
    """

    factory: Callable[..., nn.Module]
    input_size: int = 224


_MODELS: dict[str, ModelInfo] = {
    "resnet18": ModelInfo(resnet18),
    "resnet34": ModelInfo(resnet34),
    "resnet50": ModelInfo(resnet50),
    "resnet101": ModelInfo(resnet101),
    "resnet152": ModelInfo(resnet152),
    "plain18": ModelInfo(plain18),
    "plain34": ModelInfo(plain34),
    **{f"cifar_resnet{d}": ModelInfo(partial(cifar_resnet, d), 32) for d in (20, 32, 44, 56, 110)},
    **{f"cifar_plain{d}": ModelInfo(partial(cifar_plain, d), 32) for d in (20, 32, 44, 56)},
    "highway19": ModelInfo(highway19, 32),
    "highway32": ModelInfo(highway32, 32),
    "googlenet": ModelInfo(googlenet),
    "googlenet_5x5": ModelInfo(googlenet_5x5),
    "inception_v3": ModelInfo(inception_v3, 299),
    "mobilenet_v1": ModelInfo(mobilenet_v1),
    "mobilenet_v2": ModelInfo(mobilenet_v2),
    "mobilenet_v3_large": ModelInfo(mobilenet_v3_large),
    "mobilenet_v3_small": ModelInfo(mobilenet_v3_small),
    "densenet121": ModelInfo(densenet121),
    "densenet161": ModelInfo(densenet161),
    "densenet169": ModelInfo(densenet169),
    "densenet201": ModelInfo(densenet201),
    "efficientnet_lite0": ModelInfo(efficientnet_lite0),
    "unet": ModelInfo(unet, 256),
    "fcn_resnet50": ModelInfo(fcn_resnet50, 520),
}


def model_info(name: str) -> ModelInfo:
    """The entry of a registered network.

    Raises:
        ValueError: no network has this name; the message lists the closest ones.
    """
    if name not in _MODELS:
        close = difflib.get_close_matches(name, _MODELS, n=3, cutoff=0.5)
        hint = f"did you mean {', '.join(close)}?" if close else "list_models() names them all"
        raise ValueError(f"unknown model {name!r}: {hint}")
    return _MODELS[name]


def get_model(name: str, **kwargs: Any) -> nn.Module:
    """Build a network by name, with freshly initialised weights, in training mode.

    Args:
        name: one of `list_models()`.
        **kwargs: passed to the network: ``num_classes``, ``width_mult`` of the MobileNets,
            ``aux_logits`` of the Inceptions, ``weights="imagenet"`` of efficientnet_lite0, ...

    Raises:
        ValueError: no network has this name.
        TypeError: the network does not take an argument.
    """
    return model_info(name).factory(**kwargs)


def list_models(pattern: str | None = None) -> list[str]:
    """Names of the networks, sorted; those matching a shell pattern such as ``"mobilenet*"``."""
    return sorted(n for n in _MODELS if pattern is None or fnmatch.fnmatchcase(n, pattern))


def default_input_size(name: str) -> tuple[int, int, int]:
    """(channels, height, width) that a network was published for.

    Raises:
        ValueError: no network has this name.
    """
    size = model_info(name).input_size
    return (3, size, size)
