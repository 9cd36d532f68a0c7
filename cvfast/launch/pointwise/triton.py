"""Launch parameters of the Triton kernel of kernels/pointwise.py."""

from __future__ import annotations

import functools
import itertools
import math
from dataclasses import astuple, dataclass, replace

import torch

from cvfast.perf.devices import MAX_THREADS, WARP, Device

from . import Problem

MAX_SPLITS = 32
_TILES = (16, 32, 64, 128, 256)
_VECTOR_BYTES = 16
_MAX_SUMS = 128  # registers of a thread for the tile's sums; half of what there are


@dataclass(frozen=True)
class Launch:
    """How the kernel is compiled and launched.

    Attributes:
        block_m, block_n: pixels and output channels of a tile: powers of two, at least 16.
        block_k: input channels of a step: a power of two, at least 16.
        num_warps: of a program, 32 lanes each.
        num_stages: steps whose operands are on their way to shared memory.
        group: tiles of pixels that neighbouring programs take, of one column, before the next.
        splits: shares that the input channels are summed in.
        programs: that take tiles in turn; 0: as many as tiles.
    """

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    group: int = 8
    splits: int = 1
    programs: int = 0


def validate(problem: Problem, launch: Launch, pass_: str = "forward") -> None:
    """Checks that the kernel can be launched so.

    Raises:
        ValueError: naming the field and what it may be.
    """
    if pass_ != "forward":
        raise ValueError(f"pass_={pass_!r}: expected forward")

    def require(name: str, condition: bool, expected: str) -> None:
        if not condition:
            value = getattr(launch, name)
            raise ValueError(f"pointwise, triton: {name}={value}: expected {expected}")

    for name in ("block_m", "block_n", "block_k"):
        require(name, getattr(launch, name) in _TILES, f"one of {', '.join(map(str, _TILES))}")
    warps = [1 << i for i in range((MAX_THREADS // WARP).bit_length())]
    require("num_warps", launch.num_warps in warps, f"a power of two up to {warps[-1]}")
    for name in ("num_stages", "group"):
        require(name, getattr(launch, name) >= 1, "at least 1")
    require("programs", launch.programs >= 0, "at least 0")
    most = min(MAX_SPLITS, -(-problem.channels // launch.block_k))
    require("splits", 1 <= launch.splits <= most, f"from 1 to {most}, a step of block_k each")


def tiles(problem: Problem, launch: Launch) -> int:
    """Tiles of the result, once for each share of the input channels."""
    rows = -(-problem.pixels // launch.block_m)
    return rows * -(-problem.out_channels // launch.block_n) * launch.splits


def grid(problem: Problem, launch: Launch, pass_: str = "forward") -> tuple[int]:
    """Programs of the kernel.

    Raises:
        ValueError: if pixels or programs are 2³¹ or more.
    """
    count = tiles(problem, launch)
    if max(problem.pixels * launch.splits + launch.block_m, count) >= 2**31:
        raise ValueError(f"pointwise, triton: {problem.pixels} pixels are too many for one call")
    return (min(count, launch.programs) if launch.programs else count,)


def steps(problem: Problem, launch: Launch) -> int:
    """Steps of block_k input channels that one program sums."""
    return -(-problem.channels // (launch.block_k * launch.splits))


def align(dtype: torch.dtype, channels: int, *strides: int) -> int:
    """Adjacent elements that the kernel may load or store at once, given an image's strides."""
    return math.gcd(_VECTOR_BYTES // dtype.itemsize, channels, *strides)


def shared_bytes(problem: Problem, launch: Launch) -> int:
    """About how much shared memory the operands of all stages take."""
    step = (launch.block_m + launch.block_n) * launch.block_k * problem.dtype.itemsize
    return step * launch.num_stages


@functools.lru_cache(maxsize=4096)
def heuristic(problem: Problem, pass_: str, device: Device) -> Launch:
    """Launch parameters from the geometry and the device, without a measurement.

    Tiles of 128 pixels by up to 128 channels read each operand 64 times less often than a product
    of single elements would, which keeps L2 out of the way of the tensor cores; the width is the
    one that wastes the fewest columns. Fewer pixels a tile where tiles would not give every SM
    one; where that is not enough, as on images of 7x7 at batch 1, the input channels are shared
    out over programs, each of which is left at least four steps.
    """
    launch = Launch(
        block_m=128,
        block_n=_width(problem.out_channels),
        block_k=_step(problem),
        num_warps=8,
        num_stages=1,
    )
    while tiles(problem, launch) < device.sms and launch.block_m > 16:
        launch = replace(launch, block_m=launch.block_m // 2)
    while tiles(problem, launch) < device.sms and launch.block_n > 32:
        launch = replace(launch, block_n=launch.block_n // 2)
    walk = steps(problem, launch)
    wanted = device.sms // max(1, tiles(problem, launch))
    launch = replace(launch, splits=max(1, min(wanted, walk // 4, MAX_SPLITS)))
    return _staged(problem, replace(launch, num_warps=_warps(launch)), device)


def _width(channels: int) -> int:
    """Of the tiles up to 128 wide, the widest of those that waste the fewest columns; a waste of
    an eighth is worth a tile of twice the width."""

    def cost(width: int) -> float:
        return -(-channels // width) * width / channels - 0.125 * math.log2(width)

    return min((width for width in _TILES if width <= 128), key=cost)


def _step(problem: Problem) -> int:
    # The tile that a prologue works on is in registers.
    most = (64 if problem.prologue else 128) // problem.dtype.itemsize
    return max(16, min(most, 1 << (problem.channels - 1).bit_length()))


def _warps(launch: Launch) -> int:
    return 8 if launch.block_m * launch.block_n >= 128 * 128 else 4


def _staged(problem: Problem, launch: Launch, device: Device) -> Launch:
    """As many stages as there are steps and as leave room for a second program on an SM, but
    two at least."""
    room = device.architecture.shared_per_sm // 2
    one = shared_bytes(problem, replace(launch, num_stages=1))
    return replace(launch, num_stages=max(2, min(4, steps(problem, launch), room // one)))


def candidates(problem: Problem, pass_: str, device: Device, limit: int = 32) -> list[Launch]:
    """Launch parameters worth timing: the heuristic's, and those nearest to it of all that the
    device holds; at most `limit`."""
    first = heuristic(problem, pass_, device)
    found = set()
    for m, n, k, stages, splits, programs in itertools.product(
        _near(first.block_m), _near(first.block_n), _near(first.block_k), (2, 3, 4),
        {1, first.splits, 2 * first.splits}, (0, device.sms, 2 * device.sms),
    ):  # fmt: skip
        launch = Launch(m, n, k, 4, stages, splits=splits, programs=programs)
        launch = replace(launch, num_warps=_warps(launch))
        if launch != first and _fits(problem, launch, device):
            found.add(launch)
    return [first, *sorted(found, key=lambda one: (_distance(first, one), astuple(one)))][:limit]


def _near(size: int) -> tuple[int, ...]:
    return tuple(s for s in (size // 2, size, 2 * size) if s in _TILES)


def _distance(a: Launch, b: Launch) -> float:
    pairs = zip(astuple(a)[:-1], astuple(b)[:-1], strict=True)
    return sum(abs(math.log2(p / q)) for p, q in pairs) + (a.programs != b.programs)


def _fits(problem: Problem, launch: Launch, device: Device) -> bool:
    try:
        validate(problem, launch)
    except ValueError:
        return False
    sums = launch.block_m * launch.block_n // (WARP * launch.num_warps)
    fits = shared_bytes(problem, launch) <= device.architecture.shared_per_block - 4096
    wasteful = launch.programs and launch.programs >= tiles(problem, launch)
    return fits and sums <= _MAX_SUMS and not wasteful
