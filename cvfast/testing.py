"""Helpers for tests of kernels, cvfast's and its users'.

What they are for: a kernel is wrong in ways that random square tensors do not show. It may read
memory that it never wrote (`poisoned_memory`), write beyond its output or read beyond its input
(`guarded`), lean on even channel counts and friendly statistics (`image`), or be right at one
instruction-set level only (`isa`, `isa_levels`). Results are judged by `cvfast.tolerance`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from cvfast import extension, tolerance

KINDS = ("normal", "offset", "nonfinite")


def assert_close_to_float64(
    actual: Tensor,
    function: Callable[..., Tensor],
    *inputs: Tensor | None,
    k: float | None = None,
) -> None:
    """Asserts that `actual` is as near to `function` in float64 as the policy asks.

    Args:
        actual: the result to judge.
        function: the reference in plain PyTorch; called with the inputs as they are, for PyTorch's
            own error, and with the inputs in float64, for the truth.
        k: see `cvfast.tolerance.check`.

    Raises:
        AssertionError: with the errors and limits.
    """
    baseline = function(*inputs)
    expected = function(*(None if t is None else t.double() for t in inputs))
    verdict = tolerance.check(actual, expected, baseline, k=k)
    assert verdict, str(verdict)


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """Inside, memory that torch allocates uninitialised is NaN (largest value for integers).

    Covers allocations made in C++ too. Operators without a deterministic implementation warn.
    """
    enabled = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(enabled, warn_only=warn_only)
        torch.utils.deterministic.fill_uninitialized_memory = fill  # type: ignore[attr-defined]


@dataclass(frozen=True)
class Guarded:
    """A tensor inside a larger buffer.

    Attributes:
        tensor: the view to hand to the kernel.
        buffer: all memory around and between its elements.
        outside: True for the elements of the buffer that are not the tensor's.
        canary: what those hold.
    """

    tensor: Tensor
    buffer: Tensor
    outside: Tensor
    canary: float

    def assert_untouched(self) -> None:
        """Raises AssertionError if an element around the tensor changed."""
        around = self.buffer[self.outside]
        expected = torch.full_like(around, self.canary)
        same = torch.equal(around.isnan(), expected.isnan()) and torch.equal(
            around.nan_to_num(), expected.nan_to_num()
        )
        assert same, "memory around the tensor was written"


def guarded(
    source: Tensor,
    *,
    channels_before: int = 3,
    channels_after: int = 2,
    border: int = 1,
    canary: float = float("nan"),
) -> Guarded:
    """A copy of `source` [N, C, H, W] as a channels-last slice of a buffer full of `canary`.

    Around the image lie `border` pixels, beside its channels more channels; its start is aligned to
    no vector. With NaN as canary, a kernel that uses what it reads outside shows it in its result.
    """
    n, c, h, w = source.shape
    channels = channels_before + c + channels_after
    flat = torch.full(
        ((n * (h + 2 * border) * (w + 2 * border)) * channels + 1,),
        canary,
        dtype=source.dtype,
        device=source.device,
    )

    def view(memory: Tensor) -> Tensor:
        images = memory[1:].view(n, h + 2 * border, w + 2 * border, channels).permute(0, 3, 1, 2)
        return images[
            :,
            channels_before : channels_before + c,
            border : border + h,
            border : border + w,
        ]

    outside = torch.ones_like(flat, dtype=torch.bool)
    view(outside).fill_(False)
    tensor = view(flat)
    tensor.copy_(source)
    return Guarded(tensor, flat, outside, canary)


def image(
    shape: Sequence[int],
    dtype: torch.dtype = torch.float32,
    *,
    kind: str = "normal",
    seed: int = 0,
) -> Tensor:
    """Channels-last data [N, C, H, W] from a fixed seed.

    Args:
        kind: "normal"; "offset": mean 1000 at variance 1, in which sums of squares and careless
            accumulation lose everything; "nonfinite": normal with NaN, both infinities, -0 and a
            subnormal strewn in.

    Raises:
        ValueError: for another kind.
    """
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(*shape, generator=generator, dtype=torch.float64)
    if kind == "offset":
        x = x + 1000
    elif kind == "nonfinite":
        strange = torch.tensor([float("nan"), float("inf"), -float("inf"), -0.0, 1e-42])
        if x.numel():
            where = torch.randint(x.numel(), (max(1, x.numel() // 50),), generator=generator)
            pick = torch.randint(len(strange), where.shape, generator=generator)
            x.view(-1)[where] = strange[pick].double()
    elif kind != "normal":
        raise ValueError(f"unknown kind {kind!r}; expected {', '.join(KINDS)}")
    return x.to(dtype).contiguous(memory_format=torch.channels_last)


def isa_levels() -> tuple[str, ...]:
    """Levels that the CPU kernels can be run on here; none without the extension."""
    return extension.cpu_isa_levels() if extension.load("cpu") else ()


@contextmanager
def isa(level: str) -> Iterator[None]:
    """Inside, the CPU kernels of this process run on `level`.

    Raises:
        ValueError: if the machine does not have it.
    """
    before = extension.cpu_isa()
    extension.select_cpu_isa(level)
    try:
        yield
    finally:
        extension.select_cpu_isa(before)


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Inside, torch uses `count` threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
