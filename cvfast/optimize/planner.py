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
from .launches import Launch, launches
from .lower import lower
from .module import split_inputs
from .options import Options
from .report import Report


@dataclass(frozen=True)
class Plan:
    """The kernels of one run.

    ``report``: the rows that :func:`cvfast.optimize` would give, unverified. ``launches``: in the
    order in which they run. ``device``: what it was planned for.
    """

    report: Report
    launches: list[Launch]
    device: devices.Device

    @property
    def bytes(self) -> int:
        """Moved by all launches, each input read and each output written once."""
        return sum(launch.bytes for launch in self.launches)

    @property
    def flops(self) -> int:
        return sum(launch.flops for launch in self.launches)

    @property
    def roof(self) -> float:
        """Seconds that all bytes take at the device's memory bandwidth."""
        return self.bytes / self.device.dram_bandwidth

    def summary(self) -> str:
        """One line: launches, bytes, the time they take at least."""
        return (
            f"{self.report.model} on {self.device.name}: {len(self.launches)} launches, "
            f"{self.bytes / 1e6:.1f} MB, {self.flops / 1e9:.2f} GFLOP, at least "
            f"{self.roof * 1e6:.1f} us at {self.device.dram_bandwidth / 1e12:.2f} TB/s"
        )

    def to_dict(self) -> dict[str, Any]:
        return {
            "device": self.device.name,
            "architecture": self.device.architecture.name,
            "bytes": self.bytes,
            "flops": self.flops,
            "roof_seconds": self.roof,
            "launches": [
                {**asdict(launch), "roof_seconds": launch.roof(self.device)}
                for launch in self.launches
            ],
            "report": self.report.to_dict(),
        }


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
        program = lower(capture(model, args, kwargs), model, options)
    except CaptureError as error:
        raise ValueError(f"{name} cannot be planned as a whole: {error} [{error.reason}]") from None
    report = Report(name, rows=program.rows)
    return Plan(report, launches(program, target), target)
