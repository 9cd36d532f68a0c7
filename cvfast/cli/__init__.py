"""The command line, ``cvfast``: one module per command group, on typer and rich."""

from __future__ import annotations

import sys


def main() -> None:
    """Runs the command line and exits; says what to install where typer or rich is missing."""
    try:
        import rich  # noqa: F401  # imported where it is used; asked for here, before any work

        from cvfast.cli.app import app
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] not in ("typer", "rich"):
            raise
        sys.exit(
            f"cvfast: the command line needs {error.name}, which is not installed: "
            "pip install 'cvfast[cli]'"
        )
    app(prog_name="cvfast")
