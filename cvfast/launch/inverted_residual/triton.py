"""Launch parameters of the Triton kernels of kernels/inverted_residual.py.

Figures in the comments were counted in the code that Triton 3.6 generates for sm_89 and sm_90.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from dataclasses import astuple, dataclass

import torch

from cvfast.launch.inverted_residual import PASSES, Problem
from cvfast.perf.devices import MAX_THREADS, WARP, Device, occupancy
from cvfast.perf.predict import COPY_SHARE, LATENCY, LAUNCH, MMA_SHARE

_LEAST = 16  # sizes of a matrix product
_MAX_COLUMNS = 65535  # programs along the second axis of a grid
_MAX_IMAGE_ROWS = 31  # the kernel has a bit of a number for each
_MAX_REGISTERS = 255
_MAX_PIXEL_BYTES = 128  # of channels that are expanded; beyond, sm_80's code spills
_MAX_SHARED = 65536


@dataclass(frozen=True)
class Launch:
    """How one kernel is compiled and launched.

    Attributes:
        rows: of outputs, that a program computes at each of its positions.
        positions: of a program: columns of `rows` outputs.
        hidden: channels of the depthwise convolution that a program computes at a time.
        channels: of x, that one product of the expansion reads.
        outputs: channels of the projection that a program computes; more are other programs.
        num_warps: of a program.
        registers: that a thread may have; a multiple of 8, or 255. The compiler spills a few to
            reach the next lower step of occupancy unless it is told that it need not.
        num_stages: of Triton's software pipelining.
    """

    rows: int
    positions: int
    hidden: int
    channels: int
    outputs: int
    num_warps: int
    registers: int = _MAX_REGISTERS
    num_stages: int = 1


def unsupported(problem: Problem) -> str | None:
    """Why no kernel can be launched for the problem; None if one can."""
    if problem.kernel[0] > _MAX_IMAGE_ROWS:
        return f"the kernel takes windows of up to {_MAX_IMAGE_ROWS} rows, not {problem.kernel[0]}"
    most = _MAX_PIXEL_BYTES // problem.dtype.itemsize
    if problem.expands and problem.channels > most:
        return (
            f"the kernel expands at most {most} channels of {problem.dtype}: the operands of "
            f"{problem.channels} fill a thread's registers"
        )
    return None


def validate(problem: Problem, launch: Launch, pass_: str = "forward") -> None:
    """Checks that the kernel can be launched so.

    Raises:
        ValueError: naming the field and what it may be.
    """
    if pass_ not in PASSES:
        raise ValueError(f"pass_={pass_!r}: expected {', '.join(PASSES)}")
    if (reason := unsupported(problem)) is not None:
        raise ValueError(f"inverted_residual, triton: {reason}")

    def require(name: str, condition: bool, expected: str) -> None:
        if not condition:
            value = getattr(launch, name)
            raise ValueError(f"inverted_residual, triton: {name}={value}: expected {expected}")

    most = _most_rows(problem)
    require("rows", 1 <= launch.rows <= most, f"1 to {most}")
    for name in ("positions", "hidden", "channels", "outputs"):
        value = getattr(launch, name)
        require(name, value >= _LEAST and value & (value - 1) == 0, f"a power of two from {_LEAST}")
    warps = MAX_THREADS // WARP
    powers = [1 << i for i in range(warps.bit_length())]
    require("num_warps", launch.num_warps in powers, f"a power of two up to {warps}")
    steps = (*range(32, _MAX_REGISTERS, 8), _MAX_REGISTERS)
    require("registers", launch.registers in steps, f"a multiple of 8 from 32, or {steps[-1]}")
    require("num_stages", launch.num_stages >= 1, "at least 1")


def grid(problem: Problem, launch: Launch, pass_: str = "forward") -> tuple[int, int]:
    """Programs of the kernel.

    Raises:
        ValueError: if they are more than a grid holds.
    """
    strips = problem.batch * -(-problem.out_height // launch.rows)
    if problem.projects:
        positions = strips * problem.out_width
        programs = -(-positions // launch.positions)
        columns = -(-problem.out_channels // launch.outputs)
    else:
        positions = programs = strips
        columns = -(-problem.hidden // launch.hidden)
    if positions + launch.positions > 2**31 or columns > _MAX_COLUMNS:
        raise ValueError(f"inverted_residual, triton: {launch} has too many programs for {problem}")
    return programs, columns


def expansions(problem: Problem, launch: Launch) -> float:
    """How often a pixel's hidden channels are computed, on average; 0 without an expansion.

    A pixel is expanded for each column of the window that reads it, by every strip of rows and for
    every block of output channels.
    """
    if not problem.expands or problem.batch == 0:
        return 0.0
    strips = -(-problem.out_height // launch.rows)
    pixels = strips * _image_rows(problem, launch) * problem.kernel[1] * problem.out_width
    blocks = grid(problem, launch)[1] if problem.projects else 1
    return pixels * blocks / (problem.height * problem.width)


@functools.lru_cache(maxsize=4096)
def heuristic(problem: Problem, pass_: str, device: Device) -> Launch:
    """The launch that `predict` expects to be fastest."""
    return candidates(problem, pass_, device, limit=1)[0]


def candidates(problem: Problem, pass_: str, device: Device, limit: int = 32) -> list[Launch]:
    """Launches worth timing, those that `predict` expects to be fastest first; at most `limit`."""
    found = list(_launches(problem))
    for launch in found:
        validate(problem, launch, pass_)
    times = {launch: predict(problem, launch, pass_, device) for launch in found}
    return sorted(found, key=lambda launch: (times[launch], astuple(launch)))[:limit]


def _launches(problem: Problem) -> Iterator[Launch]:
    """Launches that compile without spills on every architecture.

    A warp takes 16 hidden channels and 16 positions, 8 numbers a lane of each row's sums, which
    leaves registers for some rows and, beside them, the projection's sums; a quarter of that where
    the matrix units cannot multiply.
    """
    exact = problem.expands and problem.dtype == torch.float32 and not problem.tf32
    wide = problem.channels * problem.dtype.itemsize > _FEW_BYTES
    # Many products of few channels: the compiler loads the operands of each when it needs them.
    channels = 16 if wide or problem.channels <= 16 else 32
    most = _MAX_SUMS[wide or problem.kernel[0] > 3]
    # Strips of nearly equal height.
    heights = sorted({-(-problem.out_height // n) for n in range(1, problem.out_height + 1)})
    fewest = 4 if exact else problem.dtype.itemsize // 2
    for num_warps in (n for n in (1, 2, 4, 8) if n >= fewest):
        hidden = (4 if exact else 16) * num_warps
        outputs = _LEAST
        if problem.projects:
            # Sums of 32 numbers a lane and row at most; of 16 where operands are twice as wide.
            most_outputs = 128 // problem.dtype.itemsize * num_warps
            outputs = min(_power_of_two(problem.out_channels), most_outputs)
        for rows in heights:
            launch = Launch(rows, 16, hidden, channels, outputs, num_warps)
            fits = rows * _sums(problem, launch) <= most and rows <= _most_rows(problem)
            need, shared = _registers(problem, launch), shared_bytes(problem, launch)
            if (exact and rows > 2) or shared > _MAX_SHARED:
                continue
            if rows == 1 or (fits and need <= _MOST_REGISTERS):
                yield launch


# Numbers a lane of the sums of all rows that compile without spills: with few bytes of channels and
# windows of up to 3 rows, and with more; and what `_registers` may come to.
_MAX_SUMS = (64, 40)
_FEW_BYTES = 64
_MOST_REGISTERS = 192


def _most_rows(problem: Problem) -> int:
    """Rows of outputs of a program, at most."""
    return (_MAX_IMAGE_ROWS - problem.kernel[0]) // problem.stride[0] + 1


def _sums(problem: Problem, launch: Launch) -> int:
    """Numbers a lane of one row's sums: of the depthwise convolution and of the projection."""
    projected = _numbers(launch.outputs, launch) if problem.projects else 0
    return _numbers(launch.hidden, launch) + projected


def _numbers(channels: int, launch: Launch) -> int:
    """Numbers a lane of a tile [channels, positions]: warps lie along channels, 16 at least."""
    return max(16, -(-channels // launch.num_warps)) * launch.positions // WARP


def registers(problem: Problem, launch: Launch, pass_: str = "forward") -> int:
    """About how many registers a thread needs; within a third of what the compiler takes."""
    return min(launch.registers, _registers(problem, launch))


def _registers(problem: Problem, launch: Launch) -> int:
    # Four lanes hold a position's channels, 4 bytes a register: of x for each row, of the weights
    # once.
    operands = 4
    if problem.expands:
        operands = _round_up(problem.channels, launch.channels) * problem.dtype.itemsize // 8
    rows = launch.rows * _sums(problem, launch) + _image_rows(problem, launch) * (6 + operands)
    return 48 + rows + operands + 4 * problem.kernel[0]


def shared_bytes(problem: Problem, launch: Launch, pass_: str = "forward") -> int:
    """About how many bytes of shared memory a program needs: what products have to pass through
    it, one matrix of weights and one of images at a time."""
    widths = [launch.channels] if problem.expands else [0]
    if problem.projects:
        widths.append(launch.outputs)
    return problem.dtype.itemsize * launch.hidden * (max(widths) + launch.positions)


# What `predict` counts with. From the code: instructions of a warp for each row of the image and
# column of the window that is expanded (address, mask, load, to and from shared memory) or only
# loaded, for each chunk, and before and behind all. Estimates: cycles until a row's products can go
# on, a round through shared memory; the share of issue slots that a full multiprocessor uses; the
# instructions a cycle of a lone warp.
_EXPANDED_ROW, _ROW, _CHUNK, _PROGRAM = 36, 12, 140, 450
_ROW_LATENCY = 120
_ISSUE_SHARE, _WARP_RATE, _SCHEDULERS = 0.75, 0.4, 4


def predict(problem: Problem, launch: Launch, pass_: str, device: Device) -> float:
    """Seconds of a call with nothing of its data in L2, by counting.

    A program computes row after row; a multiprocessor shares its issue slots, matrix units and
    shared memory among those that it holds. A round of programs takes the longer of what it needs
    of these together and of what one program needs alone; all rounds take at least as long as
    device memory needs.
    """
    architecture = device.architecture
    threads = WARP * launch.num_warps
    held = occupancy(
        architecture, threads, registers(problem, launch), shared_bytes(problem, launch)
    ).blocks_per_sm
    programs = math.prod(grid(problem, launch))
    if programs == 0:
        return LAUNCH
    needs = _program(problem, launch)
    flops = device.fp32_flops
    if problem.dtype != torch.float32 or problem.tf32:
        # Tiles are too small for the instructions of four warps, sm_90's and sm_100's.
        share = MMA_SHARE if architecture.name in ("sm_90", "sm_100") else 1.0
        flops = share * device.matrix_flops(problem.dtype)
    rate = flops / 2 / device.sms / device.clock_hz
    cycles = max(
        launch.num_warps * needs.instructions / (_SCHEDULERS * _ISSUE_SHARE),
        needs.multiply_adds / rate,
        needs.shared_bytes / architecture.load_bytes_per_cycle,
    )
    alone = needs.instructions / _WARP_RATE + needs.rows * _ROW_LATENCY
    per_sm = -(-programs // device.sms)
    rounds = -(-per_sm // max(1, held))
    seconds = max(per_sm * cycles, rounds * alone) / device.clock_hz
    return LAUNCH + max(LATENCY + seconds, problem.bytes() / (COPY_SHARE * device.dram_bandwidth))


@dataclass(frozen=True)
class _Needs:
    """Of one program: instructions of each warp, multiply-adds of products, bytes that pass L1 and
    shared memory, rows of the image in all columns of the window."""

    instructions: float
    multiply_adds: int
    shared_bytes: int
    rows: int


def _program(problem: Problem, launch: Launch) -> _Needs:
    chunks, tiles = -(-problem.hidden // launch.hidden), 1
    if not problem.projects:
        chunks, tiles = 1, -(-problem.out_width // launch.positions)
    rows = problem.kernel[1] * _image_rows(problem, launch)
    taps = problem.kernel[0] * problem.kernel[1] * launch.rows
    hidden, outputs = _numbers(launch.hidden, launch), _numbers(launch.outputs, launch)
    channels = _round_up(problem.channels, launch.channels) if problem.expands else launch.hidden
    # Bias, lower and upper bound of an activation; or conversion to float32.
    row = 3 * hidden + _EXPANDED_ROW if problem.expands else hidden + _ROW
    chunk = rows * row + taps * hidden + launch.rows * 4 * hidden + _CHUNK
    multiply_adds = rows * launch.hidden * channels if problem.expands else 0
    copied = rows * channels * (2 + launch.num_warps)
    if problem.projects:
        multiply_adds += launch.rows * launch.hidden * max(launch.outputs, 16 * launch.num_warps)
        copied += launch.rows * launch.hidden * (1 + launch.num_warps)
    matrices = launch.hidden * ((channels if problem.expands else 0) + launch.outputs)
    steps = chunks * tiles
    return _Needs(
        instructions=steps * chunk + launch.rows * 4 * outputs + _PROGRAM,
        multiply_adds=steps * multiply_adds * launch.positions,
        shared_bytes=steps * problem.dtype.itemsize * (copied * launch.positions + 3 * matrices),
        rows=steps * rows,
    )


def _image_rows(problem: Problem, launch: Launch) -> int:
    """Rows of the image that a program reads."""
    return (launch.rows - 1) * problem.stride[0] + problem.kernel[0]


def _power_of_two(count: int) -> int:
    return max(_LEAST, 1 << (count - 1).bit_length())


def _round_up(count: int, unit: int) -> int:
    return -(-count // unit) * unit
