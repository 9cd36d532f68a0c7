"""The zoo on a GPU: cvfast against eager PyTorch, CUDA graphs and max-autotune, as JSON.

    python benchmarks/bench_gpu_networks.py [MODEL ...] [--batch 1 256] [--dtype float16]
        [--budget SECONDS] [--workers N] [--output FILE]

A row per network and batch is written as soon as it is measured; rows that are in the file already,
from this machine and code, are skipped (`--again`: measured anew), so that a run that was cut short
is continued by the next.
Networks come in the order of `PRIORITY`; when the budget is spent, no further row is measured.

Each network has a process of its own. Compilation takes minutes, so several are built side by side;
one that is ready to be timed has the machine to itself: the others are stopped meanwhile. What a
contender cannot do (too little memory, a failed compilation) is recorded in its row; a process that
dies costs its rows, which then say so.
"""

from __future__ import annotations

import argparse
import collections
import copy
import json
import os
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Hashable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

import torch
from torch import Tensor

import cvfast
from cvfast import tolerance
from cvfast.models import default_input_size, list_models
from cvfast.perf import clocks, environment, flops, gpu_timing, peers, timing
from cvfast.zoo import calibrate_batch_norms, load_model

sys.path.insert(0, str(Path(__file__).parent))
from results_file import Budget, Results, Row, same_origin

RESULTS = Path(__file__).parent / "results" / "gpu" / "networks.json"
PRIORITY = (
    "mobilenet_v2", "mobilenet_v1", "mobilenet_v3_large", "efficientnet_lite0", "densenet121",
    "googlenet", "inception_v3", "resnet50", "resnet18", "unet",
)  # fmt: skip
OURS = ("cvfast", "cvfast_graph")
DEVICE = "cuda"
CHECKED = 8  # images of a batch that are compared with float64
PEER_K = 10.0  # as in `cvfast bench`: a peer may round differently, not compute something else
MEMORY_PER_WORKER = 20 << 30
SETTLE = 0.2  # seconds between stopping the other processes and timing
ROW_TIMEOUT = 120.0


# What a worker does.


@dataclass
class Built:
    """The contenders of one row, and why others are missing."""

    calls: dict[str, Callable[[], Any]] = field(default_factory=dict)
    setup: dict[str, float] = field(default_factory=dict)
    verdicts: dict[str, tolerance.Verdict] = field(default_factory=dict)
    unavailable: dict[str, str] = field(default_factory=dict)
    coverage: float | None = None

    def add(self, name: str, build: Callable[[], Callable[[], Any]]) -> None:
        start = time.perf_counter()
        try:
            call = build()
            call()
            if DEVICE == "cuda":
                torch.cuda.synchronize()
        except peers.PeerUnavailable as error:
            self.unavailable[name] = str(error)
        except Exception as error:
            self.unavailable[name] = f"{name}: {type(error).__name__}: {error}".splitlines()[0]
        else:
            self.calls[name] = call
            self.setup[name] = time.perf_counter() - start


def load(name: str) -> tuple[torch.nn.Module, tuple[int, int, int]]:
    """A network with the same random weights each time, its statistics calibrated; (C, H, W)."""
    torch.manual_seed(0)
    model = load_model(name).to(DEVICE)
    shape = default_input_size(name) if name in list_models() else (3, 224, 224)
    with torch.no_grad():
        return calibrate_batch_norms(model, images(4, shape)), shape


def images(batch: int, shape: tuple[int, int, int]) -> Tensor:
    return torch.randn(batch, *shape, generator=torch.Generator().manual_seed(0)).to(DEVICE)


def build(model: torch.nn.Module, x: Tensor, dtype: torch.dtype) -> Built:
    """Every contender, run once and checked against float64; the slowest to build last."""
    built = Built()
    for name in ("eager", "eager_channels_last", "eager_graph"):
        built.add(name, lambda name=name: _peer(name, model, x, dtype))
    built.add("cvfast", lambda: _optimized(built, model, x, dtype))
    if "cvfast" in built.calls:
        ours = built.calls["cvfast"]
        built.add("cvfast_graph", lambda: gpu_timing.capture(ours))
    built.add("max_autotune", lambda: _peer("max_autotune", model, x, dtype))
    check(built, model, x)
    return built


def _peer(name: str, model: torch.nn.Module, x: Tensor, dtype: torch.dtype) -> Callable[[], Any]:
    return peers.build(name, model, x, threads=torch.get_num_threads(), dtype=dtype).run


def _optimized(
    built: Built, model: torch.nn.Module, x: Tensor, dtype: torch.dtype
) -> Callable[[], Any]:
    y = x.to(dtype=dtype, memory_format=torch.channels_last)
    narrow = copy.deepcopy(model).to(dtype=dtype, memory_format=torch.channels_last)
    # Optimising verifies in float64, which has no room for a large batch; any batch runs then.
    optimized = cvfast.optimize(narrow, (y[:CHECKED],))
    built.coverage = optimized.report.coverage
    verification = optimized.report.verification
    if verification is not None and not verification.ok:
        # What runs then is the original: its time must not stand for cvfast's.
        raise RuntimeError(str(verification))

    @torch.no_grad()
    def run() -> Any:
        return optimized(y)

    return run


def check(built: Built, model: torch.nn.Module, x: Tensor) -> None:
    """Judges the first images of every contender's output; the yardstick is eager's error."""
    if "eager" not in built.calls:
        return
    with torch.no_grad():
        truth = copy.deepcopy(model).double()
        expected = peers.flatten(truth(x[:CHECKED].double()))
    baseline = [t[:CHECKED].clone() for t in peers.flatten(built.calls["eager"]())]
    for name, call in built.calls.items():
        k = tolerance.K_NETWORK if name in OURS else PEER_K
        outputs = [t[:CHECKED] for t in peers.flatten(call())]
        if len(outputs) != len(expected):
            message = f"{len(outputs)} output tensors, expected {len(expected)}"
            built.verdicts[name] = tolerance.Verdict(False, float("inf"), message=message)
            continue
        verdicts = [
            tolerance.check(a, e, b, k=k)
            for a, e, b in zip(outputs, expected, baseline, strict=True)
        ]
        built.verdicts[name] = max(verdicts, key=lambda verdict: (not verdict.ok, verdict.error))


def measure(setting: Row, built: Built, work: int) -> Row:
    """Times what was built, and makes the row."""
    if not built.calls:
        return failed(setting, next(iter(built.unavailable.values())))
    log: list[clocks.Sample] = []
    timings = gpu_timing.interleave_cuda(
        built.calls, cold_l2=False, queued=False, min_time=0.2, max_time=20.0, log=log
    )
    return {**setting, **summary(built, timings, work, setting["shape"][0]),
            "clocks": clocks.summarize(log)}  # fmt: skip


def summary(
    built: Built, timings: dict[str, timing.Timing], work: int, batch: int
) -> dict[str, Any]:
    """What follows from the times. A speedup stands only between two that passed their check."""
    variants = {}
    for name, measured in timings.items():
        verdict = built.verdicts.get(name, tolerance.Verdict(False, message="no eager to judge by"))
        variants[name] = {
            **measured.to_dict(),
            "images_per_second": batch / measured.median,
            "flops_per_second": work / measured.median,
            "setup_seconds": built.setup[name],
            "error": verdict.error,
            "limit": verdict.limit,
            "ok": verdict.ok,
            "message": verdict.message,
        }
    passed = sorted((n for n in variants if variants[n]["ok"]), key=lambda n: timings[n].median)
    ours = next((n for n in passed if n in OURS), None)
    peer = next((n for n in passed if n not in OURS), None)
    wrong = [name for name in OURS if name in variants and not variants[name]["ok"]]
    return {
        "flops": work,
        "coverage": built.coverage,
        "ok": ours is not None and not wrong,
        "best": ours,
        "best_peer": peer,
        "speedup": timing.ratio(timings[peer], timings[ours]) if ours and peer else None,
        "variants": variants,
        "unavailable": built.unavailable,
    }


def work(name: str, batches: Sequence[int], dtype: str, channel: TextIO, orders: TextIO) -> None:
    """The life of a worker: for each batch build, say so, wait for leave, time, hand the row in."""

    def say(message: dict[str, Any]) -> None:
        print(json.dumps(message), file=channel, flush=True)

    torch.backends.cudnn.benchmark = True  # as PyTorch's tuning guide advises
    model, shape = load(name)
    per_image = flops.count(model, (images(1, shape),))
    captured = environment.capture()
    for batch in batches:
        setting = {
            "model": name, "shape": [batch, *shape], "dtype": dtype, "environment": captured,
        }  # fmt: skip
        try:
            built = build(model, images(batch, shape), getattr(torch, dtype))
            say({"ready": batch})
            if not orders.readline():
                return  # who would take the row is gone
            row = measure(setting, built, per_image * batch)
        except Exception as error:
            row = failed(setting, f"{type(error).__name__}: {error}".splitlines()[0])
        say({"row": row})
        built = None
        torch.compiler.reset()
        torch.cuda.empty_cache()


def failed(setting: Row, reason: str) -> Row:
    """The row of what could not be measured at all."""
    return {**setting, "ok": False, "speedup": None, "variants": {}, "error": reason}


# What the process above them does.


class Worker:
    """A process that builds one network, and times it when told to.

    It is the head of its process group: the compilers that it starts stop and die with it.
    """

    def __init__(
        self, model: str, batches: Sequence[int], command: Sequence[str], log: Path,
        environ: dict[str, str] | None = None,
    ) -> None:  # fmt: skip
        self.model, self.missing = model, list(batches)
        self.inbox: collections.deque[dict[str, Any]] = collections.deque()
        self._text = b""
        with log.open("w") as stderr:
            self.process = subprocess.Popen(
                list(command),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
                env={**os.environ, **(environ or {})},
                start_new_session=True,
            )

    def fileno(self) -> int:
        assert self.process.stdout is not None
        return self.process.stdout.fileno()

    def receive(self) -> bool:
        """Puts what it has said since into `inbox`; False if it has ended."""
        chunk = os.read(self.fileno(), 1 << 16)
        *lines, self._text = (self._text + chunk).split(b"\n")
        self.inbox.extend(map(json.loads, lines))
        return bool(chunk)

    def go(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(b"go\n")
        self.process.stdin.flush()

    def signal(self, number: signal.Signals) -> None:
        """To it and its compilers, unless it is gone."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, number)

    def end(self) -> int:
        """Ends it if it has not, and returns its exit status."""
        self.signal(signal.SIGKILL)
        for pipe in (self.process.stdin, self.process.stdout):
            assert pipe is not None
            pipe.close()
        return self.process.wait()


def conduct(
    tasks: Iterable[tuple[str, Sequence[int]]],
    start: Callable[[str, Sequence[int]], Worker],
    keep: Callable[[Row], None],
    *,
    workers: int,
    budget: Budget,
) -> list[str]:
    """Builds networks side by side and has them timed one at a time, until the budget is spent.

    Args:
        tasks: (network, batches), most wanted first.
        start: makes the worker of a task.
        keep: takes each row.
        workers: that may run at once.

    Returns:
        The networks of which rows are missing because the budget ended.
    """
    waiting = collections.deque(tasks)
    running: list[Worker] = []
    with selectors.DefaultSelector() as selector, ExitStack() as cleanup:
        while budget.left and (waiting or running):
            while waiting and len(running) < workers:
                worker = start(*waiting.popleft())
                cleanup.callback(worker.end)
                running.append(worker)
                selector.register(worker, selectors.EVENT_READ)
            timeout = None if budget.left == float("inf") else budget.left
            for found, _ in selector.select(timeout):
                worker = found.fileobj
                assert isinstance(worker, Worker)
                others = [other for other in running if other is not worker]
                if not _listen(worker, others, keep):
                    selector.unregister(worker)
                    running.remove(worker)
        return [worker.model for worker in running] + [model for model, _ in waiting]


def _listen(worker: Worker, others: list[Worker], keep: Callable[[Row], None]) -> bool:
    """Deals with what a worker has said; False if it has ended."""
    alive = worker.receive()
    while worker.inbox:
        message = worker.inbox.popleft()
        row = _alone(worker, others) if "ready" in message else message["row"]
        if row is None:
            alive = False
            break
        worker.missing.remove(row["shape"][0])
        keep(row)
    if not alive:
        status = worker.end()
        for batch in worker.missing:
            setting = {"model": worker.model, "shape": [batch]}
            keep(failed(setting, f"its process ended with status {status}"))
    return alive


def _alone(worker: Worker, others: list[Worker]) -> Row | None:
    """The row that a worker measures while the others stand still; None if it dies over it."""
    for other in others:
        other.signal(signal.SIGSTOP)
    try:
        time.sleep(SETTLE)
        worker.go()
        end = time.monotonic() + ROW_TIMEOUT
        with selectors.DefaultSelector() as selector:
            selector.register(worker, selectors.EVENT_READ)
            while not worker.inbox:
                if not selector.select(max(0.0, end - time.monotonic())) or not worker.receive():
                    return None
        return worker.inbox.popleft()["row"]
    except BrokenPipeError:
        return None
    finally:
        for other in others:
            other.signal(signal.SIGCONT)


def ordered(models: Iterable[str]) -> list[str]:
    """Those of `PRIORITY` first."""
    rank = {name: index for index, name in enumerate(PRIORITY)}
    return sorted(models, key=lambda name: (rank.get(name, len(rank)), name))


def todo(
    models: Sequence[str], batches: Sequence[int], dtype: str, results: Results
) -> list[tuple[str, list[int]]]:
    """Each network with the batches that have no row yet."""
    missing = [
        (model, [batch for batch in batches if (model, dtype, batch) not in results])
        for model in models
    ]
    return [task for task in missing if task[1]]


def kept(row: Row, captured: dict[str, Any]) -> bool:
    """Whether a row of an earlier run still says what one measured now would: it comes from the
    same machine and code, and from a process that lived to tell."""
    return "environment" in row and same_origin(row["environment"], captured)


def key(row: Row) -> Hashable:
    return row["model"], row["dtype"], row["shape"][0]


def describe(row: Row) -> str:
    """One line."""
    label = f"{row['model']:22s} b{row['shape'][0]:<4d} {row['dtype']}"
    if "error" in row:
        return f"{label}  not measured: {row['error']}"
    times = "  ".join(
        f"{name} {1e3 * variant['median']:.3f}{'' if variant['ok'] else ' FAILED'}"
        for name, variant in row["variants"].items()
    )
    speedup = f"{row['speedup']:.2f}x {row['best_peer']}" if row["speedup"] else "no speedup"
    missing = "".join(f"\n    {reason}" for reason in row["unavailable"].values())
    return f"{label}  ms: {times}  {speedup}{missing}"


def default_workers() -> int:
    """As many as cores and memory of the GPU feed."""
    memory = torch.cuda.get_device_properties(0).total_memory
    return max(1, min((os.cpu_count() or 1) // 2, memory // MEMORY_PER_WORKER))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="*", help="default: all of `cvfast list`")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 256])
    parser.add_argument("--dtype", default="float16", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--budget", type=float, help="seconds after which no row is measured")
    parser.add_argument("--workers", type=int, help="networks that are built at once")
    parser.add_argument("--again", action="store_true", help="also what is in the file already")
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--logs", type=Path, help="what the processes print; default: beside FILE")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        # What a library prints must not mix with the messages.
        channel = os.fdopen(os.dup(sys.stdout.fileno()), "w")
        os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
        work(args.models[0], args.batch, args.dtype, channel, sys.stdin)
        return 0
    if not torch.cuda.is_available():
        sys.exit("PyTorch sees no CUDA device")
    # Ended from outside, this process still ends those that it started.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    budget = Budget(args.budget)
    results = Results(args.output, key)
    captured = environment.capture()
    results.rows = [] if args.again else [row for row in results.rows if kept(row, captured)]
    models = args.models or ordered(list_models())
    workers = args.workers or default_workers()
    logs = args.logs or args.output.parent / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    threads = str(max(1, (os.cpu_count() or 1) // workers))

    def start(model: str, batches: Sequence[int]) -> Worker:
        command = [
            sys.executable, __file__, model, "--worker", "--dtype", args.dtype,
            "--batch", *map(str, batches),
        ]  # fmt: skip
        log = logs / f"{model.replace(':', '_').replace('/', '_')}.log"
        return Worker(model, batches, command, log, {"TORCHINDUCTOR_COMPILE_THREADS": threads})

    bad = 0

    def keep(row: Row) -> None:
        nonlocal bad
        row.setdefault("dtype", args.dtype)
        bad += not row["ok"]
        results.add(row)
        print(describe(row), flush=True)

    tasks = todo(models, args.batch, args.dtype, results)
    missing = conduct(tasks, start, keep, workers=workers, budget=budget)
    if missing:
        print(f"the budget ended before: {', '.join(missing)}")
    return 1 if bad or not results.rows else 0


if __name__ == "__main__":
    sys.exit(main())
