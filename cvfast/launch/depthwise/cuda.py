"""Launch parameters of the CUDA kernels of csrc/cuda/depthwise*.

A block of the tile kernels computes rectangles of outputs for some channels: it copies the inputs
of one to shared memory, and its threads, each 4 bytes of channels of a small tile, compute from
there. The general kernels take what the tile kernels do not: one thread an output.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from cvfast.launch.depthwise import PASSES, Problem
from cvfast.perf.devices import Device, Occupancy, occupancy

MAX_THREADS = 256
"""Of a block: `kTileThreads` in csrc/cuda/depthwise_kernel.cuh, and of the general kernels."""

GENERAL_CHANNELS, GENERAL_LINES = 32, 8
"""Threads of a block of the general kernels along channels and along columns or rows."""

MAX_WORKERS = 65535
"""Blocks along the second axis of a grid."""

TILE_LIMIT = 1 << 24
"""Largest size that the tile kernels count with: `kTileLimit`."""

_WORD, _CHUNK = 4, 16  # bytes that a thread owns of each pixel, and that are copied at once

# Outputs of a thread that kernels are compiled for, by (kernel, stride): the ladders of
# csrc/cuda/depthwise_launch.cuh. Registers are the most of any element type and architecture.
_FORWARD = {
    (3, 1): {(2, 7): 80, (4, 7): 120, (4, 4): 80},
    (3, 2): {(2, 7): 80, (4, 4): 80},
    (5, 1): {(2, 7): 128, (4, 4): 128},
    (5, 2): {(2, 7): 128, (4, 4): 128},
    (7, 1): {(2, 7): 168, (4, 4): 168},
    (7, 2): {(4, 4): 168},
}
_BACKWARD_INPUT = {
    **{key: tiles for key, tiles in _FORWARD.items() if key[1] == 1},
    (3, 2): {(2, 8): 80},
    (5, 2): {(2, 8): 128},
}
_BACKWARD_WEIGHT = {
    (3, 1): {(2, 7): 80},
    (3, 2): {(2, 7): 80},
    (5, 1): {(2, 7): 128},
    (5, 2): {(2, 7): 128},
}
TILES = {
    "forward": _FORWARD,
    "backward_input": _BACKWARD_INPUT,
    "backward_weight": _BACKWARD_WEIGHT,
}
"""By pass and (kernel, stride): (rows, columns) of outputs of a thread, and registers it has."""

_GENERAL_REGISTERS = 112


@dataclass(frozen=True)
class Launch:
    """How one kernel is launched.

    Attributes:
        tiled: the tile kernel; else the general one, of which only `workers` says anything.
        thread_rows, thread_columns: outputs of a thread (of the gradient, for that of the weights).
        down, across: threads of a block along rows and columns.
        words: of 4 bytes, the channels of a block; a multiple of 4.
        stages: rectangles that shared memory holds: with 2, one is copied while the other is used.
        workers: blocks that share the rectangles of each block of channels, and for the gradient of
            the weights the partial sums; blocks altogether for the general kernels.
    """

    tiled: bool
    thread_rows: int = 0
    thread_columns: int = 0
    down: int = 0
    across: int = 0
    words: int = 0
    stages: int = 0
    workers: int = 1

    def as_ints(self) -> list[int]:
        """What the C++ operators take as `launch`."""
        return [
            int(self.tiled),
            self.thread_rows,
            self.thread_columns,
            self.down,
            self.across,
            self.words,
            self.stages,
            self.workers,
        ]


def validate(problem: Problem, launch: Launch, pass_: str) -> None:
    """Checks that the kernels of `pass_` can be launched so, shared memory aside.

    Raises:
        ValueError: saying what does not fit.
    """
    _check_pass(pass_)
    if not 1 <= launch.workers <= MAX_WORKERS:
        raise ValueError(f"depthwise, cuda: {launch.workers} workers, expected 1 to {MAX_WORKERS}")
    if not launch.tiled:
        return
    if not tileable(problem, pass_):
        raise ValueError(f"depthwise, cuda: no tile kernel of {pass_} is compiled for {problem}")
    tile = (launch.thread_rows, launch.thread_columns)
    tiles = TILES[pass_][problem.kernel[0], problem.stride[0]]
    if tile not in tiles:
        raise ValueError(f"depthwise, cuda: {tile} outputs a thread, expected one of {list(tiles)}")
    if launch.words < 1 or launch.words % (_CHUNK // _WORD):
        raise ValueError(f"depthwise, cuda: words={launch.words}, expected a multiple of 4")
    if min(launch.down, launch.across) < 1 or threads(launch) > MAX_THREADS:
        raise ValueError(
            f"depthwise, cuda: {launch.down}x{launch.across} threads of {launch.words} words, "
            f"expected 1 to {MAX_THREADS} a block"
        )
    if launch.stages not in (1, 2):
        raise ValueError(f"depthwise, cuda: stages={launch.stages}, expected 1 or 2")


def threads(launch: Launch) -> int:
    """Threads of a block."""
    if not launch.tiled:
        return GENERAL_CHANNELS * GENERAL_LINES
    return launch.words * launch.down * launch.across


def shared_bytes(problem: Problem, launch: Launch, pass_: str = "forward") -> int:
    """Dynamic shared memory of a block, in bytes.

    That of the gradients has room for the forward pass's output, whether there is an activation to
    undo or not.
    """
    if not launch.tiled:
        return 4 * MAX_THREADS if pass_ == "backward_weight" else 0
    copied, sums = _stage_bytes(problem, launch, pass_), 0
    if pass_ == "backward_weight":
        taps = problem.kernel[0] * problem.kernel[1]
        channels = launch.words * _WORD // problem.dtype.itemsize
        sums = launch.down * launch.across * (taps + 1) * channels * 4
    return max(launch.stages * copied, sums)


def grid(problem: Problem, launch: Launch, pass_: str = "forward") -> tuple[int, int, int]:
    """Blocks of the (main) kernel of `pass_`."""
    if not launch.tiled:
        return _general_grid(problem, launch, pass_)
    workers = min(math.prod(_tiles(problem, launch, pass_)), launch.workers)
    return _channel_blocks(problem, launch), workers, 1


def registers(problem: Problem, launch: Launch, pass_: str = "forward") -> int:
    """What a thread has at most, on any architecture."""
    if not launch.tiled:
        return _GENERAL_REGISTERS
    tiles = TILES[pass_][problem.kernel[0], problem.stride[0]]
    return tiles[launch.thread_rows, launch.thread_columns]


def kernels(
    problem: Problem, launch: Launch, pass_: str = "forward", activation: str = "relu6"
) -> list[str]:
    """Names of the __global__ functions that one call launches, as a demangler prints them.

    Args:
        activation: does not matter: it is an argument of the kernels.
    """
    del activation
    element = {
        torch.float32: "float",
        torch.float16: "__half",
        torch.bfloat16: "__nv_bfloat16",
    }[problem.dtype]
    kernel, stride = problem.kernel[0], problem.stride[0]
    if not launch.tiled:
        stem = "general" if pass_ == "forward" else f"{pass_}_general"
        main = f"cvfast::cuda::depthwise_{stem}<{element}>"
    else:
        stem = "backward_weight_tile" if pass_ == "backward_weight" else "tile"
        transposed = pass_ == "backward_input" and stride > 1
        axis = "Transposed" if transposed else "Correlation"
        rows, columns = (
            f"cvfast::cuda::{axis}<{kernel}, {stride}, {outputs}>"
            for outputs in (launch.thread_rows, launch.thread_columns)
        )
        main = f"cvfast::cuda::depthwise_{stem}<{element}, {rows}, {columns} >"
    if pass_ != "backward_weight":
        return [main]
    return [main, "cvfast::cuda::(anonymous namespace)::depthwise_sum_parts"]


def tileable(problem: Problem, pass_: str = "forward") -> bool:
    """Whether a tile kernel is compiled for the problem."""
    sizes = (problem.channels, problem.height, problem.width, *problem.padding)
    return (
        problem.multiplier == 1
        and problem.dilation == (1, 1)
        and problem.kernel[0] == problem.kernel[1]
        and problem.stride[0] == problem.stride[1]
        and (problem.kernel[0], problem.stride[0]) in TILES[pass_]
        and max(*sizes, problem.out_height, problem.out_width) <= TILE_LIMIT
    )


def candidates(problem: Problem, pass_: str, device: Device, limit: int = 32) -> list[Launch]:
    """Launches worth timing, those that `predict` expects to be fastest first.

    Args:
        limit: how many at most.

    Raises:
        ValueError: for an unknown pass.
    """
    _check_pass(pass_)
    general = _general(problem, device)
    if problem.batch == 0 or not tileable(problem, pass_):
        return [general]
    launches = set(_tiled(problem, pass_, device))
    if not launches:
        return [general]
    order = sorted(
        launches, key=lambda launch: (predict(problem, launch, pass_, device), launch.as_ints())
    )
    return order[:limit]


def heuristic(problem: Problem, pass_: str, device: Device) -> Launch:
    """The launch that `predict` expects to be fastest.

    Raises:
        ValueError: for an unknown pass.
    """
    return candidates(problem, pass_, device, limit=1)[0]


# What `predict` counts with; estimates until kernels are tuned on a device. Seconds from a request
# for device memory to its data under load, and from the launch of a kernel to its first request;
# the share of the datasheet's bandwidth that a copy reaches; the share of issue slots that is used;
# bytes a cycle that a multiprocessor takes from L2; instructions a cycle of a lone warp.
_MEMORY_LATENCY = 0.9e-6
_START = 1.5e-6
_COPY_EFFICIENCY = 0.9
_ISSUE_EFFICIENCY = 0.75
_L2_BYTES_PER_CYCLE = 40
_WARP_IPC = 0.5
_SCHEDULERS = 4
_LINE = 128
_SECTOR_COST = 0.1  # of a pixel's channels being one sector of a line, and not all four


def predict(problem: Problem, launch: Launch, pass_: str, device: Device) -> float:
    """Seconds that the kernel takes with nothing of its data in L2, by counting.

    The largest of the times that device memory, L2 and the issue slots need, and of the rounds in
    which blocks come and go. A block waits for its inputs and then computes; with two stages it
    computes while it waits for the next.
    """
    occupied = _occupancy(problem, launch, pass_, device)
    if occupied.blocks_per_sm == 0:
        return math.inf
    memory = _bytes_moved(problem, pass_) / (device.dram_bandwidth * _COPY_EFFICIENCY)
    if not launch.tiled:
        taps = problem.kernel[0] * problem.kernel[1]
        outputs = problem.batch * problem.out_height * problem.out_width * problem.out_channels
        rate = device.sms * _SCHEDULERS * 32 * device.clock_hz * _ISSUE_EFFICIENCY
        return _START + _MEMORY_LATENCY + max(memory, 12 * taps * outputs / rate)

    tiles = math.prod(_tiles(problem, launch, pass_))
    copied = _stage_bytes(problem, launch, pass_)
    workers = min(tiles, launch.workers)
    turns = -(-tiles // workers)  # rectangles of one worker
    blocks = workers * _channel_blocks(problem, launch)
    per_sm = -(-blocks // device.sms)
    warps = -(-threads(launch) // 32)
    instructions = _instructions(problem, launch, pass_, copied)
    slots = warps / _SCHEDULERS * instructions / (device.clock_hz * _ISSUE_EFFICIENCY)
    compute = max(slots, instructions / (device.clock_hz * _WARP_IPC))  # of a block by itself
    wait = max(_MEMORY_LATENCY, copied / (_L2_BYTES_PER_CYCLE * device.clock_hz))
    if launch.stages == 1:
        block = turns * (wait + compute)
    else:
        block = wait + compute + (turns - 1) * max(wait, compute)
    rounds = -(-per_sm // occupied.blocks_per_sm)
    l2 = per_sm * turns * copied / (_L2_BYTES_PER_CYCLE * device.clock_hz)
    segment = min(launch.words * _WORD, _LINE)
    memory *= 1 + _SECTOR_COST * (_LINE / segment - 1) / 3
    # The first block's inputs come before, and its outputs go after, everything else.
    return _START + max(rounds * block, l2 + wait, per_sm * turns * slots + wait, memory + compute)


def _bytes_moved(problem: Problem, pass_: str) -> int:
    """Images read once, and written once."""
    image = problem.height * problem.width * problem.channels
    out = problem.out_height * problem.out_width * problem.out_channels
    # A gradient also reads the output, whose activation it undoes.
    elements = image + out if pass_ == "forward" else image + 2 * out
    return problem.batch * elements * problem.dtype.itemsize


def _instructions(problem: Problem, launch: Launch, pass_: str, copied: int) -> float:
    """Of a warp for one rectangle, counted in the code for sm_90."""
    kernel, stride = problem.kernel[0], problem.stride[0]
    lanes = _WORD // problem.dtype.itemsize
    outputs = launch.thread_rows * launch.thread_columns
    if pass_ == "backward_input":
        sources = math.prod(n // stride + (kernel - 1) // stride for n in _thread_tile(launch))
        products = outputs * kernel * kernel / stride**2
    else:
        sources = math.prod((n - 1) * stride + kernel for n in _thread_tile(launch))
        products = outputs * kernel * kernel
    # Reading a word and converting it; activating, converting and storing one; a chunk's copy; what
    # comes once.
    read, store, copy, fixed = 1 + lanes, 6, 12, 150
    chunks = copied / _CHUNK / threads(launch)
    return lanes * products + read * sources + store * outputs + copy * chunks + fixed


def _thread_tile(launch: Launch) -> tuple[int, int]:
    return launch.thread_rows, launch.thread_columns


def _check_pass(pass_: str) -> None:
    if pass_ not in PASSES:
        raise ValueError(f"pass_={pass_!r}: expected {', '.join(PASSES)}")


def _occupancy(problem: Problem, launch: Launch, pass_: str, device: Device) -> Occupancy:
    return occupancy(
        device.architecture,
        threads(launch),
        registers(problem, launch, pass_),
        shared_bytes(problem, launch, pass_),
    )


def _plane_inputs(problem: Problem, pass_: str, outputs: int) -> int:
    kernel, stride = problem.kernel[0], problem.stride[0]
    if pass_ == "backward_input":
        return outputs // stride + (kernel - 1) // stride
    return (outputs - 1) * stride + kernel


def _stage_bytes(problem: Problem, launch: Launch, pass_: str) -> int:
    """Of one rectangle in shared memory, where a row of pixels has an odd number of them."""
    rows, columns = launch.down * launch.thread_rows, launch.across * launch.thread_columns

    def plane(height: int, width: int) -> int:
        return height * (width | 1) * launch.words * _WORD

    inputs = plane(_plane_inputs(problem, pass_, rows), _plane_inputs(problem, pass_, columns))
    if pass_ == "forward":
        return inputs
    return 2 * inputs if pass_ == "backward_input" else inputs + 2 * plane(rows, columns)


def _tiles(problem: Problem, launch: Launch, pass_: str) -> tuple[int, int, int]:
    """Rectangles: of the batch, down and across an image."""
    rows, columns = launch.down * launch.thread_rows, launch.across * launch.thread_columns
    height, width = _extent(problem, pass_)
    return problem.batch, -(-height // rows), -(-width // columns)


def _extent(problem: Problem, pass_: str) -> tuple[int, int]:
    """Outputs along each axis that rectangles cover."""
    if pass_ != "backward_input":
        return problem.out_height, problem.out_width
    return (
        problem.height + problem.padding[0] % problem.stride[0],
        problem.width + problem.padding[1] % problem.stride[1],
    )


def _channel_blocks(problem: Problem, launch: Launch) -> int:
    return -(-problem.channels * problem.dtype.itemsize // (launch.words * _WORD))


def _general(problem: Problem, device: Device) -> Launch:
    """Eight blocks a multiprocessor, which are all the threads that one can hold."""
    return Launch(tiled=False, workers=min(8 * device.sms, MAX_WORKERS))


def _general_grid(problem: Problem, launch: Launch, pass_: str) -> tuple[int, int, int]:
    groups = -(-problem.channels // GENERAL_CHANNELS)
    if pass_ == "backward_weight":
        taps = problem.kernel[0] * problem.kernel[1]
        lines = -(-problem.batch * problem.out_height // GENERAL_LINES)
        parts = min(lines, launch.workers, MAX_WORKERS)
        return problem.multiplier * groups * (taps + 1), parts, 1
    if pass_ == "forward":
        groups = -(-problem.out_channels // GENERAL_CHANNELS)
        lines = problem.batch * problem.out_height
    else:
        lines = problem.batch * problem.height
    return min(groups * lines, launch.workers), 1, 1


def _tiled(problem: Problem, pass_: str, device: Device) -> Iterator[Launch]:
    """Launches of the tile kernels that the device can hold."""
    height, width = _extent(problem, pass_)
    for rows, columns in TILES[pass_][problem.kernel[0], problem.stride[0]]:
        for words in _word_counts(problem):
            for down, across in _thread_counts(-(-height // rows), -(-width // columns), words):
                for stages in (1, 2):
                    yield from _with_workers(
                        problem,
                        pass_,
                        device,
                        Launch(True, rows, columns, down, across, words, stages),
                    )


def _word_counts(problem: Problem) -> list[int]:
    """Words of channels a block: whole chunks, from a sector of memory to a line, that waste few of
    the last block's; more only if nothing fits."""
    chunks = -(-problem.channels * problem.dtype.itemsize // _CHUNK)
    shares = {-(-chunks // blocks) for blocks in range(1, chunks + 1)}
    good = [n for n in shares if 2 <= n <= 12 and -(-chunks // n) * n <= 1.1 * chunks]
    return [n * _CHUNK // _WORD for n in sorted(good) or [min(chunks, 8)]]


def _thread_counts(down: int, across: int, words: int) -> Iterator[tuple[int, int]]:
    """(down, across) of a block over an image of `down` x `across` threads: cut as equally as can
    be, and of the heights that a width allows the largest, its half and its quarter."""
    most = MAX_THREADS // words
    for x in sorted({-(-across // parts) for parts in range(1, across + 1)}):
        for share in (1, 2, 4):
            y = min(down, most // (x * share))
            if y:
                yield -(-down // -(-down // y)), x


def _with_workers(problem: Problem, pass_: str, device: Device, launch: Launch) -> Iterator[Launch]:
    tiles = math.prod(_tiles(problem, launch, pass_))
    occupied = _occupancy(problem, launch, pass_, device)
    if occupied.blocks_per_sm == 0 or tiles >= 1 << 31:
        return
    resident = -(-device.sms * occupied.blocks_per_sm // _channel_blocks(problem, launch))
    # Every worker of a round gets as many rectangles as the others, or one fewer.
    balanced = -(-tiles // -(-tiles // min(resident, MAX_WORKERS)))
    if launch.stages == 1 and pass_ != "backward_weight":
        yield replace(launch, workers=min(max(tiles, 1), MAX_WORKERS))
    elif tiles > balanced or pass_ == "backward_weight":
        yield replace(launch, workers=balanced)
