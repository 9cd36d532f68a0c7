"""Launch parameters of the Triton kernel of kernels/elementwise.py."""

from __future__ import annotations

import functools

from cvfast.launch import tile2d
from cvfast.launch.elementwise import PASSES, Problem
from cvfast.launch.tile2d import Launch
from cvfast.perf.devices import Device

__all__ = ["Launch", "candidates", "grid", "heuristic", "validate"]

_LINE_BYTES = 512


def validate(problem: Problem, launch: Launch, pass_: str) -> None:
    """Checks that the kernel can be launched so.

    Raises:
        ValueError: naming the field and what it may be.
    """
    del problem
    tile2d.validate("elementwise", PASSES, launch, pass_)


def grid(problem: Problem, launch: Launch, pass_: str) -> tuple[int]:
    """Programs of the kernel.

    Raises:
        ValueError: if pixels or programs are 2³¹ or more.
    """
    return tile2d.grid("elementwise", problem, launch, pass_)


@functools.lru_cache(maxsize=4096)
def heuristic(problem: Problem, pass_: str, device: Device) -> Launch:
    """Launch parameters from the geometry and the device, without a measurement."""
    launch = tile2d.heuristic(problem, device, _LINE_BYTES)
    validate(problem, launch, pass_)
    return launch


def candidates(problem: Problem, pass_: str, device: Device, limit: int = 32) -> list[Launch]:
    """Launch parameters worth timing: the heuristic's first, then others near it; at most
    `limit`."""
    return tile2d.candidates(heuristic(problem, pass_, device), limit)
