"""Loads the shared objects with the compiled kernels, and says why one is missing."""

from __future__ import annotations

import functools
import importlib.util
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
_library.define("cpu_amx_takes_floats(int pixels, int in_channels, int out_channels) -> bool")
_library.define("cpu_l2_bytes() -> int")
_library.define("cpu_l3_bytes() -> int")


@dataclass(frozen=True)
class Status:
    """Whether a shared object is in use.

    Attributes:
        name: "cpu", "cuda" or "triton".
        loaded: it can be used.
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
        kind = "package" if self.name == "triton" else "extension"
        if self.loaded:
            return f"{self.name} {kind}: loaded"
        return f"{self.name} {kind}: {self.reason}; mend with: {self.mend}"


def load(name: str) -> Status:
    """Makes the kernels of `name` ready: loads the shared object of "cpu" or "cuda" unless that was
    tried before, or looks for the package of "triton".

    Raises:
        ValueError: if CVFAST_CPU_ISA names a level that this machine does not have.
    """
    if name == "triton":
        return _find_triton()
    return _load(name, env.CUDA_EMULATION.get() if name == "cuda" else None)


@functools.cache
def _find_triton() -> Status:
    if importlib.util.find_spec("triton") is None:
        return Status("triton", False, "not installed", "pip install triton")
    return Status("triton", True)


@functools.cache
def _load(name: str, emulation: str | None) -> Status:
    if env.DISABLE_EXTENSION.get():
        return Status(
            name,
            False,
            f"disabled by {env.DISABLE_EXTENSION.name}=1",
            f"unset {env.DISABLE_EXTENSION.name}",
        )
    if name == "cuda" and emulation is None and torch.version.cuda is None:
        return Status(name, False, "PyTorch is a CPU build", "install a CUDA build of PyTorch")
    path = Path(emulation or Path(__file__).parent / f"_C_{name}.so")
    checkout = (Path(__file__).parents[1] / "setup.py").exists()
    mend = _BUILD_HERE if checkout else _REINSTALL
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
    """The level that the CPU kernels run on, one of `cpu_isa_levels()`."""
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
    global _selected_isa
    torch.ops.cvfast.cpu_select_isa(level)
    _selected_isa = level


_selected_isa: str | None = None


def selected_cpu_isa() -> str | None:
    """What :func:`select_cpu_isa` was last given; None before: the best level."""
    return _selected_isa


def cpu_amx_takes_floats(pixels: int, in_channels: int, out_channels: int) -> bool:
    """Whether AMX multiplies a 1x1 convolution of float32, at the level in use; needs the cpu
    extension."""
    return torch.ops.cvfast.cpu_amx_takes_floats(pixels, in_channels, out_channels)


def cpu_l2_bytes() -> int:
    """Bytes of the L2 cache that the CPU kernels cut their work for; needs the cpu extension."""
    return torch.ops.cvfast.cpu_l2_bytes()


def cpu_l3_bytes() -> int:
    """Bytes of the L3 cache, of which `cvfast.engine.stages` counts 32 MB at most; needs the cpu
    extension. Those of L2 where the system lists no L3."""
    return torch.ops.cvfast.cpu_l3_bytes()
