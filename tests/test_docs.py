"""What the documents say is true: links, commands, tables, examples."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import io
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import typer

from cvfast import backends, env, tolerance
from cvfast.models import default_input_size, get_model, list_models
from cvfast.ops.conv import ONEDNN_DTYPES
from cvfast.ops.depthwise import bytes_moved, flops
from cvfast.ops.inverted_residual import bytes_moved as block_bytes
from cvfast.ops.inverted_residual import flops as block_flops
from cvfast.ops.pointwise import bytes_moved as pointwise_bytes
from cvfast.ops.pointwise import flops as pointwise_flops
from cvfast.optimize import REASONS

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
TEXTS = {str(page.relative_to(ROOT)): page.read_text(encoding="utf-8") for page in PAGES}
EXAMPLE = "linear"  # CONTRIBUTING's, which is yet to be written
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def rows(text: str, head: str) -> list[list[str]]:
    """Cells of the table whose first line begins with `head`."""
    lines = text[text.index(head) :].splitlines()
    table = lines[2 : lines.index("") if "" in lines else None]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table if "|" in line]


def code(text: str) -> list[str]:
    """Lines of shell: indented blocks, and what stands between backticks."""
    indented = re.findall(r"^    (\S.*)$", text, re.MULTILINE)
    return [line.split("  #")[0].strip() for line in indented] + re.findall(r"`([^`\n]+)`", text)


@pytest.mark.parametrize("page", TEXTS)
def test_relative_links_resolve(page: str) -> None:
    for target in re.findall(r"\]\(([^)]+)\)", TEXTS[page]):
        if not target.startswith(("http://", "https://", "#")):
            assert (ROOT / page).parent.joinpath(target.split("#")[0]).exists(), target


@pytest.mark.parametrize("page", TEXTS)
def test_paths_exist(page: str) -> None:
    folders = r"(?:cvfast|csrc|tests|benchmarks|docs)"
    for path in re.findall(rf"(?<![\w/.-]){folders}/[\w/.-]+\.(?:py|sh|md|h|cpp)\b", TEXTS[page]):
        if EXAMPLE not in path:
            assert (ROOT / path).exists(), path


@pytest.mark.parametrize("page", TEXTS)
def test_makefile_targets_exist(page: str) -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for line in code(TEXTS[page]):
        for target in re.findall(r"^make ([a-z-]+)$", line):
            assert target in targets, line


@pytest.mark.parametrize("page", TEXTS)
def test_cvfast_commands_exist_and_take_their_options(page: str) -> None:
    from cvfast.cli.app import app

    group = typer.main.get_command(app)
    for line in code(TEXTS[page]):
        words = shlex.split(line)
        if len(words) < 2 or words[0] != "cvfast":
            continue
        command = group.get_command(typer.Context(group), words[1])
        assert command is not None, line
        options = {name for parameter in command.params for name in parameter.opts}
        assert {word for word in words if word.startswith("--")} <= options, line


@pytest.mark.parametrize("page", TEXTS)
def test_scripts_take_the_options_they_are_shown_with(page: str) -> None:
    for line in code(TEXTS[page]):
        words = shlex.split(line)
        scripts = [word for word in words if re.fullmatch(r"benchmarks/\w+\.py", word)]
        if scripts and "pytest" not in line and EXAMPLE not in line:
            source = (ROOT / scripts[0]).read_text()
            for option in (word for word in words if word.startswith("--")):
                assert f'"{option}"' in source, line


def test_the_command_table_is_complete() -> None:
    from cvfast.cli.app import app

    shown = {row[0].strip("`").split()[1] for row in rows(README, "| command |")}
    assert shown == {command.name for command in app.registered_commands}


def test_environment_variables_are_documented() -> None:
    shown = [[row[0].strip("`"), row[1]] for row in rows(README, "| variable |")]
    assert shown == [[variable.name, variable.doc] for variable in env.VARIABLES]


def test_build_variables_are_documented() -> None:
    tables = README.split("| variable |")
    shown = {row[0].strip("`") for row in rows("| variable |" + tables[2], "| variable |")}
    described = re.findall(r"^([A-Z_]{4,})", (ROOT / "setup.py").read_text().split('"""')[1], re.M)
    assert shown == set(described)


def test_extras_are_documented() -> None:
    section = (ROOT / "pyproject.toml").read_text().split("[project.optional-dependencies]")[1]
    extras = set(re.findall(r"^(\w+) = ", section.split("\n[")[0], re.MULTILINE))
    paragraph = README[README.index("cvfast[cli]") :].split("\n\n")[0]
    assert {"cli", *re.findall(r"`(\w+)`", paragraph)} == extras


def test_reason_codes_are_documented() -> None:
    page = TEXTS["docs/optimize.md"]
    table = page[page.index("<!-- reasons -->") : page.index("<!-- end reasons -->")]
    assert {row[0].strip("`"): row[1] for row in rows(table, "| code |")} == REASONS


def test_tolerance_constants_are_documented() -> None:
    for name, value, _ in rows(TEXTS["docs/numerics.md"], "| constant |"):
        assert getattr(tolerance, name.strip("`")) == float(value)


def test_every_network_is_listed_with_its_size() -> None:
    shown = {row[0].strip("`"): (row[1], row[2]) for row in rows(README, "| name | parameters |")}
    assert set(shown) == set(list_models())
    with torch.device("meta"):
        for name, (parameters, size) in shown.items():
            count = sum(p.numel() for p in get_model(name).parameters())
            assert parameters == f"{count:,}", name
            assert int(size) == default_input_size(name)[1], name


@pytest.mark.usefixtures("cpu_extension", "gpu_kernels_on_cpu")
def test_support_matrix() -> None:
    def serves(operator: str, backend: str, dtype: torch.dtype) -> bool:
        if backend == "onednn":
            return dtype in ONEDNN_DTYPES
        importlib.import_module(f"cvfast.ops.{operator}")
        x = torch.zeros(1, 2, 3, 3, dtype=dtype).to(memory_format=torch.channels_last)
        return backends.supports(operator, backend, x) is None

    matrix = rows(README, "| operator | backend |")
    assert {(row[0], row[1]) for row in matrix} == {
        ("`depthwise`", "`cpu`"), ("`depthwise`", "`cuda`"), ("`depthwise`", "`triton`"),
        ("`depthwise`", "`onednn`"), ("`depthwise`", "`reference`"),
        ("`pointwise`", "`cpu`"), ("`pointwise`", "`triton`"), ("`pointwise`", "`onednn`"),
        ("`pointwise`", "`reference`"), ("`conv`", "`cpu`"), ("`conv`", "`triton`"),
        ("`conv`", "`onednn`"), ("`conv`", "`reference`"), ("`inverted_residual`", "`cpu`"),
        ("`inverted_residual`", "`cuda`"), ("`inverted_residual`", "`triton`"),
        ("`inverted_residual`", "`reference`"), ("`upconv`", "`triton`"),
        ("`upconv`", "`reference`"),
    }  # fmt: skip
    for operator, backend, *cells in matrix:
        expected = [serves(operator.strip("`"), backend.strip("`"), dtype) for dtype in DTYPES]
        assert [cell == "yes" for cell in cells[:4]] == expected, (operator, backend)


def test_counts_of_the_depthwise_page() -> None:
    page = TEXTS["docs/kernels/depthwise.md"]
    shape = (1, 144, 56, 56)
    counts = {row[0]: row[1] for row in rows(page, "| | |")}
    operations = flops((3, 3), shape)
    moved = bytes_moved(shape, (3, 3), shape)
    assert counts["operations"].endswith(f"= {operations:,}")
    assert counts["bytes"].endswith(f"= {moved:,}")
    assert float(counts["operations per byte"]) == round(operations / moved, 1)


def test_counts_of_the_pointwise_page() -> None:
    page = TEXTS["docs/kernels/pointwise.md"]
    shape = (1, 320, 7, 7)
    counts = {row[0]: row[1] for row in rows(page, "| | |")}
    operations = pointwise_flops(960, shape)
    moved = pointwise_bytes(960, shape)
    assert counts["operations"].endswith(f"= {operations:,}")
    assert counts["bytes"].endswith(f"= {moved:,}")
    assert float(counts["operations per byte"]) == round(operations / moved, 1)


def test_counts_of_the_inverted_residual_page() -> None:
    page = TEXTS["docs/kernels/inverted_residual.md"]
    counts = {row[0]: row[1] for row in rows(page, "| | |")}
    block = ((1, 16, 112, 112), 96, 24, (3, 3), (56, 56))
    assert counts["operations"].endswith(f"= {block_flops(*block):,}")
    assert counts["bytes"].endswith(f"= {block_bytes(*block):,}")


def test_the_example_runs_and_prints_what_is_shown() -> None:
    example, shown = re.findall(
        r"<!-- (?:example|output) -->\n```(?:python|text)\n(.*?)```", README, re.DOTALL
    )
    printed = io.StringIO()
    names: dict[str, object] = {}
    with contextlib.redirect_stdout(printed):
        exec(example, names)
    assert names["y"].shape == (4, 1000)  # type: ignore[attr-defined]
    for line in filter(None, shown.splitlines()):
        if line != "...":
            assert line.removesuffix("...") in printed.getvalue()


def test_tables_are_those_of_the_committed_results() -> None:
    result = subprocess.run(
        [sys.executable, "benchmarks/tables.py", "--check"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr


@pytest.fixture(scope="module")
def tables() -> ModuleType:
    path = ROOT / "benchmarks" / "tables.py"
    spec = importlib.util.spec_from_file_location("benchmarks_tables", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_table_has_its_place_and_without_results_names_the_command(
    tables: ModuleType, tmp_path: Path
) -> None:
    pages = "".join(page.read_text(encoding="utf-8") for page in tables.PAGES)
    assert sorted(tables.TABLES) == sorted(re.findall(r"<!-- table: ([\w-]+) -->", pages))
    for make in tables.TABLES.values():
        empty = make(tmp_path)
        message = re.fullmatch(r"Not (?:measured|counted) yet: run `(\w+) (\S+)[^`]*`\.\n", empty)
        assert message is not None
        assert message[1] == "cvfast" or (ROOT / message[2]).exists()


ENVIRONMENT = {
    "date": "2026-01-02T03:04:05+00:00",
    "cpu": {"model": "Some CPU", "cores": 2, "isa": "AVX2"},
    "packages": {"torch": "2.13.0"},
    "git": {"commit": "0123456789abcdef", "dirty": False},
}


def write(results: Path, name: str, measured: dict[str, Any]) -> Path:
    (results / "cpu").mkdir(exist_ok=True)
    text = json.dumps({"environment": ENVIRONMENT, **measured})
    (results / "cpu" / name).write_text(text)
    return results


def test_zoo_table_shows_no_speedup_of_a_failed_check(tables: ModuleType, tmp_path: Path) -> None:
    size = {
        "shape": [1, 3, 192, 160],
        "ok": True,
        "speedup": 1.5,
        "cvfast": {"median": 2e-3},
        "eager": {"median": 4e-3},
        "eager_channels_last": {"median": 3e-3},
    }
    row = {"model": "net", "ok": True, "coverage": 0.5, "threads": 2, "sizes": [size]}
    text = tables.zoo(write(tmp_path, "zoo.json", {"rows": [row]}))
    assert "| net | 192x160 | 50% | 2.00 | 4.00 | 3.00 | **1.50x** |" in text
    assert "threads: 2" in text
    assert "Some CPU, 2 cores, AVX2; torch 2.13.0; cvfast 0123456789, 2026-01-02." in text
    failed = {**row, "sizes": [{**size, "ok": False}]}
    text = tables.zoo(write(tmp_path, "zoo.json", {"rows": [failed]}))
    assert "| failed |" in text
    assert "1.50x" not in text


def test_depthwise_table_shows_no_speedup_of_a_failed_check(
    tables: ModuleType, tmp_path: Path
) -> None:
    setting = {"threads": 2, "batch": 1, "dtype": "float32"}
    speedup = {"eager_nhwc": {"geomean": 2.0, "min": 1.25}}
    summary = [{**setting, "layers": 1, "speedup": speedup}]
    rows = [{**setting, "verified": True}]
    text = tables.depthwise(write(tmp_path, "depthwise.json", {"summary": summary, "rows": rows}))
    assert "| float32 | 1 | 2 | 1 | eager nhwc | **2.00x** | 1.25x |" in text
    rows = [{**setting, "verified": False}]
    text = tables.depthwise(write(tmp_path, "depthwise.json", {"summary": summary, "rows": rows}))
    assert "| failed | failed |" in text
    assert "2.00x" not in text


def test_pointwise_table_shows_no_speedup_of_a_failed_check(
    tables: ModuleType, tmp_path: Path
) -> None:
    summary = {
        "layers": 1,
        "share_of_peak": {"median": 0.9, "min": 0.8},
        "speedup": {"onednn": {"geomean": 2.0, "min": 1.25, "slower": 0}},
    }
    run = {
        "dtype": "float32", "isa": "avx2", "batch": 8, "threads": 2, "peak_gflops": 100.0,
        "summary": summary, "rows": [{"verified": True}], "environment": ENVIRONMENT,
    }  # fmt: skip
    text = tables.pointwise(write(tmp_path, "pointwise.json", {"runs": [run]}))
    row = "| float32 | avx2 | 8 | 2 | 1 | 90% of 100 | onednn | **2.00x** | 1.25x | 0 |"
    assert row in text
    failed = {**run, "rows": [{"verified": False}]}
    text = tables.pointwise(write(tmp_path, "pointwise.json", {"runs": [failed]}))
    assert "| failed | failed | failed |" in text
    assert "2.00x" not in text


def test_conv_table_shows_no_speedup_of_a_failed_check(tables: ModuleType, tmp_path: Path) -> None:
    setting = {"threads": 2, "batch": 1, "algorithm": "winograd_f2"}
    ratios = {"geomean": 2.0, "min": 1.25}
    group = {**setting, "layers": 1, "speedup": {"onednn": ratios, "eager_nhwc": ratios}}
    for verified, cells in (
        (True, "| **2.00x** | 1.25x | **2.00x** | 1.25x |"),
        (False, "| failed | failed | failed | failed |"),
    ):
        rows = [{**setting, "verified": verified}]
        measured = {"environment": ENVIRONMENT, "summary": [group], "rows": rows}
        text = tables.conv(write(tmp_path, "conv.json", measured))
        assert f"| 2 | 1 | winograd f2 | 1 {cells}" in text
