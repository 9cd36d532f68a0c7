"""Plan: what :func:`cvfast.optimize` would run on a GPU that need not be there."""

from __future__ import annotations

import copy
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from cvfast.perf import devices

from .capture import CaptureError, capture
from .launches import CONCAT, CONCAT_COPY, Launch, eager_launches, launches
from .lower import lower
from .module import split_inputs
from .options import Options
from .report import Report

COMPARED = ("H200", "RTX 4090", "RTX 5090")
"""GPUs whose least times are compared."""


@dataclass(frozen=True)
class Plan:
    """The kernels of one run.

    ``report``: the rows that :func:`cvfast.optimize` would give, unverified. ``launches``: in the
    order in which they run. ``unfused``: what PyTorch would launch, operator by operator.
    ``device``: what it was planned for. ``arena_bytes``: memory beside weights, inputs and results.
    """

    report: Report
    launches: list[Launch]
    unfused: list[Launch]
    device: devices.Device
    arena_bytes: int

    @property
    def bytes(self) -> int:
        """Moved by all launches, each input read and each output written once."""
        return sum(launch.bytes for launch in self.launches)

    @property
    def flops(self) -> int:
        return sum(launch.flops for launch in self.launches)

    @property
    def concat_bytes(self) -> int:
        """Moved by launches that do nothing but join images."""
        return sum(item.bytes for item in self.launches if item.kernel in (CONCAT, CONCAT_COPY))

    @property
    def roof(self) -> float:
        """Seconds that the launches take at least, one after the other."""
        return roof(self.launches, self.device)

    def summary(self) -> str:
        """One line: launches, bytes, the time they take at least."""
        return (
            f"{self.report.model} on {self.device.name}: {len(self.launches)} launches, "
            f"{self.bytes / 1e6:.1f} MB ({self.concat_bytes / 1e6:.1f} of concatenations), "
            f"{self.flops / 1e9:.2f} GFLOP, at least {self.roof * 1e6:.1f} us; "
            f"arena {self.arena_bytes / 1e6:.1f} MB"
        )

    def comparison(self) -> list[dict[str, Any]]:
        """The plan beside PyTorch operator by operator: launches, bytes, and least seconds on each
        of :data:`COMPARED`."""
        return [
            {
                "plan": name,
                "launches": len(found),
                "bytes": sum(launch.bytes for launch in found),
                "flops": sum(launch.flops for launch in found),
                "roof_seconds": {device: roof(found, devices.find(device)) for device in COMPARED},
            }
            for name, found in (("cvfast", self.launches), ("unfused", self.unfused))
        ]

    def to_dict(self) -> dict[str, Any]:
        return {
            "device": self.device.name,
            "architecture": self.device.architecture.name,
            "bytes": self.bytes,
            "flops": self.flops,
            "concat_bytes": self.concat_bytes,
            "arena_bytes": self.arena_bytes,
            "roof_seconds": self.roof,
            "comparison": self.comparison(),
            "launches": [
                {**asdict(launch), "roof_seconds": launch.roof(self.device)}
                for launch in self.launches
            ],
            "report": self.report.to_dict(),
        }


def roof(found: list[Launch], device: devices.Device) -> float:
    """Seconds that launches take at least, one after the other."""
    return sum(launch.roof(device) for launch in found)


def plan(
    model: nn.Module,
    example_inputs: Any,
    *,
    device: str | devices.Device,
    dtype: torch.dtype | None = None,
    backend: str = "auto",
    memory_format: str | torch.memory_format = "auto",
) -> Plan:
    """The launches that :func:`cvfast.optimize` would run on ``device``; runs nothing there.

    Args:
        model: the network, in evaluation mode; left untouched.
        example_inputs: as for :func:`cvfast.optimize`.
        device: a GPU or architecture by name: ``"H200"``, ``"RTX 4090"``, ``"sm_89"``.
        dtype: compute in this dtype. Default: the model's own.
        backend, memory_format: as for :func:`cvfast.optimize`.

    Raises:
        ValueError: for a device that is not known, or a network that cannot be captured whole.
    """
    target = devices.find(device) if isinstance(device, str) else device
    options = Options(backend=backend, memory_format=memory_format, target=target)
    model = copy.deepcopy(model)
    args, kwargs = split_inputs(example_inputs)
    if dtype is not None:
        model = model.to(dtype)
        args, kwargs = pytree.tree_map_only(
            Tensor, lambda t: t.to(dtype) if t.is_floating_point() else t, (args, kwargs)
        )
    name = type(model).__name__
    try:
        captured = capture(model, args, kwargs)
        program = lower(captured, model, options)
    except CaptureError as error:
        raise ValueError(f"{name} cannot be planned as a whole: {error} [{error.reason}]") from None
    report = Report(name, rows=program.rows)
    schedule = None
    if program.gpu is not None:
        schedule = program.flatten(pytree.tree_leaves((args, kwargs)), torch.device("meta"))
    if schedule is not None:
        report.execution = schedule.describe()
    arena = report.execution.arena_bytes if report.execution is not None else 0
    found = launches(program, schedule, target)
    return Plan(report, found, eager_launches(captured), target, arena)
