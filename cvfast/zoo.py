"""Networks from anywhere: cvfast's own, torchvision's, timm's or a file's."""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import inspect
import re
import sys
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.nn as nn

from . import models

_FORMS = "NAME (cvfast's own), torchvision:NAME, timm:NAME or path/to/file.py:factory"

# torchvision registers fakes for its C++ operators while it is imported, so their schemas must
# exist; a torchvision built for CUDA cannot load them beside a torch without CUDA.
_TORCHVISION_SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "roi_align(Tensor input, Tensor rois, float spatial_scale, SymInt pooled_height, "
    "SymInt pooled_width, int sampling_ratio, bool aligned) -> Tensor",
    "qroi_align(Tensor input, Tensor rois, float input_scale, int input_zero_point, "
    "float rois_scale, int rois_zero_point, float spatial_scale, SymInt pooled_height, "
    "SymInt pooled_width, int sampling_ratio, bool aligned) -> Tensor",
    "roi_pool(Tensor input, Tensor rois, float spatial_scale, SymInt pooled_height, "
    "SymInt pooled_width) -> (Tensor, Tensor)",
    "ps_roi_align(Tensor input, Tensor rois, float spatial_scale, SymInt pooled_height, "
    "SymInt pooled_width, int sampling_ratio) -> (Tensor, Tensor)",
    "ps_roi_pool(Tensor input, Tensor rois, float spatial_scale, SymInt pooled_height, "
    "SymInt pooled_width) -> (Tensor, Tensor)",
    "deform_conv2d(Tensor input, Tensor weight, Tensor offset, Tensor mask, Tensor bias, "
    "SymInt stride_h, SymInt stride_w, SymInt pad_h, SymInt pad_w, SymInt dilation_h, "
    "SymInt dilation_w, SymInt groups, SymInt offset_groups, bool use_mask) -> Tensor",
)
_torchvision_library: torch.library.Library | None = None  # schemas live as long as this does


def import_torchvision() -> ModuleType:
    """Import torchvision, also where its C++ operators do not load (it has no CPU build of late).

    Its networks need none of them; detection operators then raise when they are called.

    Raises:
        ModuleNotFoundError: torchvision is not installed.
    """
    global _torchvision_library
    if "torchvision" in sys.modules:
        return sys.modules["torchvision"]
    spec = importlib.util.find_spec("torchvision")
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(
            "torchvision is not installed: pip install torchvision", name="torchvision"
        )
    if _torchvision_library is None and not _loads_any(Path(spec.origin).parent.glob("_C*.so")):
        _torchvision_library = torch.library.Library("torchvision", "DEF")
        for schema in _TORCHVISION_SCHEMAS:
            _torchvision_library.define(schema)
    return importlib.import_module("torchvision")


def _loads_any(libraries: Iterable[Path]) -> bool:
    for library in libraries:
        try:
            torch.ops.load_library(str(library))
        except OSError:
            continue
        return True
    return False


def load_model(spec: str, **kwargs: Any) -> nn.Module:
    """Build the network that `spec` names, with random weights, in evaluation mode.

    Args:
        spec: ``NAME`` of `cvfast.list_models`; ``torchvision:NAME``; ``timm:NAME``; or
            ``path/to/file.py:factory``, a callable in that file that returns a module.
        **kwargs: passed to the network's factory.

    Raises:
        ValueError: `spec` has none of these forms, or names no network.
        ModuleNotFoundError: torchvision or timm is needed and not installed.
        FileNotFoundError: the file does not exist.
        AttributeError: the file has no such factory.
        TypeError: the factory is not callable, or returns no `torch.nn.Module`.
    """
    source, colon, name = spec.rpartition(":")
    if not spec.strip() or (colon and not (source and name)):
        raise ValueError(f"{spec!r} names no model: use {_FORMS}")
    if not colon:
        model = _from_registry(spec, kwargs)
    elif source == "torchvision":
        model = _from_torchvision(name, kwargs)
    elif source == "timm":
        model = _from_timm(name, kwargs)
    elif source.endswith(".py"):
        model = _from_file(Path(source), name, kwargs)
    else:
        raise ValueError(f"unknown source {source!r} in {spec!r}: use {_FORMS}")
    return model.eval()


def _from_registry(name: str, kwargs: dict[str, Any]) -> nn.Module:
    if name.endswith(".py"):
        raise ValueError(f"{name!r} lacks the factory: use {name}:factory")
    return models.get_model(name, **kwargs)


def _unknown(library: str, name: str, names: Iterable[str]) -> ValueError:
    close = difflib.get_close_matches(name, list(names), n=3, cutoff=0.5)
    hint = f"; did you mean {', '.join(close)}?" if close else ""
    return ValueError(f"{library} has no model {name!r}{hint}")


def _from_torchvision(name: str, kwargs: dict[str, Any]) -> nn.Module:
    torchvision = import_torchvision()
    names = torchvision.models.list_models()
    if name not in names:
        raise _unknown("torchvision", name, names)
    parameters = inspect.signature(torchvision.models.get_model_builder(name)).parameters
    # By default some segmentation and detection networks download their backbone's weights.
    for weights in ("weights", "weights_backbone"):
        if weights in parameters:
            kwargs.setdefault(weights, None)
    if name in ("googlenet", "inception_v3"):
        kwargs.setdefault("init_weights", True)
    return torchvision.models.get_model(name, **kwargs)


def _from_timm(name: str, kwargs: dict[str, Any]) -> nn.Module:
    if importlib.util.find_spec("timm") is None:
        raise ModuleNotFoundError("timm is not installed: pip install timm", name="timm")
    import_torchvision()
    timm = importlib.import_module("timm")
    if not timm.is_model(name):
        raise _unknown("timm", name, timm.list_models())
    return timm.create_model(name, pretrained=False, **kwargs)


def _from_file(path: Path, name: str, kwargs: dict[str, Any]) -> nn.Module:
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}: check the path before ':{name}'")
    module_name = "_cvfast_model_" + re.sub(r"\W", "_", str(path.resolve()))
    spec = importlib.util.spec_from_file_location(module_name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module  # so that its classes can be pickled
    spec.loader.exec_module(module)
    if not hasattr(module, name):
        public = sorted(n for n, v in vars(module).items() if n[0] != "_" and callable(v))
        raise AttributeError(f"{path} has no {name!r}; it has {', '.join(public) or 'nothing'}")
    factory = getattr(module, name)
    if not callable(factory):
        raise TypeError(f"{path}:{name} is not callable: name a function or class that builds it")
    model = factory(**kwargs)
    if not isinstance(model, nn.Module):
        raise TypeError(f"{path}:{name} returned {type(model).__name__}, not a torch.nn.Module")
    return model


@torch.no_grad()
def calibrate_batch_norms(model: nn.Module, x: torch.Tensor) -> nn.Module:
    """Give every batch norm of `model` the statistics that its input has for the images `x`.

    With the mean 0 and variance 1 of a fresh network activations die out or explode from layer to
    layer, and its result says little about whether it was computed right. Uses one forward pass;
    everything but the batch norms stays in evaluation mode. Returns `model`.

    Args:
        model: in evaluation mode.
        x: [N, C, H, W]; N > 1, so that 1×1 maps have a variance.
    """
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d) and m.track_running_stats]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.train()
        norm.momentum = None  # the cumulative average, which after one pass is that pass
    try:
        model(x)
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.eval()
            norm.momentum = momentum
    return model
