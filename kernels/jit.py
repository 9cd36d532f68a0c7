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

import numpy as np
from triton import knobs
from triton import language as tl
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpretedFunction, TensorHandle, interpreter_builder
from triton.runtime.jit import JITFunction


def _widened(operand: TensorHandle) -> TensorHandle:
    if operand.dtype.scalar != tl.bfloat16:
        return operand
    bits = operand.data.astype(np.uint32) << 16
    return TensorHandle(bits.view(np.float32), tl.float32)


def _dot(a: TensorHandle, b: TensorHandle, *rest: Any) -> TensorHandle:
    """A product of the interpreter, which in Triton 3.6 takes bfloat16 for its bits' integers."""
    return type(interpreter_builder).create_dot(
        interpreter_builder, _widened(a), _widened(b), *rest
    )


interpreter_builder.create_dot = _dot


def _patch_tensor(tensor: Any, scope: Any) -> None:
    _patch_lang_tensor(tensor, scope)
    # The interpreter's scalars are arrays of one element, which NumPy 2.4 no longer takes for
    # numbers: loops from one scalar to another would fail.
    scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())


_patch_lang_tensor = interpreter._patch_lang_tensor
interpreter._patch_lang_tensor = _patch_tensor


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
