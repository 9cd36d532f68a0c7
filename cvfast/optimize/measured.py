"""What ``select="measure"`` found on this machine, kept in a file from process to process."""

from __future__ import annotations

import functools
import json
import os
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock

from cvfast import env, extension
from cvfast.perf import environment
from cvfast.version import __version__

from .capture import shape_hint
from .match import Site

_FORMAT = "cvfast measured choices, 1"
_MOST_ENTRIES = 10_000
_LOCK_SECONDS = 10.0

Choice = tuple[str | None, float]
"""The fastest candidate, None where nothing beats the unfused path; and its gain."""


def path() -> Path:
    return Path(env.MEASURED.get() or "~/.cache/cvfast/measured.json").expanduser()


@functools.cache
def _cpu_model() -> str:
    return str(environment.cpu()["model"])


def key(site: Site, candidates: Sequence[str], winograd: str, channels_last: bool) -> str:
    """All that the choice for a site on the CPU depends on, as text."""
    geometry = site.geometry
    parts = {
        "cpu": _cpu_model(),
        "isa": extension.cpu_isa() if extension.load("cpu") else None,
        "threads": torch.get_num_threads(),
        "cvfast": __version__,
        "torch": torch.__version__,
        "dtype": str(site.dtype),
        "x": list(shape_hint(site.source)),
        "weight": list(shape_hint(site.weight)),
        "stride": geometry.stride,
        "padding": geometry.padding,
        "dilation": geometry.dilation,
        "absorbed": [str(node.target) for node in site.absorbed],
        "channels_last": channels_last,
        "winograd": winograd,
        "candidates": list(candidates),
    }
    return json.dumps(parts)


def find(key: str) -> Choice | None:
    """What was measured for ``key``, if anything was."""
    return (_read() or {}).get(key)


def remember(key: str, choice: Choice) -> None:
    """Adds an entry. Processes that write at once take turns, so that none loses its entry, and
    the file is replaced as a whole, so that a reader never sees half of it."""
    file = path()
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{file}.lock", timeout=_LOCK_SECONDS):
            entries = _read()
            if entries is None:
                return
            entries[key] = choice
            kept = list(entries.items())[-_MOST_ENTRIES:]
            _replace(file, json.dumps({"format": _FORMAT, "entries": dict(kept)}, indent=0))
    except OSError as error:
        _warn(file, f"cannot be written ({error})")


def _replace(file: Path, text: str) -> None:
    handle, partial = tempfile.mkstemp(dir=file.parent, prefix=f"{file.name}.")
    try:
        with open(handle, "w", encoding="utf-8") as out:
            out.write(text)
        os.replace(partial, file)
    except BaseException:
        os.unlink(partial)
        raise


def _read() -> dict[str, Choice] | None:
    """All entries, oldest first; None, with a warning, if the file is not one of ours."""
    file = path()
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        if content["format"] != _FORMAT:
            raise ValueError(f"format is {content['format']!r}")
        return {name: _choice(*entry) for name, entry in content["entries"].items()}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        _warn(file, f"does not hold measured choices ({error!r}); remove it, or set "
              f"{env.MEASURED.name} to another path")  # fmt: skip
        return None


def _choice(best: Any, gain: Any) -> Choice:
    if not (best is None or isinstance(best, str)):
        raise ValueError(f"candidate {best!r}")
    return best, float(gain)


@functools.cache
def _warn(file: Path, problem: str) -> None:
    """Once per file and problem."""
    warnings.warn(f"{file} {problem}. select='measure' measures without remembering.", stacklevel=3)
