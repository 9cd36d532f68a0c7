"""Launch parameters of the Triton kernel of kernels/pool.py."""

from __future__ import annotations

import functools
import itertools
from dataclasses import astuple, dataclass, replace

from cvfast.launch.pool import PASSES, Problem
from cvfast.perf.devices import MAX_THREADS, WARP, Device

MAX_UNROLLED = 16
"""Taps up to which the loop over a window is unrolled, so that its loads are in flight together."""

_LANE_BYTES = 16  # a lane loads at once
_LINE_BYTES = 128


@dataclass(frozen=True)
class Launch:
    """How the kernel is compiled and launched.

    Attributes:
        rows, columns: results of the patch that a program computes.
        channels: of these, too. All three are powers of two.
        num_warps: of a program, 32 lanes each.
    """

    rows: int
    columns: int
    channels: int
    num_warps: int


def validate(problem: Problem, launch: Launch, pass_: str) -> None:
    """Checks that the kernel can be launched so.

    Raises:
        ValueError: naming the field and what it may be.
    """
    del problem
    if pass_ not in PASSES:
        raise ValueError(f"pass_={pass_!r}: expected {', '.join(PASSES)}")
    limits = {"rows": 64, "columns": 64, "channels": 1024, "num_warps": MAX_THREADS // WARP}
    for name, most in limits.items():
        value = getattr(launch, name)
        if not 1 <= value <= most or value & (value - 1):
            raise ValueError(
                f"pool, triton, {pass_}: {name}={value}: expected a power of two up to {most}"
            )


def grid(problem: Problem, launch: Launch, pass_: str) -> tuple[int]:
    """Programs of the kernel.

    Raises:
        ValueError: if they are 2³¹ or more.
    """
    programs = (
        problem.batch
        * -(-problem.out_height // launch.rows)
        * -(-problem.out_width // launch.columns)
        * -(-problem.channels // launch.channels)
    )
    if programs >= 2**31:
        raise ValueError(
            f"pool, triton, {pass_}: a patch of {launch.rows}x{launch.columns} results is too "
            "small for this image: more than 2³¹ of them"
        )
    return (programs,)


@functools.lru_cache(maxsize=4096)
def heuristic(problem: Problem, pass_: str, device: Device) -> Launch:
    """Launch parameters from the geometry and the device, without a measurement.

    Pooling is bound by memory. Windows overlap by what a patch holds in the L1 cache: 4x8 results
    of a 3x3 window read 6x10 pixels, 1.9 for each, instead of 9. A lane takes 16 bytes of channels
    and neighbours a cache line of a pixel; a program has as many lanes as that makes, 32 to 256.
    While programs are fewer than four to a multiprocessor, patches are made smaller.
    """
    line = _LINE_BYTES // problem.dtype.itemsize
    launch = Launch(
        rows=min(4, _power(problem.out_height)),
        columns=min(8, _power(problem.out_width)),
        channels=min(line, _power(problem.channels)),
        num_warps=1,
    )
    while launch.rows > 1 and grid(problem, launch, pass_)[0] < 4 * device.sms:
        launch = replace(launch, rows=launch.rows // 2)
    while launch.columns > 1 and grid(problem, launch, pass_)[0] < 4 * device.sms:
        launch = replace(launch, columns=launch.columns // 2)
    return replace(launch, num_warps=_warps(problem, launch))


def _power(size: int) -> int:
    """The least power of two that is not below `size`."""
    return 1 << max(0, size - 1).bit_length()


def _warps(problem: Problem, launch: Launch) -> int:
    elements = launch.rows * launch.columns * launch.channels
    lanes = elements * problem.dtype.itemsize // _LANE_BYTES
    return max(1, min(8, lanes // WARP))


def candidates(problem: Problem, pass_: str, device: Device, limit: int = 32) -> list[Launch]:
    """Launch parameters worth timing: the heuristic's first, and patches near it; at most
    `limit`."""
    first = heuristic(problem, pass_, device)
    found = {first}
    for rows, columns, channels in itertools.product((1, 2, 4, 8), (2, 4, 8, 16), (32, 64, 128)):
        shape = replace(first, rows=rows, columns=columns, channels=channels)
        for warps in {_warps(problem, shape), max(1, _warps(problem, shape) // 2)}:
            found.add(replace(shape, num_warps=warps))

    def distance(launch: Launch) -> int:
        pairs = zip(astuple(first), astuple(launch), strict=True)
        return sum(abs(a.bit_length() - b.bit_length()) for a, b in pairs)

    rest = sorted(found - {first}, key=lambda launch: (distance(launch), astuple(launch)))
    return [first, *rest][:limit]
