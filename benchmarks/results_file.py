"""Results that outlive the run that makes them, and a run that ends when its time is spent."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

Row = dict[str, Any]
T = TypeVar("T")


class Results:
    """Rows in a JSON file that is rewritten after each of them.

    Args:
        path: read if it exists.
        key: of a row: what was measured, without the result. A new row replaces that of its key.

    Attributes:
        rows: in the order in which their keys first came.
        head: what the file holds beside its rows; ready for JSON.
    """

    def __init__(self, path: Path, key: Callable[[Row], Hashable]) -> None:
        self.path, self.key = path, key
        content = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        self.rows: list[Row] = content.pop("rows", [])
        self.head: dict[str, Any] = content

    def __contains__(self, key: Hashable) -> bool:
        return any(self.key(row) == key for row in self.rows)

    def add(self, row: Row) -> None:
        """Keeps a row, and writes the file."""
        keys = [self.key(other) for other in self.rows]
        if self.key(row) in keys:
            self.rows[keys.index(self.key(row))] = row
        else:
            self.rows.append(row)
        self.write()

    def write(self) -> None:
        """Writes the file; whoever reads it meanwhile sees the old one or the new one, whole."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        fresh = self.path.with_suffix(".part")
        text = json.dumps({**self.head, "rows": self.rows}, indent=1)
        fresh.write_text(text + "\n", encoding="utf-8")
        os.replace(fresh, self.path)


class Budget:
    """Seconds that may be spent from now on.

    Args:
        seconds: None for no end.
        clock: seconds; for tests.
    """

    def __init__(self, seconds: float | None, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._end = None if seconds is None else clock() + seconds

    @property
    def left(self) -> float:
        """Seconds; not below 0."""
        return float("inf") if self._end is None else max(0.0, self._end - self._clock())

    def while_it_lasts(self, items: Iterable[T]) -> Iterator[T]:
        """The items, until the budget is spent. What has begun may end."""
        for item in items:
            if not self.left:
                return
            yield item


def same_origin(a: Mapping[str, Any], b: Mapping[str, Any]) -> bool:
    """Whether rows made in two environments (`cvfast.perf.environment.capture`) may stand in one
    file: same GPUs, PyTorch, Triton and code."""

    def identity(captured: Mapping[str, Any]) -> tuple[Any, ...]:
        gpus = [gpu["name"] for gpu in captured["gpus"]]
        packages = captured["packages"]
        return gpus, packages["torch"], packages["triton"], captured["git"]

    return identity(a) == identity(b)
