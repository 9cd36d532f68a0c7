from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def script(name):
    spec = importlib.util.spec_from_file_location(f"benchmarks_{name}", BENCHMARKS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def tables():
    return script("tables")


def row(model="net", batch=1, **changes):
    environment = {
        "date": "2026-01-02T03:04:05+00:00",
        "cpu": {"model": "Some CPU", "cores": 2, "isa": "AVX2"},
        "packages": {"torch": "2.13.0", "onnxruntime": None, "openvino": "1"},
        "git": {"commit": "0123456789abcdef", "dirty": True},
    }
    variants = {
        "cvfast": {
            "median": 2e-3, "ok": True, "error": 2e-6, "flops_per_second": 3e11,
            "memory_bytes": 7_500_000,
        },
        "eager": {"median": 5e-3, "ok": True, "memory_bytes": 9_000_000},
        "openvino": {"median": 1e-3, "ok": False},
    }  # fmt: skip
    return {
        "model": model,
        "shape": [batch, 3, 8, 8],
        "dtype": "float32",
        "threads": 2,
        "peak_flops_per_second": 4e11,
        "eager_error": 1e-6,
        "speedup": 2.5,
        "best_peer": "eager",
        "variants": variants,
        "environment": environment,
    } | changes


@pytest.fixture
def results(tmp_path):
    (tmp_path / "cpu").mkdir()
    (tmp_path / "cpu" / "networks.json").write_text(json.dumps({"rows": [row()]}))
    return tmp_path


def test_table_from_json(tables, results):
    text = tables.networks(results)
    cells = "2.00 | 5.00 | - | **2.50x** eager | 75% of 400 | 2.0 | 7.5 | 9.0 eager |"
    assert f"| net | 1x3x8x8 | {cells}" in text
    assert "\nfloat32, 2 threads. Medians" in text
    assert "Some CPU, 2 cores, AVX2" in text
    assert "cvfast 0123456789+, 2026-01-02" in text


def test_no_speedup_is_a_dash(tables, results):
    path = results / "cpu" / "networks.json"
    path.write_text(json.dumps({"rows": [row(speedup=None, best_peer=None)]}))
    assert "| 5.00 | - | - | 75%" in tables.networks(results)


def test_each_setting_has_its_table(tables, results):
    assert tables.networks(results, threads=1).startswith("Not measured yet: run `cvfast bench")
    path = results / "cpu" / "networks.json"
    rows = [row("old", eager_error=None), row("half", dtype="bfloat16"), row("one", threads=1)]
    for old in rows[0]["variants"].values():
        old.pop("memory_bytes", None)
    path.write_text(json.dumps({"rows": rows}))
    assert "| 75% of 400 | - | - | - |" in tables.networks(results)
    assert "| half |" in tables.networks(results, dtype="bfloat16")
    assert "float32, 1 thread. " in tables.networks(results, threads=1)


def test_render_replaces_only_what_is_marked(tables):
    text = "before\n<!-- table: a -->\nold\n<!-- end table -->\nafter\n"
    expected = "before\n<!-- table: a -->\nnew\n<!-- end table -->\nafter\n"
    assert tables.render(text, {"a": lambda: "new\n"}) == expected
    with pytest.raises(KeyError, match="a"):
        tables.render(text, {})


def test_check_mode_tells_outdated_from_current(tables, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(tables, "TABLES", {"a": lambda: "new\n"})
    page = tmp_path / "page.md"
    page.write_text("<!-- table: a -->\nold\n<!-- end table -->\n")
    monkeypatch.setattr(sys, "argv", ["tables.py", "--check", str(page)])
    assert tables.main() == 1
    assert "outdated" in capsys.readouterr().err
    assert "old" in page.read_text()
    monkeypatch.setattr(sys, "argv", ["tables.py", str(page)])
    assert tables.main() == 0
    monkeypatch.setattr(sys, "argv", ["tables.py", "--check", str(page)])
    assert tables.main() == 0


def test_pages_are_current(tables, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["tables.py", "--check"])
    assert tables.main() == 0
