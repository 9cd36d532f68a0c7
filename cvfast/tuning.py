"""Measuring launch parameters of GPU kernels, for the tables that `cvfast.launch.table` reads.

For each call of the networks, every candidate of `cvfast.launch.<op>.<backend>` is checked against
float64 by the policy of `cvfast.tolerance`, then timed with cold L2 beside the heuristic's choice:
all briefly, the fastest again and longer. A table is replaced after every problem, so that an
interrupted run keeps what it measured.
"""

from __future__ import annotations

import itertools
import multiprocessing
import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from cvfast import inventory, tolerance
from cvfast.launch import calls, table
from cvfast.launch.calls import Call
from cvfast.launch.table import Entry, Table
from cvfast.ops._example import Example
from cvfast.perf import devices, environment
from cvfast.perf.devices import Device
from cvfast.perf.gpu_timing import interleave_cuda

FINALISTS = 4
AHEAD = 4  # problems whose kernels are compiled while another is timed


@dataclass(frozen=True)
class Job:
    """One call to tune on one backend."""

    backend: str
    call: Call

    def __str__(self) -> str:
        call = self.call
        return f"{call.op} {self.backend} {call.pass_} {call.describe()}"

    def candidates(self, device: Device) -> list[Any]:
        launches = table.parameters(self.call.op, self.backend)
        found: list[Any] = launches.candidates(self.call.problem, self.call.pass_, device)
        return found


def jobs(
    ops: Sequence[str],
    backends: Sequence[str],
    *,
    passes: Sequence[str],
    dtypes: Sequence[torch.dtype],
    batches: Sequence[int],
    holding: str = "",
) -> list[Job]:
    """What is tuned, most wanted first: passes and dtypes in the order given, large batches before
    small ones, the networks in the order of `cvfast.launch.calls`, and operators in turn.

    Args:
        batches: those of `cvfast.launch.calls.BATCHES`.
        holding: only calls whose description holds this text.
    """
    found: list[Job] = []
    for pass_, batch, dtype in itertools.product(passes, sorted(batches, reverse=True), dtypes):
        lists = [
            [
                Job(backend, call)
                for call in calls.network_calls([op], [batch])
                if (call.pass_, call.problem.dtype) == (pass_, dtype)
                if holding in call.describe()
                for backend in backends
                if call.served_by(backend)
            ]
            for op in ops
        ]
        turns = itertools.zip_longest(*lists)
        found += [job for turn in turns for job in turn if job is not None]
    return found


def judge(example: Example, call: Call) -> Callable[[Sequence[torch.Tensor]], tolerance.Verdict]:
    """The check of a call's results against float64, whose expectation is computed once; it gives
    the worst verdict of all tensors."""
    dtype = call.problem.dtype
    with inventory.rounding(call.problem):
        expected, baseline = example.reference(torch.float64), example.reference(dtype)

    def verdict(results: Sequence[torch.Tensor]) -> tolerance.Verdict:
        verdicts = [
            tolerance.check(*tensors) for tensors in zip(results, expected, baseline, strict=True)
        ]
        return max(verdicts, key=lambda one: (not one.ok, one.error))

    return verdict


def tune(job: Job, device: Device) -> tuple[Entry | None, list[str]]:
    """The fastest launch parameters of a job, and what was wrong with others."""
    call = job.call
    launches = table.parameters(call.op, job.backend)
    heuristic = launches.heuristic(call.problem, call.pass_, device)
    example = inventory.example(call, device="cuda")
    check = judge(example, call)
    right, failures = {}, []
    for launch in job.candidates(device):
        try:
            verdict = check(example.run(job.backend, launch))
        except (
            Exception
        ) as error:  # of the compiler or the launch; Triton's have a base of their own
            failures.append(f"{launch}: {error}")
            continue
        if verdict:
            right[launch] = _bind(example, job.backend, launch)
        else:
            failures.append(f"{launch}: {verdict}")
    if heuristic not in right:
        return None, failures
    brief = interleave_cuda(_named(right), min_rounds=2, min_time=2e-3, max_time=5.0)
    order = sorted(right, key=lambda launch: brief[str(launch)].median)
    finalists = {launch: right[launch] for launch in dict.fromkeys([*order[:FINALISTS], heuristic])}
    timings = interleave_cuda(_named(finalists), min_time=2e-2, max_time=5.0)
    best = min(finalists, key=lambda launch: timings[str(launch)].median)
    seconds = timings[str(best)].median
    usual = timings[str(heuristic)].median
    return Entry(call.pass_, call.problem, best, seconds, usual), failures


def _bind(example: Example, backend: str, launch: Any) -> Callable[[], Any]:
    return lambda: example.run(backend, launch)


def _named(candidates: dict[Any, Callable[[], Any]]) -> dict[str, Callable[[], Any]]:
    return {str(launch): call for launch, call in candidates.items()}


def save(
    entry: Entry, op: str, backend: str, device: str, provenance: dict[str, Any], folder: Path
) -> Path:
    """Adds an entry to the table in `folder`, in place of an older one of its problem."""
    path = folder / table.file_name(op, backend, device)
    entries: dict[Any, Entry] = {}
    if path.exists():
        old = Table.from_json(path.read_text(encoding="utf-8"))
        entries = {(e.pass_, e.problem): e for e in old.entries}
    entries[entry.pass_, entry.problem] = entry
    whole = Table(op, backend, device, provenance, tuple(entries.values()))
    folder.mkdir(parents=True, exist_ok=True)
    fresh = path.with_suffix(".json.new")
    fresh.write_text(whole.to_json(), encoding="utf-8")
    os.replace(fresh, path)
    return path


def _compile(call: Call, launch: Any, arch: str) -> None:
    inventory.compile_triton(call, launch, arch)  # whose result no other process can hold


@dataclass(frozen=True)
class Outcome:
    """What came of one job: an entry and the table that holds it, and failures of candidates."""

    job: Job
    entry: Entry | None
    path: Path | None
    failures: list[str]


def run(todo: Sequence[Job], folder: Path, budget: float) -> Iterator[Outcome]:
    """Tunes the jobs on the current GPU, until `budget` seconds are spent; each outcome as soon as
    its table is written.

    Triton's kernels of the next jobs are compiled into its cache meanwhile, on all cores.
    """
    deadline = time.monotonic() + budget
    device, provenance = devices.current(), environment.capture()
    context = multiprocessing.get_context("spawn")  # a process that uses CUDA cannot be forked
    with ProcessPoolExecutor(os.cpu_count(), mp_context=context) as pool:
        for index, job in enumerate(todo):
            if time.monotonic() > deadline:
                pool.shutdown(cancel_futures=True)
                return
            for ahead in todo[index + AHEAD : index + AHEAD + 1] if index else todo[: AHEAD + 1]:
                if ahead.backend == "triton":
                    for launch in ahead.candidates(device):
                        pool.submit(_compile, ahead.call, launch, device.architecture.name)
            entry, failures = tune(job, device)
            path = None
            if entry is not None:
                path = save(entry, job.call.op, job.backend, device.name, provenance, folder)
            yield Outcome(job, entry, path, failures)
