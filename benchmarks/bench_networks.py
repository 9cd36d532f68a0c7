"""The zoo against its peers, one row per network, batch and thread count, as JSON.

    python benchmarks/bench_networks.py [NAME ...] [--batch 1,8] [--threads 1,2] [--dtype float32]

Each setting runs through `cvfast bench` in a process of its own, so that no peer's thread pool or
cache outlives it. The file is rewritten after every row: a run that is cut short keeps what it has,
and rows of other settings that are already there stay.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from cvfast.models import list_models

RESULTS = Path(__file__).parent / "results" / "cpu" / "networks.json"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="*", help="default: all of `cvfast list`")
    parser.add_argument("--batch", default="1,8")
    parser.add_argument("--threads", default="1,2")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    rows = json.loads(options.output.read_text())["rows"] if options.output.exists() else []
    failures = 0
    for model in options.models or list_models():
        for threads in options.threads.split(","):
            for batch in options.batch.split(","):
                result = measure(model, batch, threads, options.dtype)
                if result is None:
                    failures += 1
                    continue
                rows = merge(rows, result["rows"], result["environment"])
                options.output.parent.mkdir(parents=True, exist_ok=True)
                options.output.write_text(json.dumps({"rows": rows}, indent=1) + "\n")
                failures += not all(row["ok"] for row in result["rows"])
    return 1 if failures else 0


def measure(model: str, batch: str, threads: str, dtype: str) -> dict[str, Any] | None:
    """The JSON of one `cvfast bench`, or None, after its message, if it produced none."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "result.json"
        settings = {"--batch": batch, "--threads": threads, "--dtype": dtype, "--json": str(path)}
        flags = [word for setting in settings.items() for word in setting]
        subprocess.run([sys.executable, "-m", "cvfast", "bench", model, *flags], check=False)
        return json.loads(path.read_text()) if path.exists() else None


def merge(
    rows: list[dict[str, Any]], new: list[dict[str, Any]], environment: dict[str, Any]
) -> list[dict[str, Any]]:
    """`rows` with `new` in place of those of the same setting; each row keeps its environment."""
    replaced = {key(row) for row in new}
    kept = [row for row in rows if key(row) not in replaced]
    return sorted([*kept, *({**row, "environment": environment} for row in new)], key=key)


def key(row: dict[str, Any]) -> tuple[str, str, int, int]:
    """What makes a setting: network, dtype, threads, batch."""
    return row["model"], row["dtype"], row["threads"], row["shape"][0]


if __name__ == "__main__":
    sys.exit(main())
