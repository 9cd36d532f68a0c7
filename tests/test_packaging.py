"""The wheel, and what the build says where it cannot build."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def run(*command: str | Path, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        list(map(str, command)),
        cwd=cwd,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.slow
def test_wheel_runs_from_another_folder(tmp_path: Path) -> None:
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check")
    wheels, site = tmp_path / "wheels", tmp_path / "site"
    command = ("wheel", "--no-build-isolation", "--no-deps", "-w", wheels, ROOT)
    built = run(*pip, *command, cwd=tmp_path)
    assert built.returncode == 0, built.stdout + built.stderr
    (wheel,) = wheels.glob("cvfast-*.whl")
    assert "-cp310-abi3-" in wheel.name
    names = zipfile.ZipFile(wheel).namelist()
    assert {"cvfast/_C_cpu.so", "cvfast/kernels/depthwise.py"} <= set(names)
    assert not [name for name in names if name.startswith(("tests/", "benchmarks/", "csrc/"))]

    installed = run(*pip, "install", "--no-deps", "--target", site, wheel, cwd=tmp_path)
    assert installed.returncode == 0, installed.stderr
    code = (
        "import cvfast, torch; from cvfast.ops import depthwise;"
        "x = torch.randn(1, 8, 6, 6).to(memory_format=torch.channels_last);"
        "y = depthwise(x, torch.randn(8, 1, 3, 3), padding=1, backend='cpu');"
        "print(cvfast.__file__, cvfast.__version__)"
    )
    used = run(sys.executable, "-c", code, cwd=tmp_path, PYTHONPATH=str(site))
    assert used.returncode == 0, used.stderr
    assert used.stdout.startswith(str(site))


def test_build_without_torch_names_the_command(tmp_path: Path) -> None:
    # -I -S: neither this environment's packages nor its paths, as under build isolation.
    code = (
        "import sys, types; m = types.ModuleType('setuptools');"
        "m.Extension = m.find_packages = m.setup = None;"
        f"sys.modules['setuptools'] = m; exec(open({str(ROOT / 'setup.py')!r}).read())"
    )
    result = run(sys.executable, "-I", "-S", "-c", code, cwd=tmp_path)
    assert result.returncode != 0
    assert "pip install --no-build-isolation ." in result.stderr


def test_an_unknown_choice_of_cuda_is_an_error() -> None:
    result = run(sys.executable, "setup.py", "--version", cwd=ROOT, CVFAST_CUDA="maybe")
    assert result.returncode != 0
    assert "expected auto, 0 or 1" in result.stderr
