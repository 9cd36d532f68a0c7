from __future__ import annotations

import json
import subprocess
import sys
from datetime import datetime, timezone

import torch

from cvfast.perf import environment


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
