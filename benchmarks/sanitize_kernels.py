"""The GPU kernels on small shapes under NVIDIA's compute-sanitizer.

    python benchmarks/sanitize_kernels.py [--tools memcheck racecheck initcheck] [--logs FOLDER]

Each tool runs in a process of its own, all at once: they look for accesses outside of allocations,
for races on shared memory, and for reads of memory that nothing wrote. The shapes exercise masks:
channels and rows that fill no tile, strides, dilations, every flag of the kernels; of depthwise
also channel slices whose start is aligned to no vector. Exit code 1 if a tool found an error, 77 if
none can run here.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

SKIPPED = 77
ERRORS_FOUND = 99
TOOLS = ("memcheck", "racecheck", "initcheck")
BACKENDS = ("cuda", "triton")
UNABLE = "Device not supported"  # what the tools say in some virtual machines


@dataclass(frozen=True)
class Case:
    """A depthwise convolution of x [batch, channels, *size]."""

    channels: int
    size: tuple[int, int]
    kernel: tuple[int, int] = (3, 3)
    stride: int = 1
    dilation: int = 1
    multiplier: int = 1
    activation: str = "relu6"
    dtype: torch.dtype = torch.float16
    sliced: bool = False
    batch: int = 2

    def tensors(self, device: str) -> tuple[Tensor, Tensor, Tensor]:
        """x, weight and bias; x in the middle of a wider buffer if `sliced`."""
        generator = torch.Generator().manual_seed(0)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator).to(self.dtype)

        x = normal(self.batch, self.channels + 8 * self.sliced, *self.size)
        x = x.to(memory_format=torch.channels_last).to(device)
        if self.sliced:
            x = x[:, 3 : 3 + self.channels]
        out = self.channels * self.multiplier
        return x, normal(out, 1, *self.kernel).to(device), normal(out).to(device)

    @property
    def geometry(self) -> dict[str, Any]:
        padding = [self.dilation * (k - 1) // 2 for k in self.kernel]
        return {
            "stride": self.stride,
            "padding": (padding[0], padding[1]),
            "dilation": self.dilation,
            "activation": self.activation,
        }


CASES = (
    Case(64, (9, 13)),
    Case(64, (15, 14), stride=2, activation="relu"),
    Case(33, (7, 11), activation="hardswish"),
    Case(33, (7, 11), kernel=(5, 5), dtype=torch.bfloat16, activation="none"),
    Case(16, (10, 9), kernel=(5, 5), stride=2, dtype=torch.float32),
    Case(24, (12, 12), kernel=(7, 7), activation="none"),
    Case(20, (9, 9), sliced=True),
    Case(20, (9, 9), sliced=True, dtype=torch.float32, stride=2),
    Case(8, (9, 9), dilation=2, activation="relu"),
    Case(8, (9, 9), kernel=(3, 5), multiplier=2, activation="none"),
    Case(3, (1, 1), batch=1),
)


def exercise(backends: Sequence[str] = BACKENDS, device: str = "cuda") -> list[str]:
    """Runs every case forward and backward on each backend, and names those whose result is wrong.

    References are computed on the CPU, so that the tools see little but cvfast's kernels.

    Raises:
        cvfast.backends.Unsupported: if a backend cannot serve a case.
    """
    wrong = []
    for case in CASES:
        expected = _gradients(case, "reference", [t.double() for t in case.tensors("cpu")])
        for backend in backends:
            actual = _gradients(case, backend, list(case.tensors(device)))
            for name, a, e in zip(("y", "x", "weight", "bias"), actual, expected, strict=True):
                if not _close(a.cpu().double(), e, case.dtype):
                    wrong.append(f"{backend}: {name} of {case}")
    return wrong


def exercise_all(device: str = "cuda") -> list[str]:
    """Runs the calls of every operator's `GENERAL` in float16 and float32, and names those whose
    result is wrong; references are computed on the CPU."""
    from cvfast import extension, inventory
    from cvfast.launch import calls

    wrong = []
    for call in calls.general_calls():
        if call.problem.dtype is torch.bfloat16:
            continue  # the same code as float16
        example = inventory.example(call, device=device)
        inputs = (None if t is None else t.cpu().double() for t in example.inputs)
        expected = example.evaluate(inputs)
        for backend in call.backends():
            if not extension.load(backend):
                continue
            for actual, truth in zip(example.run(backend), expected, strict=True):
                if not _close(actual.cpu().double(), truth, torch.float16):
                    wrong.append(f"{backend}: {call.op} {call.pass_} {call.describe()}")
    return wrong


def _gradients(case: Case, backend: str, inputs: list[Tensor]) -> list[Tensor]:
    """y, and the gradients of its sum with respect to x, weight and bias."""
    from cvfast.ops import depthwise

    leaves = [t.detach().requires_grad_() for t in inputs]
    y = depthwise(*leaves, **case.geometry, backend=backend)
    return [y.detach(), *torch.autograd.grad(y, leaves, torch.ones_like(y))]


def _close(actual: Tensor, expected: Tensor, dtype: torch.dtype) -> bool:
    """Whether results agree but for rounding, and for the few masks of a ReLU that it decides.

    Coarse: the tests judge accuracy. This notices a kernel that did not run.
    """
    off = (actual - expected).abs() > 64 * torch.finfo(dtype).eps * expected.abs().clamp(min=1)
    return bool(off.float().mean() < 0.02)


def sanitize(tools: Sequence[str], logs: Path, command: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Runs `command` under each tool, side by side; (tool, outcome) of each, as soon as known.

    An outcome is "passed", "failed" or why the tool cannot run.
    """
    sanitizer = shutil.which("compute-sanitizer")
    if sanitizer is None:
        yield from dict.fromkeys(tools, "compute-sanitizer is not on PATH").items()
        return
    logs.mkdir(parents=True, exist_ok=True)
    # Without PyTorch's cache every tensor is an allocation, beyond whose end an access is an error.
    environ = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    runs = {}
    for tool in tools:
        with (logs / f"{tool}.log").open("w") as log:
            runs[tool] = subprocess.Popen(
                [sanitizer, "--tool", tool, "--error-exitcode", str(ERRORS_FOUND), *command],
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environ,
            )
    for tool, run in runs.items():
        yield tool, outcome(run.wait(), logs / f"{tool}.log")


def outcome(status: int, log: Path) -> str:
    """What a tool's exit status and output mean."""
    text = log.read_text(errors="replace")
    for line in text.splitlines():
        if UNABLE in line:
            return line.strip("= ")
    return "passed" if status == 0 else "failed"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tools", nargs="+", default=TOOLS, choices=(*TOOLS, "synccheck"))
    parser.add_argument("--logs", type=Path, default=Path("sanitizer_logs"))
    parser.add_argument("--run", action="store_true", help="run the kernels; what is sanitized")
    args = parser.parse_args()
    if args.run:
        wrong = exercise() + exercise_all()
        print("\n".join(wrong) or "every case agrees with the reference")
        return 1 if wrong else 0
    outcomes = {}
    for tool, result in sanitize(args.tools, args.logs, [sys.executable, __file__, "--run"]):
        outcomes[tool] = result
        print(f"{tool}: {result}")
        if result == "failed":
            print((args.logs / f"{tool}.log").read_text(errors="replace")[-4000:])
    if "failed" in outcomes.values():
        return 1
    return 0 if "passed" in outcomes.values() else SKIPPED


if __name__ == "__main__":
    sys.exit(main())
