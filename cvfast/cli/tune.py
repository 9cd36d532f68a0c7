"""``cvfast tune``: measures launch parameters on this machine's GPU."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer

from cvfast.cli.output import fail, note

if TYPE_CHECKING:
    from cvfast.extension import Status

T = TypeVar("T")

_DTYPES = ("float16", "bfloat16", "float32")


def tune(
    op: Annotated[list[str] | None, typer.Option(help="Only this operator; repeatable.")] = None,
    backend: Annotated[list[str] | None, typer.Option(help="triton or cuda; repeatable.")] = None,
    passes: Annotated[
        list[str] | None, typer.Option("--pass", help="Such as forward; repeatable.")
    ] = None,
    dtype: Annotated[
        list[str] | None, typer.Option(help="float16 (default), bfloat16, float32; repeatable.")
    ] = None,
    batch: Annotated[
        list[int] | None, typer.Option(help="1 or 256; both by default; repeatable.")
    ] = None,
    holding: Annotated[
        str, typer.Option("--filter", help="Only calls whose description holds this.")
    ] = "",
    budget: Annotated[float, typer.Option(help="Seconds.")] = float("inf"),
    output: Annotated[
        Path | None, typer.Option(help="Folder of the tables. Default: where cvfast reads them.")
    ] = None,
    plan: Annotated[
        bool, typer.Option("--plan", help="Print what would be timed; needs no GPU.")
    ] = False,
    device: Annotated[str, typer.Option(help="Of --plan where there is no GPU.")] = "H200",
) -> None:
    """Measure the launch parameters of GPU kernels and write the tables that cvfast reads.

    Exit code 1 if a candidate failed its check, 2 without a GPU.
    """
    import torch

    from cvfast import extension, tuning
    from cvfast.launch import calls, table
    from cvfast.perf import devices

    ops = _known("operator", op, calls.OPS)
    backends = _known("backend", backend, calls.BACKENDS)
    every = tuple(dict.fromkeys(p for one in calls.COLUMNS for p in one.passes))
    todo = tuning.jobs(
        ops,
        [name for name in backends if plan or _usable(extension.load(name))],
        passes=_known("pass", passes, every),
        dtypes=[getattr(torch, name) for name in _known("dtype", dtype or ["float16"], _DTYPES)],
        batches=_known("batch", batch, calls.BATCHES),
        holding=holding,
    )
    if plan:
        here = devices.current() if torch.cuda.is_available() else devices.find(device)
        counts = {job: len(job.candidates(here)) for job in todo}
        for job, count in counts.items():
            print(f"{job}: {count} candidates")
        print(f"{len(todo)} problems, {sum(counts.values())} candidates, on {here.name}")
        return
    if not torch.cuda.is_available():
        raise fail("kernels are timed on a GPU, and PyTorch sees none here; --plan needs none")
    failed, done = False, 0
    for outcome in tuning.run(todo, output or table.folder(), budget):
        done += 1
        for failure in outcome.failures:
            failed = True
            print(f"FAILED {outcome.job}: {failure}", flush=True)
        if outcome.entry is not None and outcome.path is not None:
            print(
                f"{outcome.job}: {1e6 * outcome.entry.seconds:.1f} us, heuristic "
                f"{1e6 * outcome.entry.heuristic_seconds:.1f} us -> {outcome.path.name}",
                flush=True,
            )
    if done < len(todo):
        note(f"budget spent: {len(todo) - done} problems left")
    if failed:
        raise typer.Exit(1)


def _known(what: str, given: list[T] | None, known: Sequence[T]) -> list[T]:
    """What was given, or else all that is known."""
    for one in given or ():
        if one not in known:
            raise fail(f"unknown {what} {one!r}; choose from {', '.join(map(str, known))}")
    return list(given or known)


def _usable(status: Status) -> bool:
    if not status:
        note(f"left out: {status}")
    return bool(status)
