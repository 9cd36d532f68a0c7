"""Loads the shared objects with the compiled kernels, and says why one is missing."""

from __future__ import annotations

import functools
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch

from cvfast import env

_REINSTALL = (
    "pip install --no-build-isolation --no-binary cvfast --force-reinstall --no-deps cvfast"
)
_BUILD_HERE = "pip install --no-build-isolation -e ."

_library = torch.library.Library("cvfast", "FRAGMENT")
_library.define("cpu_isa() -> str")
_library.define("cpu_isa_levels() -> str")
_library.define("cpu_select_isa(str level) -> ()")


@dataclass(frozen=True)
class Status:
    """Whether a shared object is in use.

    Attributes:
        name: "cpu" or "cuda".
        loaded: its operators are registered.
        reason: why not; empty if loaded.
        mend: the command that would change that; empty if loaded.
    """

    name: str
    loaded: bool
    reason: str = ""
    mend: str = ""

    def __bool__(self) -> bool:
        return self.loaded

    def __str__(self) -> str:
        if self.loaded:
            return f"{self.name} extension: loaded"
        return f"{self.name} extension: {self.reason}; mend with: {self.mend}"


@functools.cache
def load(name: str) -> Status:
    """Loads the shared object `name` ("cpu" or "cuda") unless that was tried before.

    Raises:
        ValueError: if CVFAST_CPU_ISA names a level that this machine does not have.
    """
    if env.DISABLE_EXTENSION.get():
        return Status(
            name,
            False,
            f"disabled by {env.DISABLE_EXTENSION.name}=1",
            f"unset {env.DISABLE_EXTENSION.name}",
        )
    path = Path(__file__).parent / f"_C_{name}.so"
    mend = _BUILD_HERE if (path.parents[1] / "setup.py").exists() else _REINSTALL
    if not path.exists():
        return Status(name, False, "not built", mend)
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        return Status(name, False, f"failed to load: {error}", mend)
    if name == "cpu" and (level := env.CPU_ISA.get()) is not None:
        try:
            select_cpu_isa(level)
        except ValueError as error:
            raise ValueError(f"environment variable {env.CPU_ISA.name}: {error}") from None
    return Status(name, True)


@functools.cache
def warn_missing(name: str) -> None:
    """Says once that operators run on the reference implementation, and what would change that."""
    status = load(name)
    if not status:
        warnings.warn(
            f"cvfast runs on its reference implementation, which is slower. {status}", stacklevel=2
        )


def cpu_isa_levels() -> tuple[str, ...]:
    """Instruction-set levels that this machine can run, lowest first; needs the cpu extension."""
    return tuple(torch.ops.cvfast.cpu_isa_levels().split(","))


def cpu_isa() -> str:
    """The level that the CPU kernels run on: "portable", "avx2", "avx512" or "avx512_bf16"."""
    return torch.ops.cvfast.cpu_isa()


def select_cpu_isa(level: str) -> None:
    """Makes the CPU kernels of this process run on `level`.

    Raises:
        ValueError: if the machine does not have it; the message names those that it has.
    """
    available = cpu_isa_levels()
    if level not in available:
        raise ValueError(
            f"instruction-set level {level!r} is not available; this machine has "
            f"{', '.join(available)}"
        )
    torch.ops.cvfast.cpu_select_isa(level)
