"""benchmarks/tune.py, as far as it needs no GPU."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import torch

from cvfast.launch import table
from cvfast.launch.depthwise import PASSES, Problem, triton
from cvfast.launch.table import Entry, Table
from cvfast.perf import devices

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "tune.py"
PROBLEM = Problem(2, 8, 6, 5, (3, 3), (1, 1), (1, 1), dtype=torch.float16)


@pytest.fixture(scope="module")
def tune() -> ModuleType:
    spec = importlib.util.spec_from_file_location("tune", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["tune"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_the_plan_names_every_problem(tune: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--plan", "--filter", "mobilenet_v2.00", "--batch", "1", "--device", "RTX 4090"]
    assert tune.main(arguments) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1].startswith("6 problems, ")
    assert lines[-1].endswith("on NVIDIA GeForce RTX 4090")
    for line in lines[:-1]:
        assert "mobilenet_v2.00-32x112-k3s1-relu6 b1 float16" in line


def test_tables_are_written_where_they_are_read(tune: ModuleType) -> None:
    assert tune.parse([]).output == table.folder()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(tune: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    assert tune.main([]) == 2
    assert "on a GPU" in capsys.readouterr().out


@pytest.mark.gpu_kernels
@pytest.mark.parametrize("pass_", PASSES)
def test_right_results_pass_and_wrong_ones_do_not(
    pass_: str,
    tune: ModuleType,
    gpu_kernels: Callable[[str], AbstractContextManager[str]],
) -> None:
    job = tune.Job("triton", pass_, PROBLEM, "relu6", "test")
    with gpu_kernels("triton") as device:
        operands = tune.Operands(job, device)
        launch = triton.heuristic(PROBLEM, pass_, devices.by_arch("sm_89"))
        result = operands.call(launch)()
    judge = operands.judge()
    assert judge(result)
    result[0, 0, 0, 0] += 1
    assert not judge(result)


def test_tables_grow_and_replace_what_they_hold(tune: ModuleType, tmp_path: Path) -> None:
    launch = triton.heuristic(PROBLEM, "forward", devices.find("H200"))
    other = replace(PROBLEM, batch=4)
    for problem, seconds in ((PROBLEM, 3.0), (other, 2.0), (PROBLEM, 1.0)):
        entry = Entry("forward", problem, launch, seconds, 4.0)
        path = tune.save(entry, "triton", "NVIDIA H200", {"date": "2026"}, tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    assert path.name == table.file_name("depthwise", "triton", "NVIDIA H200")
    written = Table.from_json(path.read_text())
    assert [(e.problem, e.seconds) for e in written.entries] == [(PROBLEM, 1.0), (other, 2.0)]
