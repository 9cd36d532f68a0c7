"""Launch parameters of kernels whose programs each take a tile of pixels by channels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple, dataclass, replace
from typing import Any

from cvfast.perf.devices import MAX_THREADS, WARP, Device

_LANE_BYTES = 16  # the widest access of a lane


@dataclass(frozen=True)
class Launch:
    """How the kernel is compiled and launched.

    Attributes:
        pixels, channels: of a program's tile, powers of two.
        num_warps: of a program, 32 lanes each.
    """

    pixels: int
    channels: int
    num_warps: int


def validate(op: str, passes: Sequence[str], launch: Launch, pass_: str) -> None:
    """Checks that a kernel can be launched so.

    Raises:
        ValueError: naming the field and what it may be.
    """
    if pass_ not in passes:
        raise ValueError(f"pass_={pass_!r}: expected {', '.join(passes)}")
    limits = {"pixels": 1024, "channels": 1024, "num_warps": MAX_THREADS // WARP}
    for name, most in limits.items():
        value = getattr(launch, name)
        if not 1 <= value <= most or value & (value - 1):
            raise ValueError(
                f"{op}, triton, {pass_}: {name}={value}: expected a power of two up to {most}"
            )


def grid(op: str, problem: Any, launch: Launch, pass_: str) -> tuple[int]:
    """Programs of a kernel on all pixels and channels of ``problem``.

    Raises:
        ValueError: if pixels or programs are 2³¹ or more.
    """
    rows = -(-problem.pixels // launch.pixels)
    programs = rows * -(-problem.channels // launch.channels)
    if max(problem.pixels, programs) >= 2**31:
        raise ValueError(
            f"{op}, triton, {pass_}: {problem.describe()}: more than 2³¹ pixels or programs; split "
            "the batch"
        )
    return (programs,)


def heuristic(problem: Any, device: Device, line: int) -> Launch:
    """A tile of ``line`` bytes of channels, and pixels for 4 warps at 16 bytes a lane; fewer while
    there are fewer programs than multiprocessors."""
    size = problem.dtype.itemsize
    channels = min(_power(line // size), _power(problem.channels))
    elements = 4 * WARP * _LANE_BYTES // size
    pixels = min(_power(problem.pixels), max(1, elements // channels))
    while pixels > 1 and pixels * channels > WARP * _LANE_BYTES // size and (
        -(-problem.pixels // pixels) * -(-problem.channels // channels) < device.sms
    ):  # fmt: skip
        pixels //= 2
    lanes = pixels * channels * size // _LANE_BYTES
    return Launch(pixels, channels, max(1, min(4, lanes // WARP)))


def candidates(first: Launch, limit: int) -> list[Launch]:
    """``first``, then others near it; at most ``limit``."""
    found = {
        replace(first, pixels=pixels, channels=channels, num_warps=warps)
        for pixels in (8, 16, 32, 64)
        for channels in (16, 32, 64, 128, 256)
        for warps in (1, 2, 4, 8)
        if pixels * channels <= 16384
    }

    def distance(launch: Launch) -> int:
        pairs = zip(astuple(first), astuple(launch), strict=True)
        return sum(abs(a.bit_length() - b.bit_length()) for a, b in pairs)

    rest = sorted(found - {first}, key=lambda launch: (distance(launch), astuple(launch)))
    return [first, *rest][:limit]


def _power(size: int) -> int:
    """The least power of two that is not below ``size``."""
    return 1 << max(0, size - 1).bit_length()
