from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import pytest
import torch

from cvfast import env, extension

EMULATION = Path(__file__).parent / "emulation" / "build.py"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        skip = pytest.mark.skip(reason="needs a CUDA device")
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(skip)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def cpu_extension() -> None:
    """For tests of compiled kernels: without the extension they fail, and say what to do."""
    status = extension.load("cpu")
    if not status:
        pytest.fail(str(status))


@pytest.fixture(scope="session")
def cuda_emulation() -> str:
    """Path of the CUDA kernels compiled for the host."""
    build = subprocess.run(
        [sys.executable, str(EMULATION)], capture_output=True, text=True, check=False
    )
    assert build.returncode == 0, build.stderr
    return build.stdout.strip()


@pytest.fixture(scope="session")
def gpu_kernels(request: pytest.FixtureRequest) -> Callable[[str], AbstractContextManager[str]]:
    """Context manager: the kernels of backend "triton" or "cuda" can be called, and on what device.

    That is a GPU where there is one; else they are interpreted or emulated on the CPU.
    """

    @contextmanager
    def ready(backend: str) -> Iterator[str]:
        if torch.cuda.is_available():
            yield "cuda"
            return
        with pytest.MonkeyPatch.context() as patch:
            if backend == "triton":
                patch.setenv("TRITON_INTERPRET", "1")
            else:
                path = request.getfixturevalue("cuda_emulation")
                patch.setenv(env.CUDA_EMULATION.name, path)
            yield "cpu"

    return ready


@pytest.fixture
def gpu_kernels_on_cpu(monkeypatch: pytest.MonkeyPatch, cuda_emulation: str) -> None:
    """Backends "triton" and "cuda" serve CPU tensors."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setenv(env.CUDA_EMULATION.name, cuda_emulation)
