from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=ROOT
    )


def test_under_their_bare_name_the_kernels_say_what_to_import() -> None:
    result = python("import kernels")
    assert result.returncode != 0
    assert "import it as `cvfast.kernels`" in result.stderr


def test_the_package_imports_without_triton() -> None:
    result = python("import cvfast.kernels, sys; print('triton' in sys.modules)")
    assert result.stdout == "False\n", result.stderr
