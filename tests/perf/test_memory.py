from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch

from cvfast.perf import isolated, memory

ROOT = Path(__file__).parents[2]
MEGABYTE = 1 << 20

linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


def grown(megabytes: int, *, freed_before: int = 0, kept: bool = False) -> int:
    """What is measured of a call that touches so many megabytes, half of them at a time if not
    `kept`; before it, others are touched and given back."""
    torch.ones(freed_before * MEGABYTE, dtype=torch.uint8)
    arena = []

    def run() -> None:
        if not kept:
            for _ in range(2):
                torch.ones(megabytes * MEGABYTE // 2, dtype=torch.uint8)
        elif not arena:
            arena.append(torch.ones(megabytes * MEGABYTE, dtype=torch.uint8))

    return memory.peak_growth(run)


@linux
@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"megabytes": 64, "kept": True}, 64),
        ({"megabytes": 64, "kept": True, "freed_before": 200}, 64),
        ({"megabytes": 64}, 32),
        ({"megabytes": 64, "freed_before": 200}, 32),
    ],
)
def test_growth_is_what_is_alive_at_once(
    monkeypatch: pytest.MonkeyPatch, options: dict, expected: int
) -> None:
    monkeypatch.syspath_prepend(ROOT)  # which the process inherits, to find this module by
    measured = isolated.call(grown, environment=memory.ENVIRONMENT, **options)
    assert measured == pytest.approx(expected * MEGABYTE, abs=2 * MEGABYTE)


def test_a_missing_field_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory.Path, "read_text", lambda *args, **kwargs: "VmPeak: 1 kB\n")
    with pytest.raises(OSError, match="no VmRSS"):
        memory._status("VmRSS")


def test_a_call_in_a_process_of_its_own() -> None:
    process = isolated.call(os.getpid)
    assert process != os.getpid()
    assert isolated.call(os.getenv, "CVFAST_TEST", environment={"CVFAST_TEST": "x"}) == "x"
    assert "CVFAST_TEST" not in os.environ
    with pytest.raises(ValueError, match="invalid literal"):
        isolated.call(int, "one")
    with pytest.raises(RuntimeError, match="terminated"):
        isolated.call(os._exit, 3)
