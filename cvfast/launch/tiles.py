"""How a matrix kernel cuts its product into tiles: the launch parameters, and what they cost.

`cycles` is a model, not a measurement; its constants say where they come from. It ranks the ways of
cutting a product: the first is the heuristic's choice, it and those that follow are what the tuner
times.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from cvfast.perf.devices import WARP, Device

# With eight, Triton compiles loops over pairs of tap and channels into code that is silently wrong
# (pytorch issue 173068, seen there on an H100).
MAX_WARPS = 4


@dataclass(frozen=True)
class Launch:
    """Launch parameters of a matrix kernel.

    Attributes:
        block_m, block_n: rows (pixels) and columns (output channels) of a program's tile.
        block_k: what a step multiplies: channels, or elements of (tap, channel).
        splits: programs that share the steps of one tile; a second kernel adds their sums.
        num_warps, num_stages: of Triton: warps of a program, steps that are loaded ahead.
    """

    block_m: int
    block_n: int
    block_k: int
    splits: int = 1
    num_warps: int = 4
    num_stages: int = 3


@dataclass(frozen=True)
class Product:
    """A matrix product as the kernel walks over it.

    Attributes:
        rows: pixels.
        columns: packed output channels of one group.
        groups: matrices of columns beside each other, none of whose tiles overlap.
        taps: times that each depth is walked over.
        depths: channels of each source.
        scattered: elements of a tile are loaded one by one, not 16 bytes at a time.
        itemsize: bytes of an element.
        matrix_units: whether they do the product; else float32 is multiplied by the common units.
        residual: whether an image is added, which takes registers beside the sums.
    """

    rows: int
    columns: int
    groups: int
    taps: int
    depths: tuple[int, ...]
    scattered: bool
    itemsize: int
    matrix_units: bool
    residual: bool = False

    def steps(self, block_k: int) -> int:
        """Blocks that a tile's sums are made of."""
        return self.taps * sum(-(-depth // block_k) for depth in self.depths)

    def tiles(self, launch: Launch) -> int:
        """Tiles of the result."""
        across = self.groups * -(-self.columns // launch.block_n)
        return -(-self.rows // launch.block_m) * across


def matrix_units(dtype: torch.dtype, tf32: bool) -> bool:
    """Whether products of this dtype run on the matrix units: all but exact float32 do."""
    return dtype != torch.float32 or tf32


def validate(op: str, product: Product, launch: Launch) -> None:
    """Checks that a kernel can be launched so.

    Raises:
        ValueError: naming the field and what it may be.
    """

    def require(name: str, condition: bool, expected: str) -> None:
        if not condition:
            value = getattr(launch, name)
            raise ValueError(f"{op}, triton: {name}={value}: expected {expected}")

    for name, most in (("block_m", 256), ("block_n", 256), ("block_k", 128)):
        value = getattr(launch, name)
        require(
            name, 16 <= value <= most and value & (value - 1) == 0,
            f"a power of two from 16 to {most}",
        )  # fmt: skip
    require("num_warps", launch.num_warps in (1, 2, MAX_WARPS), f"1, 2 or {MAX_WARPS}")
    require("num_stages", 1 <= launch.num_stages <= 8, "1 to 8")
    steps = max(1, product.steps(launch.block_k))
    require("splits", 1 <= launch.splits <= steps, f"1 to the {steps} steps of a tile")


def grid(op: str, product: Product, launch: Launch) -> tuple[int]:
    """Programs.

    Raises:
        ValueError: if they, or the rows, are 2³¹ or more, which 32 bits do not count.
    """
    programs = product.tiles(launch) * launch.splits
    if max(programs, product.rows + launch.block_m) >= 2**31:
        raise ValueError(
            f"{op}, triton: {product.rows} pixels in {programs} programs: the kernel counts fewer "
            "than 2³¹; call it on parts of the batch"
        )
    return (programs,)


# By compute capability. Operations of the matrix units per cycle and multiprocessor, 16-bit with
# float32 sums: dense rates of NVIDIA's data sheets over multiprocessors and boost clock.
_MATRIX_FLOPS = {(8, 0): 2048, (8, 6): 512, (8, 9): 512, (9, 0): 4096, (10, 0): 8192, (12, 0): 512}
# Bytes a cycle that a multiprocessor gets from L2 while all of them load; assumptions. Good matrix
# products in Triton reach some 600 TFLOP/s on an H100, which take 38 in tiles of 128 x 128; the L2
# of GeForce cards delivers some 5 TB/s.
_L2_BYTES = {(8, 0): 32, (8, 6): 16, (8, 9): 16, (9, 0): 40, (10, 0): 40, (12, 0): 16}
# Multiplying and loading overlap, but for this share of the shorter of them; and each step costs
# barriers and addresses.
_NOT_OVERLAPPED, _STEP = 0.25, 60
# Cycles until a load from L2 or memory arrives; to start a program and fill its first stages; of a
# second launch, about 2 us.
_LATENCY, _START, _SECOND_LAUNCH = 700, 1500, 4000
# Registers of a thread that its sums and its copies may take: a copy of 16 bytes from x keeps an
# address and a mask (9), one from the weights shares more (3). Beyond 210 compiled kernels spilled;
# about 45 hold the rest.
_MAX_REGISTERS, _REGISTERS_X, _REGISTERS_WEIGHT, _OTHER_REGISTERS = 210, 9, 3, 45
# Sums of a thread without matrix units, whose operands pass through registers too.
_MAX_SUMS_COMMON = 32
# Sums of a thread in TF32, whose operands take twice the registers: with 128, upconv spilled.
_MAX_SUMS_TF32 = 64


def cycles(product: Product, launch: Launch, device: Device) -> float:
    """About how long the product takes.

    A multiprocessor takes its share of the programs. Their steps cost the larger of multiplying and
    of loading; and where few programs are resident, the latency of loads that are not far enough
    ahead. Starting programs, storing tiles and adding shares come on top.
    """
    resident = max(1, _resident(product, launch, device))
    programs = -(-product.tiles(launch) * launch.splits // device.sms)
    rounds = -(-programs // resident)
    steps = -(-product.steps(launch.block_k) // launch.splits)
    area = launch.block_m * launch.block_n
    capability = device.architecture.capability
    bandwidth = _L2_BYTES.get(capability, 16)
    if product.matrix_units:
        rate = _MATRIX_FLOPS.get(capability, 512) * 2 / product.itemsize
    else:
        rate = 2.0 * device.architecture.fp32_lanes_per_sm
    multiply = 2 * area * launch.block_k / rate
    load = _stage_bytes(product, launch) / bandwidth
    if product.scattered:
        load += launch.block_m * launch.block_k / WARP
    step = max(multiply, load) + _NOT_OVERLAPPED * min(multiply, load) + _STEP
    waiting = _LATENCY / max(1, launch.num_stages - 1)
    walk = steps * max(programs * step, rounds * waiting)
    store = programs * area * product.itemsize / bandwidth
    total = walk + store + rounds * _START
    if launch.splits > 1:
        sums = launch.splits * product.rows * product.columns * 4
        total += _SECOND_LAUNCH + 2 * sums / (bandwidth * device.sms)
    return total


def _stage_bytes(product: Product, launch: Launch) -> int:
    return (launch.block_m + launch.block_n) * launch.block_k * product.itemsize


def _resident(product: Product, launch: Launch, device: Device) -> int:
    """Programs that a multiprocessor holds at a time."""
    limits = device.architecture
    threads = launch.num_warps * WARP
    registers = _registers(product, launch) + _OTHER_REGISTERS
    shared = max(
        launch.num_stages * _stage_bytes(product, launch),
        launch.block_m * launch.block_n * product.itemsize,  # a tile is stored through it
    )
    if shared > limits.shared_per_block:
        return 0
    return min(
        limits.registers_per_sm // (registers * threads),
        limits.shared_per_sm // (shared + limits.shared_reserved),
    )


def _registers(product: Product, launch: Launch) -> int:
    """Of a thread, about: its sums, what is added to them, and its copies."""
    threads = launch.num_warps * WARP
    copies = launch.block_k * product.itemsize / 16 / threads
    x, weight = _REGISTERS_X * launch.block_m, _REGISTERS_WEIGHT * launch.block_n
    sums = launch.block_m * launch.block_n / threads
    added = sums * product.itemsize / 4 if product.residual else 0
    # The second loop's addresses, beside the first's: on sm_80, 128 sums spilled at any depth.
    second = sums if sum(map(bool, product.depths)) > 1 else 0
    return int(sums + added + copies * (x + weight) + second)


def _options(product: Product, device: Device) -> Iterator[Launch]:
    """Every way worth considering."""
    width = max(16, min(256, 1 << (product.columns - 1).bit_length()))
    depth = max(16, min(64, 1 << (max(product.depths) - 1).bit_length()))
    for m, n, k, stages in itertools.product(
        (64, 128, 256), (16, 32, 64, 128, 256), (16, 32, 64), (2, 3, 4)
    ):
        launch = Launch(m, n, k, num_stages=stages)
        # Rows of 128 bytes are the widest that shared memory swizzles.
        if n > width or k > depth or k * product.itemsize > 128:
            continue
        sums = m * n // (launch.num_warps * WARP)
        if not product.matrix_units and sums > _MAX_SUMS_COMMON:
            continue
        if product.matrix_units and product.itemsize == 4 and sums > _MAX_SUMS_TF32:
            continue
        if _registers(product, launch) > _MAX_REGISTERS or not _resident(product, launch, device):
            continue
        tiles, steps = product.tiles(launch), product.steps(k)
        for splits in (1, 2, 4, 8, 16):
            # Shares of four steps at least, and only as many as fill the device.
            few = splits == 1 or (steps >= 4 * splits and tiles * splits < 2 * device.sms)
            if few and (splits == 1 or product.groups == 1):
                yield Launch(m, n, k, splits, num_stages=stages)


@functools.lru_cache(maxsize=4096)
def ranked(product: Product, device: Device) -> tuple[Launch, ...]:
    """Launch parameters by what the model says they cost, the cheapest first."""

    def key(launch: Launch) -> tuple[float, ...]:
        # Of equals, the fewest shares, three stages, and the least shared memory.
        return (
            cycles(product, launch, device),
            launch.splits,
            abs(launch.num_stages - 3),
            _stage_bytes(product, launch),
        )

    return tuple(sorted(_options(product, device), key=key))


def heuristic(product: Product, device: Device) -> Launch:
    """The cheapest of `ranked`."""
    return ranked(product, device)[0]


def candidates(product: Product, device: Device, limit: int) -> list[Launch]:
    """The cheapest of `ranked`; at most `limit`."""
    return list(ranked(product, device)[:limit])
