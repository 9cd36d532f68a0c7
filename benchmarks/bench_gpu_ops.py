"""The kernels of every operator on a GPU, against eager, Inductor and a copy of the same bytes.

    python benchmarks/bench_gpu_ops.py [--op OP ...] [--json FILE] [--budget SECONDS]

Contenders of each call of the networks: cvfast's kernels with the launch parameters that a user
gets; PyTorch's operators on channels-last tensors, cuDNN choosing its algorithm by measurement; the
same under Inductor with max-autotune; and, as the limit, a device-to-device copy of as many bytes
as the call has to move. All are timed with cold L2 on a filled stream, so that what launching takes
the host counts for none of them. Rows are on disk as soon as they are measured; a second run adds
what is missing.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Callable, Hashable
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent))
from results_file import Budget, Results, same_origin

from cvfast import extension, inventory, tuning
from cvfast.launch import calls
from cvfast.launch.calls import Call
from cvfast.ops._example import Example
from cvfast.perf import clocks, devices, environment, gpu_timing, timing

RESULTS = Path(__file__).parent / "results" / "gpu" / "ops.json"
DEVICE = "cuda"
COPY = "copy"
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


def wanted(ops: list[str], batches: list[int], dtypes: list[str]) -> list[Call]:
    """The forward calls of the networks, largest first of each operator, operators in turn."""
    lists = []
    for op in ops:
        found = [
            call
            for call in calls.network_calls([op], batches)
            if call.pass_ == "forward" and call.problem.dtype in map(DTYPES.__getitem__, dtypes)
        ]
        lists.append(sorted(found, key=lambda call: -call.problem.bytes()))
    turns = itertools.zip_longest(*lists)
    return [call for turn in turns for call in turn if call is not None]


def contenders(
    call: Call, example: Example, *, inductor: bool
) -> tuple[dict[str, Callable[[], Any]], dict[str, str]]:
    """Each contender's call, and why the others are missing.

    An error of cvfast's own kernels is raised.
    """
    variants: dict[str, Callable[[], Any]] = {}
    unavailable: dict[str, str] = {}
    for backend in call.backends():
        if status := extension.load(backend):
            variants[f"cvfast_{backend}"] = _bind(example, backend)
        else:
            unavailable[f"cvfast_{backend}"] = str(status)
    inputs, definition = example.inputs, example.definition
    variants["eager"] = lambda: definition(*inputs)
    if inductor:
        # Graphs of Inductor's own would copy the input into their pool first.
        torch.compiler.reset()
        compiled = torch.compile(definition, dynamic=False, mode="max-autotune-no-cudagraphs")
        try:
            compiled(*inputs)
        except Exception as error:  # a peer that does not run is no failure of ours
            unavailable["inductor"] = f"{type(error).__name__}: {error}".splitlines()[0]
        else:
            variants["inductor"] = lambda: compiled(*inputs)
    elements = max(1, call.problem.bytes() // call.problem.dtype.itemsize // 2)
    source = torch.empty(elements, dtype=call.problem.dtype, device=DEVICE).normal_()
    target = torch.empty_like(source)
    variants[COPY] = lambda: target.copy_(source)
    return variants, unavailable


def _bind(example: Example, backend: str) -> Callable[[], Any]:
    return lambda: example.run(backend)


def measure(call: Call, *, bandwidth: float, inductor: bool, min_time: float) -> dict[str, Any]:
    """One row: seconds of each contender, what they reach, and the check of cvfast's results."""
    example = inventory.example(call, device=DEVICE)
    check = tuning.judge(example, call)
    with torch.inference_mode(), inventory.rounding(call.problem):
        variants, unavailable = contenders(call, example, inductor=inductor)
        ours = [name for name in variants if name.startswith("cvfast")]
        verdicts = {name: check(variants[name]()) for name in ours}
        log: list[clocks.Sample] = []
        timings = gpu_timing.interleave_cuda(
            variants, cold_l2=True, min_rounds=3, min_time=min_time, max_time=5.0, log=log
        )
    return {
        **setting(call),
        "bytes": call.problem.bytes(),
        "flops": call.problem.flops(),
        "verified": bool(verdicts) and all(verdicts.values()),
        "checks": {name: str(verdict) for name, verdict in verdicts.items()},
        "seconds": {name: one.to_dict() for name, one in timings.items()},
        **summary(timings, call, bandwidth),
        "unavailable": unavailable,
        "clocks": clocks.summarize(log),
    }


def summary(timings: dict[str, timing.Timing], call: Call, bandwidth: float) -> dict[str, Any]:
    """The faster of cvfast's kernels: its rates, and how many times as long the others take."""
    ours = [name for name in timings if name.startswith("cvfast")]
    best = min(ours, key=lambda name: timings[name].median, default=None)
    if best is None:
        return {"best": None, "share_of_copy_bandwidth": None, "tflops": None, "speedup": {}}
    seconds = timings[best].median
    return {
        "best": best,
        "share_of_copy_bandwidth": call.problem.bytes() / seconds / bandwidth,
        "tflops": 1e-12 * call.problem.flops() / seconds,
        "speedup": {
            name: timing.ratio(one, timings[best])
            for name, one in timings.items()
            if name not in ours
        },
    }


def setting(call: Call) -> dict[str, Any]:
    return {"op": call.op, "call": call.describe(), "batch": call.problem.batch}


def key(row: dict[str, Any]) -> Hashable:
    return row["op"], row["call"]


def describe(row: dict[str, Any]) -> str:
    """One line."""
    label = f"{row['op']:18s} {row['call']:56s}"
    if not row["verified"]:
        return f"{label}  FAILED: {row['checks'] or row['unavailable']}"
    speedups = "  ".join(f"{name} {ratio:.2f}x" for name, ratio in row["speedup"].items())
    return (
        f"{label} {row['best']} {1e6 * row['seconds'][row['best']]['median']:.1f} us, "
        f"{row['share_of_copy_bandwidth']:.0%} of copy, {row['tflops']:.1f} TFLOP/s | {speedups}"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--op", nargs="+", choices=calls.OPS, default=list(calls.OPS))
    parser.add_argument("--batch", nargs="+", type=int, default=[256])
    parser.add_argument("--dtype", nargs="+", choices=list(DTYPES), default=["float16"])
    parser.add_argument("--no-inductor", action="store_true")
    parser.add_argument("--json", type=Path, default=RESULTS)
    parser.add_argument("--budget", type=float, help="seconds after which no row is begun")
    parser.add_argument("--min-time", type=float, default=0.05, help="seconds of each contender")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        print("bench_gpu_ops.py times kernels on a GPU, and PyTorch sees none here")
        return 2
    torch.backends.cudnn.benchmark = True
    results = Results(args.json, key)
    captured = environment.capture()
    if results.rows and not same_origin(results.head["environment"], captured):
        print(f"{results.path}: made elsewhere or from other code; measured anew")
        results.rows = []
    bandwidth = gpu_timing.copy_bandwidth()
    results.head = {"environment": captured, "copy_bandwidth": bandwidth}
    print(f"{devices.current().name}: copies {1e-9 * bandwidth:.0f} GB/s, read and written")
    todo = [
        call
        for call in wanted(args.op, args.batch, args.dtype)
        if key(setting(call)) not in results
    ]
    for call in Budget(args.budget).while_it_lasts(todo):
        try:
            row = measure(
                call, bandwidth=bandwidth, inductor=not args.no_inductor, min_time=args.min_time
            )
        except torch.OutOfMemoryError as error:
            print(f"{call.op} {call.describe()}: skipped, out of memory: {error}", flush=True)
            continue
        results.add(row)
        print(describe(row), flush=True)
        torch.cuda.empty_cache()
    return 0 if results.rows and all(row["verified"] for row in results.rows) else 1


if __name__ == "__main__":
    sys.exit(main())
