"""Pooling, elementwise operators and copies between layouts, as networks at 224 × 224 have them.

Contenders on the CPU: cvfast's kernel, and eager PyTorch. All are bound by memory, so the figure to
look at is bytes per second.

    python benchmarks/bench_pool.py --json benchmarks/results/cpu/pool.json
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cvfast import extension, tolerance
from cvfast.ops import elementwise, layout, pool
from cvfast.perf import environment, timing

Call = Callable[[], Tensor]
OPS = torch.ops.cvfast


class Problem:
    """A kernel and eager PyTorch on the same operands.

    Attributes:
        name: for people.
        bytes: that must be moved at least.
        ours, eager: run once; both return the result.
        expected: the result in float64.
    """

    def __init__(self, name: str, bytes_: int, ours: Call, eager: Call, expected: Call) -> None:
        self.name, self.bytes = name, bytes_
        self.ours, self.eager, self.expected = ours, eager, expected


def image(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(*shape, generator=generator)
    return x.contiguous(memory_format=torch.channels_last)


def window(
    batch: int, channels: int, size: int, kind: str, kernel: int, stride: int, padding: int
) -> Problem:
    x = image(batch, channels, size, size)
    arguments: tuple[Any, ...] = (
        kind, [kernel] * 2, [stride] * 2, [padding] * 2, [1, 1], False, True, None,
    )  # fmt: skip
    out = OPS.pool_cpu(x, *arguments)

    def ours() -> Tensor:
        OPS.pool_cpu.out(x, *arguments, out=out)
        return out

    return Problem(
        f"{kind} {kernel}x{kernel}/{stride} {batch}x{channels}x{size}²",
        pool.bytes_moved(x.shape, out.shape),
        ours,
        lambda: pool.reference(x, *arguments),
        lambda: pool.reference(x.double(), *arguments),
    )


def mean(batch: int, channels: int, size: int) -> Problem:
    x = image(batch, channels, size, size)
    out = OPS.global_pool_cpu(x)

    def ours() -> Tensor:
        OPS.global_pool_cpu.out(x, out=out)
        return out

    return Problem(
        f"mean {batch}x{channels}x{size}²",
        pool.bytes_moved(x.shape, out.shape),
        ours,
        lambda: F.adaptive_avg_pool2d(x, 1),
        lambda: pool.global_reference(x.double()),
    )


def element(batch: int, channels: int, size: int, op: str, activation: str) -> Problem:
    x = image(batch, channels, size, size)
    side = 1 if op == "mul" else size
    y = None if op == "none" else image(batch, channels, side, side)
    out = torch.empty_like(x)

    def ours() -> Tensor:
        OPS.elementwise_cpu.out(x, y, op, activation, out=out)
        return out

    return Problem(
        f"{op} {activation} {batch}x{channels}x{size}²",
        elementwise.bytes_moved(x.shape, () if y is None else y.shape),
        ours,
        lambda: elementwise.reference(x, y, op, activation),
        lambda: elementwise.reference(
            x.double(), None if y is None else y.double(), op, activation
        ),
    )


def copied(batch: int, channels: int, size: int, back: bool) -> Problem:
    x = image(batch, channels, size, size)
    x = x if back else x.contiguous()
    other = torch.contiguous_format if back else torch.channels_last
    out, eager_out = (torch.empty_like(x, memory_format=other) for _ in range(2))

    def ours() -> Tensor:
        OPS.copy_layout_cpu.out(x, out=out)
        return out

    return Problem(
        f"{'to contiguous' if back else 'to channels-last'} {batch}x{channels}x{size}²",
        2 * x.numel() * x.itemsize,
        ours,
        lambda: eager_out.copy_(x) if back else layout.channels_last(x),
        lambda: x.double(),
    )


def problems(batch: int) -> list[Problem]:
    """Layers of ResNet, GoogLeNet, Inception, DenseNet, MobileNet and EfficientNet."""
    return [
        window(batch, 64, 112, "max", 3, 2, 1),
        window(batch, 192, 56, "max", 3, 2, 1),
        window(batch, 256, 28, "max", 3, 1, 1),
        window(batch, 288, 35, "avg", 3, 1, 1),
        window(batch, 256, 56, "avg", 2, 2, 0),
        mean(batch, 1280, 7),
        mean(batch, 32, 112),
        element(batch, 256, 56, "add", "relu"),
        element(batch, 672, 14, "mul", "none"),
        element(batch, 96, 112, "none", "silu"),
        copied(batch, 3, 224, back=False),
        copied(batch, 512, 7, back=True),
    ]


def measure(problem: Problem, threads: int, batch: int, min_time: float) -> dict[str, Any]:
    """One row of results: seconds of both, verified in the same run."""
    torch.set_num_threads(threads)
    with torch.no_grad():
        verdict = tolerance.check(problem.ours(), problem.expected(), problem.eager())
        calls = {"cvfast": problem.ours, "eager": problem.eager}
        timings = timing.interleave(calls, min_time=min_time, settle=0)
    return {
        "problem": problem.name,
        "threads": threads,
        "batch": batch,
        "verified": verdict.ok,
        "seconds": {name: t.to_dict() for name, t in timings.items()},
        "speedup": timing.ratio(timings["eager"], timings["cvfast"]),
        "gbytes": problem.bytes / timings["cvfast"].median * 1e-9,
    }


def format_row(row: dict[str, Any]) -> str:
    label = f"{row['problem']:36s} t{row['threads']}"
    if not row["verified"]:
        return f"{label}  FAILED its check"
    return f"{label} {row['gbytes']:6.1f} GB/s  {row['speedup']:5.2f}x of eager"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--min-time", type=float, default=0.2, help="seconds per contender")
    parser.add_argument("--json", type=Path, help="where the results go")
    options = parser.parse_args()
    if not (status := extension.load("cpu")):
        parser.error(str(status))
    rows = []
    for batch in options.batch:
        for threads in options.threads:
            for problem in problems(batch):
                rows.append(measure(problem, threads, batch, options.min_time))
                print(format_row(rows[-1]), flush=True)
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        content = {"environment": environment.capture(), "rows": rows}
        options.json.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
