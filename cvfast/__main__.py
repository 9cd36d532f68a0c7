"""``python -m cvfast``: the command line."""

from __future__ import annotations

from cvfast.cli import main

main()
