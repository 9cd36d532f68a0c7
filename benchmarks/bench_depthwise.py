"""Depthwise convolution + folded batch norm + activation on every MobileNet layer.

Contenders on the CPU: cvfast's kernel; eager `conv2d` with bias and activation on NCHW and on NHWC;
the same under Inductor; and eager NHWC `conv2d` alone, without its activation. Those on a GPU are
in `depthwise_on_cuda.py`; its rows are written one by one, and a second run adds what is missing.

    python benchmarks/bench_depthwise.py --json benchmarks/results/cpu/depthwise.json
    python benchmarks/bench_depthwise.py --device cuda --batch 1 32 256 --dtype float16
    pytest benchmarks/bench_depthwise.py --benchmark-only

The first two interleave the contenders and verify in the same run; a ratio is printed only beside a
passed check. The last fills pytest-benchmark's tables, for comparison between commits.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))
import depthwise_on_cuda
from depthwise_on_cuda import PASSES
from shapes import DepthwiseLayer, distinct, mobilenet_depthwise_layers

from cvfast import extension, tolerance
from cvfast.ops.depthwise import bytes_moved, flops, prepack, reference
from cvfast.perf import environment, timing

CVFAST = "cvfast"
CONV_ALONE = "eager_nhwc_conv_alone"
BASELINES = ("eager_nhwc", "eager_nchw", "inductor")
DTYPES = ("float32", "bfloat16", "float16")
GPU_RESULTS = Path(__file__).parent / "results" / "gpu" / "depthwise.json"
LAYERS = distinct(mobilenet_depthwise_layers())


def contenders(
    layer: DepthwiseLayer, x: Tensor, weight: Tensor, bias: Tensor, *, inductor: bool = True
) -> dict[str, Callable[[], Tensor]]:
    """Each contender on this layer, by name; all but the last compute the same."""
    k, s = [layer.kernel] * 2, [layer.stride] * 2
    p, d = [layer.kernel // 2] * 2, [1, 1]
    packed = prepack(weight, bias)
    nchw = x.contiguous()
    kernel = torch.ops.cvfast.depthwise_cpu.default

    def eager(t: Tensor) -> Tensor:
        return reference(t, weight, bias, s, p, d, layer.activation)

    calls: dict[str, Callable[[], Tensor]] = {
        CVFAST: lambda: kernel(x, packed, k, s, p, d, layer.activation),
        "eager_nhwc": lambda: eager(x),
        "eager_nchw": lambda: eager(nchw),
    }
    if inductor:
        torch.compiler.reset()
        compiled = torch.compile(eager, dynamic=False)
        calls["inductor"] = lambda: compiled(x)
    calls[CONV_ALONE] = lambda: F.conv2d(x, weight, bias, s, p, d, layer.channels)
    return calls


def verify(
    layer: DepthwiseLayer, x: Tensor, weight: Tensor, bias: Tensor, actual: Tensor
) -> tolerance.Verdict:
    """Judges the kernel's result by the numbers policy."""
    k, s = layer.kernel // 2, layer.stride
    geometry = ([s, s], [k, k], [1, 1], layer.activation)
    expected = reference(x.double(), weight.double(), bias.double(), *geometry)
    return tolerance.check(actual, expected, reference(x, weight, bias, *geometry))


def measure(
    layer: DepthwiseLayer,
    *,
    threads: int,
    batch: int,
    dtype: torch.dtype,
    inductor: bool,
    min_time: float,
) -> dict[str, Any]:
    """One row of results: seconds per contender, and what the baselines take relative to cvfast."""
    torch.set_num_threads(threads)
    x, weight, bias = layer.tensors(batch, dtype)
    calls = contenders(layer, x, weight, bias, inductor=inductor)
    y = calls[CVFAST]()
    verdict = verify(layer, x, weight, bias, y)
    # Every contender runs on torch's own thread pool: no settling between them.
    timings = timing.interleave(calls, min_time=min_time, settle=0)
    seconds = timings[CVFAST].median
    kernel = (layer.kernel, layer.kernel)
    return {
        "layer": layer.name,
        "threads": threads,
        "batch": batch,
        "dtype": str(dtype).removeprefix("torch."),
        "verified": verdict.ok,
        "relative_error": verdict.error,
        "relative_error_eager": verdict.baseline_error,
        "seconds": {name: t.to_dict() for name, t in timings.items()},
        "speedup": {
            name: timing.ratio(t, timings[CVFAST]) for name, t in timings.items() if name != CVFAST
        },
        "gflops": flops(kernel, y.shape) / seconds * 1e-9,
        "gbytes": bytes_moved(x.shape, kernel, y.shape, dtype) / seconds * 1e-9,
    }


def geometric_mean(values: list[float]) -> float:
    return math.exp(sum(map(math.log, values)) / len(values))


def summarize(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Geometric mean and minimum of each speedup, per thread count, batch and dtype."""
    groups: dict[tuple[int, int, str], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["threads"], row["batch"], row["dtype"]), []).append(row)
    return [
        {
            "threads": threads,
            "batch": batch,
            "dtype": dtype,
            "layers": len(group),
            "speedup": {
                name: {
                    "geomean": geometric_mean([row["speedup"][name] for row in group]),
                    "min": min(row["speedup"][name] for row in group),
                }
                for name in group[0]["speedup"]
            },
        }
        for (threads, batch, dtype), group in groups.items()
    ]


def format_row(row: dict[str, Any]) -> str:
    label = f"{row['layer']:44s} t{row['threads']} b{row['batch']}"
    if not row["verified"]:
        return f"{label}  FAILED its check: relative error {row['relative_error']:.1e}"
    speedups = "  ".join(f"{name} {ratio:.2f}x" for name, ratio in row["speedup"].items())
    seconds = row["seconds"][CVFAST]
    return (
        f"{label} {seconds['median'] * 1e6:7.1f} us "
        f"[{seconds['p20'] * 1e6:.1f}, {seconds['p80'] * 1e6:.1f}]"
        f" {row['gflops']:4.0f} GFLOP/s {row['gbytes']:4.0f} GB/s | {speedups}"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2], help="on the CPU")
    parser.add_argument("--batch", type=int, nargs="+", default=[1])
    parser.add_argument("--dtype", nargs="+", default=["float32"], choices=DTYPES)
    parser.add_argument("--passes", nargs="+", default=PASSES, choices=PASSES, help="on a GPU")
    parser.add_argument("--budget", type=float, help="on a GPU: seconds after which no row starts")
    parser.add_argument("--filter", default="", help="only layers whose name contains this")
    parser.add_argument("--min-time", type=float, default=0.2, help="seconds per contender")
    parser.add_argument("--no-inductor", action="store_true", help="saves its compilation")
    parser.add_argument("--json", type=Path, help="write results and environment here")
    args = parser.parse_args()
    if args.device == "cuda":
        return depthwise_on_cuda.run(args, LAYERS, GPU_RESULTS)
    status = extension.load("cpu")
    if not status:
        sys.exit(str(status))

    rows = []
    with torch.inference_mode():
        for threads, batch, dtype, layer in itertools.product(
            args.threads, args.batch, args.dtype, LAYERS
        ):
            if args.filter not in layer.name:
                continue
            row = measure(
                layer,
                threads=threads,
                batch=batch,
                dtype=getattr(torch, dtype),
                inductor=not args.no_inductor,
                min_time=args.min_time,
            )
            rows.append(row)
            print(format_row(row), flush=True)
    summary = summarize(rows)
    for group in summary:
        print(f"threads {group['threads']}, batch {group['batch']}, {group['layers']} layers:")
        for name, speedup in group["speedup"].items():
            print(f"  {name:22s} geomean {speedup['geomean']:.2f}x  min {speedup['min']:.2f}x")
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        result = {
            "environment": environment.capture(),
            "isa": extension.cpu_isa(),
            "summary": summary,
            "rows": rows,
        }
        args.json.write_text(json.dumps(result, indent=1) + "\n")
    return 0 if all(row["verified"] for row in rows) else 1


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("contender", [CVFAST, *BASELINES, CONV_ALONE])
@pytest.mark.parametrize("layer", LAYERS, ids=lambda layer: layer.name)
def test_depthwise(benchmark: Any, layer: DepthwiseLayer, contender: str, threads: int) -> None:
    torch.set_num_threads(threads)
    x, weight, bias = layer.tensors(1)
    benchmark.group = f"{layer.name} {threads} threads"
    with torch.inference_mode():
        calls = contenders(layer, x, weight, bias, inductor=contender == "inductor")
        y = benchmark(calls[contender])
        verdict = verify(layer, x, weight, bias, calls[CVFAST]())
    assert verdict, str(verdict)
    benchmark.extra_info["gflops_per_call"] = flops([layer.kernel] * 2, y.shape) * 1e-9


if __name__ == "__main__":
    sys.exit(main())
