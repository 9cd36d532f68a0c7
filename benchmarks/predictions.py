"""Predicted times of every layer of the networks on several GPUs, an operator's in a file.

    python benchmarks/predictions.py [--op OP ...] [--check]

For each call of the networks, batch, GPU and backend: the kernel and launch that the call would get
there, compiled for that architecture (needs nvcc and Triton, no GPU), and the time that
`cvfast.perf.predict` gives it. Written to benchmarks/results/gpu/predicted_<op>.json, beside which
the first measurement on such a GPU stands or falls. `--check` writes nothing and exits with 1 if a
file differs from what is predicted now.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from cvfast import inventory
from cvfast.inventory import Configuration
from cvfast.launch import calls
from cvfast.launch.calls import Call
from cvfast.perf.devices import Device, find
from cvfast.perf.predict import Work, predict

RESULTS = Path(__file__).parent / "results" / "gpu"
DEVICES = ("H200", "RTX 4090", "RTX 5090")
BATCHES = (1, 256)
NOTE = (
    "Forward pass in float16 with cold L2, all distinct calls of {} summed, by the model in "
    "`cvfast/perf/predict.py`."
)
TARGETS = {
    "depthwise": "at least 80 %, then 90 % of the bandwidth of a device copy, every MobileNet v2 "
    "layer, cold L2",
    "inverted_residual": "at least 2x, then 4x as fast as the three best separate kernels, one "
    "kernel, layers of 112 to 28 pixels",
}
"""What a measurement is to reach, where an operator has a target of its own."""


def result(op: str) -> Path:
    """The file of an operator."""
    return RESULTS / f"predicted_{op}.json"


def layers(op: str, batches: Sequence[int] = BATCHES) -> list[Call]:
    """Every distinct forward call of the networks in float16, at each batch size."""
    found: dict[Any, Call] = {}
    for call in calls.network_calls([op], batches):
        if call.pass_ == "forward" and call.problem.dtype is torch.float16:
            # Calls that differ in their activation alone take the same time.
            activation = "none" if call.activation == "none" else "relu6"
            found.setdefault(call.problem, replace(call, activation=activation))
    return list(found.values())


def predicted(device: Device, backend: str, todo: Iterable[Call]) -> list[dict[str, Any]]:
    """A row per call on one device and backend. Times in seconds."""
    found: dict[Call, Configuration] = {}
    arch = device.architecture.name
    for call in todo:
        launch = inventory.launch_of(backend, arch, call)
        if launch is not None:
            found[call] = inventory.configure(backend, arch, call, launch)[0]
    builds = inventory.build(list(found.values()))
    rows = []
    for call, configuration in found.items():
        built = builds[configuration.key]
        if built.error:
            raise SystemExit(f"{configuration.config}: {built.error}")
        work = _work(call)
        prediction = predict(
            device,
            built.binaries[configuration.function],
            work,
            blocks=configuration.blocks,
            threads=configuration.threads,
            dynamic_shared=inventory.dynamic_shared(configuration, built),
        )
        peak = device.fp32_flops
        if inventory.uses_matrix_units(call, configuration.launch):
            peak = device.matrix_flops(call.problem.dtype)
        rows.append(
            {
                "device": device.name,
                "backend": backend,
                "batch": call.problem.batch,
                "layer": call.describe(),
                "config": configuration.config,
                "bytes": work.bytes,
                "flops": 2 * work.multiply_adds,
                "blocks": configuration.blocks,
                "waves": round(prediction.waves, 3),
                "occupancy": round(prediction.occupancy.fraction, 3),
                "occupancy_limiter": prediction.occupancy.limiter,
                "seconds": _round(prediction.seconds),
                "roofline": _round(max(prediction.roofline, 2 * work.multiply_adds / peak)),
                "copy_share": round(prediction.copy_share, 3),
                "limiter": prediction.limiter,
            }
        )
    return rows


def _work(call: Call) -> Work:
    problem = call.problem
    results = inventory.example(call, device="meta").reference(problem.dtype)
    written = sum(result.nbytes for result in results)
    return Work(problem.bytes() - written, written, multiply_adds=problem.flops() // 2)


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


def render(op: str, rows: Sequence[dict[str, Any]]) -> str:
    """The file of an operator: each row and each group on a line of its own."""

    def lines(items: Sequence[dict[str, Any]]) -> str:
        return "[\n" + ",\n".join(json.dumps(item) for item in items) + "\n]"

    networks = ", ".join(calls.column(op).networks)
    parts = (
        f'"note": {json.dumps(NOTE.format(networks))}',
        f'"target": {json.dumps(TARGETS.get(op))}',
        f'"summary": {lines(summarize(rows))}',
        f'"rows": {lines(rows)}',
    )
    return "{\n" + ",\n".join(parts) + "\n}\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--op", nargs="+", choices=calls.OPS, default=calls.OPS)
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if outdated")
    options = parser.parse_args()
    outdated = False
    for op in options.op:
        todo, path = layers(op), result(op)
        rows = [
            row
            for name in DEVICES
            for backend in calls.column(op).backends
            for row in predicted(
                find(name), backend, [call for call in todo if call.served_by(backend)]
            )
        ]
        text = render(op, rows)
        if options.check:
            if not path.exists() or path.read_text(encoding="utf-8") != text:
                command = f"python benchmarks/predictions.py --op {op}"
                print(f"{path} is outdated: run {command}", file=sys.stderr)
                outdated = True
            continue
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        for group in summarize(rows):
            print(op, group)
    return int(outdated)


if __name__ == "__main__":
    sys.exit(main())
