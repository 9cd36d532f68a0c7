"""``cvfast bench``: cvfast against its peers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from cvfast.cli.output import Table, fail, note, print_json
from cvfast.cli.specs import MODEL_HELP

_PEERS = "eager,eager_channels_last,inductor,onnxruntime,openvino"


def bench(
    models: Annotated[list[str], typer.Argument(metavar="MODEL...", help=MODEL_HELP)],
    device: Annotated[str, typer.Option(help="cpu")] = "cpu",
    batch: Annotated[str, typer.Option(help="Comma-separated.")] = "1",
    threads: Annotated[
        str | None, typer.Option(help="Comma-separated. Default: as many as torch uses.")
    ] = None,
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16.")] = "float32",
    peers: Annotated[str, typer.Option(help="Comma-separated; '' for none.")] = _PEERS,
    size: Annotated[int | None, typer.Option(min=1, help="Height and width in pixels.")] = None,
    min_time: Annotated[float, typer.Option(min=0.0, help="Seconds per contender.")] = 1.0,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write JSON to FILE; '-' for standard output.")
    ] = None,
) -> None:
    """Time cvfast and its peers, interleaved and verified; exit code 1 if a check fails."""
    import torch

    from cvfast.cli import comparison, specs
    from cvfast.perf import environment
    from cvfast.perf.peers import NAMES

    if device != "cpu":
        raise fail(f"cannot measure on device {device!r}: only cpu has kernels so far")
    precision = specs.dtype(dtype)
    names = [name for name in peers.split(",") if name]
    for name in names:
        if name not in NAMES:
            raise fail(f"unknown peer {name!r}; choose from {', '.join(NAMES)}")
    batches = _numbers("--batch", batch)
    counts = _numbers("--threads", threads) if threads else [torch.get_num_threads()]
    for model in models:
        specs.load(model)  # a misspelt name fails before hours of measuring, not after

    to_stdout = json_file is not None and str(json_file) == "-"
    rows: list[dict[str, Any]] = []
    for model in models:
        for count in counts:
            for images in batches:
                row = comparison.compare(
                    model,
                    batch=images,
                    threads=count,
                    dtype=precision,
                    names=names,
                    size=size,
                    min_time=min_time,
                )
                rows.append(row)
                if not to_stdout:
                    print_comparison(row)
    result = {"environment": environment.capture(), "rows": rows}
    if to_stdout:
        print_json(result)
    elif json_file is not None:
        json_file.write_text(json.dumps(result, indent=1) + "\n")
        note(f"wrote {json_file}")
    if not all(row["ok"] for row in rows):
        raise typer.Exit(1)


def print_comparison(row: dict[str, Any]) -> None:
    """Writes one result of `comparison.compare` as a table."""
    shape = "x".join(map(str, row["shape"]))
    title = f"{row['model']}  {shape}  {row['dtype']}  {row['threads']} threads"
    columns = ("", "median ms", "p20", "p80", "% of peak", "error", "check", "cvfast is")
    table = Table(columns, title=title, right=columns[1:6] + columns[7:])
    for name, result in row["variants"].items():
        speedup = result.get("speedup")
        table.add(
            name,
            *(f"{result[key] * 1e3:.3f}" for key in ("median", "p20", "p80")),
            f"{100 * result['flops_per_second'] / row['peak_flops_per_second']:.0f}",
            f"{result['error']:.1e}",
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
    discarded = row["variants"]["cvfast"]["discarded"]
    if discarded:
        print(f"{discarded} rounds discarded: the machine ran slow")
    unsteady = [name for name, result in row["variants"].items() if result["unsteady"]]
    if unsteady:
        print(f"the times of {', '.join(unsteady)} vary widely: something else is running")
    print()


def _numbers(option: str, text: str) -> list[int]:
    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError:
        numbers = []
    if not numbers or min(numbers) < 1:
        raise fail(f"{option} takes positive integers, separated by commas; got {text!r}")
    return numbers
