"""``cvfast kernels``: every GPU kernel that ships, as compiled for every architecture."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from cvfast.cli.output import Table, fail, note, print_json

if TYPE_CHECKING:
    from cvfast.inventory import Row

_COLUMNS = (
    "op",
    "backend",
    "pass",
    "arch",
    "registers",
    "spilled",
    "shared",
    "occupancy",
    "code",
    "status",
    "instructions",
    "config",
)
_NUMBERS = ("registers", "spilled", "shared", "occupancy", "code")


def kernels(
    op: Annotated[list[str] | None, typer.Option(help="Only this operator; repeatable.")] = None,
    arch: Annotated[
        list[str] | None, typer.Option(help="Only this architecture, such as sm_90; repeatable.")
    ] = None,
    backend: Annotated[list[str] | None, typer.Option(help="triton or cuda; repeatable.")] = None,
    full: Annotated[
        bool, typer.Option("--full", help="All configurations: minutes, the first time.")
    ] = False,
    jobs: Annotated[
        int | None, typer.Option(min=1, help="Compilations at once. Default: the cores.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Compile the GPU kernels that ship and look at them; needs no GPU.

    Exit code 1 if one spills registers, exceeds a limit of its architecture, or lacks the wide
    memory accesses or the matrix instructions it is meant to have.
    """
    from cvfast import extension, inventory, validation
    from cvfast.launch import calls as shipped
    from cvfast.perf.devices import ARCHITECTURES

    backends = list(backend or inventory.BACKENDS)
    if "triton" in backends and not (status := extension.load("triton")):
        note(f"Triton's kernels are left out: {status}")
        backends.remove("triton")

    try:
        ops = op or list(shipped.OPS)
        every = (*shipped.network_calls(ops), *shipped.general_calls(ops))
        calls = every if full else shipped.sample_calls(ops)
        found = inventory.configurations(
            calls,
            ops=ops,
            backends=backends,
            archs=arch or (tuple(ARCHITECTURES) if full else inventory.SAMPLE_ARCHS),
            tuned=full,
        )
    except ValueError as error:
        raise fail(str(error)) from None
    rows = inventory.inspect(found, jobs=jobs)
    failed = [row for row in rows if row.failed]
    if as_json:
        print_json([row.to_dict() for row in rows])
    else:
        _print(rows)
        for kernel in dict.fromkeys(configuration.kernel for configuration in found):
            print(f"{kernel.op} {kernel.backend} {kernel.pass_}: {validation.status(kernel)}")
        print(f"{len(rows)} configurations, {len(failed)} with faults")
    if not full:
        archs = ", ".join(dict.fromkeys(row.arch for row in rows))
        note(f"{len(calls)} of {len(every)} calls, for {archs}; --full looks at all")
    if failed:
        raise typer.Exit(1)


def _print(rows: list[Row]) -> None:
    table = Table(_COLUMNS, right=_NUMBERS)
    for row in rows:
        table.add(
            row.op,
            row.backend,
            row.pass_,
            row.arch,
            row.registers,
            row.spill_bytes,
            row.shared_bytes,
            None if row.occupancy is None else f"{row.occupancy:.0%}",
            row.code_bytes,
            row.status,
            " ".join(f"{name}:{count}" for name, count in row.instructions.items()),
            row.config,
        )
    table.print()
