"""Measures the launch parameters of GPU kernels and writes the tables that cvfast ships.

    python benchmarks/tune.py [--op depthwise] [--budget SECONDS] [--output DIR] [--plan]

For each depthwise layer of the MobileNets, each pass and backend, every candidate of
`cvfast.launch.<op>.<backend>` is checked against float64 by the policy of `cvfast.tolerance`, then
timed with cold L2 beside the heuristic's choice: all briefly, the fastest again and longer. A table
is replaced after every problem, so that an interrupted run keeps what it measured. The exit code is
1 if a candidate failed its check.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cvfast import extension, tolerance
from cvfast.launch import table
from cvfast.launch.depthwise import PASSES, Problem
from cvfast.launch.table import Entry, Table
from cvfast.ops.depthwise import prepack, reference, unpack
from cvfast.perf import devices, environment
from cvfast.perf.gpu_timing import interleave_cuda

sys.path.insert(0, str(Path(__file__).parent))
from shapes import distinct, mobilenet_depthwise_layers

OPS = ("depthwise",)
BACKENDS = ("triton", "cuda")
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
FINALISTS = 4
AHEAD = 4  # problems whose kernels are compiled while another is timed
TUNED = table.folder()


@dataclass(frozen=True)
class Job:
    """One problem to tune; `activation` is that of the layer, `name` for the log."""

    backend: str
    pass_: str
    problem: Problem
    activation: str
    name: str


def jobs(options: argparse.Namespace) -> list[Job]:
    """What the options ask for: the forward pass, large batches and MobileNet v2 first."""
    layers = distinct(mobilenet_depthwise_layers())
    layers.sort(key=lambda layer: layer.model != "mobilenet_v2")
    return [
        Job(
            backend,
            pass_,
            Problem(
                batch,
                layer.channels,
                layer.size,
                layer.size,
                (layer.kernel, layer.kernel),
                (layer.stride, layer.stride),
                (layer.kernel // 2, layer.kernel // 2),
                dtype=DTYPES[dtype],
            ),
            # The kernels of the gradient undo ReLU and ReLU6 only.
            layer.activation if pass_ == "forward" or layer.activation != "hardswish" else "none",
            f"{layer.name} b{batch} {dtype}",
        )
        for pass_ in options.passes
        for batch in sorted(options.batch, reverse=True)
        for dtype in options.dtype
        for layer in layers
        if options.filter in layer.name
        for backend in options.backend
    ]


class Operands:
    """The tensors of a job, and how its kernel is called and judged."""

    def __init__(self, job: Job, device: str = "cuda") -> None:
        problem = job.problem
        generator = torch.Generator(device).manual_seed(0)

        def draw(*shape: int) -> Tensor:
            values = torch.randn(*shape, generator=generator, device=device)
            layout = torch.channels_last if len(shape) == 4 else torch.contiguous_format
            return values.to(dtype=problem.dtype, memory_format=layout)

        self.job = job
        self.geometry = (problem.stride, problem.padding, problem.dilation)
        self.x = draw(problem.batch, problem.channels, problem.height, problem.width)
        self.weight = draw(problem.out_channels, 1, *problem.kernel).contiguous()
        self.bias = draw(problem.out_channels)
        self.packed = prepack(self.weight, self.bias, multiplier=problem.multiplier)
        self.output: Tensor | None = None
        self.grad = self.x
        if job.pass_ != "forward":
            output = reference(self.x, self.weight, self.bias, *self.geometry, job.activation)
            self.output = output.contiguous(memory_format=torch.channels_last)
            self.grad = draw(*output.shape)

    def call(self, launch: Any) -> Callable[[], Tensor]:
        """The kernel with these launch parameters."""
        job, problem = self.job, self.job.problem
        if job.backend == "triton":
            from cvfast.kernels import depthwise as kernels

            run = getattr(kernels, job.pass_)
            tensors = {
                "forward": (self.x, self.packed),
                "backward_input": (self.grad, self.output, self.packed),
                "backward_weight": (self.grad, self.output, self.x),
            }[job.pass_]
            return lambda: run(*tensors, problem, launch, job.activation)
        ops, ints = torch.ops.cvfast, launch.as_ints()
        rest = (problem.kernel, *self.geometry, job.activation, ints)
        size = (problem.height, problem.width)
        output = None if job.activation == "none" else self.output
        if job.pass_ == "forward":
            return lambda: ops.depthwise_cuda_launch(self.x, self.packed, *rest)
        if job.pass_ == "backward_input":
            return lambda: ops.depthwise_backward_input_cuda_launch(
                self.grad, output, self.packed, size, *rest
            )
        return lambda: ops.depthwise_backward_weight_cuda_launch(self.grad, output, self.x, *rest)

    def judge(self) -> Callable[[Tensor], tolerance.Verdict]:
        """The check of a result against float64, whose expectation is computed once."""
        expected, baseline = self._expected(torch.float64), self._expected(self.job.problem.dtype)

        def verdict(result: Tensor) -> tolerance.Verdict:
            if self.job.pass_ == "backward_weight":
                weight, bias = unpack(result, self.job.problem.channels, self.job.problem.kernel)
                result = torch.cat([weight.flatten(1), bias[:, None]], 1).to(baseline.dtype)
            return tolerance.check(result, expected, baseline)

        return verdict

    def _expected(self, dtype: torch.dtype) -> Tensor:
        x, weight, bias = (t.to(dtype) for t in (self.x, self.weight, self.bias))
        if self.job.pass_ == "forward":
            return reference(x, weight, bias, *self.geometry, self.job.activation)
        grad = self.grad.to(dtype)
        if self.job.activation != "none":
            assert self.output is not None
            outside = self.output <= 0
            if self.job.activation == "relu6":
                outside |= self.output >= 6
            grad = grad.masked_fill(outside, 0)
        inputs = [t.requires_grad_() for t in (x, weight, bias)]
        y = reference(*inputs, *self.geometry, "none")
        if self.job.pass_ == "backward_input":
            return torch.autograd.grad(y, x, grad)[0]
        of_weight, of_bias = torch.autograd.grad(y, (weight, bias), grad)
        return torch.cat([of_weight.flatten(1), of_bias[:, None]], 1)


def tune(job: Job, device: devices.Device) -> tuple[Entry | None, list[str]]:
    """The fastest launch parameters of a job, and what was wrong with others."""
    launches = table.parameters("depthwise", job.backend)
    heuristic = launches.heuristic(job.problem, job.pass_, device)
    operands = Operands(job)
    judge = operands.judge()
    calls, failures = {}, []
    for launch in launches.candidates(job.problem, job.pass_, device):
        call = operands.call(launch)
        try:
            verdict = judge(call())
        except (
            Exception
        ) as error:  # of the compiler or the launch; Triton's have a base of their own
            failures.append(f"{launch}: {error}")
            continue
        if verdict:
            calls[launch] = call
        else:
            failures.append(f"{launch}: {verdict}")
    if heuristic not in calls:
        return None, failures
    brief = interleave_cuda(_named(calls), min_rounds=2, min_time=2e-3, max_time=5.0)
    order = sorted(calls, key=lambda launch: brief[str(launch)].median)
    finalists = {launch: calls[launch] for launch in dict.fromkeys([*order[:FINALISTS], heuristic])}
    timings = interleave_cuda(_named(finalists), min_time=2e-2, max_time=5.0)
    best = min(finalists, key=lambda launch: timings[str(launch)].median)
    seconds = timings[str(best)].median
    usual = timings[str(heuristic)].median
    return Entry(job.pass_, job.problem, best, seconds, usual), failures


def _named(calls: dict[Any, Callable[[], Tensor]]) -> dict[str, Callable[[], Tensor]]:
    return {str(launch): call for launch, call in calls.items()}


def save(entry: Entry, backend: str, device: str, provenance: dict[str, Any], folder: Path) -> Path:
    """Adds an entry to the table in `folder`, in place of an older one of its problem."""
    path = folder / table.file_name("depthwise", backend, device)
    entries: dict[Any, Entry] = {}
    if path.exists():
        old = Table.from_json(path.read_text(encoding="utf-8"))
        entries = {(e.pass_, e.problem): e for e in old.entries}
    entries[entry.pass_, entry.problem] = entry
    whole = Table("depthwise", backend, device, provenance, tuple(entries.values()))
    folder.mkdir(parents=True, exist_ok=True)
    fresh = path.with_suffix(".json.new")
    fresh.write_text(whole.to_json(), encoding="utf-8")
    os.replace(fresh, path)
    return path


def compile_ahead(job: Job, device: devices.Device, pool: ProcessPoolExecutor) -> None:
    """Has the Triton candidates of a job compiled into Triton's cache, on all cores."""
    if job.backend == "triton":
        launches = table.parameters("depthwise", "triton")
        for launch in launches.candidates(job.problem, job.pass_, device):
            pool.submit(_compile, job, launch, device.architecture.capability)


def _compile(job: Job, launch: Any, capability: tuple[int, int]) -> None:
    from cvfast.kernels import depthwise as kernels

    major, minor = capability
    kernels.compiled(job.problem, launch, job.pass_, 10 * major + minor, job.activation)


def usable(backends: list[str]) -> Iterator[str]:
    """The backends that run here; says why of the others."""
    for backend in backends:
        status = extension.load("cuda") if backend == "cuda" else True
        if status:
            yield backend
        else:
            print(f"skipping cuda: {status}", flush=True)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--op", choices=OPS, default="depthwise")
    parser.add_argument("--backend", nargs="+", choices=BACKENDS, default=list(BACKENDS))
    parser.add_argument("--passes", nargs="+", choices=PASSES, default=list(PASSES))
    parser.add_argument("--dtype", nargs="+", choices=list(DTYPES), default=["float16"])
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 256])
    parser.add_argument("--filter", default="", help="only layers whose name holds this")
    parser.add_argument("--budget", type=float, default=float("inf"), help="seconds")
    parser.add_argument("--output", type=Path, default=TUNED, help="folder of the tables")
    parser.add_argument("--plan", action="store_true", help="print what would be timed, and stop")
    parser.add_argument("--device", default="H200", help="of --plan where there is no GPU")
    return parser.parse_args(arguments)


def plan(options: argparse.Namespace) -> int:
    here = torch.cuda.is_available()
    device = devices.current() if here else devices.find(options.device)
    total = 0
    for job in jobs(options):
        launches = table.parameters("depthwise", job.backend)
        count = len(launches.candidates(job.problem, job.pass_, device))
        total += count
        print(f"{job.backend} {job.pass_} {job.name}: {count} candidates")
    print(f"{len(jobs(options))} problems, {total} candidates, on {device.name}")
    return 0


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    if options.plan:
        return plan(options)
    if not torch.cuda.is_available():
        print("tune.py times kernels on a GPU, and PyTorch sees none here; --plan needs none.")
        return 2
    options.backend = list(usable(options.backend))
    deadline = time.monotonic() + options.budget
    device, provenance = devices.current(), environment.capture()
    todo = jobs(options)
    failed = False
    context = multiprocessing.get_context("spawn")  # a process that uses CUDA cannot be forked
    with ProcessPoolExecutor(os.cpu_count(), mp_context=context) as pool:
        for index, job in enumerate(todo):
            if time.monotonic() > deadline:
                print(f"budget spent: {len(todo) - index} problems left")
                pool.shutdown(cancel_futures=True)
                break
            for ahead in todo[index + AHEAD : index + AHEAD + 1] if index else todo[: AHEAD + 1]:
                compile_ahead(ahead, device, pool)
            entry, failures = tune(job, device)
            failed |= bool(failures)
            for failure in failures:
                print(f"FAILED {job.backend} {job.pass_} {job.name}: {failure}", flush=True)
            if entry is not None:
                path = save(entry, job.backend, device.name, provenance, options.output)
                print(
                    f"{job.backend} {job.pass_} {job.name}: {1e6 * entry.seconds:.1f} us, "
                    f"heuristic {1e6 * entry.heuristic_seconds:.1f} us -> {path.name}",
                    flush=True,
                )
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
