"""Where the time of an optimised network goes, step by step."""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from .lower import Program
from .module import OptimizedModule


@dataclass(frozen=True)
class Step:
    """``name``: the module it came from; ``kind``: the node of :mod:`cvfast.engine.nodes`;
    ``reads`` and ``out``: shapes; ``flops``: multiplications and additions; ``bytes``: of all
    images and weights, once each; ``seconds``: the median over runs; ``waited``: those of them that
    the threads spent waiting for each other at the step's end, all threads together."""

    name: str
    kind: str
    reads: str
    out: str
    flops: int
    bytes: int
    seconds: float
    waited: float

    @property
    def flops_per_second(self) -> float:
        return self.flops / self.seconds if self.seconds else 0.0


def profile(network: OptimizedModule, *args: Any, runs: int = 20, **kwargs: Any) -> list[Step]:
    """The steps of the plans that ``network(*args, **kwargs)`` runs on the CPU.

    Raises:
        ValueError: if this call does not run as plans.
    """
    network.prepare(*args, **kwargs)
    flat: list[Tensor] = pytree.tree_leaves((args, kwargs))
    program = _program(network, flat)
    schedule = program.schedule(flat) if program is not None and program.planned else None
    if schedule is None:
        raise ValueError(
            "this call does not run as a plan of the CPU engine; the network's .report says why"
        )
    with torch.no_grad(), torch._C._AutoDispatchBelowAutograd():
        rounds = [schedule.profile(flat) for _ in range(runs + 1)][1:]
    steps = []
    for same in zip(*rounds, strict=True):
        times = {t: statistics.median(row[t] for row in same) for t in ("seconds", "waited")}
        steps.append(Step(**{**same[0], **times}))
    return steps


def _program(network: OptimizedModule, flat: list[Tensor]) -> Program | None:
    programs = network.__dict__["_runner"].programs
    return next((p for p in programs if p.capture.accepts(flat)), None)
