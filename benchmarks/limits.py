"""What limits each network's inference on the CPU: where its time goes, by kind of step.

    python benchmarks/limits.py [MODEL ...] [--batch 1] [--threads 2] [--dtype float32]

Of each kind: its share of the time, the share of the FMA peak (measured in the same process) that
its steps reach, their bytes, counting every image and weight once, and the share of the threads'
time spent waiting for each other at their ends. Rows of other settings that are in the file already
stay.
"""

from __future__ import annotations

import argparse
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from results_file import Results

import cvfast
from cvfast.cli import comparison, specs
from cvfast.optimize import Step, profile
from cvfast.perf import environment

RESULTS = Path(__file__).parent / "results" / "cpu" / "limits.json"
NETWORKS = (
    "mobilenet_v1", "mobilenet_v2", "mobilenet_v3_large", "efficientnet_lite0", "densenet121",
    "googlenet", "inception_v3", "resnet18", "resnet50", "unet",
)  # fmt: skip
KEYS = ("model", "shape", "dtype", "threads")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="*", default=NETWORKS)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--runs", type=int, default=30)
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    results = Results(options.output, key=lambda row: tuple(str(row[key]) for key in KEYS))
    for name in options.models:
        row = measure(name, options.batch, getattr(torch, options.dtype), options.runs)
        results.add(row)
        print(summary(row), flush=True)
    return 0


def measure(name: str, batch: int, dtype: torch.dtype, runs: int) -> dict[str, Any]:
    """The row of one network at torch's number of threads; times are sums of medians of steps."""
    threads = torch.get_num_threads()
    model = specs.load(name)
    shape = specs.input_shape(name, model, None)
    x = specs.example(shape, batch)
    network = cvfast.optimize(model, (x,), dtype=None if dtype is x.dtype else dtype)
    peak = comparison.peak(threads, dtype)
    steps = profile(network, x, runs=runs)
    kinds: dict[str, list[Step]] = defaultdict(list)
    for step in steps:
        kinds[step.kind].append(step)
    return {
        "model": name,
        "shape": [batch, *shape],
        "dtype": str(dtype).removeprefix("torch."),
        "threads": threads,
        "environment": environment.capture(),
        "peak_flops_per_second": peak,
        "total": totals(steps, threads),
        "kinds": {kind: totals(group, threads) for kind, group in kinds.items()},
    }


def totals(steps: list[Step], threads: int) -> dict[str, float]:
    """Sums over `steps`; `waiting` is the share of the threads' time."""
    seconds = sum(step.seconds for step in steps)
    return {
        "steps": len(steps),
        "seconds": seconds,
        "flops": sum(step.flops for step in steps),
        "bytes": sum(step.bytes for step in steps),
        "waiting": sum(step.waited for step in steps) / (threads * seconds),
    }


def summary(row: dict[str, Any]) -> str:
    """One line."""
    total, peak = row["total"], row["peak_flops_per_second"]
    slowest = sorted(row["kinds"].items(), key=lambda item: -item[1]["seconds"])
    kinds = ", ".join(
        f"{kind} {group['seconds'] / total['seconds']:.0%} at "
        f"{group['flops'] / group['seconds'] / peak:.0%}"
        for kind, group in slowest
    )
    return (
        f"{row['model']:20} {1e3 * total['seconds']:7.2f} ms, "
        f"{total['flops'] / total['seconds'] / peak:.0%} of peak, "
        f"waiting {total['waiting']:.1%}: {kinds}"
    )


if __name__ == "__main__":
    sys.exit(main())
