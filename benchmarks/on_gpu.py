"""Everything that a GPU is needed for, in stages: `benchmarks/on_gpu.sh` calls this.

A stage is a list of commands. Its result is written as soon as it exists, and one that fails does
not stop the next: `summary.json` and the exit code tell. What the stages do not find out in the
time there is, a second run with the same folder adds. Imports nothing but the standard library, and
changes no setting of the GPU.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
BUDGET = 570.0
SKIPPED = 77  # the exit status of a command that cannot run here, and says why in its last line
MARGIN = 10.0  # seconds before its limit at which a command with a budget of its own is to end
LOOK = """
import json, torch
from cvfast.perf import environment
print(json.dumps(environment.capture()))
"""
# On a GPU nothing is to be interpreted or emulated.
STAND_INS = ("TRITON_INTERPRET", "CVFAST_CUDA_EMULATION")
GRACE = 10.0  # seconds between being asked to end and being ended


@dataclass(frozen=True)
class Command:
    """One command of a stage, run in the root of the checkout.

    Attributes:
        line: words, in which {python}, {out}, {arch}, ... stand for what `placeholders` gives;
            a word that is nothing but a placeholder may become several words, or none.
        environ: additions to the environment, with the same placeholders.
        tool: a program that must be on PATH; without it the command is left out.
        modules: Python packages without which the command is left out, and its stage skipped.
        stdout: a file of the folder of results that gets the standard output.
    """

    line: str
    environ: Mapping[str, str] = field(default_factory=dict)
    tool: str | None = None
    modules: tuple[str, ...] = ()
    stdout: str | None = None


@dataclass(frozen=True)
class Stage:
    """A step of the plan.

    Attributes:
        limit: seconds; None for all that are left.
        share: of the budget, that the stages before it must leave.
        results: files of the checkout that the stage writes, and the folder of the results that
            those just written are copied to; of a pattern, the name of an archive.
    """

    name: str
    purpose: str
    limit: float | None
    commands: tuple[Command, ...]
    results: Mapping[str, str] = field(default_factory=dict)
    share: float = 0.0


STAGES = (
    Stage(
        "env",
        "the machine",
        20,
        (
            Command("nvidia-smi", tool="nvidia-smi"),
            Command("nvidia-smi -q -d CLOCK,POWER,PERFORMANCE,ECC", tool="nvidia-smi"),
            Command("{python} -m pip list"),
        ),
    ),
    Stage(
        "build",
        "install the project, kernels compiled for this GPU only",
        150,
        (
            Command(
                "{python} -m pip install --no-build-isolation --no-deps --no-index -e .",
                environ={
                    "CVFAST_CUDA": "1",
                    "TORCH_CUDA_ARCH_LIST": "{arch_list}",
                    "MAX_JOBS": "{cores}",
                },
            ),
        ),
    ),
    Stage(
        "test",
        "the tests of GPU kernels and of what measures them",
        130,
        (
            Command(
                "{python} -m pytest tests -m 'gpu or gpu_kernels' -q {parallel} "
                "-p no:cacheprovider --junitxml={out}/logs/tests.xml",
                environ={"PYTHONSAFEPATH": "1"},
                modules=("pytest", "hypothesis"),
            ),
        ),
    ),
    Stage(
        "validate",
        "errors against float64, and the record of what is proven",
        60,
        (Command("{python} benchmarks/validate.py {junit}", modules=("pytest", "hypothesis")),),
        results={"benchmarks/results/validation.json": "."},
        share=0.1,
    ),
    Stage(
        "sanitize",
        "small shapes under compute-sanitizer",
        80,
        (Command("{python} benchmarks/sanitize_kernels.py --logs {out}/logs/sanitizer"),),
    ),
    Stage(
        "kernels",
        "registers, spills, shared memory and instructions, as compiled here",
        45,
        (
            Command(
                "{python} -m cvfast kernels --arch {arch} --json",
                environ={"PYTHONSAFEPATH": "1"},
                modules=("typer", "rich"),
                stdout="logs/kernels.json",
            ),
        ),
    ),
    Stage(
        "tune",
        "launch parameters for this GPU",
        60,
        (
            Command(
                "{python} -m cvfast tune --budget {seconds}",
                environ={"PYTHONSAFEPATH": "1"},
                modules=("typer", "rich"),
            ),
        ),
        results={"cvfast/launch/tuned/*.json": "tuned"},
        share=0.06,
    ),
    Stage(
        "bench-ops",
        "the kernels against eager, max-autotune and a copy of the same bytes",
        100,
        (
            Command(
                "{python} benchmarks/bench_gpu_ops.py --json {out}/ops.json "
                "--budget {half} --min-time 0.02"
            ),
            Command(
                "{python} benchmarks/bench_depthwise.py --device cuda --json {out}/depthwise.json "
                "--dtype float16 --batch 256 --passes forward --filter mobilenet_v2 "
                "--budget {half} --min-time 0.05"
            ),
            Command(
                "{python} benchmarks/bench_depthwise.py --device cuda --json {out}/depthwise.json "
                "--dtype float16 bfloat16 float32 --batch 256 32 1 --no-inductor "
                "--budget {seconds} --min-time 0.05"
            ),
        ),
        share=0.1,
    ),
    Stage(
        "profile",
        "hardware counters of the main kernels, by Nsight Compute",
        45,
        (
            Command(
                "{python} benchmarks/profile_kernels.py --json {out}/profile.json "
                "--log {out}/logs/ncu.csv"
            ),
        ),
    ),
    Stage(
        "bench-networks",
        "the zoo against eager, CUDA graphs and max-autotune",
        None,
        (
            Command(
                "{python} benchmarks/bench_gpu_networks.py --batch 1 256 --budget {seconds} "
                "--output {out}/networks.json --logs {out}/logs/networks"
            ),
        ),
        share=0.2,
    ),
)


def placeholders(out: Path, seconds: float, capability: tuple[int, int] | None) -> dict[str, str]:
    """What the words in braces stand for; `capability` is None in a plan made without a GPU."""
    cores = os.cpu_count() or 1
    junit = out / "logs" / "tests.xml"
    xdist = importlib.util.find_spec("xdist") is not None
    left = max(0.0, seconds - MARGIN)
    return {
        "python": sys.executable,
        "out": str(out),
        "cores": str(cores),
        "seconds": f"{left:.0f}",
        "half": f"{left / 2:.0f}",
        "parallel": f"-n {min(16, cores)}" if xdist else "",
        "junit": f"--junit {junit}" if junit.exists() else "",
        "arch": "sm_{}{}".format(*capability) if capability else "sm_NN",
        "arch_list": arch_list(capability) if capability else "N.N",
    }


def arch_list(capability: tuple[int, int]) -> str:
    """`TORCH_CUDA_ARCH_LIST` for one GPU: with the features of its very architecture where it has
    such."""
    major, minor = capability
    return f"{major}.{minor}{'a' if major in (9, 10) else ''}"


def expand(command: Command, values: Mapping[str, str]) -> tuple[list[str], dict[str, str]]:
    """The words of a command, and its environment."""
    words: list[str] = []
    for word in shlex.split(command.line):
        filled = word.format(**values)
        words += shlex.split(filled) if re.fullmatch(r"\{\w+\}", word) else [filled]
    return words, {name: value.format(**values) for name, value in command.environ.items()}


# The plan.


def describe(stages: Sequence[Stage], out: Path, budget: float) -> str:
    """What would be run."""
    lines = []
    for stage in stages:
        limit = f"at most {stage.limit:.0f} s" if stage.limit else "the rest of the budget"
        lines.append(f"{stage.name}: {stage.purpose} ({limit})")
        values = placeholders(out, min(budget, stage.limit or budget), None)
        for command in stage.commands:
            words, environ = expand(command, values)
            settings = [f"{name}={shlex.quote(value)}" for name, value in environ.items()]
            tool = f"  # if {command.tool} is there" if command.tool else ""
            lines.append("    " + " ".join([*settings, shlex.join(words)]) + tool)
    return "\n".join(lines)


def faults(stages: Sequence[Stage], root: Path = ROOT) -> list[str]:
    """What the plan refers to and the checkout does not have: files, options, commands, marks."""
    return [fault for stage in stages for fault in _stage_faults(stage, root)]


def _stage_faults(stage: Stage, root: Path) -> list[str]:
    found = []
    for command in stage.commands:
        words = shlex.split(command.line)
        scripts = [word for word in words if word.endswith(".py")]
        paths = [*scripts, *(word for word in words if word == "tests")]
        missing = [path for path in paths if not (root / path).exists()]
        found += [f"{stage.name}: there is no {path}" for path in missing]
        for script in scripts:
            source = (root / script).read_text() if script not in missing else ""
            options = {word.split("=")[0] for word in words if word.startswith("--")}
            if script == "benchmarks/validate.py":
                options.add("--junit")  # what {junit} becomes
            found += [
                f"{stage.name}: {script} has no option {option}"
                for option in sorted(options)
                if source and f'"{option}"' not in source
            ]
        if "cvfast" in words:
            name = words[words.index("cvfast") + 1]
            app = root / "cvfast" / "cli" / "app.py"
            if not app.exists() or not re.search(rf"\b{name}\b", app.read_text()):
                found.append(f"{stage.name}: there is no command cvfast {name}")
        if "-m" in words and "pytest" in words:
            marks = words[words.index("pytest") :]
            marks = re.findall(r"\w+", marks[marks.index("-m") + 1])
            found += [
                f"{stage.name}: no test carries the mark {mark}"
                for mark in marks
                if mark not in ("and", "or", "not") and not _marked(mark, root)
            ]
    return found


def _marked(mark: str, root: Path) -> bool:
    """Whether a mark is registered, and a test carries it."""
    registered = f'"{mark}:' in (root / "pyproject.toml").read_text()
    files = (root / "tests").rglob("test_*.py")
    return registered and any(f"mark.{mark}" in file.read_text() for file in files)


# Running it.


def run(
    stages: Sequence[Stage], out: Path, budget: float, environment: dict[str, Any]
) -> list[dict[str, Any]]:
    """Runs the stages in turn; the summary is rewritten after each."""
    major, minor = map(int, environment["gpus"][0]["capability"].split("."))
    out.mkdir(parents=True, exist_ok=True)
    (out / "logs").mkdir(exist_ok=True)
    start = time.monotonic()
    summary: dict[str, Any] = {
        "date": _now(),
        "budget": budget,
        "environment": environment,
        "stages": [],
    }
    try:
        for index, stage in enumerate(stages):
            kept = budget * sum(later.share for later in stages[index + 1 :])
            left = budget - kept - (time.monotonic() - start)
            limit = min(left, stage.limit or left)
            if limit <= MARGIN:
                result = {"stage": stage.name, "status": "skipped", "reason": "the budget is spent"}
            else:
                print(f"{stage.name}: {stage.purpose}", flush=True)
                result = run_stage(stage, out, limit, (major, minor))
            summary["stages"].append(result)
            reason = f": {result['reason']}" if result.get("reason") else ""
            print(f"{stage.name}: {result['status']}{reason}", flush=True)
            summary["seconds"] = round(time.monotonic() - start, 1)
            (out / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
            pack(out)
    finally:
        # Also where it is ended from outside: with the log of the stage that it was in.
        pack(out)
        shutil.rmtree(out / "logs")
    return summary["stages"]


def run_stage(stage: Stage, out: Path, limit: float, capability: tuple[int, int]) -> dict[str, Any]:
    """Runs a stage's commands one after another, for `limit` seconds altogether.

    Returns:
        ``stage``, ``status`` (passed, failed, timeout or skipped), ``seconds``, ``commands`` with
        their exit status, and the ``reason`` of anything but passed.
    """
    start, begun = time.monotonic(), time.time()
    path = out / "logs" / f"{stage.name}.log"
    result: dict[str, Any] = {"stage": stage.name, "status": "passed", "commands": []}
    with path.open("w") as log:
        for command in stage.commands:
            left = limit - (time.monotonic() - start)
            if command.tool and shutil.which(command.tool) is None:
                log.write(f"{command.tool} is not on PATH\n")
                continue
            if missing := [one for one in command.modules if importlib.util.find_spec(one) is None]:
                result["status"] = "skipped"
                result["reason"] = f"not installed: {', '.join(missing)}"
                log.write(f"{result['reason']}\n")
                continue
            words, environ = expand(command, placeholders(out, left, capability))
            log.write(f"$ {shlex.join(words)}\n")
            log.flush()
            target = out / command.stdout if command.stdout else None
            status = _call(words, environ, max(left, 0.0), log, target)
            result["commands"].append({"line": shlex.join(words), "status": status})
            if status != 0 and result["status"] in ("passed", "skipped"):
                result["status"], result["reason"] = _judge(status, limit, path)
    _collect(stage, out, begun)
    return {**result, "seconds": round(time.monotonic() - start, 1)}


def _call(
    words: Sequence[str], environ: Mapping[str, str], limit: float, log: Any, stdout: Path | None
) -> int | None:
    """The exit status of a command; None if it ran out of time. What it started ends with it."""
    inherited = {name: value for name, value in os.environ.items() if name not in STAND_INS}
    with stdout.open("w") if stdout else contextlib.nullcontext(log) as target:
        process = subprocess.Popen(
            list(words),
            cwd=ROOT,
            # Unbuffered: the log is to hold what a command said that had to be ended.
            env={**inherited, "PYTHONUNBUFFERED": "1", **environ},
            stdout=target,
            stderr=log,
            start_new_session=True,
        )
        try:
            return process.wait(limit)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(GRACE)
            return None
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _judge(status: int | None, limit: float, log: Path) -> tuple[str, str]:
    """The status of a stage whose command did not exit with 0, and the reason."""
    if status is None:
        return "timeout", f"it took longer than {limit:.0f} s"
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    last = lines[-1][:300]
    if status == SKIPPED:
        return "skipped", last.removeprefix("skipped: ")
    return "failed", f"exit status {status}: {last}"


def _collect(stage: Stage, out: Path, begun: float) -> None:
    """Copies what the stage wrote into the checkout: a file by its name, those of a pattern packed
    together, since they may be many."""
    for pattern, target in stage.results.items():
        files = [file for file in ROOT.glob(pattern) if file.stat().st_mtime >= begun - 1]
        if files and "*" in pattern:
            with tarfile.open(out / f"{target}.tar.gz", "w:gz") as archive:
                for file in sorted(files):
                    archive.add(file, f"{target}/{file.name}")
        elif files:
            (out / target).mkdir(parents=True, exist_ok=True)
            shutil.copy(files[0], out / target)


def pack(out: Path) -> None:
    """`logs.tar.gz`, from `logs`."""
    fresh = out / "logs.part"
    with tarfile.open(fresh, "w:gz") as archive:
        archive.add(out / "logs", "logs")
    os.replace(fresh, out / "logs.tar.gz")


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def look() -> dict[str, Any]:
    """The environment, and ``capability`` of the first GPU; exits with what is missing.

    In a process of its own: this one is to hold no memory of the GPU.
    """
    # The checkout's cvfast, which may not be installed yet.
    environ = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", LOOK], env=environ, capture_output=True, text=True, check=False
    )
    if "No module named 'torch'" in done.stderr:
        sys.exit(f"{sys.executable} has no PyTorch: set PYTHON to the interpreter that has it")
    if done.returncode != 0:
        sys.exit(f"PyTorch does not work:\n{done.stderr}")
    found = json.loads(done.stdout)
    if not found["gpus"]:
        sys.exit("PyTorch sees no NVIDIA GPU; --plan shows what would be run")
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    names = [stage.name for stage in STAGES]
    parser = argparse.ArgumentParser(prog="on_gpu.sh", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="the folder that the results are written to")
    parser.add_argument("--stages", default=",".join(names), help="comma-separated; default: all")
    parser.add_argument("--budget", type=float, default=BUDGET, help="seconds for all stages")
    parser.add_argument("--plan", action="store_true", help="print and check what would be run")
    args = parser.parse_args(arguments)
    wanted = args.stages.split(",")
    if unknown := [name for name in wanted if name not in names]:
        parser.error(f"unknown stage {', '.join(unknown)}; choose from {', '.join(names)}")
    stages = [stage for stage in STAGES if stage.name in wanted]
    if args.plan:
        print(describe(stages, args.out or Path("OUT"), args.budget))
        wrong = faults(stages)
        print("\n".join(wrong), end="\n" if wrong else "", file=sys.stderr)
        return 1 if wrong else 0
    if args.out is None:
        parser.error("--out is missing: where shall the results go?")
    # Ended from outside, it still ends what it started.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    results = run(stages, args.out.resolve(), args.budget, look())
    return 1 if any(result["status"] in ("failed", "timeout") for result in results) else 0


if __name__ == "__main__":
    sys.exit(main())
