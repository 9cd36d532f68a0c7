"""Runner: per call, the program for these inputs, a new capture, the parts or the original."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from .capture import Capture, CaptureError, capture
from .gate import GATE
from .lower import Program, lower
from .options import Options
from .report import Row, skipped
from .watch import Exposure, Watch

MAX_PROGRAMS = 8
"""Captures per module: one that pins its sizes needs one per shape, and runs as it is beyond."""

MAX_ROUTES = 256
"""Input signatures remembered per module."""

_MISSING = object()
_CONVOLUTIONS = (nn.Conv2d, nn.Conv1d, nn.Conv3d, nn.ConvTranspose2d)


class Runner:
    """Runs one module through programs captured from it, or by its parts, or as it is.

    Whatever the inputs are, the result is the module's own: inputs that no capture serves lead to a
    new capture, inputs that cannot be captured to the original.
    """

    def __init__(
        self,
        module: nn.Module,
        options: Options,
        exposure: Exposure,
        prefix: str = "",
        captures: Sequence[Capture] = (),
    ) -> None:
        self.module = module
        self.options = options
        self.exposure = exposure
        self.prefix = prefix
        self.captures = list(captures)
        self.lock = threading.RLock()
        self.notes: list[str] = []
        self._reset()

    def _reset(self) -> None:
        self.programs: list[Program] = []
        self.routes: dict[Any, Program | None] = {}
        self.parts: nn.Module | None = None
        self.failure: CaptureError | None = None
        self.watch = Watch(self.module)
        self.epoch = self.exposure.epoch

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The module's result; inference only. To be called with gradients off."""
        if self.exposure.handed_out or self.exposure.epoch != self.epoch:
            self._catch_up()
        if len(args) == 1 and not kwargs and isinstance(args[0], Tensor):
            flat: Sequence[Any] = args
            spec, key = None, (args[0].dtype, args[0].shape, args[0].device)
        else:
            flat, spec = pytree.tree_flatten((args, kwargs))
            key = (*map(_signature, flat), str(spec))
        for value in flat:
            if isinstance(value, Tensor) and not is_ordinary(value):
                return self._run_original(args, kwargs)
        program = self.routes.get(key, _MISSING)
        if program is _MISSING:
            with GATE.locked(self.lock):
                program = self._route(key, flat, spec, args, kwargs)
        if isinstance(program, Program):
            outputs = program(flat)
            out_spec = program.capture.out_spec
            return outputs[0] if out_spec.is_leaf() else pytree.tree_unflatten(outputs, out_spec)
        result = self._run_parts(args, kwargs)
        # The inputs were valid, so there is no use in trying to capture for them again.
        self._remember(key, None)
        return result

    def rows(self) -> list[Row]:
        """The report's rows for this module, from its first program."""
        if self.programs:
            return self.programs[0].rows
        reason = self.failure.reason if self.failure is not None else "not_reached"
        detail = str(self.failure) if self.failure is not None else ""
        if self.parts is not None:
            return _part_rows(self.parts, self.module, self.prefix)
        convolutions = [
            skipped(_join(self.prefix, name), "conv", reason, detail)
            for name, module in self.module.named_modules()
            if isinstance(module, _CONVOLUTIONS)
        ]
        return convolutions or [skipped(self.prefix, "module", reason, detail)]

    def fused(self) -> bool:
        """Whether anything at all runs through a program."""
        parts = self.parts.modules() if self.parts is not None else ()
        return bool(self.programs) or any(p.runner.fused() for p in parts if isinstance(p, Part))

    def all_notes(self) -> Iterator[str]:
        yield from self.notes
        if self.parts is not None:
            for module in self.parts.modules():
                if isinstance(module, Part):
                    yield from module.runner.all_notes()

    def _route(
        self,
        key: Any,
        flat: Sequence[Any],
        spec: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Program | None:
        """Find or make the program for these inputs. Called under the lock."""
        if key in self.routes:
            return self.routes[key]
        program = self._find(flat, spec)
        if program is None and len(self.programs) < MAX_PROGRAMS:
            try:
                program = self._capture(args, kwargs)
            except CaptureError as error:
                if not self.programs:
                    self.failure = error
        if program is not None:
            self._remember(key, program)
            self.failure, self.parts = None, None
            self.notes.clear()
        return program

    def _remember(self, key: Any, program: Program | None) -> None:
        if len(self.routes) >= MAX_ROUTES:
            self.routes.clear()
        self.routes[key] = program

    def _find(self, flat: Sequence[Any], spec: Any) -> Program | None:
        for program in self.programs:
            if program.capture.accepts(flat) and _same_spec(program.capture, spec):
                return program
        for captured in self.captures:
            if captured.accepts(flat) and _same_spec(captured, spec):
                return self._add(captured)
        return None

    def _capture(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Program:
        reason = opaque(self.module, self.exposure)
        if reason is not None:
            raise CaptureError(*reason, divisible=self.module not in self.exposure.stateful)
        captured = capture(self.module, args, kwargs)
        if captured not in self.captures:
            self.captures.append(captured)
        return self._add(captured)

    def _add(self, captured: Capture) -> Program:
        try:
            program = lower(captured, self.module, self.options, self.prefix)
        except Exception as error:
            message = f"{type(error).__name__}: {error}"
            warnings.warn(
                f"cvfast failed on {self.prefix or 'the model'}, which runs as it is; "
                f"please report this: {message}",
                RuntimeWarning,
                stacklevel=2,
            )
            self.captures.remove(captured)
            raise CaptureError("internal_error", message) from error
        self.programs.append(program)
        self.watch.accept_weights()
        return program

    def _catch_up(self) -> None:
        """Pack weights that were written to; forget captures of a structure that changed."""
        epoch = self.exposure.epoch
        if self.watch.structure_changed():
            with self.lock:
                if self.watch.structure_changed():
                    self.captures = []
                    self._reset()
        elif epoch != self.epoch or self.watch.weights_changed():
            with self.lock:
                if epoch != self.epoch or self.watch.weights_changed():
                    for program in self.programs:
                        program.refresh(self.module)
                    self.watch.accept_weights()
        self.epoch = epoch

    def _run_original(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        with GATE.shared():
            return self.module.forward(*args, **kwargs)

    def _run_parts(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        failure = self.failure
        if failure is None or not failure.divisible or not _divisible(self.module):
            return self._run_original(args, kwargs)
        try:
            with GATE.locked(self.lock):
                if self.parts is None:
                    self.parts = split(self.module, self.options, self.exposure, self.prefix)
                    self.notes.append(
                        f"{self.prefix or 'the model'} runs by its parts "
                        f"({failure.reason}: {failure})"
                    )
                parts = self.parts
            with GATE.shared():
                return parts.forward(*args, **kwargs)
        except Exception as error:
            # The original decides whether the inputs were at fault: then it raises its own error.
            result = self._run_original(args, kwargs)
            self.parts = None
            message = f"{type(error).__name__}: {error}"
            self.failure = CaptureError("parts_failed", message, divisible=False)
            return result


def _divisible(module: nn.Module) -> bool:
    return not isinstance(module, torch.jit.ScriptModule) and any(True for _ in module.children())


class Part(nn.Module):
    """Stands for a module inside a copy of its parent, and behaves like it in all but speed."""

    def __init__(
        self, module: nn.Module, options: Options, exposure: Exposure, prefix: str
    ) -> None:
        super().__init__()
        self.__dict__.update(module.__dict__)
        self.__dict__["runner"] = Runner(module, options, exposure, prefix)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.runner(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["runner"].module, name)

    def __getitem__(self, index: Any) -> Any:
        return self.runner.module[index]

    def __iter__(self) -> Iterator[Any]:
        return iter(self.runner.module)

    def __len__(self) -> int:
        return len(self.runner.module)


def opaque(module: nn.Module, exposure: Exposure) -> tuple[str, str] | None:
    """Why a module cannot be captured whole: hooks, state of its own, a part in training mode."""
    for name, child in module.named_modules():
        path = name or "the module"
        if child.training:
            norm = isinstance(child, nn.modules.batchnorm._BatchNorm)
            return "bn_training" if norm else "training_mode", f"{path} is in training mode"
        if _hooked(child):
            return "hook_present", f"{path} has forward hooks"
        if child in exposure.stateful:
            return "stateful", f"the forward of {path} writes to its attributes"
    return None


def _hooked(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks)


def split(module: nn.Module, options: Options, exposure: Exposure, prefix: str) -> nn.Module:
    """A shallow copy of ``module`` whose children have runners of their own."""
    copy = module.__new__(type(module))
    copy.__dict__ = dict(module.__dict__)
    copy._modules = {
        name: None if child is None else _part(child, options, exposure, _join(prefix, name))
        for name, child in module._modules.items()
    }
    return copy


def _part(module: nn.Module, options: Options, exposure: Exposure, prefix: str) -> nn.Module:
    if not any(isinstance(m, _CONVOLUTIONS) for m in module.modules()):
        return module
    # Hooks and state must see the module itself, not a copy.
    itself = _hooked(module) or module in exposure.stateful
    if itself or isinstance(module, torch.jit.ScriptModule):
        return module
    if module.training or type(module).forward is nn.Module.forward:
        return split(module, options, exposure, prefix)
    return Part(module, options, exposure, prefix)


def _part_rows(copy: nn.Module, module: nn.Module, prefix: str) -> list[Row]:
    rows: list[Row] = []
    for name, child in module._modules.items():
        stand_in = copy._modules[name]
        path = _join(prefix, name)
        if child is None or stand_in is None:
            continue
        if isinstance(stand_in, Part):
            rows += stand_in.runner.rows()
        elif stand_in is not child:
            rows += _part_rows(stand_in, child, path)
        else:
            rows += _rows_as_it_is(child, path)
    return rows


def _rows_as_it_is(module: nn.Module, prefix: str) -> list[Row]:
    """Rows for the convolutions and batch norms of a module that runs itself."""
    rows: list[Row] = []
    for name, child in module.named_modules():
        path = _join(prefix, name)
        if isinstance(child, _CONVOLUTIONS):
            rows.append(skipped(path, "conv", "hook_present" if _hooked(module) else "stateful"))
        elif isinstance(child, nn.modules.batchnorm._BatchNorm):
            rows.append(skipped(path, "bn", "bn_training" if child.training else "bn_standalone"))
    return rows


def _join(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix and name else prefix or name


def is_ordinary(value: Tensor) -> bool:
    """Whether a program can take this tensor: no subclass, not empty, not sparse."""
    return (
        type(value) in (Tensor, nn.Parameter)
        and value.numel() > 0
        and value.layout is torch.strided
    )


def _signature(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.dtype, value.shape, value.device
    try:
        hash(value)
    except TypeError:
        return type(value), id(value)
    return type(value), value


def _same_spec(captured: Capture, spec: Any) -> bool:
    if spec is None:
        return captured.in_spec.num_leaves == 1 and str(captured.in_spec) == _SINGLE_TENSOR
    return bool(captured.in_spec == spec)


_SINGLE_TENSOR = str(pytree.tree_flatten(((0,), {}))[1])
