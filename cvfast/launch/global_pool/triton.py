"""Launch parameters of the Triton kernel of kernels/global_pool.py."""

from __future__ import annotations

import functools
from dataclasses import astuple, dataclass, replace

from cvfast.launch.global_pool import PASSES, Problem
from cvfast.perf.devices import MAX_THREADS, WARP, Device

_SECTOR_BYTES = 32  # what memory hands out at least
_LINE_BYTES = 128


@dataclass(frozen=True)
class Launch:
    """How the kernel is compiled and launched.

    Attributes:
        pixels: that a program reads at a time.
        channels: that a program averages. Both are powers of two.
        num_warps: of a program, 32 lanes each.
    """

    pixels: int
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
    limits = {"pixels": 1024, "channels": 1024, "num_warps": MAX_THREADS // WARP}
    for name, most in limits.items():
        value = getattr(launch, name)
        if not 1 <= value <= most or value & (value - 1):
            raise ValueError(
                f"global_pool, triton, {pass_}: {name}={value}: expected a power of two up to "
                f"{most}"
            )


def grid(problem: Problem, launch: Launch, pass_: str) -> tuple[int]:
    """Programs of the kernel.

    Raises:
        ValueError: if they are 2³¹ or more.
    """
    programs = problem.batch * -(-problem.channels // launch.channels)
    if programs >= 2**31:
        raise ValueError(
            f"global_pool, triton, {pass_}: channels={launch.channels} are too few for this image: "
            "more than 2³¹ programs"
        )
    return (programs,)


@functools.lru_cache(maxsize=4096)
def heuristic(problem: Problem, pass_: str, device: Device) -> Launch:
    """Launch parameters from the geometry and the device, without a measurement.

    A program reads a cache line of a pixel, or while programs are fewer than multiprocessors less,
    down to the sector that memory hands out anyway, and as many pixels at a time as its lanes take
    at 16 bytes each: 8 warps for large images, one for 7x7 ones.
    """
    size = problem.dtype.itemsize
    channels = min(_LINE_BYTES // size, _power(problem.channels))
    while channels * size > _SECTOR_BYTES and (
        problem.batch * -(-problem.channels // channels) < device.sms
    ):
        channels //= 2
    pixels = min(_power(problem.pixels), 1024, max(1, 4096 // (channels * size)))
    lanes = pixels * channels * size // 16
    launch = Launch(pixels, channels, max(1, min(8, lanes // WARP)))
    validate(problem, launch, pass_)
    return launch


def _power(size: int) -> int:
    """The least power of two that is not below `size`."""
    return 1 << max(0, size - 1).bit_length()


def candidates(problem: Problem, pass_: str, device: Device, limit: int = 32) -> list[Launch]:
    """Launch parameters worth timing: the heuristic's first, then others near it; at most
    `limit`."""
    first = heuristic(problem, pass_, device)
    found = {
        replace(first, pixels=pixels, channels=channels, num_warps=warps)
        for pixels in (16, 32, 64, 128)
        for channels in (16, 32, 64, 128)
        for warps in (1, 4, 8)
    }

    def distance(launch: Launch) -> int:
        pairs = zip(astuple(first), astuple(launch), strict=True)
        return sum(abs(a.bit_length() - b.bit_length()) for a, b in pairs)

    rest = sorted(found - {first}, key=lambda launch: (distance(launch), astuple(launch)))
    return [first, *rest][:limit]
