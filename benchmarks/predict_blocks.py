"""Predicted times of MobileNet v2's blocks on GPUs, in one CUDA kernel and in one for each layer.

    python benchmarks/predict_blocks.py [--check]

What a block takes in one kernel comes from the cost model that also chooses its launch parameters
(`cvfast.launch.inverted_residual.cuda.cost`), what its layers take in kernels of their own from
`cvfast.ops.inverted_residual.separate_seconds`; `fuses` is what the planner makes of the two.
Written to benchmarks/results/gpu/blocks_predicted.json. `--check` writes nothing and exits with 1
if the file differs from what is predicted now.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from cvfast.launch import calls, table
from cvfast.launch.inverted_residual import Problem, cuda
from cvfast.ops.inverted_residual import fuses_on_gpu, separate_seconds
from cvfast.perf.devices import Device, find

RESULT = Path(__file__).parent / "results" / "gpu" / "blocks_predicted.json"
DEVICES = ("H200", "RTX 4090", "RTX 5090")
BATCHES = (1, 256)
NETWORK = "mobilenet_v2"


def blocks() -> list[Problem]:
    """The distinct blocks of the network, at batch 1 in float16."""
    (column,) = (column for column in calls.COLUMNS if column.op == "inverted_residual")
    return list(dict.fromkeys(problem for problem, _ in column.problems(NETWORK)))


def predicted(problem: Problem, device: Device) -> dict[str, Any]:
    """A row. Times in seconds, bytes as they pass device memory at the least."""
    launch = table.choose("inverted_residual", "cuda", problem, "forward", device)
    cost = cuda.cost(problem, launch, device)
    hidden = problem.batch * problem.hidden * problem.dtype.itemsize
    planes = problem.out_height * problem.out_width
    if problem.expands:
        planes += problem.height * problem.width
    return {
        "device": device.name,
        "block": replace(problem, batch=1).describe(),
        "batch": problem.batch,
        "flops": problem.flops(),
        "bytes": problem.bytes(),
        "bytes_separate": problem.bytes() + 2 * hidden * planes,
        "launch": vars(launch),
        "blocks": math.prod(cuda.grid(problem, launch)),
        "shared_bytes": cuda.shared_bytes(problem, launch),
        "recompute": round(cost.recompute, 3),
        "occupancy": round(cost.held.fraction, 3),
        "occupancy_limiter": cost.held.limiter,
        "waves": round(cost.waves, 2),
        "seconds": round(cost.seconds, 9),
        "limiter": cost.limiter,
        "seconds_separate": round(separate_seconds(problem, device), 9),
        "fuses": fuses_on_gpu(problem, device, "cuda"),
    }


def rows() -> list[dict[str, Any]]:
    """Every block on every device at every batch."""
    # That no table was tuned for a device is no news here.
    logging.getLogger("cvfast.launch").setLevel(logging.ERROR)
    return [
        predicted(replace(problem, batch=batch), find(device))
        for batch in BATCHES
        for problem in blocks()
        for device in DEVICES
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--check", action="store_true", help="compare, and write nothing")
    options = parser.parse_args()
    text = '{"rows": [\n' + ",\n".join(json.dumps(row) for row in rows()) + "\n]}\n"
    if not options.check:
        RESULT.write_text(text, encoding="utf-8")
        return 0
    same = RESULT.exists() and RESULT.read_text(encoding="utf-8") == text
    if not same:
        print(f"{RESULT} is outdated: run python benchmarks/predict_blocks.py", file=sys.stderr)
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main())
