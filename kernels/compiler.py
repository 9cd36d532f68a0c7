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


def source(
    kernel: Kernel, dtypes: Sequence[torch.dtype], constants: Mapping[str, Any]
) -> ASTSource:
    """What Triton compiles of a kernel whose tensors are aligned to 16 bytes.

    Args:
        dtypes: of its tensors, which are its first parameters.
        constants: its constant parameters by name; what is left are 32-bit numbers.
    """
    signature = dict.fromkeys(kernel.arg_names, "i32")
    signature.update(dict.fromkeys(constants, "constexpr"))
    pointers = kernel.arg_names[: len(dtypes)]
    signature.update({n: _ELEMENTS[dtype] for n, dtype in zip(pointers, dtypes, strict=True)})
    aligned = {(i,): [["tt.divisibility", 16]] for i in range(len(dtypes))}
    return ASTSource(kernel, signature, dict(constants), aligned)


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
