"""Which implementation serves an operator, and why another does not.

An operator registers, per backend, a check that looks at the arguments of one call and answers
`None` (served) or a `Reason`. `select` walks a table: it never tries and catches.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from cvfast import env, extension

BACKENDS = ("reference", "cpu", "triton", "cuda")

# What `auto` prefers, per device type; devices that are not listed run the reference.
_PREFERENCE: dict[str, tuple[str, ...]] = {"cpu": ("cpu",), "cuda": ("cuda", "triton")}
_DEVICES = {"cpu": "cpu", "triton": "cuda", "cuda": "cuda"}
OLDEST_CAPABILITY = (8, 0)


class Reason(NamedTuple):
    """Why a backend does not serve a call: a stable code, and a sentence for people."""

    code: str
    text: str

    def __str__(self) -> str:
        return f"{self.text} [{self.code}]"


class Unsupported(RuntimeError):
    """An explicit request that the backend cannot serve; `.reason` says why."""

    def __init__(self, op: str, backend: str, reason: Reason) -> None:
        super().__init__(f"cvfast.ops.{op}: backend {backend!r} cannot serve this call: {reason}")
        self.reason = reason


Check = Callable[..., "Reason | None"]
_checks: dict[tuple[str, str], Check] = {}


def register(op: str, backend: str) -> Callable[[Check], Check]:
    """Decorator: the check that says whether `backend` serves a call of `op`."""

    def add(check: Check) -> Check:
        if (op, backend) in _checks:
            raise ValueError(f"{op!r} has a check for {backend!r} already")
        _checks[op, backend] = check
        return check

    return add


def wrong_device(backend: str, device: torch.device) -> Reason | None:
    """The reason if the kernels of `backend` do not run on `device`; `None` if they do.

    The GPU backends take CPU tensors too where their kernels are interpreted (`TRITON_INTERPRET`)
    or emulated (`CVFAST_CUDA_EMULATION`), as the tests do.
    """
    wanted = _DEVICES[backend]
    if device.type == "cpu" and env.on_cpu(backend):
        return None
    if device.type != wanted:
        return Reason("device", f"x is on {device}, the kernel runs on {wanted}")
    if wanted == "cuda" and (found := _capability(device)) < OLDEST_CAPABILITY:
        oldest = "sm_{}{}".format(*OLDEST_CAPABILITY)
        return Reason("device", f"{device} is an sm_{found[0]}{found[1]}; kernels need {oldest}")
    return None


def wrong_layout(image: torch.Tensor, name: str = "x") -> Reason | None:
    """The reason if the channels of `image` [N, C, H, W], called `name`, are not adjacent."""
    if image.shape[1] == 1 or image.stride(1) == 1:
        return None
    return Reason(
        "layout",
        f"{name} is not channels-last (stride 1 along C); convert it once with "
        f"{name}.contiguous(memory_format=torch.channels_last)",
    )


@functools.cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


def _unavailable(backend: str) -> tuple[str, str] | None:
    status = extension.load(backend)
    return None if status else ("no_extension", str(status))


def _warn_missing(backend: str) -> bool:
    extension.warn_missing(backend)
    return True


# What torch.compiler.assume_constant_result does, without its import of Dynamo and Triton (1.2 s).
for _function in (_unavailable, _warn_missing, wrong_device):
    _function._dynamo_marked_constant = True  # type: ignore[union-attr]


def supports(op: str, backend: str, *args: Any, **kwargs: Any) -> Reason | None:
    """Whether `backend` serves this call of `op`: `None` if so, else the reason.

    Raises:
        ValueError: if there is no backend of that name.
    """
    if backend not in BACKENDS:
        raise ValueError(f"unknown backend {backend!r}; expected auto, {', '.join(BACKENDS)}")
    if backend == "reference":
        return None
    check = _checks.get((op, backend))
    if check is None:
        return Reason("no_backend", f"{op} has no {backend} implementation")
    reason = check(*args, **kwargs)
    if reason is None and (missing := _unavailable(backend)) is not None:
        return Reason(*missing)
    return reason


def preferred(device: torch.device) -> tuple[str, ...]:
    """The backends that `"auto"` tries on a device before the reference, best first."""
    return _PREFERENCE.get(device.type, ())


def select(op: str, backend: str, device: torch.device, *args: Any, **kwargs: Any) -> str:
    """The backend that serves this call: `backend` itself, or what `"auto"` comes to.

    Where `auto` falls back on the reference because an extension is missing, it warns once.

    Raises:
        Unsupported: if an explicit `backend` cannot serve the call.
    """
    if backend != "auto":
        reason = supports(op, backend, *args, **kwargs)
        if reason is not None:
            raise Unsupported(op, backend, reason)
        return backend
    missing = []
    for candidate in preferred(device):
        reason = supports(op, candidate, *args, **kwargs)
        if reason is None:
            return candidate
        if reason.code == "no_extension":
            missing.append(candidate)
    for candidate in missing:
        _warn_missing(candidate)
    return "reference"
