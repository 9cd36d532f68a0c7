"""Launch parameters of the Triton transposed convolution; `cvfast.launch.tiles` chooses them."""

from __future__ import annotations

from cvfast.launch import tiles
from cvfast.launch.tiles import Launch, Product
from cvfast.launch.upconv import PASSES, Problem
from cvfast.perf.devices import Device

__all__ = ["Launch", "candidates", "grid", "heuristic", "product", "validate"]


def product(problem: Problem) -> Product:
    """The matrix product that the kernel walks over."""
    return Product(
        rows=problem.pixels,
        columns=problem.columns,
        groups=problem.taps,
        taps=1,
        depths=(problem.channels,),
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
    tiles.validate("upconv", product(problem), launch)
    if launch.splits != 1:
        raise ValueError(f"upconv, triton: splits={launch.splits}: expected 1")


def grid(problem: Problem, launch: Launch, pass_: str) -> tuple[int]:
    """Programs of the kernel.

    Raises:
        ValueError: if they, or the pixels of x, are 2³¹ or more.
    """
    del pass_
    return tiles.grid("upconv", product(problem), launch)


def heuristic(problem: Problem, pass_: str, device: Device) -> Launch:
    """Launch parameters from the geometry and the device, without a measurement."""
    del pass_
    return tiles.heuristic(product(problem), device)


def candidates(problem: Problem, pass_: str, device: Device, limit: int = 32) -> list[Launch]:
    """Launch parameters worth timing, the heuristic's first; at most `limit`."""
    del pass_
    return tiles.candidates(product(problem), device, limit)
