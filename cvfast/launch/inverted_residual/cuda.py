"""Launch parameters of the CUDA kernels of csrc/cuda/inverted_residual*.

A block computes a tile of outputs, `CHUNK` hidden channels at a time: it expands the tile's inputs,
halo included, into shared memory, convolves them, and adds their part of the projection to sums in
registers, or without a projection writes them. Blocks may share the hidden channels of a tile: then
a second kernel adds up their parts.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from cvfast.launch.inverted_residual import PASSES, Problem
from cvfast.perf.devices import Device, Occupancy, occupancy

CHUNK = 32
"""Hidden channels that shared memory holds at a time: `kChunk`."""

MAX_THREADS = 256
"""Of a block: `kBlockThreads`."""

STRIP = 4
"""Neighbouring outputs of a thread of the depthwise convolution: `kStrip`."""

HEIGHT = 2
"""Rows of 16 pixels of the projection that a warp sums: `BlockTraits::kHeight`."""

REGISTERS = {0: 80, 2: 128, 5: 192}
"""By `Launch.width`, what kernels are compiled for (without a projection, and with it), and the
most registers that a thread has on any architecture."""

KERNELS, STRIDES = (3, 5), (1, 2)
"""Of the depthwise convolution, the same along both axes, what kernels are compiled for."""

MAX_SIDE = 255
"""Input rows, input columns and images of a tile: places in it are kept in bytes."""

MAX_SPLITS = 65535

SIZE_LIMIT = 1 << 24
"""Largest size that the kernels count with: `kSizeLimit`."""

_MATRIX = 16  # rows and columns of the matrices that the tensor cores multiply
_WARP = 32
_DTYPES = {torch.float16: "__half", torch.bfloat16: "__nv_bfloat16"}


@dataclass(frozen=True)
class Launch:
    """How the kernel is launched.

    Attributes:
        rows, columns: outputs of a tile.
        images: that a tile spans, each with as many outputs.
        down, across: warps of a block along the pixels and the channels of the projection; without
            one, `down` is all of them.
        width: 16-channel columns of the projection that a warp sums; 0 without a projection.
        splits: blocks that share the hidden channels of a tile.
    """

    rows: int
    columns: int
    images: int
    down: int
    across: int
    width: int
    splits: int = 1

    def as_ints(self) -> list[int]:
        """What the C++ operators take as `launch`."""
        return [
            self.rows,
            self.columns,
            self.images,
            self.down,
            self.across,
            self.width,
            self.splits,
        ]


def unsupported(problem: Problem) -> str | None:
    """Why no kernel is compiled for the problem; None if one is."""
    widest = MAX_THREADS // _WARP * max(REGISTERS) * _MATRIX
    sizes = (problem.batch, problem.channels, problem.hidden, problem.height, problem.width)
    if problem.dtype not in _DTYPES:
        return f"the kernel takes float16 and bfloat16, not {problem.dtype}"
    if problem.kernel[0] != problem.kernel[1] or problem.kernel[0] not in KERNELS:
        return f"the kernel is compiled for 3x3 and 5x5, not {problem.kernel}"
    if problem.stride[0] != problem.stride[1] or problem.stride[0] not in STRIDES:
        return f"the kernel is compiled for strides 1 and 2, not {problem.stride}"
    if problem.out_channels > widest:
        return f"{problem.out_channels} output channels are more than the {widest} of one block"
    if not problem.expands and problem.hidden != problem.channels:
        return "without an expansion the hidden channels are those of x"
    if max(*sizes, *problem.padding, problem.out_height, problem.out_width) > SIZE_LIMIT:
        return f"a size is more than {SIZE_LIMIT}, beyond which 32 bits do not count"
    if not problem.projects and _reach(problem, 1, _strips(problem.out_width) * STRIP) > MAX_SIDE:
        return f"rows of {problem.out_width} outputs are longer than a tile, which means need whole"
    return None


def validate(problem: Problem, launch: Launch, pass_: str = "forward") -> None:
    """Checks that the kernel can be launched so, shared memory aside.

    Raises:
        ValueError: saying what does not fit.
    """
    _check_pass(pass_)

    def refuse(reason: str) -> None:
        raise ValueError(f"inverted_residual, cuda: {reason}")

    if (reason := unsupported(problem)) is not None:
        refuse(reason)
    if min(launch.as_ints()[:5]) < 1 or not 1 <= launch.splits <= _chunks(problem):
        refuse(f"{launch}: expected counts of at least 1, and at most {_chunks(problem)} splits")
    if max(*_rectangle(problem, launch), launch.images) > MAX_SIDE:
        refuse(f"{launch}: expected at most {MAX_SIDE} input rows, columns and images a tile")
    if threads(launch) > MAX_THREADS:
        refuse(f"{threads(launch)} threads, expected at most {MAX_THREADS} a block")
    if launch.width not in REGISTERS or problem.projects != (launch.width > 0):
        refuse(
            f"width={launch.width}, expected 0 without a projection, else one of "
            f"{[width for width in REGISTERS if width]}"
        )
    pixels, channels = launch.down * HEIGHT * _MATRIX, launch.across * launch.width * _MATRIX
    if problem.projects and (_outputs(launch) > pixels or problem.out_channels > channels):
        refuse(
            f"{_outputs(launch)} outputs of {problem.out_channels} channels, but the warps of "
            f"{launch} sum {pixels} of {channels}"
        )
    if not problem.projects and (launch.columns < problem.out_width or launch.across != 1):
        refuse("means of rows need tiles as wide as the image, and one warp across")


def threads(launch: Launch) -> int:
    """Threads of a block."""
    return _WARP * launch.down * launch.across


def grid(problem: Problem, launch: Launch, pass_: str = "forward") -> tuple[int, int, int]:
    """Blocks of the main kernel."""
    return _tiles(problem, launch), launch.splits, 1


def shared_bytes(problem: Problem, launch: Launch, pass_: str = "forward") -> int:
    """Dynamic shared memory of a block, in bytes."""
    rows, columns = _rectangle(problem, launch)
    inputs, outputs = _most_inputs(problem, launch), _outputs(launch)
    hidden = _matrix_bytes(launch.images * rows * columns, CHUNK)
    turned = launch.down * launch.across * _MATRIX * (_MATRIX + 4) * 4
    panels = 2 * (problem.kernel[0] ** 2 + 1) * CHUNK * 4
    parts = [
        max(hidden * (1 if problem.expands else 2), turned if problem.projects else 0),
        _matrix_bytes(_round_up(outputs, _MATRIX), CHUNK),
        panels,
        *(4 * n for n in (inputs, outputs, launch.images * launch.rows * _strips(launch.columns))),
    ]
    if problem.expands:
        parts.append(_matrix_bytes(_round_up(inputs, _MATRIX), problem.channels))
        parts.append(_matrix_bytes(_round_up(problem.channels, _MATRIX), CHUNK) + 4 * CHUNK)
    if problem.projects:
        parts.append(_matrix_bytes(CHUNK, problem.out_channels))
    return sum(_round_up(part, 16) for part in parts)


def registers(problem: Problem, launch: Launch, pass_: str = "forward") -> int:
    """The most registers that a thread has on any architecture."""
    return REGISTERS[launch.width]


def kernels(
    problem: Problem, launch: Launch, pass_: str = "forward", activation: str = "none"
) -> list[str]:
    """Names of the kernels as cuobjdump prints them, the one that does the work first."""
    del activation
    element = _DTYPES[problem.dtype]
    traits = f"{problem.kernel[0]}, {problem.stride[0]}, {launch.width}"
    names = [
        f"cvfast::cuda::inverted_residual_tile<{element}, cvfast::cuda::BlockTraits<{traits}> >"
    ]
    if problem.projects and launch.splits > 1:
        names.append(f"cvfast::cuda::inverted_residual_sum<{element}>")
    return names


def candidates(problem: Problem, pass_: str, device: Device, limit: int = 32) -> list[Launch]:
    """Launches worth timing, those that `predict` expects to be fastest first.

    Args:
        limit: how many at most.

    Raises:
        ValueError: for an unknown pass, or a problem that no kernel is compiled for or no tile of
            which fits into the device's shared memory.
    """
    _check_pass(pass_)
    if (reason := unsupported(problem)) is not None:
        raise ValueError(f"inverted_residual, cuda: {reason}")
    times = {
        launch: predict(problem, launch, pass_, device) for launch in _launches(problem, device)
    }
    found = [launch for launch, seconds in times.items() if math.isfinite(seconds)]
    if not found:
        raise ValueError(
            f"inverted_residual, cuda: no tile of {problem.describe()} fits into the "
            f"{device.architecture.shared_per_block} bytes of shared memory of {device.name}"
        )
    return sorted(found, key=lambda launch: (times[launch], launch.as_ints()))[:limit]


def heuristic(problem: Problem, pass_: str, device: Device) -> Launch:
    """The launch that `predict` expects to be fastest.

    Raises:
        ValueError: as `candidates`.
    """
    return candidates(problem, pass_, device, limit=1)[0]


# What `predict` counts with; estimates until kernels are tuned on a device. Seconds from the launch
# of a kernel to its first request, and from a request for device memory to its data under load;
# the shares of the datasheet's bandwidth that a copy, and of the issue slots that a kernel reaches;
# bytes a cycle that a multiprocessor takes from L2; instructions a cycle of a lone warp; cycles of
# a barrier, and from a request to L2 to its data.
_START = 1.5e-6
_MEMORY_LATENCY = 0.9e-6
_COPY_EFFICIENCY = 0.9
_ISSUE_EFFICIENCY = 0.75
_L2_BYTES_PER_CYCLE = 40
_WARP_IPC = 0.4
_BARRIER = 40
_L2_LATENCY = 300
_SCHEDULERS = 4

# Multiply-adds a cycle of a multiprocessor by mma.sync, at most: sm_80's. The tensor cores of sm_90
# and sm_100 reach the rest of their data sheet's rate by wgmma and tcgen05 only.
_MMA_RATE = 1024


@dataclass(frozen=True)
class Cost:
    """What `predict` finds for one launch.

    Attributes:
        seconds: of the whole call.
        recompute: pixels that are expanded, over those that exist; 1 where there is no expansion.
        held: blocks of a multiprocessor.
        waves: blocks over those that the device holds.
        limiter: the largest of the times: "memory", "L2", "issue", "shared memory", "tensor",
            "latency" (blocks that wait for themselves) or "launch".
    """

    seconds: float
    recompute: float
    held: Occupancy
    waves: float
    limiter: str


def predict(problem: Problem, launch: Launch, pass_: str, device: Device) -> float:
    """Seconds that a call takes with nothing of its data in L2, by counting; see `cost`."""
    return cost(problem, launch, device).seconds


def cost(problem: Problem, launch: Launch, device: Device) -> Cost:
    """Counts what a call takes.

    A multiprocessor shares its issue slots, shared memory and tensor cores among the blocks that it
    holds; a block alone passes through its phases one after the other, each at the pace of what it
    needs most or of its slowest warp. A round of blocks takes the longer of the two, and all rounds
    at least as long as L2 and device memory need for what they read and write.
    """
    architecture, clock = device.architecture, device.clock_hz
    held = occupancy(
        architecture,
        threads(launch),
        registers(problem, launch),
        shared_bytes(problem, launch),
    )
    if held.blocks_per_sm == 0 or problem.batch == 0:
        return Cost(math.inf if problem.batch else _START, 1.0, held, 0.0, "launch")
    inputs, outputs, tiles = (
        _mean_inputs(problem, launch),
        _outputs(launch),
        _tiles(problem, launch),
    )
    chunks = -(-_chunks(problem) // launch.splits)
    share = problem.hidden / (CHUNK * _chunks(problem))  # of a mean chunk that exists
    phases = _phases(problem, launch, inputs, share)
    rate = min(_MMA_RATE, device.matrix_flops(problem.dtype) / (2 * device.sms * clock))
    busy = {"issue": 0.0, "shared memory": 0.0, "tensor": 0.0}
    alone = 0.0
    for phase in phases:
        needs = {
            "issue": phase.instructions / _SCHEDULERS / _ISSUE_EFFICIENCY,
            "shared memory": phase.shared / architecture.load_bytes_per_cycle,
            "tensor": phase.multiply_adds / rate,
        }
        alone += max(*needs.values(), phase.longest / _WARP_IPC)
        for name, cycles in needs.items():
            busy[name] += cycles
    alone += 2 * _BARRIER

    item = problem.dtype.itemsize
    weights = (
        CHUNK
        * share
        * (
            (_round_up(problem.channels, _MATRIX) * item if problem.expands else 0)
            + _round_up(problem.out_channels, _MATRIX) * item
            + 4 * (problem.kernel[0] ** 2 + 1)
        )
    )
    image = inputs * (problem.channels * item if problem.expands else CHUNK * share * item * chunks)
    results = float(outputs * problem.out_channels * item)
    if launch.splits > 1 and problem.projects:
        results = outputs * _round_up(problem.out_channels, _MATRIX) * 4
    if not problem.projects:
        results = outputs * CHUNK * share * item * chunks
    block_l2 = image + chunks * weights + results

    blocks = tiles * launch.splits
    per_sm = -(-blocks // device.sms)
    resident = min(held.blocks_per_sm, per_sm)
    rounds = -(-per_sm // held.blocks_per_sm)
    # The image has to come first, and the results leave last; they are as long as nothing overlaps.
    ends = _MEMORY_LATENCY * clock + (image + results) / _L2_BYTES_PER_CYCLE
    prepare = 250 / _WARP_IPC
    block = ends + prepare + chunks * max(alone, _L2_LATENCY)
    times = {
        **{name: per_sm * chunks * cycles / clock for name, cycles in busy.items()},
        "L2": per_sm * block_l2 / _L2_BYTES_PER_CYCLE / clock,
        "latency": rounds * block / clock,
        "memory": problem.bytes() / (device.dram_bandwidth * _COPY_EFFICIENCY),
    }
    # While some of a multiprocessor's blocks load or store, the others compute.
    shared_time = max(times[name] for name in busy) + ends / clock / resident
    limiter = max(times, key=lambda name: times[name])
    seconds = _START + max(*times.values(), shared_time)
    if launch.splits > 1 and problem.projects:
        pixels = problem.batch * problem.out_height * problem.out_width
        parts = launch.splits * pixels * _round_up(problem.out_channels, _MATRIX) * 4
        read = parts / (device.sms * _L2_BYTES_PER_CYCLE * clock)
        seconds += _START + _MEMORY_LATENCY + read
    if seconds < 2 * _START:
        limiter = "launch"
    across_images = -(-problem.batch // launch.images) * launch.images / max(problem.batch, 1)
    existing = problem.batch * problem.height * problem.width
    recompute = tiles * inputs / existing / across_images if problem.expands else 1.0
    return Cost(seconds, recompute, held, blocks / (held.blocks_per_sm * device.sms), limiter)


@dataclass(frozen=True)
class _Phase:
    """What stands between two barriers, of one block and chunk: instructions of all its warps, and
    of the slowest one; bytes of shared memory; multiply-adds of the tensor cores."""

    instructions: float
    longest: float
    shared: float
    multiply_adds: float


def _phases(problem: Problem, launch: Launch, inputs: float, share: float) -> list[_Phase]:
    """Counted in the code for sm_90, relu6. `share`: of a chunk's channels that exist."""
    warps = launch.down * launch.across
    columns = CHUNK // _MATRIX * share
    matrix = 16 * 16 * 2  # bytes of an ldmatrix
    copy = 10 * _copied_vectors(problem, share) / warps / _WARP  # instructions of a warp

    def product(down: float, depth: float, width: float, per_row: float) -> _Phase:
        """Of `down` x `width` matrices; a warp loads those of a row once, and has `per_row`
        instructions besides."""
        rounds = math.ceil(down / warps)
        row = depth * (12 + 4 * width) + per_row
        return _Phase(
            down * row,
            rounds * row,
            down * depth * (1 + width) * matrix,
            down * depth * width * 4096,
        )

    parts = []
    if problem.expands:
        depth = _round_up(problem.channels, _MATRIX) // _MATRIX
        expand = product(math.ceil(inputs / _MATRIX), depth, columns, 130)
        stored = inputs * CHUNK * share * 2 * 2
        parts.append(
            _Phase(
                expand.instructions, expand.longest, expand.shared + stored, expand.multiply_adds
            )
        )
    if problem.projects:
        down = math.ceil(_outputs(launch) / _MATRIX)
        width = math.ceil(problem.out_channels / _MATRIX)
        # A warp has `height` x `breadth` matrices.
        height, breadth = math.ceil(down / launch.down), math.ceil(width / launch.across)
        longest = columns * (10 + 6 * height + breadth * (6 + 2 * height))
        loaded = columns * (down * launch.across + width * min(launch.down, down)) * matrix
        parts.append(_Phase(warps * longest, longest, loaded, down * width * columns * 4096))
    else:
        vectors = _outputs(launch) * CHUNK * share / 8
        rows = launch.images * launch.rows * CHUNK * share / 2
        mean = rows * (8 + 4 * launch.columns) / _WARP
        total = vectors * 20 / _WARP + mean
        parts.append(_Phase(total, total / warps, vectors * 32, 0.0))
    first = _Phase(
        *(sum(getattr(part, name) for part in parts) for name in _Phase.__dataclass_fields__)
    )

    taps, stride = problem.kernel[0], problem.stride[0]
    read = (STRIP - 1) * stride + taps
    strips = launch.images * launch.rows * _strips(launch.columns)
    once = taps * (taps + 3 * read) + 2 * STRIP * taps**2 + 45
    turns = math.ceil(strips * (CHUNK // 2) / threads(launch))
    # Two strips of a warp lie in the same banks, but for 3x3 and 5x5 at stride 1.
    conflicts = 1 if stride == 1 else 2
    moved = strips * CHUNK / 2 * share * (taps * (read * 4 * conflicts + taps * 8) + STRIP * 4)
    second = _Phase(
        warps * copy + strips * CHUNK / 2 / _WARP * once, copy + turns * once, moved, 0.0
    )
    return [first, second]


def _copied_vectors(problem: Problem, share: float) -> float:
    """16-byte vectors of a chunk's weights."""
    expand = problem.channels * CHUNK * share / 8 if problem.expands else 0
    panels = (problem.kernel[0] ** 2 + 1) * CHUNK * share / 4
    return expand + CHUNK * share * problem.out_channels / 8 + panels


def _launches(problem: Problem, device: Device) -> Iterator[Launch]:
    """Every tile that warps and shared memory hold and that cuts the image evenly."""
    seen = set()
    for down, across, width in _warps(problem):
        most = down * HEIGHT * _MATRIX if problem.projects else 8 * MAX_THREADS
        for columns in _column_counts(problem):
            for rows in _row_counts(problem, most // columns):
                whole = rows >= problem.out_height and columns >= problem.out_width
                spare = max(1, min(most // (rows * columns), problem.batch)) if whole else 1
                for images in sorted({1, spare, min(2, spare), min(4, spare)}):
                    for splits in _split_counts(problem, device, rows, columns, images):
                        launch = Launch(rows, columns, images, down, across, width, splits)
                        if launch not in seen and _fits(problem, launch, device):
                            seen.add(launch)
                            yield launch


def _fits(problem: Problem, launch: Launch, device: Device) -> bool:
    return (
        max(*_rectangle(problem, launch), launch.images) <= MAX_SIDE
        and shared_bytes(problem, launch) <= device.architecture.shared_per_block
        and _tiles(problem, launch) < 1 << 31
    )


def _warps(problem: Problem) -> Iterator[tuple[int, int, int]]:
    """(down, across, width) of four or eight warps whose sums are as wide as the projection."""
    for warps in (4, 8):
        if not problem.projects:
            yield warps, 1, 0
            continue
        for across, width in itertools.product((1, 2, 4, 8), (w for w in REGISTERS if w)):
            wide = across * width * _MATRIX
            if across <= warps and problem.out_channels <= wide <= 4 * _round_up(
                problem.out_channels, 2 * _MATRIX
            ):
                yield warps // across, across, width


def _column_counts(problem: Problem) -> list[int]:
    """Columns of a tile: shares of an image's, as equal as can be."""
    width = problem.out_width
    if not problem.projects:
        return [width]
    return sorted({-(-width // parts) for parts in range(1, width + 1)} & set(range(1, 65)) or {64})


def _row_counts(problem: Problem, most: int) -> list[int]:
    """Rows of a tile: the most that the warps sum, and fewer, cut as equally as can be."""
    height = problem.out_height
    if most < 1:
        return []
    limits = {most, most // 2, most // 4} if problem.projects else {1, 2, 3, 4, 6, 8, 16, most}
    return sorted({-(-height // -(-height // min(n, height))) for n in limits if n})


def _split_counts(
    problem: Problem, device: Device, rows: int, columns: int, images: int
) -> list[int]:
    """1, and as many as fill the device's multiprocessors once, twice or four times."""
    chunks = _chunks(problem)
    tiles = _tiles(problem, Launch(rows, columns, images, 1, 1, 0))
    wanted = {1}
    for fill in (1, 2, 4):
        split = min(chunks, fill * device.sms // max(tiles, 1))
        if split > 1:
            wanted.add(-(-chunks // -(-chunks // split)))
    return sorted(wanted)


def _check_pass(pass_: str) -> None:
    if pass_ not in PASSES:
        raise ValueError(f"pass_={pass_!r}: expected {', '.join(PASSES)}")


def _round_up(n: int, unit: int) -> int:
    return -(-n // unit) * unit


def _chunks(problem: Problem) -> int:
    return -(-problem.hidden // CHUNK)


def _strips(columns: int) -> int:
    return -(-columns // STRIP)


def _outputs(launch: Launch) -> int:
    return launch.images * launch.rows * launch.columns


def _matrix_bytes(rows: int, columns: int) -> int:
    """Of 16-bit elements in shared memory, where rows are padded: `matrix_pitch`."""
    return rows * (_round_up(columns, _MATRIX) + 8) * 2


def _reach(problem: Problem, axis: int, outputs: int) -> int:
    """Rows or columns that so many outputs read."""
    return (outputs - 1) * problem.stride[axis] + problem.kernel[axis]


def _rectangle(problem: Problem, launch: Launch) -> tuple[int, int]:
    """(rows, columns) of hidden pixels that a tile's strips read."""
    return (
        _reach(problem, 0, launch.rows),
        _reach(problem, 1, _strips(launch.columns) * STRIP),
    )


def _most_inputs(problem: Problem, launch: Launch) -> int:
    """Pixels of the image that a tile reads at most."""
    rows = min(_reach(problem, 0, launch.rows), problem.height)
    return launch.images * rows * min(_reach(problem, 1, launch.columns), problem.width)


def _mean_inputs(problem: Problem, launch: Launch) -> float:
    """Pixels of the image that a tile reads, in the mean over the tiles of an image."""

    def mean(axis: int, outputs: int, size: int, tile: int) -> float:
        starts = range(0, outputs, tile)
        covered = 0
        for start in starts:
            first = start * problem.stride[axis] - problem.padding[axis]
            last = first + _reach(problem, axis, min(tile, outputs - start))
            covered += max(0, min(last, size) - max(first, 0))
        return covered / len(starts)

    return (
        launch.images
        * mean(0, problem.out_height, problem.height, launch.rows)
        * mean(1, problem.out_width, problem.width, launch.columns)
    )


def _tiles(problem: Problem, launch: Launch) -> int:
    sizes = (problem.batch, problem.out_height, problem.out_width)
    tile = (launch.images, launch.rows, launch.columns)
    return math.prod(-(-size // n) for size, n in zip(sizes, tile, strict=True))
