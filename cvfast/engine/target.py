"""Where a plan runs."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from cvfast.perf.devices import Device

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Target:
    """The CPU, with ``threads``; or, where ``gpu`` says so, GPU kernels on tensors on ``memory``.

    ``memory`` is a CUDA device; or the CPU, where kernels are interpreted; or ``meta``, where
    nothing runs and a plan is only looked at. ``gpu`` is what launch parameters are chosen for.
    ``in_place``: a GPU's results are handed out where they are computed.
    """

    threads: int = 1
    gpu: Device | None = None
    memory: torch.device = CPU
    in_place: bool = False

    @property
    def backend(self) -> str:
        """Of the steps between convolutions: pools, sums, copies."""
        return "cpu" if self.gpu is None else "triton"
