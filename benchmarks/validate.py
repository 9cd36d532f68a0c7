"""Proves the GPU kernels on this machine's GPU, and writes that into the validation record.

    python benchmarks/validate.py [--junit FILE] [--output FILE]

Runs the tests of GPU kernels, or takes their result from the `--junitxml` of a run just made, and
measures the error of every kernel against float64: on every layer of the networks in float16, on
some layers in the other dtypes, and on calls beyond those of the networks, with odd channels and
every flag of the kernel. A kernel whose tests and errors all pass is recorded with the hash of its
sources; exit code 1 if any does not.
"""

from __future__ import annotations

import argparse
import importlib.util
import math
import multiprocessing
import os
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from cvfast import inventory, tolerance, validation
from cvfast.launch import calls
from cvfast.launch.calls import Call
from cvfast.perf import environment
from cvfast.validation import Kernel, Proof

BATCH = 16
"""Of the layers of networks: enough blocks to fill any GPU, small enough for float64 anywhere."""

MARKS = "gpu or gpu_kernels"
"""The tests that run GPU kernels, slow ones too."""

# Read by the kernels' loaders: on a GPU, nothing is to be interpreted or emulated.
STAND_INS = ("TRITON_INTERPRET", "CVFAST_CUDA_EMULATION")


@dataclass(frozen=True)
class Tests:
    """How many tests of a kernel passed, and the names of those that did not."""

    passed: int
    failed: tuple[str, ...]


def run_tests(report: Path) -> None:
    """Runs the tests of GPU kernels and writes their results to `report`, as JUnit does."""
    command = [sys.executable, "-m", "pytest", "tests", "-m", MARKS, "-q", f"--junitxml={report}"]
    if importlib.util.find_spec("xdist") is not None:
        # Most of the time goes into compiling Triton kernels.
        command += ["-n", str(min(8, os.cpu_count() or 1))]
    environ = {name: value for name, value in os.environ.items() if name not in STAND_INS}
    subprocess.run(command, cwd=validation.ROOT, env=environ, check=False)


def read_tests(report: Path, op: str, backend: str) -> Tests:
    """The results of the tests that name the operator and the backend, skipped ones left out."""
    longer = [other for other in calls.OPS if op in other and other != op]  # global_pool of pool
    passed, failed = 0, []
    for case in ElementTree.parse(report).getroot().iter("testcase"):
        name = f"{case.get('classname')}.{case.get('name')}"
        outcomes = {child.tag for child in case}
        if not _names(name, op, longer) or backend not in name or "skipped" in outcomes:
            continue
        if outcomes & {"failure", "error"}:
            failed.append(name)
        else:
            passed += 1
    return Tests(passed, tuple(failed))


def _names(name: str, op: str, longer: Sequence[str]) -> bool:
    for other in longer:
        name = name.replace(other, "")
    return op in name


def cases(op: str) -> list[Call]:
    """The calls of an operator whose errors are measured."""
    networks = calls.network_calls([op], [BATCH])
    chosen = dict.fromkeys(call for call in networks if call.problem.dtype is torch.float16)
    for call in calls.sample_calls([op]):
        batch = min(BATCH, call.problem.batch)
        for problem in calls.in_every_dtype(replace(call.problem, batch=batch)):
            chosen[replace(call, problem=problem)] = None
    chosen.update(dict.fromkeys(calls.general_calls([op])))
    return list(chosen)


def measure(call: Call, backend: str, device: str) -> float:
    """The error of one call over what the policy allows; infinite if it fails otherwise."""
    example = inventory.example(call, device=device)
    with inventory.rounding(call.problem):
        results = example.run(backend)
        baselines = example.reference(call.problem.dtype)
        truths = example.reference(torch.float64)
    worst = 0.0
    for result, truth, baseline in zip(results, truths, baselines, strict=True):
        verdict = tolerance.check(result, truth, baseline)
        if not verdict:
            return math.inf
        worst = max(worst, verdict.error / verdict.limit, verdict.max_error / verdict.max_limit)
    return worst


@dataclass
class Finding:
    """What was found of one kernel.

    Attributes:
        worst, where: the largest error over what is allowed, and the call it was found in.
        cases: calls measured.
        faults: what is wrong; a kernel without any is proven.
    """

    worst: float = 0.0
    where: str = ""
    cases: int = 0
    faults: tuple[str, ...] = ()


def attempt(job: tuple[Call, str, str]) -> float | str:
    """`measure` of (call, backend, device), or what went wrong."""
    try:
        return measure(*job)
    except Exception as error:  # of a compiler, a launch, or the device: all say the kernel fails
        return f"{type(error).__name__}: {error}"


class Processes:
    """Measure side by side: most of the time goes into compiling Triton kernels."""

    def __init__(self, count: int) -> None:
        self._count = count
        self._pool: ProcessPoolExecutor | None = None

    def measure(self, jobs: Sequence[tuple[Call, str, str]]) -> list[float | str]:
        """`attempt` of each job; of one whose process died, that it did."""
        if self._pool is None:
            context = multiprocessing.get_context("spawn")
            self._pool = ProcessPoolExecutor(self._count, context)
        futures = [self._pool.submit(attempt, job) for job in jobs]
        outcomes: list[float | str] = []
        for future in futures:
            try:
                outcomes.append(future.result())
            except BrokenProcessPool as error:
                outcomes.append(str(error))
        if any(isinstance(outcome, str) for outcome in outcomes):
            # An illegal access stays with its process: the next kernel is to have other ones.
            self.end()
        return outcomes

    def end(self) -> None:
        if self._pool is not None:
            self._pool.shutdown()
            self._pool = None


def examine(tests: Tests, measured: Iterable[tuple[Call, float | str]]) -> Finding:
    """Judges a kernel's tests and the errors of its calls together."""
    finding = Finding(faults=tuple(f"{name} failed" for name in tests.failed))
    if tests.passed == 0:
        finding.faults += ("no test of it ran",)
    for call, outcome in measured:
        name = call.describe()
        if isinstance(outcome, str):
            finding.faults += (f"{name}: {outcome}",)
            continue
        finding.cases += 1
        if not outcome <= 1:
            finding.faults += (f"{name}: the error is {outcome:.2f} of what is allowed",)
        if outcome >= finding.worst:
            finding.worst, finding.where = outcome, name
    return finding


def proof(kernel: Kernel, tests: Tests, finding: Finding) -> Proof:
    """What goes into the record of a kernel without faults, on the current GPU."""
    found = environment.capture()
    gpu = found["gpus"][torch.cuda.current_device()]
    source_hash = validation.source_hash(kernel.op, kernel.backend)
    assert source_hash is not None
    return Proof(
        *kernel,
        source_hash=source_hash,
        device=gpu["name"],
        capability=gpu["capability"],
        driver=gpu["driver"],
        torch=found["packages"]["torch"],
        triton=found["packages"]["triton"],
        cuda=torch.version.cuda,
        date=found["date"],
        commit=found["git"]["commit"],
        dirty=found["git"]["dirty"],
        error_ratio=finding.worst,
        worst=finding.where,
        cases=finding.cases,
        tests=tests.passed,
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--junit",
        type=Path,
        metavar="FILE",
        help=f"results of `pytest -m '{MARKS}' --junitxml FILE`",
    )
    parser.add_argument(
        "--output", type=Path, default=validation.ROOT / validation.RECORD, metavar="FILE"
    )
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("validate.py needs an NVIDIA GPU: nothing is proven without one", file=sys.stderr)
        return 2
    if stand_ins := [name for name in STAND_INS if os.environ.get(name)]:
        print(f"unset {', '.join(stand_ins)}: kernels must run on the GPU", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory() as folder:
        report = options.junit or Path(folder) / "gpu.xml"
        if options.junit is None:
            run_tests(report)
        if not report.exists():
            print("the tests did not run, and without them nothing is proven", file=sys.stderr)
            return 2
        tests = {
            (op, backend): read_tests(report, op, backend)
            for op, backend in {kernel[:2] for kernel in validation.KERNELS}
        }
    faulty, processes = False, Processes(min(8, os.cpu_count() or 1))
    for kernel in validation.KERNELS:
        own = tests[kernel.op, kernel.backend]
        own_calls = [
            call
            for call in cases(kernel.op)
            if call.pass_ == kernel.pass_ and call.served_by(kernel.backend)
        ]
        errors = processes.measure([(call, kernel.backend, "cuda") for call in own_calls])
        finding = examine(own, zip(own_calls, errors, strict=True))
        state = f"{len(finding.faults)} faults" if finding.faults else "proven"
        print(
            f"{kernel.op} {kernel.backend} {kernel.pass_}: {state}; {finding.cases} cases, worst "
            f"error {finding.worst:.2f} of what is allowed ({finding.where}); {own.passed} tests"
        )
        for fault in finding.faults:
            print(f"  {fault}")
        faulty |= bool(finding.faults)
        if not finding.faults:
            # At once: what comes later may be cut off.
            validation.record([proof(kernel, own, finding)], options.output)
    processes.end()
    return int(faulty)


if __name__ == "__main__":
    sys.exit(main())
