from __future__ import annotations

import json
import subprocess
import sys
from datetime import datetime, timezone

import pytest
import torch

from cvfast.perf import clocks, environment


def test_capture_is_json_and_complete():
    captured = json.loads(json.dumps(environment.capture()))
    assert set(captured) == {
        "date",
        "cpu",
        "memory_bytes",
        "gpus",
        "os",
        "python",
        "packages",
        "compilers",
        "threads",
        "cuda",
        "git",
    }
    assert captured["packages"]["torch"] == torch.__version__
    assert captured["cpu"]["cores"] >= 1
    assert captured["cpu"]["model"]
    assert set(captured["git"]) == {"commit", "dirty"}
    date = datetime.fromisoformat(captured["date"])
    assert abs((datetime.now(timezone.utc) - date).total_seconds()) < 60


def test_threads_are_those_in_use():
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        assert environment.capture()["threads"] == 3
    finally:
        torch.set_num_threads(before)


class _Properties:
    name = "NVIDIA Test"
    major, minor = 9, 0
    multi_processor_count = 132
    total_memory = 1 << 37
    L2_cache_size = 60 << 20


class _Nvml:
    def describe(self):
        return {"driver": "580.1", "ecc": True, "max_sm_mhz": 1980, "power_limit_watts": 700.0}

    def sample(self):
        return clocks.Sample(sm_mhz=345, reasons=("idle",))


@pytest.mark.parametrize("nvml", [None, _Nvml()])
def test_gpus_have_their_clocks_where_nvml_tells(monkeypatch, nvml):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: _Properties())
    monkeypatch.setattr(clocks, "nvml", lambda index: nvml)
    version = "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.159.03  Release Build"
    monkeypatch.setattr(environment, "_read", lambda path: version)
    (gpu,) = json.loads(json.dumps(environment.gpus()))
    assert gpu["capability"] == "9.0"
    assert gpu["l2_bytes"] == 60 << 20
    if nvml:
        assert gpu["now"]["sm_mhz"] == 345
        assert (gpu["driver"], gpu["ecc"]) == ("580.1", True)
    else:
        assert gpu["driver"] == "580.159.03"
        assert "now" not in gpu


def test_absent_package_and_compiler_are_none(monkeypatch):
    assert environment.package_version("no-such-package-anywhere") is None
    monkeypatch.setenv("PATH", "")
    assert environment.compiler_version("g++") is None


def test_cpuinfo_of_other_machines(monkeypatch):
    arm = "processor\t: 0\nFeatures\t: fp asimd asimdhp bf16\nCPU part\t: 0xd40\n"
    monkeypatch.setattr(environment, "_read", lambda path: arm)
    cpu = environment.cpu()
    assert cpu["flags"] == ["asimd", "asimdhp", "bf16"]
    assert cpu["clock_mhz"] is None
    monkeypatch.setattr(environment, "_read", lambda path: "")
    assert environment.cpu()["model"]


def test_capture_imports_no_optional_package():
    code = (
        "import sys, cvfast; before = set(sys.modules);"
        "from cvfast.perf import environment; environment.capture();"
        "print({'triton', 'onnxruntime', 'openvino', 'torchvision', 'timm'}"
        " & (set(sys.modules) - before))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
