"""Tables and JSON: rich on a terminal, plain aligned text in a pipe."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import typer


@dataclass
class Table:
    """Rows of text under headings; columns named in `right` are aligned to the right."""

    columns: Sequence[str]
    title: str = ""
    right: Sequence[str] = ()
    rows: list[list[str]] = field(default_factory=list)

    def add(self, *cells: object) -> None:
        """Appends a row.

        Raises:
            ValueError: if the number of cells is not that of the columns.
        """
        if len(cells) != len(self.columns):
            raise ValueError(f"expected {len(self.columns)} cells, got {len(cells)}")
        self.rows.append(["" if cell is None else str(cell) for cell in cells])

    def print(self) -> None:
        """Writes the table to standard output."""
        if sys.stdout.isatty():
            self._print_rich()
        else:
            print(self.text())

    def text(self) -> str:
        """The table as aligned plain text, two spaces between columns."""
        lines = [list(self.columns), *self.rows]
        widths = [max(len(line[i]) for line in lines) for i in range(len(self.columns))]
        aligned = [
            "  ".join(
                cell.rjust(width) if column in self.right else cell.ljust(width)
                for cell, width, column in zip(line, widths, self.columns, strict=True)
            ).rstrip()
            for line in lines
        ]
        return "\n".join([self.title, *aligned] if self.title else aligned)

    def _print_rich(self) -> None:
        from rich import box
        from rich.console import Console
        from rich.table import Table as RichTable
        from rich.text import Text

        table = RichTable(title=self.title or None, title_justify="left", box=box.SIMPLE_HEAD)
        for column in self.columns:
            table.add_column(column, justify="right" if column in self.right else "left")
        for row in self.rows:
            # Text keeps square brackets of names from being read as markup.
            table.add_row(*(Text(cell, style=_style(cell)) for cell in row))
        Console().print(table)


def print_json(value: Mapping[str, Any] | Sequence[Any]) -> None:
    """Writes one JSON document to standard output."""
    print(json.dumps(value, indent=2))


def note(message: str) -> None:
    """Writes a remark to standard error, so that standard output stays data."""
    print(message, file=sys.stderr)


def fail(message: str) -> typer.Exit:
    """Writes an error to standard error; ``raise fail(...)`` ends the command with exit code 2."""
    print(f"cvfast: {message}", file=sys.stderr)
    return typer.Exit(2)


_STYLES = {
    "ok": "green",
    "fused": "green",
    "passed": "green",
    "skipped": "yellow",
    "missing": "yellow",
    "failed": "bold red",
    "FAILED": "bold red",
}


def _style(cell: str) -> str:
    return _STYLES.get(cell, "")
