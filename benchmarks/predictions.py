"""Predicted times of every depthwise layer of the MobileNets on several GPUs.

    python benchmarks/predictions.py [--check]

For each layer, batch, GPU and backend: the kernel and launch that the layer would get there,
compiled for that architecture (needs nvcc and Triton, no GPU), and the time that
`cvfast.perf.predict` gives it. Written to benchmarks/results/gpu/predicted_depthwise.json, beside
which the first measurement on such a GPU stands or falls. `--check` writes nothing and exits with 1
if the file differs from what is predicted now.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from cvfast import inventory
from cvfast.inventory import Call, Configuration
from cvfast.ops.depthwise import bytes_moved, flops
from cvfast.perf.devices import Device, find
from cvfast.perf.predict import Work, predict

RESULT = Path(__file__).parent / "results" / "gpu" / "predicted_depthwise.json"
DEVICES = ("H200", "RTX 4090", "RTX 5090")
BATCHES = (1, 256)
NOTE = (
    "Forward pass in float16 with cold L2, all distinct depthwise layers of MobileNet v1, v2, v3 "
    "and EfficientNet-Lite0 summed, by the model in `cvfast/perf/predict.py`."
)


def layers(batches: Sequence[int] = BATCHES) -> list[Call]:
    """Every distinct depthwise layer of the networks, float16, forward, at each batch size."""
    calls: dict[Call, None] = {}
    for batch in batches:
        for call in inventory.network_calls():
            if call.pass_ == "forward" and call.problem.dtype is torch.float16:
                # Layers that differ in their activation alone take the same time.
                problem = replace(call.problem, batch=batch)
                calls[Call(problem, call.pass_, "relu6")] = None
    return list(calls)


def predicted(device: Device, backend: str, calls: Iterable[Call]) -> list[dict[str, Any]]:
    """A row per layer on one device and backend. Times in seconds."""
    found: dict[Call, Configuration] = {}
    arch = device.architecture.name
    for call in calls:
        launch = inventory.launch_of("depthwise", backend, arch, call)
        (found[call],) = inventory.configure("depthwise", backend, arch, call, launch)
    builds = inventory.build(list(found.values()))
    rows = []
    for call, configuration in found.items():
        result = builds[configuration.key]
        if result.error:
            raise SystemExit(f"{configuration.config}: {result.error}")
        work = _work(call)
        prediction = predict(
            device,
            result.binaries[configuration.function],
            work,
            blocks=configuration.blocks,
            threads=configuration.threads,
            dynamic_shared=inventory.dynamic_shared(configuration, result),
        )
        rows.append(
            {
                "device": device.name,
                "backend": backend,
                "batch": call.problem.batch,
                "layer": inventory.describe(call),
                "config": configuration.config,
                "bytes": work.bytes,
                "flops": 2 * work.multiply_adds,
                "blocks": configuration.blocks,
                "waves": round(prediction.waves, 3),
                "occupancy": round(prediction.occupancy.fraction, 3),
                "occupancy_limiter": prediction.occupancy.limiter,
                "seconds": _round(prediction.seconds),
                "roofline": _round(prediction.roofline),
                "copy_share": round(prediction.copy_share, 3),
                "limiter": prediction.limiter,
            }
        )
    return rows


def _work(call: Call) -> Work:
    problem = call.problem
    out = (problem.batch, problem.out_channels, problem.out_height, problem.out_width)
    shape = (problem.batch, problem.channels, problem.height, problem.width)
    written = math.prod(out) * problem.dtype.itemsize
    return Work(
        read=bytes_moved(shape, problem.kernel, out, problem.dtype) - written,
        written=written,
        multiply_adds=flops(problem.kernel, out) // 2,
    )


def _round(seconds: float) -> float:
    """To a nanosecond: what the model is good for."""
    return round(seconds, 9)


def summarize(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """All layers of a device, batch and backend together."""
    groups: dict[tuple[str, int, str], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["device"], row["batch"], row["backend"]), []).append(row)
    return [
        {
            "device": device,
            "batch": batch,
            "backend": backend,
            "layers": len(group),
            "seconds": _round(sum(row["seconds"] for row in group)),
            "roofline": _round(sum(row["roofline"] for row in group)),
            "copy_share": {
                "least": min(row["copy_share"] for row in group),
                "most": max(row["copy_share"] for row in group),
            },
            "limiters": dict(Counter(row["limiter"] for row in group).most_common()),
        }
        for (device, batch, backend), group in groups.items()
    ]


def render(rows: Sequence[dict[str, Any]]) -> str:
    """The file: each row and each group on a line of its own."""

    def lines(items: Sequence[dict[str, Any]]) -> str:
        return "[\n" + ",\n".join(json.dumps(item) for item in items) + "\n]"

    parts = (
        f'"note": {json.dumps(NOTE)}',
        f'"summary": {lines(summarize(rows))}',
        f'"rows": {lines(rows)}',
    )
    return "{\n" + ",\n".join(parts) + "\n}\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if outdated")
    options = parser.parse_args()
    calls = layers()
    rows = [
        row
        for name in DEVICES
        for backend in inventory.BACKENDS
        for row in predicted(find(name), backend, calls)
    ]
    text = render(rows)
    if options.check:
        if not RESULT.exists() or RESULT.read_text(encoding="utf-8") != text:
            print(f"{RESULT} is outdated: run python benchmarks/predictions.py", file=sys.stderr)
            return 1
        return 0
    RESULT.parent.mkdir(parents=True, exist_ok=True)
    RESULT.write_text(text, encoding="utf-8")
    for group in summarize(rows):
        print(group)
    return 0


if __name__ == "__main__":
    sys.exit(main())
