"""Launch parameters of the Triton kernels of kernels/depthwise.py.

Figures in the comments were counted in the code that Triton 3.6 generates for sm_90.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterator
from dataclasses import astuple, dataclass, replace

from cvfast.launch.depthwise import PASSES, Problem
from cvfast.perf.devices import MAX_THREADS, WARP, Device, occupancy

_PANEL = 16  # channels of a panel of packed weights

MAX_RESIDENT = 100
"""Taps times vector up to which the forward kernels keep a lane's weights in registers, and the
kernel of the weights' gradient sums all of them in one program."""

_MAX_REGISTERS = 168  # three warps to each of an SM's four schedulers
_WARPS_PER_SM = 8  # below that, patches are made less high
_LINE_BYTES = 128
_FEW_TAPS, _SOME_TAPS = 16, 25


@dataclass(frozen=True)
class Launch:
    """How one kernel is compiled and launched.

    Attributes:
        rows, columns: results of the patch that a lane (a thread) computes, in the gradient of the
            weights those of the output that it reads at a time.
        vector: adjacent channels of a lane: 1, 2, 4 or 8.
        channels: adjacent channels that adjacent lanes take before the next patch begins: a
            multiple of vector; in the gradient of the weights a power of two.
        num_warps: of a program, 32 lanes each.
        num_stages: of Triton's software pipelining.
        splits: shares that the gradient of the weights is summed in; else 1.
    """

    rows: int
    columns: int
    vector: int
    channels: int
    num_warps: int
    num_stages: int = 1
    splits: int = 1

    @property
    def lanes(self) -> int:
        """Threads of a program."""
        return WARP * self.num_warps

    @property
    def patches(self) -> int:
        """Patches that a program of the weights' gradient reads at a time."""
        return self.lanes * self.vector // self.channels


def validate(problem: Problem, launch: Launch, pass_: str) -> None:
    """Checks that the kernel of `pass_` can be launched so.

    Raises:
        ValueError: naming the field and what it may be.
    """
    if pass_ not in PASSES:
        raise ValueError(f"pass_={pass_!r}: expected {', '.join(PASSES)}")

    def require(name: str, condition: bool, expected: str) -> None:
        if not condition:
            value = getattr(launch, name)
            raise ValueError(f"depthwise, triton, {pass_}: {name}={value}: expected {expected}")

    for name in ("rows", "columns", "num_stages", "splits"):
        require(name, getattr(launch, name) >= 1, "at least 1")
    require("vector", launch.vector in (1, 2, 4, 8), "1, 2, 4 or 8")
    most = MAX_THREADS // WARP
    require("num_warps", launch.num_warps in _powers_of_two(most), f"a power of two up to {most}")
    if pass_ == "backward_weight":
        powers = _powers_of_two(launch.lanes * launch.vector)
        require(
            "channels",
            launch.channels in powers and launch.channels >= launch.vector,
            f"a power of two from vector={launch.vector} to 32·num_warps·vector={powers[-1]}",
        )
        return
    require(
        "channels",
        launch.channels >= 1 and launch.channels % launch.vector == 0,
        f"a multiple of vector={launch.vector}",
    )
    require("splits", launch.splits == 1, "1")
    if pass_ == "backward_input":
        for name, axis in (("rows", 0), ("columns", 1)):
            step = problem.stride[axis]
            require(name, getattr(launch, name) % step == 0, f"a multiple of the stride, {step}")


def _powers_of_two(most: int) -> list[int]:
    return [1 << i for i in range(most.bit_length())]


def grid(problem: Problem, launch: Launch, pass_: str) -> tuple[int]:
    """Programs of the kernel of `pass_`.

    Raises:
        ValueError: if they, or the patches of the weights' gradient, are 2³¹ or more.
    """
    if pass_ == "backward_weight":
        programs, most = tiles(problem, launch) * launch.splits, patches(problem, launch, pass_)
    else:
        programs = most = -(-lanes(problem, launch, pass_) // launch.lanes)
    if max(programs, most + launch.patches) >= 2**31:
        raise ValueError(
            f"depthwise, triton, {pass_}: a patch of {launch.rows}x{launch.columns} results is too "
            "small for this image: more than 2³¹ of them"
        )
    return (programs,)


def result_size(problem: Problem, pass_: str) -> tuple[int, int, int]:
    """Channels, height and width of what is cut into patches: the result of the forward pass and
    of the image's gradient, the gradient of the output in that of the weights."""
    if pass_ == "backward_input":
        return problem.channels, problem.height, problem.width
    return problem.out_channels, problem.out_height, problem.out_width


def patches(problem: Problem, launch: Launch, pass_: str) -> int:
    """Patches of all images."""
    _, height, width = result_size(problem, pass_)
    return problem.batch * -(-height // launch.rows) * -(-width // launch.columns)


def tap_rows(problem: Problem, launch: Launch) -> int:
    """Rows of the kernel whose gradient one program sums: all, or of large kernels one."""
    return problem.kernel[0] if _taps(problem) * launch.vector <= MAX_RESIDENT else 1


def tiles(problem: Problem, launch: Launch) -> int:
    """Programs of the weights' gradient that one share takes."""
    channels = -(-problem.channels // _PANEL) * _PANEL * problem.multiplier
    return -(-channels // launch.channels) * (problem.kernel[0] // tap_rows(problem, launch))


def even(problem: Problem, launch: Launch, pass_: str) -> bool:
    """Whether every lane's channels exist."""
    channels = result_size(problem, pass_)[0]
    if pass_ == "backward_weight" and problem.channels % _PANEL:
        return False  # programs write the lanes beyond the last channel too
    return channels % launch.channels == 0


def steps(problem: Problem, launch: Launch) -> int:
    """Times that a program of the weights' gradient reads `launch.patches` patches."""
    groups = -(-patches(problem, launch, "backward_weight") // launch.patches)
    return -(-groups // launch.splits)


def registers(problem: Problem, launch: Launch, pass_: str) -> int:
    """About how many registers a thread needs; within a third of what the compiler takes."""
    taps = _taps(problem)
    resident = taps if taps * launch.vector <= MAX_RESIDENT else problem.kernel[1]
    reach = problem.dilation[0] * (problem.kernel[0] - 1)
    if pass_ == "forward":
        open_rows = min(launch.rows, reach // problem.stride[0] + 1)
    else:
        open_rows = min(launch.rows, reach + 1)
    across = launch.columns * (1 if pass_ == "backward_input" else problem.stride[1])
    pixels = (across + problem.kernel[1] - 1) * launch.vector * problem.dtype.itemsize // 4
    # Addresses and what else is there whatever the patch.
    return 28 + resident * launch.vector + open_rows * launch.columns * launch.vector + pixels


@functools.lru_cache(maxsize=4096)
def heuristic(problem: Problem, pass_: str, device: Device) -> Launch:
    """Launch parameters from the geometry and the device, without a measurement.

    The kernels are bound by memory, and on the fastest memories by the instructions issued too: an
    H200 copies 18 bytes a cycle and SM, 4.5 results of a 3x3 float16 layer, which leaves 28
    instructions for each.

    Patch: the larger, the fewer pixels are loaded twice and the fewer instructions a result takes,
    but the more registers. At 3x3, 8x2 results of 4 channels take 22 instructions a result and 96
    registers (20 warps an SM), 4x4 take 21 and 128, 2x2 take 37 and 96. The vector is 4 channels: 8
    of a 16-bit type take 18 instructions, but 172 registers leave 8 warps. Weights of larger
    kernels leave room for fewer channels (5x5 and 7x7: 2). Rows are evened out, so that no patch
    is mostly empty: 14 rows are cut into 7 and 7, not 8 and 6.

    Filling the device: while the lanes would not give every SM eight warps, patches are made less
    high; then programs smaller, until there is one for every SM.

    Channels: adjacent lanes take 128 bytes of a pixel, a cache line, then the next patch of the
    row, whose pixels overlap theirs and come from L1. The number of vectors is a divisor of all,
    near that, so that no lane is idle.

    The gradient of the weights keeps sums for all taps in place of weights, and as many shares as
    give every SM 16 warps.
    """
    channels, height, width = result_size(problem, pass_)
    vector = _vector(problem, pass_)
    if pass_ == "backward_weight":
        return _share_out(problem, device, vector)
    step = problem.stride if pass_ == "backward_input" else (1, 1)
    launch = Launch(
        rows=_even_parts(height, _rows(problem, pass_), step[0]),
        columns=_even_parts(width, 2, step[1]),
        vector=vector,
        channels=_channels(problem, channels, vector),
        num_warps=4,
    )
    while lanes(problem, launch, pass_) < _WARPS_PER_SM * WARP * device.sms and (
        launch.rows > step[0]
    ):
        launch = replace(launch, rows=_even_parts(height, launch.rows // 2, step[0]))
    while launch.num_warps > 1 and grid(problem, launch, pass_)[0] < device.sms:
        launch = replace(launch, num_warps=launch.num_warps // 2)
    return launch


def _vector(problem: Problem, pass_: str) -> int:
    channels = result_size(problem, pass_)[0]
    if pass_ == "backward_input" and problem.multiplier > 1:
        return 1  # its source's channels lie apart
    return math.gcd(4 if _taps(problem) <= _FEW_TAPS else 2, channels)


def _rows(problem: Problem, pass_: str) -> int:
    """Rows of a patch, where the image is large enough for any number."""
    if _taps(problem) > _SOME_TAPS:
        return 2
    apart = max(problem.dilation) > 1 or problem.multiplier > 1
    if pass_ == "backward_weight":
        return 2 if apart or max(problem.stride) > 1 else 4
    if pass_ == "backward_input":
        return 2 if apart else 8 if _taps(problem) <= _FEW_TAPS or max(problem.stride) > 1 else 4
    return 4 if apart or max(problem.stride) > 1 else 8


def _taps(problem: Problem) -> int:
    return problem.kernel[0] * problem.kernel[1]


def _share_out(problem: Problem, device: Device, vector: int) -> Launch:
    """Of the gradient of the weights: as many shares as fill the device, but no empty one."""
    channels = -(-problem.channels // _PANEL) * _PANEL * problem.multiplier
    widths = [width for width in (64, 32, 16) if width <= max(channels, 16)]
    launch = Launch(
        rows=_even_parts(problem.out_height, _rows(problem, "backward_weight"), 1),
        columns=_even_parts(problem.out_width, 2, 1),
        vector=vector,
        channels=min(widths, key=lambda width: -(-channels // width) * width),
        num_warps=4,
    )
    groups = -(-patches(problem, launch, "backward_weight") // launch.patches)
    wanted = -(-4 * device.sms // tiles(problem, launch))
    each = -(-groups // max(1, min(groups, wanted)))
    return replace(launch, splits=max(1, -(-groups // max(1, each))))


def _even_parts(size: int, most: int, step: int) -> int:
    """Positions of a patch, a multiple of `step`: at most `most`, unless that is less than a step,
    and such that the patches along `size` are nearly equal."""
    most = max(step, most // step * step)
    parts = math.ceil(max(1, size) / most)
    return math.ceil(max(1, size) / parts / step) * step


def _channels(problem: Problem, channels: int, vector: int) -> int:
    """Channels of adjacent lanes: about a cache line of them, and no lane without any."""
    total = -(-channels // vector)
    line = _LINE_BYTES / (vector * problem.dtype.itemsize)

    def cost(vectors: int) -> float:
        idle = -(-total // vectors) * vectors / total - 1
        return idle + 0.1 * abs(math.log2(vectors / line))

    return vector * min(range(1, total + 1), key=cost)


def lanes(problem: Problem, launch: Launch, pass_: str) -> int:
    """Lanes that the patches of all images and channels take."""
    chunks = -(-result_size(problem, pass_)[0] // launch.channels)
    return patches(problem, launch, pass_) * chunks * (launch.channels // launch.vector)


def candidates(problem: Problem, pass_: str, device: Device, limit: int = 32) -> list[Launch]:
    """Launch parameters worth timing: the heuristic's, and those nearest to it of all that the
    kernel can be launched with and whose registers the device holds; at most `limit`."""
    first = heuristic(problem, pass_, device)

    def distance(launch: Launch) -> float:
        pairs = zip(astuple(first), astuple(launch), strict=True)
        return sum(abs(math.log2(a / b)) for a, b in pairs)

    found = {first, *_variants(problem, pass_, first)}
    fitting = [launch for launch in found if _fits(problem, launch, pass_, device)]
    rest = (launch for launch in fitting if launch != first)
    return [first, *sorted(rest, key=lambda launch: (distance(launch), astuple(launch)))][:limit]


def _fits(problem: Problem, launch: Launch, pass_: str, device: Device) -> bool:
    try:
        validate(problem, launch, pass_)
        grid(problem, launch, pass_)
    except ValueError:
        return False
    need = registers(problem, launch, pass_)
    held = occupancy(device.architecture, launch.lanes, need, 0)
    return need <= _MAX_REGISTERS and held.blocks_per_sm > 0


def _variants(problem: Problem, pass_: str, first: Launch) -> Iterator[Launch]:
    channels, height, width = result_size(problem, pass_)
    step = problem.stride if pass_ == "backward_input" else (1, 1)
    rows = sorted({_even_parts(height, most, step[0]) for most in (1, 2, 4, 8)})
    columns = sorted({_even_parts(width, most, step[1]) for most in (1, 2, 4)})
    vectors = [vector for vector in (1, 2, 4, 8) if channels % vector == 0][-3:]
    for r, c, vector in itertools.product(rows, columns, vectors):
        shape = replace(first, rows=r, columns=c, vector=vector)
        if pass_ == "backward_weight":
            for splits in sorted({max(1, first.splits // 2), first.splits, 2 * first.splits}):
                yield replace(shape, splits=splits)
        else:
            for warps in (2, 4, 8):
                chunk = _channels(problem, channels, vector)
                yield replace(shape, channels=chunk, num_warps=warps)
