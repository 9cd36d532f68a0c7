from __future__ import annotations

from pathlib import Path

import pytest
import torch

from cvfast import tuning
from cvfast.launch.table import Entry


def test_the_plan_names_every_problem(run):
    select = ("--op", "depthwise", "--filter", "x32x112x112 k3 s1", "--batch", "1")
    result = run("tune", *select, "--plan", "--device", "RTX 4090")
    assert result.exit_code == 0
    lines = result.stdout.splitlines()
    assert lines[-1].startswith("12 problems, ")  # two activations, three passes, two backends
    assert lines[-1].endswith("on NVIDIA GeForce RTX 4090")
    for line in lines[:-1]:
        assert "1x32x112x112 k3 s1 float16" in line


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(run):
    result = run("tune", "--backend", "triton")
    assert result.exit_code == 2
    assert "on a GPU" in result.stderr


@pytest.mark.parametrize(
    ("option", "value"),
    [("--op", "softmax"), ("--backend", "cpu"), ("--dtype", "int8"), ("--pass", "sideways"),
     ("--batch", "7")],
)  # fmt: skip
def test_unknown_names_are_refused(run, option, value):
    result = run("tune", "--plan", option, value)
    assert result.exit_code == 2
    assert value in result.stderr and "choose from" in result.stderr


def test_outcomes_are_printed_and_a_failure_is_one(run, monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    given = {}

    def tuned(todo, folder, budget):
        given.update(folder=folder, budget=budget)
        entry = Entry("forward", todo[0].call.problem, "launch", 1e-6, 2e-6)
        yield tuning.Outcome(todo[0], entry, Path("a.json"), [])
        yield tuning.Outcome(todo[1], None, None, ["rows=1: wrong"])

    monkeypatch.setattr(tuning, "run", tuned)
    options = ("--backend", "triton", "--output", str(tmp_path), "--budget", "5")
    result = run("tune", "--op", "depthwise", *options)
    assert result.exit_code == 1
    assert given == {"folder": tmp_path, "budget": 5}
    first, second = result.stdout.splitlines()
    assert first.endswith("1.0 us, heuristic 2.0 us -> a.json")
    assert second.startswith("FAILED depthwise triton forward") and "rows=1: wrong" in second
    assert "problems left" in result.stderr
