"""Named ranges on the time line of Nsight Systems and Nsight Compute.

Off by default, and then all but free. `enable` turns them on:

    from cvfast.perf import nvtx

    nvtx.enable()
    with nvtx.range(nvtx.name("mobilenet_v2", "features.1.conv.0", "depthwise+bn+relu6")):
        ...

Ranges of cvfast are called ``cvfast/<model>/<fqn>/<pattern>``: the network, the module's qualified
name in it, and what was fused there.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch

Emitter = Callable[[str], AbstractContextManager[object]]

_OFF = nullcontext()
_emitter: Emitter | None = None


def range(name: str) -> AbstractContextManager[object]:
    """A context that shows as a range called `name`, if ranges are enabled."""
    return _OFF if _emitter is None else _emitter(name)


def name(model: str, fqn: str, pattern: str) -> str:
    """The name of a range: ``cvfast/<model>/<fqn>/<pattern>``."""
    return f"cvfast/{model}/{fqn}/{pattern}"


def enabled() -> bool:
    """Whether ranges are on."""
    return _emitter is not None


def enable(emitter: Emitter | None = None) -> bool:
    """Turns ranges on, for this process.

    Args:
        emitter: makes the context of a name; default, the package ``nvtx`` if it is installed,
            else PyTorch's binding where there is a CUDA device.

    Returns:
        Whether ranges are on: False if there is nothing to emit them with.
    """
    global _emitter
    _emitter = emitter or _find()
    return _emitter is not None


def disable() -> None:
    """Turns ranges off."""
    global _emitter
    _emitter = None


def _find() -> Emitter | None:
    try:
        return importlib.import_module("nvtx").annotate
    except ImportError:
        return torch.cuda.nvtx.range if torch.cuda.is_available() else None
