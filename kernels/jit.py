"""`jit`: Triton's decorator, with the choice between compiler and interpreter made at each launch.

`triton.jit` reads TRITON_INTERPRET when a kernel is defined, which ties a whole process to one of
the two. A `Kernel` reads it when it is launched: a test may interpret a kernel on the CPU and
compile the same kernel for an architecture without a GPU. Kernels decorated so call only each other
and builtins of `triton.language`, not functions such as `tl.sum` that Triton decorates itself.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

from triton import knobs
from triton.runtime.interpreter import InterpretedFunction
from triton.runtime.jit import JITFunction


class Kernel(JITFunction):
    """A kernel, or a function that kernels call: compiled, or with TRITON_INTERPRET=1 interpreted.

    Interpreted, it runs on the CPU, on CPU tensors.
    """

    def __getitem__(self, grid: Any) -> Any:
        return self._interpreted[grid] if knobs.runtime.interpret else super().__getitem__(grid)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Called by an interpreted kernel; in compiled ones it is inlined."""
        return self._interpreted.rewrite()(*args, **kwargs)

    @functools.cached_property
    def _interpreted(self) -> InterpretedFunction:
        return InterpretedFunction(self.fn)


def jit(function: Callable[..., Any]) -> Kernel:
    """A function that kernels call."""
    return Kernel(function)


def kernel(tensors: int) -> Callable[[Callable[..., Any]], Kernel]:
    """A kernel whose first `tensors` parameters are tensors, and numbers or constants the rest.

    Triton compiles anew for numbers that are 1 or divisible by 16; ours need not, since the
    alignment that matters is a constant. It does so for tensors that are not aligned to 16 bytes.
    """

    def decorate(function: Callable[..., Any]) -> Kernel:
        parameters = inspect.signature(function).parameters.values()
        plain = [p.name for p in parameters if p.annotation is inspect.Parameter.empty]
        return Kernel(function, do_not_specialize=plain[tensors:])

    return decorate
