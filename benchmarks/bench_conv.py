"""Dense k x k convolution + bias + ReLU on every layer of the large networks, on the CPU.

Contenders: cvfast's kernels, with the algorithm that `choose_algorithm` picks, and each algorithm
alone; oneDNN on prepacked weights as `cvfast.optimize` calls it; eager `conv2d` on NHWC.

    python benchmarks/bench_conv.py --json benchmarks/results/cpu/conv.json

Contenders are interleaved and verified in the same run; a ratio is printed only beside a passed
check. Rows of layers that are not measured anew stay in the file. GFLOP/s count the operations of
the definition, so that Winograd's exceed the FMA peak.
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
from torch import Tensor, nn

from cvfast import extension, tolerance
from cvfast.models import default_input_size, get_model
from cvfast.ops.activation import Activation
from cvfast.ops.conv import (
    ALGORITHMS,
    OneDnnWeight,
    choose_algorithm,
    conv,
    conv_onednn,
    flops,
    prepack,
    serves,
)
from cvfast.perf import environment, timing
from cvfast.perf.roofline import peak_flops

CVFAST = "cvfast"
NETWORKS = ("resnet18", "resnet50", "unet", "googlenet", "inception_v3", "densenet121")
RELU = Activation("relu")


@dataclass(frozen=True)
class Layer:
    """A convolution of one group, by its shapes at batch 1; `models` says where it occurs."""

    channels: int
    size: tuple[int, int]
    outputs: int
    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]

    @property
    def name(self) -> str:
        """E.g. `64x56x56-64-k3x3s1`."""
        image = "x".join(map(str, (self.channels, *self.size)))
        kernel = "x".join(map(str, self.kernel))
        return f"{image}-{self.outputs}-k{kernel}s{self.stride[0]}"

    @property
    def geometry(self) -> dict[str, tuple[int, int]]:
        return {"stride": self.stride, "padding": self.padding, "dilation": self.dilation}

    def tensors(self, batch: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        """x (channels-last), weight and bias, drawn with a fixed seed."""
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(batch, self.channels, *self.size, generator=generator)
        weight = torch.randn(self.outputs, self.channels, *self.kernel, generator=generator)
        weight *= math.prod(weight.shape[1:]) ** -0.5
        bias = torch.randn(self.outputs, generator=generator)
        return (
            x.to(dtype).contiguous(memory_format=torch.channels_last),
            weight.to(dtype),
            bias.to(dtype),
        )


def layers_of(network: str) -> list[Layer]:
    """Every k x k convolution, k > 1, of one group that a forward pass runs, in order."""
    found: list[Layer] = []

    def record(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        assert isinstance(module, nn.Conv2d)
        if module.groups == 1 and module.kernel_size != (1, 1):
            shape = args[0].shape
            found.append(
                Layer(
                    shape[1],
                    (shape[2], shape[3]),
                    module.out_channels,
                    module.kernel_size,
                    module.stride,
                    module.padding,
                    module.dilation,
                )
            )

    with torch.device("meta"), torch.no_grad():
        model = get_model(network).eval()
        for module in model.modules():
            if isinstance(module, nn.Conv2d):
                module.register_forward_pre_hook(record)
        model(torch.empty(1, *default_input_size(network)))
    return found


def distinct() -> dict[Layer, list[str]]:
    """Each distinct layer of the networks, and the networks that have it."""
    owners: dict[Layer, list[str]] = {}
    for network in NETWORKS:
        for layer in dict.fromkeys(layers_of(network)):
            owners.setdefault(layer, []).append(network)
    return owners


def contenders(
    layer: Layer, x: Tensor, weight: Tensor, bias: Tensor
) -> tuple[str, dict[str, Callable[[], Tensor]]]:
    """The algorithm that cvfast chooses, and each contender on this layer by name."""
    kernel = torch.ops.cvfast.conv_cpu.default
    chosen = choose_algorithm(x.shape, weight.shape, **layer.geometry, dtype=x.dtype)

    def ours(algorithm: str) -> Callable[[], Tensor]:
        packed = prepack(weight, bias, algorithm=algorithm, dtype=x.dtype)
        shape = (list(layer.kernel), layer.outputs)
        geometry = (list(layer.stride), list(layer.padding), list(layer.dilation))
        return lambda: kernel(x, packed, None, None, *shape, *geometry, "relu")

    onednn = OneDnnWeight(weight, x.shape, **layer.geometry, groups=1)
    calls = {CVFAST: ours(chosen)}
    for algorithm in ALGORITHMS:
        if algorithm != chosen and serves(
            algorithm, layer.kernel, layer.stride, layer.dilation, x.dtype
        ):
            calls[algorithm] = ours(algorithm)
    calls["onednn"] = lambda: conv_onednn(x, onednn, bias, None, "relu")
    calls["eager_nhwc"] = lambda: conv(x, weight, bias, **layer.geometry, activation=RELU)
    return chosen, calls


def measure(
    layer: Layer,
    models: list[str],
    *,
    threads: int,
    batch: int,
    dtype: torch.dtype,
    peak: float,
    min_time: float,
) -> dict[str, Any]:
    """One row of results: seconds per contender, and what the others take relative to cvfast."""
    torch.set_num_threads(threads)
    x, weight, bias = layer.tensors(batch, dtype)
    chosen, calls = contenders(layer, x, weight, bias)
    y = calls[CVFAST]()
    truth = conv(x.double(), weight.double(), bias.double(), **layer.geometry, activation=RELU)
    verdict = tolerance.check(y, truth, calls["eager_nhwc"]())
    # Every contender runs on torch's own thread pool: no settling between them.
    timings = timing.interleave(calls, min_rounds=3, min_time=min_time, settle=0)
    operations = flops(x.shape, weight.shape, y.shape)
    rate = operations / timings[CVFAST].median
    return {
        "layer": layer.name,
        "models": models,
        "threads": threads,
        "batch": batch,
        "dtype": str(dtype).removeprefix("torch."),
        "algorithm": chosen,
        "peak_flops": peak,
        "verified": verdict.ok,
        "relative_error": verdict.error,
        "relative_error_eager": verdict.baseline_error,
        "seconds": {name: t.to_dict() for name, t in timings.items()},
        "speedup": {
            name: timing.ratio(t, timings[CVFAST]) for name, t in timings.items() if name != CVFAST
        },
        "gflops": rate * 1e-9,
        "share_of_peak": rate / peak,
    }


def summarize(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Geometric mean and minimum of the speedups, per threads, batch, dtype and algorithm."""
    groups: dict[tuple[int, int, str, str], list[dict[str, Any]]] = {}
    for row in rows:
        key = (row["threads"], row["batch"], row["dtype"], row["algorithm"])
        groups.setdefault(key, []).append(row)
    summary = []
    for (threads, batch, dtype, algorithm), group in groups.items():
        speedup = {}
        for name in ("onednn", "eager_nhwc"):
            ratios = [row["speedup"][name] for row in group]
            mean = math.exp(sum(map(math.log, ratios)) / len(ratios))
            speedup[name] = {"geomean": mean, "min": min(ratios)}
        summary.append(
            {
                "threads": threads,
                "batch": batch,
                "dtype": dtype,
                "algorithm": algorithm,
                "layers": len(group),
                "speedup": speedup,
            }
        )
    return summary


def format_row(row: dict[str, Any]) -> str:
    label = f"{row['layer']:30s} t{row['threads']} b{row['batch']} {row['algorithm']:11s}"
    if not row["verified"]:
        return f"{label}  FAILED its check: relative error {row['relative_error']:.1e}"
    speedups = "  ".join(f"{name} {ratio:.2f}x" for name, ratio in row["speedup"].items())
    return (
        f"{label} {row['seconds'][CVFAST]['median'] * 1e6:8.1f} us {row['gflops']:4.0f} GFLOP/s "
        f"{row['share_of_peak']:4.0%} | {speedups}"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--filter", default="", help="only layers or networks that contain this")
    parser.add_argument("--min-time", type=float, default=0.2, help="seconds per contender")
    parser.add_argument("--json", type=Path, help="write results and environment here")
    args = parser.parse_args()
    status = extension.load("cpu")
    if not status:
        sys.exit(str(status))
    dtype = getattr(torch, args.dtype)

    rows = json.loads(args.json.read_text())["rows"] if args.json and args.json.exists() else []
    where = {"isa": extension.cpu_isa(), "environment": environment.capture()}
    with torch.inference_mode():
        for threads in args.threads:
            torch.set_num_threads(threads)
            peak = peak_flops(dtype)
            for batch in args.batch:
                for layer, models in distinct().items():
                    if not any(args.filter in name for name in (layer.name, *models)):
                        continue
                    row = measure(
                        layer,
                        models,
                        threads=threads,
                        batch=batch,
                        dtype=dtype,
                        peak=peak,
                        min_time=args.min_time,
                    )
                    print(format_row(row), flush=True)
                    key = (row["layer"], threads, batch, args.dtype)
                    same = ("layer", "threads", "batch", "dtype")
                    rows = [r for r in rows if tuple(r[name] for name in same) != key]
                    rows.append(row)
                    if args.json:
                        args.json.parent.mkdir(parents=True, exist_ok=True)
                        result = {**where, "summary": summarize(rows), "rows": rows}
                        args.json.write_text(json.dumps(result, indent=1) + "\n")
    for group in summarize(rows):
        ratios = "  ".join(
            f"{name} geomean {ratio['geomean']:.2f}x min {ratio['min']:.2f}x"
            for name, ratio in group["speedup"].items()
        )
        print(
            f"threads {group['threads']}, batch {group['batch']}, {group['algorithm']}, "
            f"{group['layers']} layers: {ratios}"
        )
    return 0 if all(row["verified"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
