"""cvfast.optimize on networks from everywhere: verified at two sizes, timed against eager PyTorch.

    python benchmarks/bench_zoo.py [MODEL ...] [--threads 2] [--output FILE]

One optimised network serves both sizes. The file is rewritten after every network; rows of other
networks that are already there stay. Exits with 1 if a network fails its check or is slower than
eager in either layout.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn

import cvfast
from cvfast.cli import specs
from cvfast.perf import environment
from cvfast.perf.timing import interleave, ratio

RESULTS = Path(__file__).parent / "results" / "cpu" / "zoo.json"

OWN = (
    "mobilenet_v1", "mobilenet_v2", "mobilenet_v3_small", "mobilenet_v3_large",
    "efficientnet_lite0", "resnet18", "resnet50", "densenet121", "googlenet", "inception_v3",
    "unet",
)  # fmt: skip
TORCHVISION = (
    "mobilenet_v2", "mobilenet_v3_small", "mobilenet_v3_large", "resnet18", "resnet50",
    "densenet121", "googlenet", "inception_v3",
)  # fmt: skip
TIMM = (
    "convnext_atto", "cspresnet50", "darknet53", "dla34", "efficientnet_b0", "ese_vovnet19b_dw",
    "fbnetc_100", "ghostnet_100", "hardcorenas_a", "hrnet_w18_small", "lcnet_100", "mixnet_s",
    "mnasnet_100", "mobilenetv2_100", "mobilenetv3_large_100", "mobilenetv4_conv_small",
    "nf_resnet50", "regnetx_004", "regnety_004", "repvgg_a0", "res2net50_26w_4s", "resnest14d",
    "resnet26d", "resnext50_32x4d", "rexnet_100", "seresnet50", "tf_efficientnet_lite0",
    "tinynet_a", "vgg11_bn", "xception41",
)  # fmt: skip
ZOO = (*OWN, *(f"torchvision:{name}" for name in TORCHVISION), *(f"timm:{name}" for name in TIMM))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="*", default=ZOO, help="default: the list in this file")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--min-time", type=float, default=0.4, help="seconds per contender")
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rows = json.loads(options.output.read_text())["rows"] if options.output.exists() else []
    bad = 0
    for name in options.models:
        row = measure(name, options.min_time)
        bad += not (row["ok"] and all(s["speedup"] > 1 for s in row["sizes"]))
        print(describe(row), flush=True)
        rows = [r for r in rows if r["model"] != name] + [row]
        options.output.parent.mkdir(parents=True, exist_ok=True)
        result = {"environment": environment.capture(), "rows": rows}
        options.output.write_text(json.dumps(result, indent=1) + "\n")
    return 1 if bad else 0


def measure(name: str, min_time: float) -> dict[str, Any]:
    """One network at its own size and at a smaller, not square one."""
    model = specs.load(name)
    channels, height, width = specs.input_shape(name, model)
    optimized = cvfast.optimize(model, specs.example((channels, height, width), 1))
    in_channels_last = specs.load(name).to(memory_format=torch.channels_last)
    sizes = [
        compare(model, in_channels_last, optimized, shape, min_time)
        for shape in ((channels, height, width), (channels, height - 32, width - 64))
    ]
    report = optimized.report
    return {
        "model": name,
        "ok": report.verification.ok and all(size["ok"] for size in sizes),
        "coverage": report.coverage,
        "fused": len(report.fused),
        "reasons": sorted({row.reason for row in report.rows if row.reason}),
        "optimize_seconds": report.seconds,
        "threads": torch.get_num_threads(),
        "sizes": sizes,
    }


@torch.no_grad()
def compare(
    model: nn.Module,
    in_channels_last: nn.Module,
    optimized: nn.Module,
    shape: tuple[int, int, int],
    min_time: float,
) -> dict[str, Any]:
    """Medians in seconds of eager, eager channels-last and cvfast at one size, after the check.

    ``speedup`` is over the faster of the two.
    """
    from cvfast.perf.peers import flatten

    x = specs.example(shape, 1)
    y = x.contiguous(memory_format=torch.channels_last)
    verdict = specs.Truth(model, x, x.dtype).check(flatten(optimized(x)))
    calls = {
        "eager": lambda: model(x),
        "eager_channels_last": lambda: in_channels_last(y),
        "cvfast": lambda: optimized(x),
    }
    times = interleave(calls, min_time=min_time, max_time=20, settle=0)
    ratios = {peer: ratio(times[peer], times["cvfast"]) for peer in list(calls)[:2]}
    return {
        "shape": [1, *shape],
        "ok": verdict.ok,
        "error": verdict.error,
        "limit": verdict.limit,
        **{contender: timing.to_dict() for contender, timing in times.items()},
        "over": ratios,
        "speedup": min(ratios.values()),
    }


def describe(row: dict[str, Any]) -> str:
    """One line."""
    parts = [f"{row['model']:34s} {'ok' if row['ok'] else 'FAILED':6s} {row['coverage']:6.1%}"]
    for size in row["sizes"]:
        ms = "/".join(
            f"{1e3 * size[name]['median']:.1f}"
            for name in ("eager", "eager_channels_last", "cvfast")
        )
        over = "/".join(f"{value:.2f}" for value in size["over"].values())
        parts.append(f"{size['shape'][2]}x{size['shape'][3]}: {ms} ms, {over}x")
    return "  ".join([*parts, f"{row['optimize_seconds']:.1f} s", ",".join(row["reasons"])])


if __name__ == "__main__":
    sys.exit(main())
