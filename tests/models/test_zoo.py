"""load_model: the four forms of a specification and what goes wrong with each."""

from __future__ import annotations

import importlib.util
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn as nn

from cvfast import zoo

needs_torchvision = pytest.mark.skipif(
    importlib.util.find_spec("torchvision") is None, reason="torchvision is not installed"
)
needs_timm = pytest.mark.skipif(
    importlib.util.find_spec("timm") is None, reason="timm is not installed"
)


@pytest.fixture
def model_file(tmp_path: Path) -> Path:
    path = tmp_path / "my net.py"
    path.write_text(
        "import torch.nn as nn\n"
        "class Net(nn.Sequential):\n"
        "    def __init__(self, width=4):\n"
        "        super().__init__(nn.Conv2d(3, width, 1))\n"
        "def number():\n"
        "    return 7\n"
        "CONSTANT = 7\n"
    )
    return path


def test_a_registry_name() -> None:
    model = zoo.load_model("mobilenet_v3_small", num_classes=7)
    assert not model.training
    assert model(torch.randn(1, 3, 32, 32)).shape == (1, 7)


@needs_torchvision
@pytest.mark.parametrize("name", ["squeezenet1_1", "googlenet", "lraspp_mobilenet_v3_large"])
def test_a_torchvision_name(name: str, recwarn: pytest.WarningsRecorder) -> None:
    model = zoo.load_model(f"torchvision:{name}")
    assert not model.training
    assert type(model).__module__.startswith("torchvision.")
    assert not [w for w in recwarn if issubclass(w.category, FutureWarning)]


@needs_timm
def test_a_timm_name() -> None:
    model = zoo.load_model("timm:mobilenetv3_small_050", num_classes=7)
    assert not model.training
    assert model(torch.randn(1, 3, 64, 64)).shape == (1, 7)


def test_a_factory_in_a_file(model_file: Path) -> None:
    model = zoo.load_model(f"{model_file}:Net", width=5)
    assert not model.training
    assert model(torch.randn(1, 3, 2, 2)).shape == (1, 5, 2, 2)
    copy = pickle.loads(pickle.dumps(model))
    assert torch.equal(copy[0].weight, model[0].weight)


@pytest.mark.parametrize("spec", ["", " ", ":", "torchvision:", ":resnet18"])
def test_an_empty_part_is_refused(spec: str) -> None:
    with pytest.raises(ValueError, match="names no model: use NAME"):
        zoo.load_model(spec)


def test_an_unknown_source_is_refused() -> None:
    with pytest.raises(ValueError, match="unknown source 'keras' in 'keras:resnet50': use NAME"):
        zoo.load_model("keras:resnet50")


def test_an_unknown_registry_name_suggests() -> None:
    with pytest.raises(ValueError, match=r"did you mean .*resnet18"):
        zoo.load_model("resnet17")


@needs_torchvision
def test_an_unknown_torchvision_name_suggests() -> None:
    with pytest.raises(ValueError, match=r"torchvision has no model 'resnet17'; .*resnet18"):
        zoo.load_model("torchvision:resnet17")


@needs_timm
def test_an_unknown_timm_name_suggests() -> None:
    with pytest.raises(ValueError, match=r"timm has no model 'resnet17'; .*resnet18"):
        zoo.load_model("timm:resnet17")


@pytest.mark.parametrize("library", ["torchvision", "timm"])
def test_a_missing_library_is_named(library: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.delitem(sys.modules, library, raising=False)
    with pytest.raises(ModuleNotFoundError, match=f"pip install {library}"):
        zoo.load_model(f"{library}:resnet18")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"absent\.py"):
        zoo.load_model(f"{tmp_path / 'absent.py'}:build")


def test_a_file_without_factory_is_refused(model_file: Path) -> None:
    with pytest.raises(ValueError, match="lacks the factory"):
        zoo.load_model(str(model_file))


def test_a_missing_factory_lists_those_there(model_file: Path) -> None:
    with pytest.raises(AttributeError, match="has no 'Nett'; it has Net, number"):
        zoo.load_model(f"{model_file}:Nett")


def test_a_factory_must_be_callable(model_file: Path) -> None:
    with pytest.raises(TypeError, match="CONSTANT is not callable"):
        zoo.load_model(f"{model_file}:CONSTANT")


def test_a_factory_must_return_a_module(model_file: Path) -> None:
    with pytest.raises(TypeError, match=r"returned int, not a torch\.nn\.Module"):
        zoo.load_model(f"{model_file}:number")


def test_importing_the_references_needs_torch_alone() -> None:
    code = (
        "import sys, cvfast.models, cvfast.zoo\n"
        "optional = {'torchvision', 'timm', 'skimage', 'PIL', 'triton', 'matplotlib', 'rich'}\n"
        "print(sorted(optional & set(sys.modules)))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "[]"


@needs_torchvision
def test_torchvision_is_imported_once_with_usable_networks() -> None:
    torchvision = zoo.import_torchvision()
    assert zoo.import_torchvision() is torchvision is sys.modules["torchvision"]
    assert isinstance(torchvision.models.resnet18(), nn.Module)
