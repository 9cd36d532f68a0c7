"""What `select="measure"` remembers from process to process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock
from torch import nn

import cvfast
from cvfast import env
from cvfast.optimize import measure, measured

X = torch.randn(1, 3, 20, 20, generator=torch.Generator().manual_seed(0))


class Times:
    """Stands in for the measurement: counts calls, and prefers the first candidate."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls = 0
        monkeypatch.setattr(measure, "choose", self)

    def __call__(self, candidates: dict[str, Any], *_: Any) -> tuple[str, float]:
        self.calls += 1
        return next(iter(candidates)), 1.5


@pytest.fixture
def times(monkeypatch: pytest.MonkeyPatch) -> Times:
    measured._warn.cache_clear()
    return Times(monkeypatch)


def gains(net: nn.Module) -> list[float | None]:
    return [row.gain for row in cvfast.optimize(net, X, select="measure").report.fused]


def test_what_was_measured_is_not_measured_again(
    net: nn.Module, times: Times, measured_file: Path
) -> None:
    first = gains(net)
    assert times.calls == 4 and set(first) == {1.5}
    assert gains(net) == first
    assert times.calls == 4
    measured_file.unlink()
    gains(net)
    assert times.calls == 8


def test_another_number_of_threads_or_version_is_measured_for_itself(
    net: nn.Module, times: Times, monkeypatch: pytest.MonkeyPatch
) -> None:
    gains(net)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 77)
    gains(net)
    assert times.calls == 8
    monkeypatch.setattr(measured, "__version__", "0.0.0")
    gains(net)
    assert times.calls == 12


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff\xfe no text",
        b'{"format": "cvfast measured choices, 1", "entries": {',
        b"[1, 2]",
        b'{"name": "of another program"}',
        b'{"format": "cvfast measured choices, 9", "entries": {}}',
        b'{"format": "cvfast measured choices, 1", "entries": {"key": "fast"}}',
        b'{"format": "cvfast measured choices, 1", "entries": {"key": [3, 1.5]}}',
    ],
)
def test_a_corrupt_or_foreign_file_is_left_alone_with_one_warning(
    net: nn.Module, times: Times, measured_file: Path, content: bytes
) -> None:
    measured_file.parent.mkdir()
    measured_file.write_bytes(content)
    with pytest.warns(UserWarning, match="does not hold measured choices") as caught:
        gains(net)
    (warning,) = [w for w in caught if "measured choices" in str(w.message)]
    assert str(measured_file) in str(warning.message) and env.MEASURED.name in str(warning.message)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        gains(net)
    assert times.calls == 8
    assert measured_file.read_bytes() == content


def test_a_place_that_cannot_be_written_costs_a_warning(
    net: nn.Module, times: Times, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv(env.MEASURED.name, str(tmp_path / "file" / "choices.json"))
    with pytest.warns(UserWarning, match="measures without remembering"):
        assert set(gains(net)) == {1.5}


def test_processes_that_write_at_once_lose_nothing(measured_file: Path) -> None:
    code = (
        "import sys; from cvfast.optimize import measured\n"
        "for i in range(50):\n"
        "    measured.remember(f'{sys.argv[1]} {i}', ('cpu', 1.0 + i))\n"
        "    assert measured.find(f'{sys.argv[1]} {i}') == ('cpu', 1.0 + i)"
    )
    writers = [
        subprocess.Popen([sys.executable, "-W", "error", "-c", code, str(i)], env=os.environ.copy())
        for i in range(3)
    ]
    assert [writer.wait() for writer in writers] == [0, 0, 0]
    entries = json.loads(measured_file.read_text())["entries"]
    assert entries == {f"{p} {i}": ["cpu", 1.0 + i] for p in range(3) for i in range(50)}
    left = {file.name for file in measured_file.parent.iterdir()}
    assert left <= {measured_file.name, f"{measured_file.name}.lock"}


def test_a_lock_that_is_never_released_costs_a_warning(
    net: nn.Module, times: Times, measured_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measured, "_LOCK_SECONDS", 0.01)
    measured_file.parent.mkdir()
    with (
        FileLock(f"{measured_file}.lock"),
        pytest.warns(UserWarning, match="measures without remembering"),
    ):
        assert set(gains(net)) == {1.5}
    assert not measured_file.exists()


def test_the_oldest_entries_go_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measured, "_MOST_ENTRIES", 3)
    for i in range(5):
        measured.remember(str(i), (None, 1.0))
    assert [measured.find(str(i)) is None for i in range(5)] == [True, True, False, False, False]
