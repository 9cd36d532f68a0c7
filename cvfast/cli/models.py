"""``cvfast list``, ``inspect`` and ``verify``: the networks and what cvfast makes of them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from cvfast.cli.output import Table, fail, note, print_json
from cvfast.cli.specs import MODEL_HELP

_Model = Annotated[str, typer.Argument(metavar="MODEL", help=MODEL_HELP)]
_Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def list_(
    pattern: Annotated[
        str | None, typer.Argument(metavar="[PATTERN]", help="Such as 'mobilenet*'.")
    ] = None,
    parameters: Annotated[
        bool, typer.Option("--parameters", "-p", help="Count them: takes a few seconds.")
    ] = False,
    as_json: _Json = False,
) -> None:
    """List cvfast's networks and the size of their inputs."""
    import torch

    from cvfast.models import default_input_size, get_model, list_models

    names = list_models(pattern)
    if not names:
        raise fail(f"no model matches {pattern!r}; `cvfast list` names them all")
    counts: dict[str, int] = {}
    if parameters:
        # On the meta device a network has shapes and no memory.
        with torch.device("meta"):
            counts = {n: sum(p.numel() for p in get_model(n).parameters()) for n in names}
    sizes = {name: default_input_size(name) for name in names}
    if as_json:
        extra = {name: {"parameters": count} for name, count in counts.items()}
        print_json([{"name": n, "input": sizes[n], **extra.get(n, {})} for n in names])
        return
    table = Table(
        ("model", "input", "parameters") if counts else ("model", "input"), right=("parameters",)
    )
    for name in names:
        cells = [name, "x".join(map(str, sizes[name]))]
        table.add(*cells, *([f"{counts[name]:,}"] if counts else []))
    table.print()


def inspect(
    model: _Model,
    size: Annotated[int | None, typer.Option(min=1, help="Height and width in pixels.")] = None,
    batch: Annotated[int, typer.Option(min=1)] = 1,
    html: Annotated[Path | None, typer.Option(help="Write the report as a page.")] = None,
    device: Annotated[
        str, typer.Option(help="cpu, or cuda: plan for a GPU, which need not be there.")
    ] = "cpu",
    arch: Annotated[
        str | None,
        typer.Option(
            "--gpu", "--arch", help="The GPU to plan for: H200, 'RTX 4090', sm_89. Default: H200."
        ),
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help="With --device cuda: compute in this. Default: float16.")
    ] = None,
    list_launches: Annotated[
        bool, typer.Option("--launches", help="With --device cuda: list every kernel launch.")
    ] = False,
    as_json: _Json = False,
) -> None:
    """Show what cvfast.optimize would fuse, what not, and why."""
    import cvfast
    from cvfast.cli import specs

    if device not in ("cpu", "cuda"):
        raise fail(f"unknown device {device!r}; choose cpu or cuda")
    if device == "cpu" and (arch is not None or dtype is not None or list_launches):
        raise fail("--gpu, --dtype and --launches need --device cuda")
    network = specs.load(model)
    x = specs.example(specs.input_shape(model, network, size), batch)
    if device == "cuda":
        compute = specs.dtype(dtype or "float16")
        _inspect_for_gpu(network, x, arch or "H200", compute, html, list_launches, as_json)
        return
    report = cvfast.optimize(network, (x,), dry_run=True).report
    _write_html(report, html)
    if as_json:
        print_json(report.to_dict())
    else:
        print_report(report)
    if report.verification is not None and not report.verification.ok:
        raise typer.Exit(1)


def _inspect_for_gpu(
    network: Any, x: Any, arch: str, dtype: Any, html: Path | None, list_launches: bool,
    as_json: bool,
) -> None:  # fmt: skip
    from cvfast.optimize import plan

    try:
        planned = plan(network, (x,), device=arch, dtype=dtype)
    except ValueError as error:
        raise fail(str(error)) from error
    _write_html(planned.report, html)
    if as_json:
        print_json(planned.to_dict())
        return
    if list_launches:
        columns = ("module", "kernel", "shape", "MB", "MFLOP", "us at least", "grid", "config")
        table = Table(columns, right=columns[3:6])
        for launch in planned.launches:
            table.add(
                launch.module,
                launch.kernel,
                launch.shape,
                f"{launch.bytes / 1e6:.3f}",
                f"{launch.flops / 1e6:.1f}" if launch.flops else "",
                f"{launch.roof(planned.device) * 1e6:.2f}",
                "x".join(map(str, launch.grid or ())),
                launch.config,
            )
        table.print()
    else:
        print_report(planned.report)
    rows = planned.comparison()
    gpus = tuple(rows[0]["roof_seconds"])
    heads = ("plan", "launches", "MB", *(f"us at least, {gpu}" for gpu in gpus))
    table = Table(heads, right=heads[1:])
    for row in rows:
        times = (f"{row['roof_seconds'][gpu] * 1e6:.1f}" for gpu in gpus)
        table.add(row["plan"], row["launches"], f"{row['bytes'] / 1e6:.1f}", *times)
    table.print()
    print(planned.summary())


def _write_html(report: Any, page: Path | None) -> None:
    if page is not None:
        page.write_text(report.to_html(), encoding="utf-8")
        note(f"wrote {page}")


def print_report(report: Any) -> None:
    """Writes the rows of a `cvfast.optimize.Report` as a table, its notes and its summary."""
    columns, rows = report.table()
    table = Table(columns, right=("MFLOP", "kB saved", "gain", "max error"))
    for cells in rows:
        table.add(*cells)
    table.print()
    for remark in report.notes:
        print(f"note: {remark}")
    print(report.summary())


def verify(
    model: _Model,
    size: Annotated[
        list[int] | None,
        typer.Option(min=1, help="Pixels; repeat for more. Default: the network's own, and + 32."),
    ] = None,
    batch: Annotated[int, typer.Option(min=1)] = 1,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
    as_json: _Json = False,
) -> None:
    """Compare the optimised network with float64 at several sizes; exit code 1 if it fails."""
    import torch

    import cvfast
    from cvfast.cli import specs
    from cvfast.perf.peers import flatten

    network = specs.load(model)
    precision = specs.dtype(dtype)
    own = specs.input_shape(model, network)[1]
    optimized = None
    rows = []
    for side in size or (own, own + 32):
        x = specs.example(specs.input_shape(model, network, side), batch)
        truth = specs.Truth(network, x, precision)
        if optimized is None:
            # One module for all sizes: this also checks that nothing of the first is baked in.
            target = None if precision is torch.float32 else precision
            optimized = cvfast.optimize(network, (x,), dtype=target)
        with torch.no_grad():
            verdict = truth.check(flatten(optimized(x)))
        rows.append(
            {
                "size": side,
                "ok": verdict.ok,
                "error": verdict.error,
                "baseline_error": verdict.baseline_error,
                "limit": verdict.limit,
                "message": verdict.message,
            }
        )
    assert optimized is not None
    own_check = optimized.report.verification
    failed_rows = [row for row in optimized.report.rows if row.status == "failed"]
    ok = all(row["ok"] for row in rows) and not failed_rows and (own_check is None or own_check.ok)
    if as_json:
        report = optimized.report.to_dict()
        print_json({"model": model, "dtype": dtype, "ok": ok, "sizes": rows, "report": report})
    else:
        columns = ("size", "error", "eager's error", "limit", "result")
        table = Table(columns, title=f"{model}, {dtype}, batch {batch}", right=columns[:4])
        for row in rows:
            table.add(
                row["size"],
                f"{row['error']:.2e}",
                f"{row['baseline_error']:.2e}",
                f"{row['limit']:.2e}",
                "passed" if row["ok"] else "FAILED",
            )
        table.print()
        for row in rows:
            if row["message"]:
                print(f"at {row['size']}: {row['message']}")
        for site in failed_rows:
            print(f"{site.module}: {site.reason}: {site.detail}")
        print(optimized.report.summary())
    if not ok:
        raise typer.Exit(1)
