"""An operator's kernels on random inputs: what validates, tunes and times kernels knows of them.

Each operator's module offers `example(problem, activation, *, device, seed=0)`, which makes one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Results = Tensor | Sequence[Tensor]


@dataclass(frozen=True)
class Example:
    """One call of an operator: its inputs, its kernels, and its definition.

    Attributes:
        inputs: tensors of the problem's dtype, images channels-last, on one device.
        definition: the same in plain PyTorch, called with `inputs` in any floating dtype; what a
            user without cvfast would run.
        kernel: called with a backend and launch parameters, runs that backend's kernel on `inputs`,
            prepacked before; launch None means those of the tuned table or the heuristic.
    """

    inputs: Sequence[Tensor | None]
    definition: Callable[..., Results]
    kernel: Callable[[str, Any], Results]

    def run(self, backend: str, launch: Any = None) -> tuple[Tensor, ...]:
        """The kernel's results.

        Args:
            backend: "triton" or "cuda".
            launch: a `Launch` of `cvfast.launch.<op>.<backend>`; None for the default one.
        """
        return _as_tuple(self.kernel(backend, launch))

    def reference(self, dtype: torch.dtype) -> tuple[Tensor, ...]:
        """The definition's results on the same inputs, cast to `dtype`."""
        return self.evaluate(None if t is None else t.to(dtype) for t in self.inputs)

    def evaluate(self, inputs: Iterable[Tensor | None]) -> tuple[Tensor, ...]:
        """The definition's results on other inputs."""
        return _as_tuple(self.definition(*inputs))


def _as_tuple(results: Results) -> tuple[Tensor, ...]:
    return (results,) if isinstance(results, Tensor) else tuple(results)


def normal(
    shape: Sequence[int], dtype: torch.dtype, *, device: str | torch.device, seed: int
) -> Tensor:
    """Numbers drawn from N(0, 1); with four dimensions channels-last.

    On the meta device, which has none, the shape alone.
    """
    if torch.device(device).type == "meta":
        values = torch.empty(*shape, device=device)
    else:
        generator = torch.Generator(device).manual_seed(seed)
        values = torch.randn(*shape, generator=generator, device=device)
    layout = torch.channels_last if len(shape) == 4 else torch.contiguous_format
    return values.to(dtype=dtype, memory_format=layout)


def whole(
    shape: Sequence[int], dtype: torch.dtype, *, device: str | torch.device, seed: int
) -> Tensor:
    """As `normal`, but whole numbers from -2 to 2, whose small sums every dtype holds exactly."""
    values = normal(shape, torch.float32, device=device, seed=seed)
    return values.round().clamp(-2, 2).to(dtype)
