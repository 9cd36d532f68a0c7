"""Report: what was fused, what was not, and why."""

from __future__ import annotations

import html
import json
import math
from dataclasses import asdict, dataclass, field
from typing import Any

REASONS = {
    "as_strided": "the network addresses memory by its layout (as_strided and the like)",
    "bn_no_running_stats": "the batch norm has no running statistics",
    "bn_standalone": "the batch norm does not follow a convolution",
    "bn_training": "the batch norm is in training mode",
    "busy": "other threads ran modules all the while, so that nothing could be traced",
    "control_flow": "the module has data-dependent control flow",
    "custom_object": "the module holds a custom object",
    "data_dependent": "a size depends on the data",
    "dynamic_weight": "the weight is computed from the input",
    "hook_present": "a module has hooks, which a captured graph would not call",
    "internal_error": "cvfast failed on the module; please report it",
    "layout": "the kernel needs channels-last memory, which memory_format rules out",
    "mutation": "the module writes to its input, to a parameter or through a view",
    "no_backend": "no backend serves this operator",
    "no_extension": "the compiled extension is missing",
    "no_kernel": "cvfast has no kernel for this operator",
    "not_exportable": "torch.export cannot trace the module",
    "not_reached": "the module was not called with the example inputs",
    "output_read_twice": "the convolution's output has another reader",
    "parts_failed": "running the module by its parts failed",
    "random": "the module draws random numbers",
    "signature": "the module's signature cannot be traced",
    "slower": "measured slower than the unfused path",
    "stateful": "forward writes to attributes of the module",
    "training_mode": "the module is in training mode",
    "unsupported_dtype": "no kernel takes this dtype",
    "user_filter": "filter_fn said no",
    "verification_failed": "the result differs from the original beyond the policy",
}
"""Reason codes, stable for programs; each row adds the details in words."""


@dataclass
class Row:
    """One site.

    ``module``: qualified name; ``pattern``: what was matched (``conv+bn+relu``); ``backend``: what
    computes it; ``status``: ``fused``, ``skipped`` or ``failed``; ``reason``: a key of
    :data:`REASONS` where it was not fused, ``detail`` the same in words; ``max_error``: largest
    absolute error of the site's output to float64 (with ``verify="layers"``); ``bytes_saved`` and
    ``flops``: for the example inputs; ``gain``: unfused over fused, from time with
    ``select="measure"``, else from bytes moved.
    """

    module: str
    pattern: str
    backend: str = ""
    status: str = "skipped"
    reason: str = ""
    detail: str = ""
    max_error: float | None = None
    bytes_saved: int = 0
    flops: int = 0
    gain: float | None = None


@dataclass(frozen=True)
class Execution:
    """How one size of inputs runs on the CPU: ``plans`` of ``steps`` kernel calls in all, with
    ``torch_calls`` operators between them that have no kernel. ``stages``: of each part of the
    plans that runs for groups of the batch's images, one after the other, its steps and the number
    of groups. Bytes: of the arenas, what is copied for want of a better place in one run, and what
    is moved from one band of rows to the next, which reads it too."""

    plans: int
    steps: int
    torch_calls: int
    stages: tuple[tuple[int, int], ...]
    arena_bytes: int
    bytes_copied: int
    bytes_kept: int = 0

    def __str__(self) -> str:
        def count(number: int, name: str) -> str:
            return f"{number} {name}{'' if number == 1 else 's'}"

        groups = ", ".join(
            f"{steps} in {count(number, 'group')} of images" for steps, number in self.stages
        )
        return (
            f"{count(self.plans, 'plan')} of {count(self.steps, 'step')}"
            f"{f' ({groups})' if groups else ''}, "
            f"{count(self.torch_calls, 'call')} of torch; arena {self.arena_bytes / 1e6:.1f} MB, "
            f"{self.bytes_copied} bytes copied"
            f"{f', {self.bytes_kept} kept for later steps' if self.bytes_kept else ''}"
        )


@dataclass
class Report:
    """What :func:`cvfast.optimize` did.

    ``rows``: a row per site. ``verification``: outcome of the comparison with the original, or None
    if there was none yet. ``execution``: the plans of the CPU engine, if it runs.
    ``layout_copies``: conversions between memory formats in one run, operator by operator.
    ``seconds``: what capture, lowering and verification took. ``notes``: what else to know.
    """

    model: str
    rows: list[Row] = field(default_factory=list)
    verification: Any = None
    execution: Execution | None = None
    layout_copies: int = 0
    seconds: float = 0.0
    notes: list[str] = field(default_factory=list)

    @property
    def fused(self) -> list[Row]:
        return [row for row in self.rows if row.status == "fused"]

    @property
    def coverage(self) -> float:
        """Share of the convolutions' FLOPs that runs fused; of sites, if FLOPs are unknown."""
        convolutions = [row for row in self.rows if row.pattern != "bn"]
        if not convolutions:
            return 0.0
        if all(row.flops for row in convolutions):
            return sum(row.flops for row in self.fused) / sum(row.flops for row in convolutions)
        return len(self.fused) / len(convolutions)

    def summary(self) -> str:
        """One line: sites, coverage, verification."""
        convolutions = sum(row.pattern != "bn" for row in self.rows)
        checked = "not verified" if self.verification is None else str(self.verification)
        sites = f"{len(self.fused)} of {convolutions} sites fused"
        return f"{self.model}: {sites}, {self.coverage:.1%} coverage; {checked}"

    def to_dict(self) -> dict[str, Any]:
        verification = self.verification.to_dict() if self.verification is not None else None
        return {
            "model": self.model,
            "coverage": self.coverage,
            "verification": verification,
            "execution": asdict(self.execution) if self.execution is not None else None,
            "layout_copies": self.layout_copies,
            "seconds": self.seconds,
            "notes": list(self.notes),
            "rows": [asdict(row) for row in self.rows],
        }

    def to_json(self) -> str:
        """JSON; a number that is not finite becomes null."""
        return json.dumps(_finite(self.to_dict()), indent=1, allow_nan=False)

    def to_html(self) -> str:
        """A self-contained page."""
        head = "".join(f"<th>{html.escape(name)}</th>" for name in _COLUMNS)
        body = "\n".join(
            f'<tr class="{row.status}">'
            + "".join(f"<td>{html.escape(cell)}</td>" for cell in _cells(row))
            + "</tr>"
            for row in self.rows
        )
        notes = "".join(f"<li>{html.escape(note)}</li>" for note in self.notes)
        return (
            '<!doctype html><html lang="en"><head><meta charset="utf-8">'
            f"<title>cvfast: {html.escape(self.model)}</title><style>"
            "body{font:14px system-ui,sans-serif;margin:2em}table{border-collapse:collapse}"
            "td,th{padding:.2em .7em;text-align:left;border-bottom:1px solid #ddd}"
            ".skipped td{color:#777}.failed td{color:#b00}</style></head><body>"
            f"<h1>{html.escape(self.summary())}</h1><ul>{notes}</ul>"
            f"<table><thead><tr>{head}</tr></thead><tbody>\n{body}\n</tbody></table></body></html>"
        )

    def table(self) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
        """Column names and the rows' cells, as text."""
        return _COLUMNS, [_cells(row) for row in self.rows]

    def __str__(self) -> str:
        table = [_COLUMNS, *(_cells(row) for row in self.rows)]
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        lines = [
            "  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip()
            for row in table
        ]
        lines += [f"note: {note}" for note in self.notes]
        copies = f"{self.layout_copies} layout copies in a run"
        lines += [copies if self.execution is None else str(self.execution), self.summary()]
        return "\n".join(lines)


_COLUMNS = (
    "module",
    "pattern",
    "backend",
    "status",
    "MFLOP",
    "kB saved",
    "gain",
    "max error",
    "reason",
)


def _cells(row: Row) -> tuple[str, ...]:
    reason = f"{row.reason}: {row.detail}" if row.detail else row.reason
    return (
        row.module or "(root)",
        row.pattern,
        row.backend,
        row.status,
        f"{row.flops / 1e6:.1f}" if row.flops else "",
        f"{row.bytes_saved / 1e3:.0f}" if row.bytes_saved else "",
        f"{row.gain:.2f}" if row.gain is not None else "",
        f"{row.max_error:.2e}" if row.max_error is not None else "",
        reason,
    )


def skipped(module: str, pattern: str, reason: str, detail: str = "") -> Row:
    """A row for a site that stays as it was."""
    return Row(module, pattern, status="skipped", reason=reason, detail=detail or REASONS[reason])


def _finite(tree: Any) -> Any:
    if isinstance(tree, dict):
        return {key: _finite(value) for key, value in tree.items()}
    if isinstance(tree, list):
        return [_finite(value) for value in tree]
    return None if isinstance(tree, float) and not math.isfinite(tree) else tree
