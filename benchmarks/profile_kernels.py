"""Hardware counters of the main GPU kernels, by Nsight Compute: bytes, rates, occupancy.

    python benchmarks/profile_kernels.py [--json FILE] [--log FILE]

Each kernel is profiled with cold caches, on calls of networks large enough to fill a GPU, and what
it reads from and writes to DRAM stands beside the least that its pass has to. Clocks are left as
they are. Exit code 77 if the counters cannot be read here, with the reason.
"""

from __future__ import annotations

import argparse
import csv
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from cvfast import extension, inventory
from cvfast.launch import calls
from cvfast.launch.calls import Call
from cvfast.perf import environment, nvtx

RESULTS = Path(__file__).parent / "results" / "gpu" / "profile.json"
SKIPPED = 77
BATCH = 64
DTYPE = torch.float16
METRICS = {
    "dram__bytes_read.sum": "dram_bytes_read",
    "dram__bytes_write.sum": "dram_bytes_written",
    "gpu__time_duration.sum": "nanoseconds",
    "dram__throughput.avg.pct_of_peak_sustained_elapsed": "dram_percent",
    "l1tex__throughput.avg.pct_of_peak_sustained_elapsed": "l1_percent",
    "lts__throughput.avg.pct_of_peak_sustained_elapsed": "l2_percent",
    "sm__throughput.avg.pct_of_peak_sustained_elapsed": "sm_percent",
    "sm__pipe_tensor_cycles_active.avg.pct_of_peak_sustained_active": "tensor_percent",
    "sm__warps_active.avg.pct_of_peak_sustained_active": "occupancy_percent",
    "launch__registers_per_thread": "registers",
    "launch__occupancy_limit_registers": "blocks_by_registers",
    "launch__occupancy_limit_shared_mem": "blocks_by_shared_memory",
    "l1tex__data_bank_conflicts_pipe_lsu.sum": "bank_conflicts",
}
UNKNOWN = "Failed to find metric"
# What ncu says where it may not, or cannot, read the counters; and what to do about it.
UNABLE = {
    "ERR_NVGPUCTRPERM": "the driver permits the counters to administrators only",
    "LibraryNotLoaded": "the profiler does not work on this machine",
    "not supported": "the profiler does not support this machine",
}


def profiled() -> list[Call]:
    """Of every operator and pass: the largest call of each kind that networks have most of."""
    chosen = [call for call in calls.sample_calls() if call.problem.dtype is DTYPE]
    most = {call.op: max(c.problem.batch for c in chosen if c.op == call.op) for call in chosen}
    return [
        replace(
            call, problem=replace(call.problem, batch=call.problem.batch * BATCH // most[call.op])
        )
        for call in chosen
        if call.problem.batch == most[call.op]
    ]


def range_name(call: Call, backend: str) -> str:
    spelled = re.sub(r"[^\w.-]+", "_", call.describe())
    return nvtx.name(call.op, spelled, f"{call.pass_}.{backend}")


def run(device: str = "cuda") -> None:
    """What is profiled: each call on each backend once, in a range of its own."""
    nvtx.enable()
    profiler = torch.cuda.profiler
    for call in profiled():
        example = inventory.example(call, device=device)
        for backend in call.backends():
            if not extension.load(backend):
                continue
            example.run(backend)  # compiles
            torch.cuda.synchronize()
            profiler.start()
            with nvtx.range(range_name(call, backend)):
                example.run(backend)
            torch.cuda.synchronize()
            profiler.stop()


def command(ncu: str, metrics: Iterable[str] = METRICS) -> list[str]:
    """Nsight Compute over `run`."""
    return [
        ncu, "--csv", "--page", "raw", "--print-units", "base", "--nvtx",
        "--profile-from-start", "off", "--clock-control", "none", "--cache-control", "all",
        "--metrics", ",".join(metrics),
        sys.executable, __file__, "--run",
    ]  # fmt: skip


def parse(lines: Iterable[str]) -> list[dict[str, Any]]:
    """cvfast's kernels in the output of `command`: those in one of its ranges, but PyTorch's own.

    The output begins with ncu's own lines (``==PROF== ...``); then come the names of the columns,
    their units, and a row per kernel.
    """
    text = [line for line in lines if line.startswith('"')]
    found = []
    for row in csv.DictReader(text):
        label = next(
            (match[1] for cell in row.values() if (match := re.search(r"(cvfast/[^:\"]+)", cell))),
            None,
        )
        if label is None or "at::native" in row["Kernel Name"]:
            continue
        _, op, layer, pattern = label.split("/")
        which, backend = pattern.split(".")
        counters = {name: _number(row[metric]) for metric, name in METRICS.items() if metric in row}
        found.append(
            {
                "op": op,
                "layer": layer,
                "pass": which,
                "backend": backend,
                "kernel": row["Kernel Name"],
                **counters,
            }
        )
    return found


def _number(text: str) -> float | None:
    try:
        return float(text.replace(",", ""))
    except ValueError:
        return None


def refusal(output: str) -> str | None:
    """Why the counters could not be read, if so."""
    for sign, reason in UNABLE.items():
        if sign in output:
            return f"{reason} [{sign}]"
    return None


def with_least_bytes(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows, those of a forward pass with the bytes that it has to move."""
    least = {
        tuple(range_name(call, "any").split("/")[1:3]): call.problem.bytes() for call in profiled()
    }
    return [
        {**row, "least_bytes": least[row["op"], row["layer"]]}
        if row["pass"] == "forward"
        else dict(row)
        for row in rows
    ]


def describe(row: dict[str, Any]) -> str:
    """One line."""
    parts = [f"{row['op']} {row['layer']:40s} {row['pass']:8s} {row['backend']:6s}"]
    read, written = row.get("dram_bytes_read"), row.get("dram_bytes_written")
    if read is not None and written is not None:
        moved = f"{1e-6 * read:.1f} MB read, {1e-6 * written:.1f} MB written"
        if "least_bytes" in row:
            moved += f", {(read + written) / row['least_bytes']:.2f} of the least"
        parts.append(moved)
    parts += [
        f"{name} {row[f'{name}_percent']:.0f} %"
        for name in ("dram", "sm", "tensor", "occupancy")
        if row.get(f"{name}_percent") is not None
    ]
    return "  ".join([*parts, row["kernel"][:60]])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, default=RESULTS)
    parser.add_argument("--log", type=Path, help="keep the output of ncu here")
    parser.add_argument("--run", action="store_true", help="run the kernels; what is profiled")
    args = parser.parse_args()
    if args.run:
        run()
        return 0
    ncu = shutil.which("ncu")
    if ncu is None:
        print("skipped: ncu (Nsight Compute) is not on PATH")
        return SKIPPED
    done = subprocess.run(command(ncu), capture_output=True, text=True, check=False)
    if UNKNOWN in done.stdout + done.stderr:
        # Metrics have other names on some architectures: those that all have are better than none.
        common = [name for name in METRICS if METRICS[name] != "tensor_percent"]
        done = subprocess.run(command(ncu, common), capture_output=True, text=True, check=False)
    output = done.stdout + done.stderr
    if args.log:
        args.log.write_text(output)
    rows = with_least_bytes(parse(done.stdout.splitlines()))
    if not rows:
        reason = refusal(output)
        print(f"skipped: {reason}" if reason else f"ncu failed:\n{output[-4000:]}")
        return SKIPPED if reason else 1
    for row in rows:
        print(describe(row))
    args.json.parent.mkdir(parents=True, exist_ok=True)
    result = {
        "environment": environment.capture(),
        "batch": BATCH,
        "dtype": str(DTYPE).removeprefix("torch."),
        "rows": rows,
    }
    args.json.write_text(json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
