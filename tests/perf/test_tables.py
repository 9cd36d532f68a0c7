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


@pytest.fixture(scope="module")
def bench_networks():
    return script("bench_networks")


def row(model="net", batch=1, **changes):
    environment = {
        "date": "2026-01-02T03:04:05+00:00",
        "cpu": {"model": "Some CPU", "cores": 2, "isa": "AVX2"},
        "packages": {"torch": "2.13.0", "onnxruntime": None, "openvino": "1"},
        "git": {"commit": "0123456789abcdef", "dirty": True},
    }
    variants = {
        "cvfast": {"median": 2e-3, "ok": True},
        "eager": {"median": 5e-3, "ok": True},
        "openvino": {"median": 1e-3, "ok": False},
    }
    return {
        "model": model,
        "shape": [batch, 3, 8, 8],
        "dtype": "float32",
        "threads": 1,
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
    assert "| net | 1x3x8x8 | float32 | 1 | 2.00 | 5.00 | - | **2.50x** eager |" in text
    assert "Some CPU, 2 cores, AVX2" in text
    assert "cvfast 0123456789+, 2026-01-02" in text


def test_no_speedup_is_a_dash(tables, results):
    path = results / "cpu" / "networks.json"
    path.write_text(json.dumps({"rows": [row(speedup=None, best_peer=None)]}))
    assert tables.networks(results).splitlines()[2].endswith("| - |")


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


def test_readme_is_current(tables, monkeypatch):
    readme = BENCHMARKS.parent / "README.md"
    if not readme.exists():
        pytest.skip("this checkout has no README.md")
    monkeypatch.setattr(sys, "argv", ["tables.py", "--check", str(readme)])
    assert tables.main() == 0


def test_merge_replaces_the_same_setting_and_keeps_the_others(bench_networks):
    old = [row("b"), row("a", batch=8), row("a")]
    merged = bench_networks.merge(old, [row("a", speedup=9.0)], {"date": "new"})
    assert [(r["model"], r["shape"][0]) for r in merged] == [("a", 1), ("a", 8), ("b", 1)]
    assert merged[0]["speedup"] == 9.0
    assert merged[0]["environment"] == {"date": "new"}
    assert merged[1]["environment"] != {"date": "new"}


def test_measure_runs_cvfast_bench(bench_networks, monkeypatch):
    commands = []

    def run(command, check):
        commands.append(command)
        Path(command[command.index("--json") + 1]).write_text('{"rows": []}')

    monkeypatch.setattr(bench_networks.subprocess, "run", run)
    assert bench_networks.measure("resnet18", "8", "2", "float32") == {"rows": []}
    assert commands[0][1:5] == ["-m", "cvfast", "bench", "resnet18"]
    assert commands[0][commands[0].index("--threads") + 1] == "2"
