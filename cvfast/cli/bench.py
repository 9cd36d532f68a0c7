"""``cvfast bench``: cvfast against its peers."""

from __future__ import annotations

import functools
import itertools
import json
from pathlib import Path
from typing import Annotated, Any

import typer

from cvfast.cli.output import Table, fail, note, print_json
from cvfast.cli.specs import MODEL_HELP

_ALIASES = {"eager-nhwc": "eager_channels_last"}


def bench(
    models: Annotated[
        list[str] | None,
        typer.Argument(metavar="[MODEL]...", help=f"{MODEL_HELP} Default: all of `cvfast list`."),
    ] = None,
    device: Annotated[str, typer.Option(help="cpu")] = "cpu",
    batch: Annotated[str, typer.Option(help="Comma-separated.")] = "1",
    threads: Annotated[
        str | None, typer.Option(help="Comma-separated. Default: as many as torch uses.")
    ] = None,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16; comma-separated.")] = "float32",
    peers: Annotated[
        str,
        typer.Option(
            help="Of onnxruntime, openvino, inductor, eager, eager-nhwc; comma-separated; "
            "'' for none."
        ),
    ] = "all",
    size: Annotated[int | None, typer.Option(min=1, help="Height and width in pixels.")] = None,
    min_time: Annotated[float, typer.Option(min=0.0, help="Seconds per contender.")] = 1.0,
    memory: Annotated[
        bool, typer.Option("--memory", help="Also the peak memory of inference. Linux only.")
    ] = False,
    json_file: Annotated[
        Path | None,
        typer.Option(
            "--json",
            help="Write JSON to FILE after every network, in place of what it holds of the same "
            "settings; '-' for standard output.",
        ),
    ] = None,
) -> None:
    """Time cvfast and its peers, interleaved and verified; exit code 1 if a check fails.

    Each of several settings is measured in a process of its own.
    """
    import torch

    from cvfast.cli import comparison, specs
    from cvfast.models import list_models
    from cvfast.perf import environment, isolated

    if device != "cpu":
        raise fail(f"cannot measure on device {device!r}: only cpu has kernels so far")
    names = _peers(peers)
    precisions = [specs.dtype(name) for name in dtype.split(",")]
    batches = _numbers("--batch", batch)
    counts = _numbers("--threads", threads) if threads else [torch.get_num_threads()]
    known = list_models()
    for model in models or ():
        if model not in known:
            specs.load(model)  # a misspelt name fails before hours of measuring, not after

    to_stdout = json_file is not None and str(json_file) == "-"
    kept = _rows_of(json_file) if json_file is not None and not to_stdout else []
    settings = list(itertools.product(models or known, precisions, counts, batches))
    rows: list[dict[str, Any]] = []
    for model, precision, count, images in settings:
        measure = functools.partial(
            comparison.compare,
            model,
            batch=images,
            threads=count,
            dtype=precision,
            names=names,
            size=size,
            min_time=min_time,
            with_memory=memory,
        )
        try:
            row = isolated.call(measure) if len(settings) > 1 else measure()
        except RuntimeError as error:
            note(f"cvfast: {model}, batch {images}, {count} threads, {precision}: {error}")
            continue
        rows.append({**row, "environment": environment.capture()})
        if not to_stdout:
            print_comparison(row)
        if json_file is not None and not to_stdout:
            json_file.write_text(json.dumps({"rows": merge(kept, rows)}, indent=1) + "\n")
    if to_stdout:
        print_json({"rows": rows})
    elif len(rows) > 1:
        print_summary(rows)
    if json_file is not None and not to_stdout:
        note(f"wrote {json_file}")
    if len(rows) < len(settings) or not all(row["ok"] for row in rows):
        raise typer.Exit(1)


def print_comparison(row: dict[str, Any]) -> None:
    """Writes one result of `comparison.compare` as a table."""
    from cvfast.optimize.report import Execution

    shape = "x".join(map(str, row["shape"]))
    title = (
        f"{row['model']}  {shape}  {row['dtype']}  {row['threads']} threads  "
        f"{row['flops'] * 1e-9:.2f} GFLOP, peak {row['peak_flops_per_second'] * 1e-9:.0f} GFLOP/s"
    )
    columns = ["", "median ms", "min", "p20", "p80", "GFLOP/s", "% of peak", "error"]
    with_memory = "memory_bytes" in row["variants"]["cvfast"]
    columns += ["peak MB", "check", "cvfast is"] if with_memory else ["check", "cvfast is"]
    table = Table(columns, title=title, right=[c for c in columns[1:] if c != "check"])
    for name, result in row["variants"].items():
        speedup = result.get("speedup")
        table.add(
            name,
            *(f"{result[key] * 1e3:.3f}" for key in ("median", "min", "p20", "p80")),
            f"{result['flops_per_second'] * 1e-9:.0f}",
            f"{100 * result['flops_per_second'] / row['peak_flops_per_second']:.0f}",
            f"{result['error']:.1e}",
            *([_megabytes(result)] if with_memory else []),
            "passed" if result["ok"] else "FAILED",
            f"{speedup:.2f}x" if speedup else "",
        )
    table.print()
    for name, result in row["variants"].items():
        if result["message"]:
            print(f"{name}: {result['message']}")
    for reason in row["unavailable"].values():
        print(f"not compared: {reason}")
    if not row["ok"]:
        print("no speedup: cvfast failed its check")
    elif row["speedup"]:
        print(f"{row['speedup']:.2f}x as fast as the best peer, {row['best_peer']}")
    if row["execution"]:
        print(f"cvfast runs {Execution(**row['execution'])}")
    discarded = row["variants"]["cvfast"]["discarded"]
    if discarded:
        print(f"{discarded} rounds discarded: the machine ran slow")
    unsteady = [name for name, result in row["variants"].items() if result["unsteady"]]
    if unsteady:
        print(f"the times of {', '.join(unsteady)} vary widely: something else is running")
    print()


def print_summary(rows: list[dict[str, Any]]) -> None:
    """Writes a line per result: cvfast beside the best peer."""
    columns = (
        "network", "input", "dtype", "threads", "cvfast ms", "best peer", "its ms", "cvfast is",
        "% of peak", "error / eager's", "MB", "best MB",
    )  # fmt: skip
    right = [c for c in columns if c not in ("network", "input", "dtype", "best peer")]
    table = Table(columns, title="against the best peer", right=right)
    for row in rows:
        ours, best = row["variants"]["cvfast"], row["variants"].get(row["best_peer"])
        table.add(
            row["model"],
            "x".join(map(str, row["shape"])),
            row["dtype"],
            row["threads"],
            f"{1e3 * ours['median']:.2f}" if ours["ok"] else "FAILED",
            row["best_peer"],
            f"{1e3 * best['median']:.2f}" if best else "",
            f"{row['speedup']:.2f}x" if row["speedup"] else "",
            f"{100 * ours['flops_per_second'] / row['peak_flops_per_second']:.0f}",
            f"{ours['error'] / row['eager_error']:.1f}" if row["eager_error"] else "",
            _megabytes(ours),
            _megabytes(least_memory(row)),
        )
    table.print()


def least_memory(row: dict[str, Any]) -> dict[str, Any]:
    """The result of the peer that needs the least memory; empty where none was measured."""
    rivals = [result for name, result in row["variants"].items() if name != "cvfast"]
    measured = [result for result in rivals if "memory_bytes" in result]
    return min(measured, key=lambda result: result["memory_bytes"], default={})


def merge(kept: list[dict[str, Any]], new: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """`kept` with `new` in place of those of the same setting, in order of setting."""
    merged = {key(row): row for row in [*kept, *new]}
    return [merged[setting] for setting in sorted(merged)]


def key(row: dict[str, Any]) -> tuple[str, str, int, tuple[int, ...]]:
    """What makes a setting: network, dtype, threads, input."""
    return row["model"], row["dtype"], row["threads"], tuple(row["shape"])


def _rows_of(path: Path) -> list[dict[str, Any]]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))["rows"] if path.exists() else []
    except (json.JSONDecodeError, KeyError, TypeError, OSError) as error:
        raise fail(f"--json {path} holds no results of cvfast bench: {error!r}") from error


def _megabytes(result: dict[str, Any]) -> str:
    return f"{result['memory_bytes'] * 1e-6:.1f}" if "memory_bytes" in result else ""


def _peers(text: str) -> list[str]:
    from cvfast.perf.peers import NAMES

    if text == "all":
        return list(NAMES)
    names = [_ALIASES.get(name, name) for name in text.split(",") if name]
    for name in names:
        if name not in NAMES:
            raise fail(f"unknown peer {name!r}; choose from all, {', '.join(NAMES)}")
    return names


def _numbers(option: str, text: str) -> list[int]:
    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError:
        numbers = []
    if not numbers or min(numbers) < 1:
        raise fail(f"{option} takes positive integers, separated by commas; got {text!r}")
    return numbers
