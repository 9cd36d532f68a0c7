"""Launch parameters of the Triton kernel of kernels/inception.py; `cvfast.launch.tiles` says how
they are chosen."""

from __future__ import annotations

import functools
from dataclasses import replace

from cvfast.launch import tiles
from cvfast.launch.inception import PASSES, Branch, Problem
from cvfast.launch.tiles import Launch, Product
from cvfast.perf.devices import WARP, Device

__all__ = ["Launch", "candidates", "grid", "heuristic", "product", "validate"]


def product(problem: Problem, branch: Branch) -> Product:
    """The matrix product of a branch."""
    return Product(
        rows=problem.pixels(branch),
        columns=branch.columns,
        groups=1,
        taps=branch.taps,
        depths=(branch.channels,),
        residual=False,
        scattered=False,
        itemsize=problem.dtype.itemsize,
        matrix_units=tiles.matrix_units(problem.dtype, problem.tf32),
    )


def validate(problem: Problem, launch: Launch, pass_: str) -> None:
    """Checks that the kernel can be launched so.

    Raises:
        ValueError: naming the field and what it may be.
    """
    if pass_ not in PASSES:
        raise ValueError(f"pass_={pass_!r}: expected {', '.join(PASSES)}")
    for branch in problem.branches:
        tiles.validate("inception", product(problem, branch), launch)
    if launch.splits != 1:
        raise ValueError(f"inception, triton: splits={launch.splits}: expected 1")


def grid(problem: Problem, launch: Launch, pass_: str) -> tuple[int]:
    """Programs of the kernel, those of all branches.

    Raises:
        ValueError: if they, or the pixels of a branch, are 2³¹ or more.
    """
    del pass_
    counts = [tiles.grid("inception", product(problem, b), launch)[0] for b in problem.branches]
    if sum(counts) >= 2**31:
        raise ValueError(
            f"inception, triton: {sum(counts)} programs; call it on parts of the batch"
        )
    return (sum(counts),)


@functools.lru_cache(maxsize=4096)
def _ranked(problem: Problem, device: Device) -> tuple[Launch, ...]:
    """Launch parameters, the cheapest first.

    The cost is that of one product of the same work, as high as the highest branch, times what the
    branches' tiles reach beyond their results.
    """
    products = [product(problem, branch) for branch in problem.branches]
    rows = max(1, *(p.rows for p in products))
    area = sum(p.rows * p.columns for p in products)
    work = sum(p.rows * p.columns * p.taps * p.depths[0] for p in products)
    columns = max(16, area // rows // 16 * 16)
    depth = max(16, work // (rows * columns))
    merged = replace(products[0], rows=rows, columns=columns, taps=1, depths=(depth,))

    def cost(launch: Launch) -> float:
        covered = sum(
            p.tiles(launch) * launch.block_m * launch.block_n * p.taps * p.depths[0]
            for p in products
        )
        return tiles.cycles(merged, launch, device) * covered / max(1, work)

    pools = any(branch.kind != "conv" for branch in problem.branches)
    whole = [
        launch
        for launch in tiles.ranked(merged, device)
        if launch.splits == 1 and not (pools and _crowded(launch, problem.dtype.itemsize))
    ]
    # Of equals, those of the fewest steps.
    return tuple(sorted(whole, key=lambda launch: (round(cost(launch)), -launch.block_k)))


def _crowded(launch: Launch, itemsize: int) -> bool:
    """Whether pooled pixels, those in flight and the sums are more than registers hold: of a 3x3
    window, tiles of 128 x 64 with steps of 32 spilled on sm_90, in TF32 of 128 x 32 with 16, and of
    64 x 64 on sm_86."""
    lanes = launch.num_warps * WARP
    most = {2: (16, 64), 4: (8, 16)}[itemsize]
    pixels, sums = launch.block_m * launch.block_k, launch.block_m * launch.block_n
    return pixels > most[0] * lanes or sums > most[1] * lanes


def heuristic(problem: Problem, pass_: str, device: Device) -> Launch:
    """Launch parameters from the geometry and the device, without a measurement: the cheapest with
    four warps, for the reason that `tiles.heuristic` gives."""
    del pass_
    return next(launch for launch in _ranked(problem, device) if launch.num_warps == 4)


def candidates(problem: Problem, pass_: str, device: Device, limit: int = 32) -> list[Launch]:
    """Launch parameters worth timing, the heuristic's first; at most `limit`."""
    first = heuristic(problem, pass_, device)
    others = [launch for launch in _ranked(problem, device) if launch != first]
    return [first, *others][:limit]
