from __future__ import annotations

import json

import pytest

from cvfast import extension, inventory
from cvfast.inventory import Build
from cvfast.perf.compiled import Binary, ToolMissing

GOOD = {"LDG.E.128": 4, "LDGSTS.E.128": 4, "STG.E.128": 4, "FFMA": 36, "HMMA.16816.F32": 8}


@pytest.fixture
def compiler(monkeypatch, tmp_path):
    """Stands in for the compilers: every function becomes the binary in `made`."""
    made = {"local_bytes": 0, "instructions": GOOD, "error": None}

    class Anything(dict):
        def get(self, name, default=None):
            return Binary(name, "sm_90", 40, made["local_bytes"], 0, 640, made["instructions"], {})

    def build(found, *, jobs=None):
        if made["error"]:
            return {one.key: Build({}, error=made["error"]) for one in found}
        return {one.key: Build(Anything(), dynamic_shared=2048) for one in found}

    monkeypatch.setattr(inventory, "build", build)
    return made


def test_json_has_a_row_per_configuration(run, compiler):
    result = run("kernels", "--backend", "cuda", "--json")
    assert result.exit_code == 0
    rows = json.loads(result.stdout)
    assert {row["arch"] for row in rows} == {"sm_86", "sm_90"}
    assert {row["pass"] for row in rows} == {"forward", "backward_input", "backward_weight"}
    assert set(rows[0]) == {
        "op", "backend", "pass", "config", "arch", "threads", "registers", "spill_bytes",
        "shared_bytes", "occupancy", "instructions", "code_bytes", "status", "validation",
    }  # fmt: skip
    assert all(row["status"] == "ok" and 0 < row["occupancy"] <= 1 for row in rows)
    assert "sm_86, sm_90; --full looks at all" in result.stderr


def test_full_has_more_rows_than_the_sample(run, compiler):
    select = ("kernels", "--backend", "cuda", "--arch", "sm_90", "--json")
    sample, full = (json.loads(run(*select, *more).stdout) for more in ((), ("--full",)))
    assert len(full) > len(sample)


def test_a_spill_is_shown_and_fails(run, compiler):
    compiler["local_bytes"] = 16
    result = run("kernels", "--backend", "cuda", "--arch", "sm_90")
    assert result.exit_code == 1
    header, first, *_, summary = result.stdout.splitlines()
    assert header.split()[:4] == ["op", "backend", "pass", "arch"]
    assert "spills 16 bytes" in first
    count = summary.split()[0]
    assert summary == f"{count} configurations, {count} with faults"


def test_narrow_loads_fail(run, compiler):
    compiler["instructions"] = {"LDG.E": 16, "STG.E": 16, "FFMA": 36}
    result = run("kernels", "--backend", "cuda", "--arch", "sm_90")
    assert result.exit_code == 1
    assert "no LDG.128" in result.stdout


def test_a_missing_tool_is_said_and_is_no_fault(run, compiler):
    compiler["error"] = f"{inventory.NOT_COMPILED}{ToolMissing('nvcc is not here: install it')}"
    result = run("kernels", "--backend", "cuda", "--arch", "sm_90")
    assert result.exit_code == 0
    assert "not compiled: nvcc is not here: install it" in result.stdout


def test_validation_is_shown(run, compiler):
    result = run("kernels", "--backend", "cuda", "--arch", "sm_90")
    for pass_ in ("forward", "backward_input", "backward_weight"):
        assert any(
            line.startswith(f"depthwise cuda {pass_}: ") for line in result.stdout.splitlines()
        )


def test_without_triton_its_kernels_are_left_out_with_a_word(run, compiler, monkeypatch):
    status = extension.Status("triton", False, "not installed", "pip install triton")
    monkeypatch.setattr(extension, "load", lambda name: status)
    result = run("kernels", "--arch", "sm_90", "--json")
    assert {row["backend"] for row in json.loads(result.stdout)} == {"cuda"}
    assert "pip install triton" in result.stderr


@pytest.mark.parametrize(
    ("option", "value"), [("--arch", "sm_75"), ("--backend", "cpu"), ("--op", "softmax")]
)
def test_unknown_names_are_refused(run, option, value):
    result = run("kernels", option, value)
    assert result.exit_code == 2
    assert value in result.stderr and "choose from" in result.stderr
