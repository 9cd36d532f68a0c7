"""Launch parameters by shape: from a tuned table where a device has one, else by heuristic.

A table is a file that `cvfast tune` wrote from measurements, `<op>.<backend>.<device>.json` in
the folder tuned, the device's name with `_` for what is neither letter, digit nor dot. Its entries
are problems and the launch parameters that were fastest for them.
"""

from __future__ import annotations

import functools
import importlib
import json
import logging
import math
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch

from cvfast.perf.devices import Device

FORMAT = 1
"""Version of the files' layout; files of another version are ignored."""

MAX_DISTANCE = 2.0
"""Doublings by which a problem may differ from the nearest entry, summed over its sizes. Beyond
that what was measured says little, and the heuristic knows the problem itself."""

_logger = logging.getLogger("cvfast.launch")


@dataclass(frozen=True)
class Entry:
    """The fastest launch parameters measured for a problem.

    Attributes:
        pass_: such as "forward".
        problem, launch: of the modules of the operator and its backend.
        seconds, heuristic_seconds: a call with them, and with the heuristic's.
    """

    pass_: str
    problem: Any
    launch: Any
    seconds: float
    heuristic_seconds: float


@dataclass(frozen=True)
class Table:
    """What was measured on one device.

    Attributes:
        op, backend, device: what for; device as `torch.cuda.get_device_name` names it.
        provenance: date, versions, commit, clocks: see `cvfast.perf.environment.capture`.
        entries: by pass and problem.
    """

    op: str
    backend: str
    device: str
    provenance: dict[str, Any]
    entries: tuple[Entry, ...]

    def to_json(self) -> str:
        entries = [
            {
                "pass": entry.pass_,
                "problem": {**asdict(entry.problem), "dtype": _dtype_name(entry.problem.dtype)},
                "launch": asdict(entry.launch),
                "seconds": entry.seconds,
                "heuristic_seconds": entry.heuristic_seconds,
            }
            for entry in self.entries
        ]
        content = {
            "format": FORMAT,
            "op": self.op,
            "backend": self.backend,
            "device": self.device,
            "provenance": self.provenance,
            "entries": entries,
        }
        return json.dumps(content, indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Table:
        """Reads what `to_json` wrote.

        Raises:
            ValueError: if it is something else, and says what is wrong with it.
        """
        try:
            content = json.loads(text)
            if content["format"] != FORMAT:
                raise ValueError(f"format {content['format']!r}, expected {FORMAT}")
            op, backend = content["op"], content["backend"]
            problem_type = importlib.import_module(f"cvfast.launch.{op}").Problem
            launch_type = parameters(op, backend).Launch
            entries = tuple(
                Entry(
                    entry["pass"],
                    _problem(problem_type, entry["problem"]),
                    launch_type(**_tuples(entry["launch"])),
                    entry["seconds"],
                    entry["heuristic_seconds"],
                )
                for entry in content["entries"]
            )
            return cls(op, backend, content["device"], content["provenance"], entries)
        except (KeyError, TypeError, AttributeError, ImportError) as error:
            raise ValueError(f"not a tuned table: {type(error).__name__}: {error}") from None


def parameters(op: str, backend: str) -> Any:
    """The module of an operator's backend: `Launch`, `validate`, `heuristic`, `candidates`."""
    return importlib.import_module(f"cvfast.launch.{op}.{backend}")


def file_name(op: str, backend: str, device: str) -> str:
    """`depthwise.triton.NVIDIA_H200.json`."""
    return f"{op}.{backend}.{re.sub(r'[^A-Za-z0-9.]+', '_', device)}.json"


def folder() -> Path:
    """Where the tables lie that ship."""
    return Path(__file__).with_name("tuned")


@functools.lru_cache(maxsize=4096)
def choose(op: str, backend: str, problem: Any, pass_: str, device: Device) -> Any:
    """Launch parameters of one call: of this very problem in the device's table, of the nearest
    one there, or the heuristic's.

    Args:
        op, backend: such as "depthwise", "triton".
        problem: a `Problem` of `cvfast.launch.<op>`: a frozen dataclass of numbers, tuples of
            numbers, strings and a `dtype`, whose class names its sizes in `SIZES`.
        pass_: such as "forward".
        device: the table is looked up by its name.
    """
    found = nearest(load(op, backend, device.name), problem, pass_)
    return parameters(op, backend).heuristic(problem, pass_, device) if found is None else found


@functools.lru_cache(maxsize=64)
def load(op: str, backend: str, device: str) -> Table | None:
    """The table of a device; None, with one warning, if there is none or it cannot be used."""
    path = folder() / file_name(op, backend, device)
    if not path.is_file():
        _logger.warning(
            "no tuned launch parameters of %s (%s) for %s: using the heuristic; to measure them, "
            "run `cvfast tune --op %s`",
            op, backend, device, op,
        )  # fmt: skip
        return None
    try:
        table = Table.from_json(path.read_text(encoding="utf-8"))
        if (table.op, table.backend, table.device) != (op, backend, device):
            raise ValueError(f"it is for {table.op}, {table.backend}, {table.device}")
        return table
    except (OSError, ValueError) as error:
        _logger.warning("ignoring %s: %s; using the heuristic", path, error)
        return None


def nearest(table: Table | None, problem: Any, pass_: str) -> Any | None:
    """The launch parameters of the nearest entry that the problem can be launched with.

    Near are entries of the same pass that differ in the fields named by `Problem.SIZES` only; the
    distance is the sum of the ratios of these, in doublings, `MAX_DISTANCE` at most.
    """
    if table is None:
        return None
    near = sorted(_distances(table.entries, problem, pass_), key=lambda pair: pair[0])
    validate = parameters(table.op, table.backend).validate
    for distance, launch in near:
        if distance > MAX_DISTANCE:
            break
        try:
            validate(problem, launch, pass_)
        except ValueError:
            continue
        return launch
    return None


def _distances(entries: Iterable[Entry], problem: Any, pass_: str) -> Iterable[tuple[float, Any]]:
    rest = [field.name for field in fields(problem) if field.name not in problem.SIZES]
    for entry in entries:
        other = entry.problem
        if entry.pass_ == pass_ and all(getattr(other, n) == getattr(problem, n) for n in rest):
            yield sum(map(_doublings, _sizes(other), _sizes(problem))), entry.launch


def _sizes(problem: Any) -> list[int]:
    return [getattr(problem, name) for name in problem.SIZES]


def _doublings(a: int, b: int) -> float:
    return abs(math.log2(max(a, 1) / max(b, 1)))


def _problem(problem_type: Any, content: dict[str, Any]) -> Any:
    dtype = getattr(torch, content["dtype"])
    return problem_type(**{**_tuples(content), "dtype": dtype})


def _tuples(content: dict[str, Any]) -> dict[str, Any]:
    """JSON knows lists only."""
    return {key: _tuple(value) for key, value in content.items()}


def _tuple(value: Any) -> Any:
    return tuple(map(_tuple, value)) if isinstance(value, list) else value


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
