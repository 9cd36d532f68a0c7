"""What happens without the compiled extension: everything imports and runs on the reference."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from cvfast import backends, env, extension

USE = """
import warnings
import torch, cvfast
from cvfast import backends, extension
from cvfast.ops import depthwise

x = torch.randn(1, 8, 5, 5).to(memory_format=torch.channels_last)
w = torch.randn(8, 1, 3, 3)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for _ in range(3):
        y = depthwise(x, w, padding=1, activation="relu")
assert torch.equal(y, torch.conv2d(x, w, padding=1, groups=8).relu())
z = torch.ops.cvfast.depthwise(x, w, None, [1, 1], [1, 1], [1, 1], "relu")
assert torch.equal(y, z)
try:
    depthwise(x, w, backend="cpu")
except backends.Unsupported as error:
    assert error.reason.code == "no_extension"
    print(error)
print([str(w.message) for w in caught])
"""


def test_disabled_extension_warns_once_and_computes_on_the_reference() -> None:
    result = subprocess.run(
        [sys.executable, "-c", USE],
        env={**os.environ, env.DISABLE_EXTENSION.name: "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    error, warned = result.stdout.splitlines()
    assert "backend 'cpu' cannot serve" in error
    assert warned.count("reference implementation") == 1
    assert "unset CVFAST_DISABLE_EXTENSION" in warned


@pytest.fixture
def elsewhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """extension.py looks for its shared objects in an empty package folder."""
    package = tmp_path / "site-packages" / "cvfast"
    package.mkdir(parents=True)
    monkeypatch.setattr(extension, "__file__", str(package / "extension.py"))
    extension._load.cache_clear()
    yield package
    extension._load.cache_clear()


def test_missing_shared_object_names_the_command_that_builds_it(elsewhere: Path) -> None:
    status = extension.load("cpu")
    assert not status
    assert status.reason == "not built"
    assert status.mend == (
        "pip install --no-build-isolation --no-binary cvfast --force-reinstall --no-deps cvfast"
    )
    (elsewhere.parent / "setup.py").touch()
    extension._load.cache_clear()
    assert extension.load("cpu").mend == "pip install --no-build-isolation -e ."


def test_broken_shared_object_says_what_the_loader_said(elsewhere: Path) -> None:
    (elsewhere / "_C_cpu.so").write_bytes(b"not an ELF file")
    status = extension.load("cpu")
    assert not status
    assert "failed to load" in status.reason
    assert "_C_cpu.so" in status.reason


@pytest.mark.skipif(torch.version.cuda is not None, reason="PyTorch is a CUDA build")
def test_cuda_extension_needs_a_cuda_build_of_pytorch() -> None:
    assert extension.load("cuda").reason == "PyTorch is a CPU build"


def test_import_is_lazy() -> None:
    code = (
        "import sys, time, torch; start = time.perf_counter(); before = set(sys.modules);"
        "import cvfast; elapsed = time.perf_counter() - start;"
        "optional = {'triton', 'torchvision', 'timm', 'rich', 'typer', 'onnx', 'matplotlib'};"
        "assert not optional & (set(sys.modules) - before), optional & set(sys.modules);"
        "assert elapsed < 0.2, elapsed;"
        "import cvfast.ops; assert 'triton' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_environment_variables_are_typed_and_documented(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in env.VARIABLES:
        assert variable.name.startswith("CVFAST_")
        assert variable.doc.endswith(".")
        monkeypatch.delenv(variable.name, raising=False)
        assert variable.get() == variable.default
        monkeypatch.setenv(variable.name, "nonsense")
        with pytest.raises(ValueError, match=variable.name):
            variable.get()


def test_reasons_are_stable_codes_and_readable_text() -> None:
    x = torch.zeros(1, 4, 3, 3)
    reason = backends.supports("depthwise", "cpu", x)
    assert reason is not None
    assert reason.code == "layout"
    assert str(reason).endswith("[layout]")
    assert backends.supports("depthwise", "reference", x) is None
    with pytest.raises(ValueError, match="unknown backend"):
        backends.supports("depthwise", "fpga", x)
    assert backends.supports("no_such_op", "cpu", x).code == "no_backend"
