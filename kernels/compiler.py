"""Compiling kernels for an architecture whose GPU is not here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel

from .jit import Kernel

_ELEMENTS = {
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.int64: "*i64",
    torch.int32: "*i32",
}


Types = torch.dtype | Sequence["Types"]
"""Of a tensor, or of a tuple of them."""


def source(
    kernel: Kernel,
    dtypes: Sequence[Types],
    constants: Mapping[str, Any],
    tuples: Mapping[str, Sequence[Any]] | None = None,
) -> ASTSource:
    """What Triton compiles of a kernel whose tensors are aligned to 16 bytes.

    Args:
        dtypes: of its tensors, which are its first parameters; some may be tuples of tensors.
        constants: its constant parameters by name; what is left are 32-bit numbers.
        tuples: those that are tuples of numbers, each as long as the ones given here.
    """
    aligned: dict[tuple[int, ...], list[list[Any]]] = {}

    def tensors(types: Types, *path: int) -> Any:
        if isinstance(types, torch.dtype):
            aligned[path] = [["tt.divisibility", 16]]
            return _ELEMENTS[types]
        return tuple(tensors(inner, *path, i) for i, inner in enumerate(types))

    signature: dict[str, Any] = dict.fromkeys(kernel.arg_names, "i32")
    signature.update(dict.fromkeys(constants, "constexpr"))
    signature.update({name: _numbers(values) for name, values in (tuples or {}).items()})
    for i, (name, types) in enumerate(zip(kernel.arg_names, dtypes, strict=False)):
        signature[name] = tensors(types, i)
    return ASTSource(kernel, signature, dict(constants), aligned)


def _numbers(values: Any) -> Any:
    return tuple(map(_numbers, values)) if isinstance(values, Sequence) else "i32"


def compiled(source: ASTSource, options: Mapping[str, int], capability: int) -> CompiledKernel:
    """Compiles what `source` made; neither needs a GPU nor heeds TRITON_INTERPRET.

    Args:
        options: of the launch, such as num_warps and num_stages.
        capability: of the architecture, such as 90.
    """
    with knobs.runtime.scope():
        knobs.runtime.interpret = False
        return triton.compile(
            source, target=GPUTarget("cuda", capability, 32), options=dict(options)
        )
