"""Tuning, as far as it needs no GPU."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from cvfast import inventory, tuning
from cvfast.launch import calls, table
from cvfast.launch.calls import Call
from cvfast.launch.depthwise import PASSES, Problem, triton
from cvfast.launch.table import Entry, Table
from cvfast.perf import devices

PROBLEM = Problem(2, 8, 6, 5, (3, 3), (1, 1), (1, 1), dtype=torch.float16)
H200 = devices.find("H200")


def jobs(**changes: object) -> list[tuning.Job]:
    given = {
        "ops": ["depthwise"], "backends": ["triton", "cuda"], "passes": PASSES,
        "dtypes": [torch.float16], "batches": [1, 256], **changes,
    }  # fmt: skip
    return tuning.jobs(**given)  # type: ignore[arg-type]


def test_the_most_wanted_come_first() -> None:
    found = jobs()
    assert len(found) == len(set(found))
    assert {job.call for job in found} == {
        call for call in calls.network_calls(["depthwise"]) if call.problem.dtype is torch.float16
    }
    order = [(PASSES.index(job.call.pass_), -job.call.problem.batch) for job in found]
    assert order == sorted(order)
    assert [job.backend for job in found[:2]] == ["triton", "cuda"]
    assert found[0].call.problem.channels == 32  # the first layer of MobileNet v2
    chosen = jobs(backends=["cuda"], passes=["forward"], batches=[1], holding="k5")
    assert {(job.backend, job.call.problem.kernel) for job in chosen} == {("cuda", (5, 5))}


@pytest.mark.gpu_kernels
@pytest.mark.parametrize("pass_", PASSES)
def test_right_results_pass_and_wrong_ones_do_not(
    pass_: str, gpu_kernels: Callable[[str], AbstractContextManager[str]]
) -> None:
    call = Call("depthwise", PROBLEM, pass_, "relu6")
    with gpu_kernels("triton") as device:
        example = inventory.example(call, device=device)
        launch = triton.heuristic(PROBLEM, pass_, devices.by_arch("sm_89"))
        results = example.run("triton", launch)
    check = tuning.judge(example, call)
    assert check(results)
    for wrong in range(len(results)):
        changed = [result.clone() for result in results]
        changed[wrong][(0,) * changed[wrong].dim()] += 1
        assert not check(changed)


def test_tables_grow_and_replace_what_they_hold(tmp_path: Path) -> None:
    launch = triton.heuristic(PROBLEM, "forward", H200)
    other = replace(PROBLEM, batch=4)
    for problem, seconds in ((PROBLEM, 3.0), (other, 2.0), (PROBLEM, 1.0)):
        entry = Entry("forward", problem, launch, seconds, 4.0)
        path = tuning.save(entry, "depthwise", "triton", H200.name, {"date": "2026"}, tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    assert path.name == table.file_name("depthwise", "triton", H200.name)
    written = Table.from_json(path.read_text())
    assert [(e.problem, e.seconds) for e in written.entries] == [(PROBLEM, 1.0), (other, 2.0)]


def test_outcomes_come_as_they_are_and_the_budget_ends_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    launch = triton.heuristic(PROBLEM, "forward", H200)
    entry = Entry("forward", PROBLEM, launch, 1.0, 2.0)
    monkeypatch.setattr(devices, "current", lambda: H200)
    monkeypatch.setattr(tuning, "_compile", lambda *arguments: None)
    answers = iter([(entry, []), (None, ["Launch(1): wrong"])])
    monkeypatch.setattr(tuning, "tune", lambda job, device: next(answers))
    todo = [tuning.Job("cuda", Call("depthwise", PROBLEM, "forward", "relu"))] * 2
    first, second = tuning.run(todo, tmp_path, budget=60)
    assert first.path is not None and first.path.exists()
    assert (second.entry, second.path, second.failures) == (None, None, ["Launch(1): wrong"])
    assert list(tuning.run(todo, tmp_path, budget=-1)) == []
