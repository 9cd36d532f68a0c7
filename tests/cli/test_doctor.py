from __future__ import annotations

import importlib.util
import json

import torch

from cvfast import extension
from cvfast.cli import doctor
from cvfast.perf import environment


def findings(run):
    result = run("doctor", "--json")
    report = json.loads(result.stdout)
    return result.exit_code, {finding["item"]: finding for finding in report["findings"]}


def test_reports_this_machine(run):
    code, found = findings(run)
    assert code == 0
    assert torch.__version__ in found["torch"]["detail"]
    assert found["CPU"]["status"] == "ok"
    assert {"GPU", "cpu extension", "g++", "nvcc", "ninja", "triton", "extra bench"} <= set(found)


def test_whatever_is_missing_has_a_mend(run):
    _, found = findings(run)
    assert all(item["mend"] for item in found.values() if item["status"] != "ok")
    assert not any(item["mend"] for item in found.values() if item["status"] == "ok")


def test_missing_extension_says_how_to_build_it(run, monkeypatch):
    status = extension.Status("cpu", False, "not built", "pip install --no-build-isolation -e .")
    monkeypatch.setattr(extension, "load", lambda name: status)
    code, found = findings(run)
    assert code == 0  # everything still runs, on the reference
    assert found["cpu extension"]["status"] == "missing"
    assert found["cpu extension"]["mend"] == status.mend


def test_extension_in_use_names_its_level(run):
    if not extension.load("cpu"):
        _, found = findings(run)
        assert found["cpu extension"]["status"] == "missing"
    else:
        _, found = findings(run)
        assert f"in use {extension.cpu_isa()}" in found["cpu extension"]["detail"]


def test_missing_compiler_and_packages(run, monkeypatch):
    monkeypatch.setattr(environment, "compiler_version", lambda name: None)
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *args: None if name == "timm" else find(name)
    )
    _, found = findings(run)
    assert "install GCC" in found["g++"]["mend"]
    assert found["extra zoo"]["detail"] == "without timm"
    assert found["extra zoo"]["mend"] == "pip install 'cvfast[zoo]'"


def test_old_torch_fails(run, monkeypatch):
    monkeypatch.setattr(torch, "__version__", "2.10.0+cpu")
    code, found = findings(run)
    assert code == 1
    assert found["torch"]["status"] == "failed"
    assert found["torch"]["mend"] == "pip install 'torch>=2.11'"


def test_bad_isa_variable_fails(run, monkeypatch):
    def load(name):
        raise ValueError("environment variable CVFAST_CPU_ISA: 'sse9' is not available")

    monkeypatch.setattr(extension, "load", load)
    code, found = findings(run)
    assert code == 1
    assert found["cpu extension"]["mend"] == "unset CVFAST_CPU_ISA"


def test_plain_text(run):
    text = run("doctor").stdout
    assert text.splitlines()[0].split() == ["item", "status", "detail", "mend"]
    assert text.isascii()


def test_triton_without_a_gpu_names_the_interpreter(monkeypatch):
    monkeypatch.setattr(environment, "package_version", lambda name: "3.6.0")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert "TRITON_INTERPRET=1" in doctor._triton().mend
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert doctor._triton().status == "ok"
