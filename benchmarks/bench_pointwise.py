"""Every distinct 1x1 convolution of the networks that are made of them, on the CPU.

Contenders, all with bias: cvfast's kernel on packed weights, oneDNN on packed weights, and eager
`conv2d` on NHWC.

    python benchmarks/bench_pointwise.py --json benchmarks/results/cpu/pointwise.json

The contenders are interleaved and verified in the same run; a ratio is printed only beside a passed
check. Results are added to the file; those of the same threads, batch and dtype are replaced.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cvfast import extension, tolerance
from cvfast.models import default_input_size, get_model
from cvfast.ops.conv import ONEDNN_DTYPES, OneDnnWeight, conv_onednn
from cvfast.ops.pointwise import bytes_moved, flops, output_size, prepack, reference
from cvfast.perf import environment, roofline, timing

CVFAST = "cvfast"
MODELS = (
    "mobilenet_v1", "mobilenet_v2", "mobilenet_v3_small", "mobilenet_v3_large", "densenet121",
    "resnet50", "googlenet",
)  # fmt: skip


@dataclass(frozen=True)
class Layer:
    """`in_channels` maps of `size` to `out_channels`."""

    in_channels: int
    out_channels: int
    size: tuple[int, int]
    stride: tuple[int, int]

    def __str__(self) -> str:
        stride = f"-s{self.stride[0]}" if self.stride != (1, 1) else ""
        return f"{self.in_channels}-{self.out_channels}@{self.size[0]}x{self.size[1]}{stride}"


def layers_of(name: str) -> list[Layer]:
    """The 1x1 convolutions of a network at its own input size, in order, repeats dropped."""
    found: dict[Layer, None] = {}

    def record(conv: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        assert isinstance(conv, nn.Conv2d)
        _, channels, h, w = inputs[0].shape
        stride = (conv.stride[0], conv.stride[1])
        found[Layer(channels, conv.out_channels, (h, w), stride)] = None

    with torch.device("meta"):
        model = get_model(name).eval()
        for module in model.modules():
            if isinstance(module, nn.Conv2d) and module.kernel_size == (1, 1):
                module.register_forward_pre_hook(record)
        model(torch.empty(1, *default_input_size(name)))
    return list(found)


def distinct_layers(models: list[str]) -> dict[Layer, list[str]]:
    """Each layer, and the networks that have it."""
    layers: dict[Layer, list[str]] = {}
    for name in models:
        for layer in layers_of(name):
            layers.setdefault(layer, []).append(name)
    return layers


def measure(
    layer: Layer, *, batch: int, dtype: torch.dtype, min_time: float
) -> tuple[dict[str, Any], float]:
    """A row of results, and the FLOP/s of the kernel's median."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    x = draw(batch, layer.in_channels, *layer.size).contiguous(memory_format=torch.channels_last)
    weight = draw(layer.out_channels, layer.in_channels, 1, 1)
    bias = draw(layer.out_channels)
    stride = list(layer.stride)
    packed = prepack(weight, bias, dtype=dtype)
    kernel = torch.ops.cvfast.pointwise_cpu.default
    calls: dict[str, Callable[[], Tensor]] = {
        CVFAST: lambda: kernel(
            x, packed, layer.out_channels, stride, None, None, None, None, "none"
        ),
        "eager_nhwc": lambda: F.conv2d(x, weight, bias, stride),
    }
    if dtype in ONEDNN_DTYPES:
        opaque = OneDnnWeight(
            weight, x.shape, stride=stride, padding=(0, 0), dilation=(1, 1), groups=1
        )
        calls["onednn"] = lambda: conv_onednn(x, opaque, bias, None, "none")
    expected = reference(x.double(), weight.double(), bias.double(), stride=stride)
    verdict = tolerance.check(calls[CVFAST](), expected, reference(x, weight, bias, stride=stride))
    # Every contender runs on torch's own thread pool: no settling between them.
    timings = timing.interleave(calls, min_rounds=5, min_time=min_time, burst=6, settle=0)
    out_shape = (batch, layer.out_channels, *output_size(layer.size, stride))
    rate = flops(layer.in_channels, out_shape) / timings[CVFAST].median
    row = {
        "layer": str(layer),
        "verified": verdict.ok,
        "relative_error": verdict.error,
        "relative_error_eager": verdict.baseline_error,
        "seconds": {name: t.to_dict() for name, t in timings.items()},
        "speedup": {
            name: timing.ratio(t, timings[CVFAST]) for name, t in timings.items() if name != CVFAST
        },
        "gflops": rate * 1e-9,
        "gbytes": bytes_moved(layer.in_channels, out_shape, dtype) / timings[CVFAST].median * 1e-9,
    }
    return row, rate


def run(
    layers: dict[Layer, list[str]],
    *,
    threads: int,
    batch: int,
    dtype: torch.dtype,
    min_time: float,
) -> dict[str, Any]:
    """All layers at one setting."""
    torch.set_num_threads(threads)
    peak = roofline.peak_flops(dtype)
    rows = []
    for layer, models in layers.items():
        row, rate = measure(layer, batch=batch, dtype=dtype, min_time=min_time)
        # The better of both: a layer may run faster than the convolution that measures the peak.
        peak = max(peak, rate)
        rows.append({**row, "models": models})
    peak = max(peak, roofline.peak_flops(dtype))
    for row in rows:
        row["share_of_peak"] = row["gflops"] * 1e9 / peak
        print(format_row(row), flush=True)
    return {
        "threads": threads,
        "batch": batch,
        "dtype": str(dtype).removeprefix("torch."),
        "isa": extension.cpu_isa(),
        "peak_gflops": peak * 1e-9,
        "environment": environment.capture(),
        "summary": summarize(rows),
        "rows": rows,
    }


def summarize(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Geometric mean and minimum of each speedup; of the share of peak, the median and minimum."""
    shares = sorted(row["share_of_peak"] for row in rows)
    return {
        "layers": len(rows),
        "share_of_peak": {"median": shares[len(shares) // 2], "min": shares[0]},
        "speedup": {
            name: {
                "geomean": math.exp(
                    sum(math.log(row["speedup"][name]) for row in rows) / len(rows)
                ),
                "min": min(row["speedup"][name] for row in rows),
                "slower": sum(row["speedup"][name] < 1 for row in rows),
            }
            for name in rows[0]["speedup"]
        },
    }


def format_row(row: dict[str, Any]) -> str:
    if not row["verified"]:
        return f"{row['layer']:24s} FAILED its check: relative error {row['relative_error']:.1e}"
    speedups = "  ".join(f"{name} {ratio:.2f}x" for name, ratio in row["speedup"].items())
    return (
        f"{row['layer']:24s} {row['seconds'][CVFAST]['median'] * 1e6:8.1f} us "
        f"{row['gflops']:4.0f} GFLOP/s {row['share_of_peak']:4.0%} of peak | {speedups}"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--models", nargs="+", default=list(MODELS))
    parser.add_argument("--min-time", type=float, default=0.02, help="seconds per contender")
    parser.add_argument("--json", type=Path, help="add results and environment to this file")
    args = parser.parse_args()
    status = extension.load("cpu")
    if not status:
        sys.exit(str(status))

    layers = distinct_layers(args.models)
    runs = []
    with torch.inference_mode():
        for threads in args.threads:
            for batch in args.batch:
                print(f"{threads} threads, batch {batch}, {args.dtype}")
                dtype = getattr(torch, args.dtype)
                runs.append(
                    run(layers, threads=threads, batch=batch, dtype=dtype, min_time=args.min_time)
                )
                print(json.dumps(runs[-1]["summary"]))
    if args.json:
        store(args.json, runs)
    return 0 if all(row["verified"] for group in runs for row in group["rows"]) else 1


def store(path: Path, runs: list[dict[str, Any]]) -> None:
    """Adds `runs` to those in the file, in place of those of the same setting."""

    def setting(group: dict[str, Any]) -> tuple[Any, ...]:
        return group["dtype"], group["isa"], group["batch"], group["threads"]

    known = json.loads(path.read_text(encoding="utf-8"))["runs"] if path.exists() else []
    merged = {setting(group): group for group in [*known, *runs]}
    path.parent.mkdir(parents=True, exist_ok=True)
    ordered = [merged[key] for key in sorted(merged)]
    path.write_text(json.dumps({"runs": ordered}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
