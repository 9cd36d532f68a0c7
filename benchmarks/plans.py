"""What networks launch on a GPU, and the bytes they move, beside PyTorch operator by operator.

    python benchmarks/plans.py [MODEL ...]

Lowers each network for an H200, which need not be there, in float16 at each batch size, and counts:
launches, bytes (each operand of a launch read or written once), FLOPs, and the time that data-sheet
rates allow at best on several GPUs. Nothing is timed. Written to benchmarks/results/gpu/plans.json,
from which benchmarks/tables.py makes the tables of docs/engine.md.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from results_file import Results

from cvfast.models import default_input_size, get_model
from cvfast.optimize import plan
from cvfast.optimize.launches import Launch

RESULT = Path(__file__).parent / "results" / "gpu" / "plans.json"
NETWORKS = (
    "resnet50", "densenet121", "googlenet", "inception_v3", "mobilenet_v1", "mobilenet_v2",
    "mobilenet_v3_large", "efficientnet_lite0", "unet", "fcn_resnet50",
)  # fmt: skip
BATCHES = (1, 128)
FAMILIES = {
    "products": (
        "pointwise", "conv", "upconv", "depthwise", "inverted_residual", "inception", "linear",
        "conv_transpose2d",
    ),
    "pools": ("pool", "global_pool", "max_pool2d", "avg_pool2d", "adaptive_avg_pool2d", "mean"),
    "concatenations": ("cat", "concat"),
    "copies": ("copy in", "copy out", "copy_layout", "copy_"),
}  # fmt: skip
OTHER = "normalisation, activation, addition"


def family(launch: Launch) -> str:
    """What kind of work a launch does, by its kernel's name: "conv/triton", "aten::relu"."""
    name = launch.kernel.rpartition("::")[2]
    names = {name, *name.split("/"), name.removesuffix("_squeeze")}
    return next((kind for kind, known in FAMILIES.items() if names & set(known)), OTHER)


def by_family(launches: Iterable[Launch]) -> dict[str, dict[str, int]]:
    """Launches and bytes of each kind of work."""
    found: dict[str, dict[str, int]] = {}
    for launch in launches:
        entry = found.setdefault(family(launch), {"launches": 0, "bytes": 0})
        entry["launches"] += 1
        entry["bytes"] += launch.bytes
    return found


def row(model: str, batch: int) -> dict[str, Any]:
    """One network at one batch size."""
    shape = (batch, *default_input_size(model))
    planned = plan(get_model(model).eval(), torch.randn(shape), device="H200", dtype=torch.float16)
    fused, unfused = planned.comparison()
    return {
        "model": model,
        "shape": list(shape),
        "arena_bytes": planned.arena_bytes,
        "concat_bytes": planned.concat_bytes,
        "cvfast": {**fused, "families": by_family(planned.launches)},
        "unfused": {**unfused, "families": by_family(planned.unfused)},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="*", default=NETWORKS, metavar="MODEL")
    options = parser.parse_args()
    results = Results(RESULT, key=lambda found: (found["model"], tuple(found["shape"])))
    results.head = {"device": "NVIDIA H200", "dtype": "float16"}
    for model in options.models:
        for batch in BATCHES:
            found = row(model, batch)
            results.add(found)
            print(
                f"{model} {'x'.join(map(str, found['shape']))}: "
                f"{found['cvfast']['launches']} launches, {found['cvfast']['bytes'] / 1e6:.1f} MB; "
                f"unfused {found['unfused']['launches']}, {found['unfused']['bytes'] / 1e6:.1f} MB"
            )


if __name__ == "__main__":
    main()
