from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from cvfast.launch import table
from cvfast.launch.depthwise import Problem, triton
from cvfast.launch.depthwise.triton import Launch
from cvfast.launch.table import Entry, Table
from cvfast.perf import devices

H200 = devices.find("H200")
PROBLEM = Problem(256, 96, 56, 56, (3, 3), (1, 1), (1, 1))
LAUNCH = Launch(rows=3, columns=5, vector=2, channels=32, num_warps=8)
OTHER = replace(LAUNCH, rows=7)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Takes the place of cvfast/launch/tuned."""
    monkeypatch.setattr(table, "folder", lambda: tmp_path)
    table.load.cache_clear()
    table.choose.cache_clear()
    yield tmp_path
    table.load.cache_clear()
    table.choose.cache_clear()


def write(folder: Path, *entries: tuple[str, Problem, Launch], device: str = H200.name) -> Path:
    rows = tuple(Entry(pass_, problem, launch, 1e-6, 2e-6) for pass_, problem, launch in entries)
    path = folder / table.file_name("depthwise", "triton", device)
    path.write_text(Table("depthwise", "triton", device, {"date": "2026"}, rows).to_json())
    return path


def choose(problem: Problem = PROBLEM, pass_: str = "forward") -> Launch:
    return table.choose("depthwise", "triton", problem, pass_, H200)


def heuristic(problem: Problem = PROBLEM, pass_: str = "forward") -> Launch:
    return triton.heuristic(problem, pass_, H200)


def test_a_table_survives_its_file() -> None:
    entry = Entry("forward", replace(PROBLEM, dtype=torch.bfloat16), LAUNCH, 1.5e-6, 2e-6)
    written = Table("depthwise", "triton", "NVIDIA H200", {"commit": "abc"}, (entry,))
    assert Table.from_json(written.to_json()) == written


def test_file_names_hold_no_spaces() -> None:
    name = table.file_name("depthwise", "cuda", "NVIDIA GeForce RTX 4090")
    assert name == "depthwise.cuda.NVIDIA_GeForce_RTX_4090.json"


def test_the_very_problem_is_looked_up(folder: Path) -> None:
    near = replace(PROBLEM, batch=255)
    write(folder, ("forward", near, OTHER), ("forward", PROBLEM, LAUNCH))
    assert choose() == LAUNCH
    assert choose(near) == OTHER


def test_the_nearest_of_the_same_kind_is_taken(folder: Path) -> None:
    far = replace(PROBLEM, batch=64, height=112)
    near = replace(PROBLEM, batch=128)
    write(folder, ("forward", far, OTHER), ("forward", near, LAUNCH))
    assert choose() == LAUNCH


@pytest.mark.parametrize(
    "change",
    [
        {"kernel": (5, 5), "padding": (2, 2)},
        {"stride": (2, 2)},
        {"dilation": (2, 2)},
        {"multiplier": 2},
        {"dtype": torch.float32},
        {"batch": 16},  # four doublings away
    ],
    ids=str,
)
def test_what_is_of_another_kind_or_far_gets_the_heuristic(
    change: dict[str, object], folder: Path
) -> None:
    write(folder, ("forward", replace(PROBLEM, **change), LAUNCH))
    assert choose() == heuristic()


def test_another_pass_gets_the_heuristic(folder: Path) -> None:
    write(folder, ("forward", PROBLEM, LAUNCH))
    assert choose(pass_="backward_input") == heuristic(pass_="backward_input")


def test_an_entry_that_cannot_be_launched_is_passed_over(folder: Path) -> None:
    wrong = replace(LAUNCH, vector=3)
    near = replace(PROBLEM, batch=200)
    write(folder, ("forward", PROBLEM, wrong), ("forward", near, LAUNCH))
    assert choose() == LAUNCH


def test_a_device_without_a_table_gets_the_heuristic_and_one_line(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        assert choose() == heuristic()
        choose(replace(PROBLEM, batch=3))
    (record,) = caplog.records
    assert "cvfast tune --op depthwise" in record.getMessage()
    assert "NVIDIA H200" in record.getMessage()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "Expecting property name"),
        ("[]", "not a tuned table"),
        ('{"format": 0}', "format 0, expected 1"),
        ('{"format": 1, "op": "depthwise", "backend": "triton"}', "KeyError: 'entries'"),
        ('{"format": 1, "op": "nothing", "backend": "triton"}', "No module named"),
    ],
)
def test_a_bad_file_is_ignored_with_its_reason(
    text: str, message: str, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (folder / table.file_name("depthwise", "triton", H200.name)).write_text(text)
    with caplog.at_level(logging.WARNING):
        assert choose() == heuristic()
    (record,) = caplog.records
    assert message in record.getMessage()


def test_a_table_of_another_device_under_this_name_is_ignored(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = write(folder, ("forward", PROBLEM, LAUNCH), device="NVIDIA B200")
    path.rename(folder / table.file_name("depthwise", "triton", H200.name))
    with caplog.at_level(logging.WARNING):
        assert choose() == heuristic()
    assert "it is for depthwise, triton, NVIDIA B200" in caplog.text


def test_tables_that_ship_can_be_read() -> None:
    for path in table.folder().glob("*.json"):
        shipped = Table.from_json(path.read_text(encoding="utf-8"))
        assert path.name == table.file_name(shipped.op, shipped.backend, shipped.device)
        assert shipped.entries
