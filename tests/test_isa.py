from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from cvfast import extension
from cvfast.ops.depthwise import depthwise
from cvfast.testing import image, isa, isa_levels

pytestmark = pytest.mark.usefixtures("cpu_extension")


def run(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def test_levels_start_at_portable_and_the_highest_is_the_default() -> None:
    levels = isa_levels()
    assert levels[0] == "portable"
    assert extension.cpu_isa() in levels
    if platform.machine() == "x86_64":
        flags = Path("/proc/cpuinfo").read_text().split()
        assert ("avx2" in levels) == ("avx2" in flags and "fma" in flags and "f16c" in flags)
        needed = {"avx512f", "avx512bw", "avx512vl", "avx512dq"}
        assert ("avx512" in levels) == needed.issubset(flags)
        assert ("avx512_bf16" in levels) == {*needed, "avx512_bf16"}.issubset(flags)
        amx = {*needed, "avx512_bf16", "amx_tile", "amx_bf16"}
        assert ("avx512_amx" in levels) == amx.issubset(flags)
    elif platform.machine() == "aarch64":
        assert levels == ("portable", "neon")


def test_switching_changes_the_level_and_restores_it() -> None:
    before = extension.cpu_isa()
    for level in isa_levels():
        with isa(level):
            assert extension.cpu_isa() == level
    assert extension.cpu_isa() == before


def test_levels_with_fused_multiply_add_agree_to_the_bit() -> None:
    fused = [level for level in isa_levels() if level != "portable"]
    x = image((2, 45, 15, 13))
    weight, bias = torch.randn(45, 1, 3, 3), torch.randn(45)
    results = []
    for level in fused:
        with isa(level):
            results.append(depthwise(x, weight, bias, padding=1, activation="hardswish"))
    assert all(torch.equal(result, results[0]) for result in results)


def test_unknown_level_is_refused_with_those_available() -> None:
    with pytest.raises(ValueError, match=r"'neon9' is not available; this machine has portable"):
        extension.select_cpu_isa("neon9")


SHOW = "from cvfast import extension; extension.load('cpu'); print(extension.cpu_isa())"


@pytest.mark.parametrize("level", isa_levels())
def test_environment_variable_selects_the_level(level: str) -> None:
    assert run(SHOW, CVFAST_CPU_ISA=level).stdout.strip() == level


def test_environment_variable_with_an_unknown_level_is_an_error() -> None:
    result = run(SHOW, CVFAST_CPU_ISA="sse9")
    assert result.returncode != 0
    assert "CVFAST_CPU_ISA" in result.stderr
    assert "portable" in result.stderr


def test_environment_variable_with_the_level_of_another_machine_is_an_error() -> None:
    foreign = "avx512" if platform.machine() == "aarch64" else "neon"
    result = run(SHOW, CVFAST_CPU_ISA=foreign)
    assert result.returncode != 0
    assert f"CVFAST_CPU_ISA: instruction-set level '{foreign}' is not available" in result.stderr
    assert f"this machine has {', '.join(isa_levels())}" in result.stderr
