"""The commands put together."""

from __future__ import annotations

import sys

import typer

from cvfast.cli import bench, demo, doctor, kernels, models, tune

app = typer.Typer(
    help="Fused kernels for convolutional networks: inspect, verify, measure.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich" if sys.stdout.isatty() else None,
    pretty_exceptions_enable=False,
)
app.command("doctor")(doctor.doctor)
app.command("list")(models.list_)
app.command("inspect")(models.inspect)
app.command("verify")(models.verify)
app.command("kernels")(kernels.kernels)
app.command("tune")(tune.tune)
app.command("bench")(bench.bench)
app.command("demo")(demo.demo)
