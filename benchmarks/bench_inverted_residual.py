"""Every distinct block of MobileNet v1, v2 and v3-large on the CPU: one kernel, or one per layer.

Contenders: the fused kernel; cvfast's kernels one by one, into buffers that are there already, as
in a plan's arena; and eager NHWC.

    python benchmarks/bench_inverted_residual.py --json FILE

The contenders are interleaved and verified in the same run. `fuses` says what the planner would do.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from shapes import Block, mobilenet_blocks
from torch import Tensor

from cvfast import extension, tolerance
from cvfast.ops.depthwise import prepack as prepack_depthwise
from cvfast.ops.inverted_residual import (
    bytes_moved,
    flops,
    fuses,
    reference,
    squeeze_reference,
)
from cvfast.ops.pointwise import prepack as prepack_pointwise
from cvfast.perf import environment, timing

FUSED, SEPARATE = "fused", "separate"


def measure(block: Block, *, batch: int, dtype: torch.dtype, min_time: float) -> dict[str, Any]:
    """A row of results."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        fan_in = shape[1] * shape[2] * shape[3] if len(shape) == 4 else 1
        return (torch.randn(*shape, generator=generator) / fan_in**0.5).to(dtype)

    def empty(channels: int, height: int, width: int) -> Tensor:
        return torch.zeros(batch, channels, height, width, dtype=dtype).to(
            memory_format=torch.channels_last
        )

    size, out_size, k, hidden = block.size, block.out_size, block.kernel, block.hidden
    channels = block.in_channels if block.expands else hidden
    x = torch.randn(batch, channels, size, size, generator=generator).to(
        dtype=dtype, memory_format=torch.channels_last
    )
    expand = (draw(hidden, channels, 1, 1), draw(hidden)) if block.expands else (None, None)
    depthwise = draw(hidden, 1, k, k), draw(hidden)
    geometry = [block.stride] * 2, [k // 2] * 2
    activations = block.activation, block.activation
    first = None if expand[0] is None else prepack_pointwise(*expand, dtype=dtype)
    second = prepack_depthwise(*depthwise)
    wide, d = empty(hidden, size, size), empty(hidden, out_size, out_size)
    ops = torch.ops.cvfast

    def expand_and_convolve() -> None:
        if first is not None:
            ops.pointwise_cpu.out(
                x, first, [1, 1], None, None, None, None, block.activation, out=wide
            )
        source = x if first is None else wide
        ops.depthwise_cpu.out(source, second, [k, k], *geometry, [1, 1], block.activation, out=d)

    calls: dict[str, Callable[[], object]]
    if block.out_channels is None:
        result, means = empty(hidden, out_size, out_size), empty(hidden, out_size, 1)
        calls = {
            FUSED: lambda: ops.inverted_residual_squeeze_cpu.out(
                x, first, second, hidden, [k, k], *geometry, *activations,
                out=result, row_means=means,
            ),
            SEPARATE: expand_and_convolve,
        }  # fmt: skip
        arguments = (x, *expand, *depthwise)

        def run_reference(*tensors: Tensor | None) -> Tensor:
            return squeeze_reference(*tensors, *geometry, *activations)[0]  # type: ignore[arg-type]

    else:
        project = draw(block.out_channels, hidden, 1, 1), draw(block.out_channels)
        third = prepack_pointwise(*project, dtype=dtype)
        residual = x if block.residual else None
        result = empty(block.out_channels, out_size, out_size)
        separate_result = torch.zeros_like(result)

        def separate() -> None:
            expand_and_convolve()
            ops.pointwise_cpu.out(
                d, third, [1, 1], None, None, None, residual, block.last_activation,
                out=separate_result,
            )  # fmt: skip

        calls = {
            FUSED: lambda: ops.inverted_residual_cpu.out(
                x, first, second, third, residual, hidden, [k, k], *geometry, *activations,
                block.last_activation, out=result,
            ),
            SEPARATE: separate,
        }  # fmt: skip
        arguments = (x, *expand, *depthwise, *project, residual)

        def run_reference(*tensors: Tensor | None) -> Tensor:
            return reference(*tensors, *geometry, *activations, block.last_activation)  # type: ignore[arg-type]

    calls["eager_nhwc"] = lambda: run_reference(*arguments)
    calls[FUSED]()
    verdict = tolerance.check(
        result,
        run_reference(*(None if t is None else t.double() for t in arguments)),
        run_reference(*arguments),
    )
    timings = timing.interleave(calls, min_rounds=5, min_time=min_time, burst=6, settle=0)
    counts = (x.shape, hidden, block.out_channels or 0, (k, k), (out_size, out_size))
    seconds = timings[FUSED].median
    return {
        "model": block.model,
        "block": str(block),
        "verified": verdict.ok,
        "relative_error": verdict.error,
        "relative_error_eager": verdict.baseline_error,
        "fuses": fuses(
            x.shape, hidden, block.out_channels, kernel_size=(k, k), stride=geometry[0],
            expands=block.expands, dtype=dtype, threads=torch.get_num_threads(),
        ),
        "seconds": {name: t.to_dict() for name, t in timings.items()},
        "speedup": {
            name: timing.ratio(t, timings[FUSED]) for name, t in timings.items() if name != FUSED
        },
        "gflops": flops(*counts, expand=block.expands) / seconds * 1e-9,
        "gbytes": bytes_moved(*counts, dtype, expand=block.expands) / seconds * 1e-9,
    }  # fmt: skip


def format_row(row: dict[str, Any]) -> str:
    if not row["verified"]:
        return f"{row['block']:24s} FAILED its check: relative error {row['relative_error']:.1e}"
    speedups = "  ".join(f"{name} {ratio:.2f}x" for name, ratio in row["speedup"].items())
    return (
        f"{row['model']:18s} {row['block']:22s} {row['seconds'][FUSED]['median'] * 1e6:8.1f} us "
        f"{row['gflops']:4.0f} GFLOP/s | {speedups} | {'fused' if row['fuses'] else 'separate'}"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--models", nargs="+", help="default: all")
    parser.add_argument("--min-time", type=float, default=0.02, help="seconds per contender")
    parser.add_argument("--json", type=Path, help="write results and environment to this file")
    args = parser.parse_args()
    status = extension.load("cpu")
    if not status:
        sys.exit(str(status))

    blocks = [b for b in mobilenet_blocks() if args.models is None or b.model in args.models]
    dtype = getattr(torch, args.dtype)
    runs = []
    with torch.inference_mode():
        for threads in args.threads:
            torch.set_num_threads(threads)
            for batch in args.batch:
                print(f"{threads} threads, batch {batch}, {args.dtype}")
                rows = []
                for block in blocks:
                    row = measure(block, batch=batch, dtype=dtype, min_time=args.min_time)
                    rows.append(row)
                    print(format_row(row), flush=True)
                runs.append(
                    {
                        "threads": threads,
                        "batch": batch,
                        "dtype": args.dtype,
                        "isa": extension.cpu_isa(),
                        "environment": environment.capture(),
                        "rows": rows,
                    }
                )
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps({"runs": runs}, indent=1) + "\n", encoding="utf-8")
    return 0 if all(row["verified"] for group in runs for row in group["rows"]) else 1


if __name__ == "__main__":
    sys.exit(main())
