"""The kernels without torch, against plain loops: natively, under sanitizers, and for aarch64."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

HERE = Path(__file__).parent
# Programs that a kind of build needs, and Debian's packages of them.
NEEDS = {
    "native": {"make": "make", "g++": "g++"},
    "sanitize": {"make": "make", "g++": "g++"},
    "aarch64": {
        "make": "make",
        "aarch64-linux-gnu-g++": "g++-aarch64-linux-gnu",
        "qemu-aarch64-static": "qemu-user-static",
    },
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", NEEDS)
def test_kernels_against_plain_loops(kind: str) -> None:
    missing = {p: package for p, package in NEEDS[kind].items() if not shutil.which(p)}
    if missing:
        pytest.skip(f"needs {', '.join(missing)}: apt-get install {' '.join(missing.values())}")
    command = ["make", "-C", HERE, f"-j{os.cpu_count()}", f"KIND={kind}", "CASES=40"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    passed = re.search(r"(\d+) passed at portable, (.*)", result.stdout)
    assert passed and int(passed[1]) >= 3 * 3 * 40
    assert (passed[2] == "neon") == (kind == "aarch64")
