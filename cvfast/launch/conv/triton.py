"""Launch parameters of the Triton convolution; `cvfast.launch.tiles` chooses them."""

from __future__ import annotations

from cvfast.launch import tiles
from cvfast.launch.conv import PASSES, Problem
from cvfast.launch.tiles import Launch, Product
from cvfast.perf.devices import Device

__all__ = ["Launch", "candidates", "grid", "heuristic", "product", "steps", "validate"]


def product(problem: Problem) -> Product:
    """The matrix product that the kernel walks over."""
    taps, depths = problem.taps, (problem.channels, problem.channels2)
    if problem.flat:
        taps, depths = 1, (problem.taps * problem.channels, 0)
    return Product(
        rows=problem.pixels,
        columns=problem.columns,
        groups=1,
        taps=taps,
        depths=depths,
        scattered=problem.flat,
        itemsize=problem.dtype.itemsize,
        matrix_units=tiles.matrix_units(problem.dtype, problem.tf32),
        residual=problem.residual,
    )


def validate(problem: Problem, launch: Launch, pass_: str) -> None:
    """Checks that the kernel can be launched so.

    Raises:
        ValueError: naming the field and what it may be.
    """
    if pass_ not in PASSES:
        raise ValueError(f"pass_={pass_!r}: expected {', '.join(PASSES)}")
    tiles.validate("conv", product(problem), launch)


def grid(problem: Problem, launch: Launch, pass_: str) -> tuple[int]:
    """Programs of the kernel.

    Raises:
        ValueError: if they, or the pixels of the result, are 2³¹ or more.
    """
    del pass_
    return tiles.grid("conv", product(problem), launch)


def steps(problem: Problem, launch: Launch) -> int:
    """Blocks that one program multiplies."""
    return -(-product(problem).steps(launch.block_k) // launch.splits)


def heuristic(problem: Problem, pass_: str, device: Device) -> Launch:
    """Launch parameters from the geometry and the device, without a measurement."""
    del pass_
    return tiles.heuristic(product(problem), device)


def candidates(problem: Problem, pass_: str, device: Device, limit: int = 32) -> list[Launch]:
    """Launch parameters worth timing, the heuristic's first; at most `limit`."""
    del pass_
    return tiles.candidates(product(problem), device, limit)
