"""Every environment variable that cvfast reads at run time, in one table.

Build-time variables are documented in `setup.py`.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

T = TypeVar("T")


@dataclass(frozen=True)
class Variable(Generic[T]):
    """An environment variable: read anew at each `get()`, so that tests may change it.

    Raises:
        ValueError: from `get()`, if the text does not parse; the message names the variable.
    """

    name: str
    default: T
    parse: Callable[[str], T]
    doc: str

    def get(self) -> T:
        text = os.environ.get(self.name)
        if text is None or text == "":
            return self.default
        try:
            return self.parse(text)
        except ValueError as error:
            raise ValueError(f"environment variable {self.name}={text!r}: {error}") from None


def _flag(text: str) -> bool:
    if text not in ("0", "1"):
        raise ValueError("expected 0 or 1")
    return text == "1"


def _file(text: str) -> str:
    if not os.path.isfile(text):
        raise ValueError("there is no such file")
    return text


def _json_file(text: str) -> str:
    if not text.endswith(".json"):
        raise ValueError("expected a path that ends in .json")
    return text


def _one_of(*choices: str) -> Callable[[str], str]:
    def parse(text: str) -> str:
        if text not in choices:
            raise ValueError(f"expected one of {', '.join(choices)}")
        return text

    return parse


CPU_ISA: Variable[str | None] = Variable(
    "CVFAST_CPU_ISA",
    None,
    _one_of("portable", "avx2", "avx512", "avx512_bf16", "avx512_amx", "neon"),
    "Instruction-set level of the CPU kernels: portable; avx2, avx512, avx512_bf16 or avx512_amx "
    "on x86; neon on ARM. Default: the highest that the machine has.",
)

DISABLE_EXTENSION: Variable[bool] = Variable(
    "CVFAST_DISABLE_EXTENSION",
    False,
    _flag,
    "1: load no compiled extension, and run on the reference implementations.",
)

CUDA_EMULATION: Variable[str | None] = Variable(
    "CVFAST_CUDA_EMULATION",
    None,
    _file,
    "Path of the CUDA kernels compiled for the host (docs/emulation.md): backend cuda then takes "
    "CPU tensors. For tests.",
)

MEASURED: Variable[str | None] = Variable(
    "CVFAST_MEASURED",
    None,
    _json_file,
    'File in which `select="measure"` keeps what it measured on this machine. Default: '
    "~/.cache/cvfast/measured.json.",
)

VARIABLES: tuple[Variable[str | None] | Variable[bool], ...] = (
    CPU_ISA,
    DISABLE_EXTENSION,
    CUDA_EMULATION,
    MEASURED,
)

# Triton's own switch, which it reads as any true word; "1" is what its documentation sets.
_TRITON_INTERPRET = Variable("TRITON_INTERPRET", False, lambda text: text == "1", "")


def on_cpu(backend: str) -> bool:
    """Whether a GPU backend's kernels run on the CPU in this process, interpreted or emulated."""
    if backend == "triton":
        return _TRITON_INTERPRET.get()
    return backend == "cuda" and CUDA_EMULATION.get() is not None
