"""OptimizedModule: the original network to its user in everything but speed."""

from __future__ import annotations

import copy
import threading
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from .attributes import Attributes, undone
from .capture import Capture
from .gate import GATE
from .options import Options
from .report import Report
from .runner import Runner, is_ordinary
from .verify import Verification, VerificationError, compare_layers, verify
from .watch import Exposure, Watch

_SHARED = (
    "_parameters", "_buffers", "_non_persistent_buffers_set", "_modules",
    "_forward_hooks", "_forward_pre_hooks",
    "_forward_hooks_with_kwargs", "_forward_hooks_always_called", "_forward_pre_hooks_with_kwargs",
    "_backward_hooks", "_backward_pre_hooks", "_state_dict_hooks", "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks", "_load_state_dict_post_hooks",
)  # fmt: skip
"""What nn.Module keeps in dictionaries: one set of them serves the original and the wrapper."""


class OptimizedModule(nn.Module):
    """A network that runs on fused kernels; made by :func:`cvfast.optimize`.

    It holds a copy of the network it was made from and looks like it: the same ``state_dict``,
    parameters, buffers, sub-modules and attributes. Written weights, replaced sub-modules and new
    hooks are noticed at the next call. In training mode, under autocast, inside another trace, with
    inputs that require gradients, and for empty inputs it runs the original. Safe to call from
    several threads.
    """

    report: Report
    """What was fused and what was not; without example inputs, filled in at the first call."""

    def __init__(self, original: nn.Module, options: Options) -> None:
        super().__init__()
        state = self.__dict__
        for name in _SHARED:
            state[name] = original.__dict__[name]
        state["training"] = original.training
        state["_network"] = original
        state["_trainable"] = None
        state["_tracked"] = None
        state["_options"] = options
        state["_lock"] = threading.RLock()
        state["_warned"] = set()
        state["_exposure"] = Exposure()
        state["report"] = Report(type(original).__name__)
        self._bind()

    @property
    def original(self) -> nn.Module:
        """The network itself, on the same parameters and buffers."""
        self._exposure.handed_out = True
        return cast(nn.Module, self._network)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        # nn.Module.__call__ belongs to the tracer while another thread traces; see
        # cvfast.optimize.gate.
        if self._compiled_call_impl is not None:
            return self._compiled_call_impl(*args, **kwargs)
        return self._call_impl(*args, **kwargs)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return self._dispatch(args, kwargs)
        except Exception as error:
            programs = self._runner.programs
            if programs and hasattr(error, "add_note"):
                taken = ", ".join(map(str, programs[0].capture.specs))
                error.add_note(f"cvfast: this network was optimised for inputs ({taken})")
            raise

    def _dispatch(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if torch.compiler.is_dynamo_compiling():
            return self._network.forward(*args, **kwargs)
        if torch.compiler.is_compiling():
            GATE.wait()
        if not self._eligible(args, kwargs):
            return self._run_original(args, kwargs)
        if not self._checked:
            self._check(args, kwargs)
        if self._disabled:
            return self._run_original(args, kwargs)
        if not torch.is_grad_enabled():
            return self._run(*args, **kwargs)
        with torch.no_grad():
            result = self._run(*args, **kwargs)
        if self._wants_gradients():
            return _without_parameter_gradients(result, self._tracked_outputs(args, kwargs))
        return result

    def prepare(self, *args: Any, **kwargs: Any) -> None:
        """What the first call would do before it runs: capture, verify and report.

        Leaves the inputs and the network's state as they are.
        """
        if not self._checked and self._eligible(args, kwargs):
            self._check(args, kwargs)

    def _run_original(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        with GATE.shared():
            return self._network.forward(*args, **kwargs)

    def train(self, mode: bool = True) -> OptimizedModule:
        """Training mode runs the original; evaluation mode the kernels, on the weights of then."""
        self._network.train(mode)
        self.__dict__["training"] = mode
        self._exposure.epoch += 1
        if mode:
            self._warn_once(
                "train",
                "cvfast: in training mode the original network runs; "
                ".eval() returns to the fused kernels",
            )
        return self

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        return self.original.state_dict(*args, **kwargs)

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        result = self._network.load_state_dict(*args, **kwargs)
        self._exposure.epoch += 1
        return result

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        # Called when a parent module loads; its recursion then writes to the shared sub-modules.
        self.original._load_from_state_dict(*args, **kwargs)

    def _apply(self, *args: Any, **kwargs: Any) -> OptimizedModule:
        self._network._apply(*args, **kwargs)
        self._bind()
        return self

    def named_modules(self, *args: Any, **kwargs: Any) -> Any:
        self._exposure.handed_out = True
        return super().named_modules(*args, **kwargs)

    def named_children(self) -> Any:
        self._exposure.handed_out = True
        return super().named_children()

    def _named_members(self, *args: Any, **kwargs: Any) -> Any:
        self._exposure.handed_out = True
        return super()._named_members(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        self._exposure.handed_out = True
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self._network, name)

    def __setattr__(self, name: str, value: Any) -> None:
        if "_network" not in self.__dict__ or name == "_compiled_call_impl":
            super().__setattr__(name, value)
        else:
            setattr(self._network, name, value)
            # What forward cannot have read, such as what a hook stores, changes no capture.
            if name in self._names or isinstance(value, (nn.Module, nn.Parameter)):
                self._bind()

    def __delattr__(self, name: str) -> None:
        delattr(self._network, name)
        self._bind()

    def __getitem__(self, index: Any) -> Any:
        return self.original[index]  # type: ignore[index]

    def __iter__(self) -> Iterator[Any]:
        return iter(self.original)  # type: ignore[call-overload]

    def __len__(self) -> int:
        return len(self.original)  # type: ignore[arg-type]

    def __bool__(self) -> bool:
        return True

    def __repr__(self) -> str:
        return f"OptimizedModule[{self.report.summary()}](\n{self._network!r}\n)"

    def __deepcopy__(self, memo: dict[int, Any]) -> OptimizedModule:
        twin = OptimizedModule(copy.deepcopy(self._network, memo), self._options)
        if self._working is self._network:
            twin._bind(self._runner.captures)
        twin.__dict__.update(
            _checked=self._checked,
            _disabled=self._disabled,
            report=copy.deepcopy(self.report, memo),
        )
        memo[id(self)] = twin
        return twin

    def __reduce__(self) -> tuple[Any, ...]:
        # Graphs and packed weights are not data to keep: they are made again at the first call.
        return OptimizedModule, (self._network, self._options)

    def _bind(self, captures: list[Capture] | None = None) -> None:
        """Start over on the original as it is now, to be checked anew; captures may be kept."""
        self.__dict__["_checked"] = False
        self.__dict__["_disabled"] = self._options.dry_run
        working, dtype = self._network, self._options.dtype
        if dtype is not None:
            working = copy.deepcopy(working).to(dtype)
        self.__dict__["_working"] = working
        self.__dict__["_result_dtype"] = _dtype_of(self._network)
        self.__dict__["_tracked"] = None
        self.__dict__["_names"] = self._network.__dict__.keys() | dir(type(self._network))
        self.__dict__["_runner"] = Runner(
            working, self._options, self._exposure, captures=captures or ()
        )
        self.__dict__["_watch"] = Watch(self._network) if dtype is not None else None

    def _run(self, *args: Any, **kwargs: Any) -> Any:
        dtype = self._options.dtype
        if dtype is None:
            return self._runner(*args, **kwargs)
        stale = self._exposure.handed_out or self._exposure.epoch != self._runner.epoch
        if stale and (self._watch.structure_changed() or self._watch.weights_changed()):
            with self._lock:
                self._bind()
        args, kwargs = _cast(args, dtype), kwargs and _cast(kwargs, dtype)
        return _cast(self._runner(*args, **kwargs), self._result_dtype)

    def _eligible(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Whether this call may leave the original path."""
        if self.training:
            return False
        if torch.compiler.is_compiling() or torch.jit.is_tracing():
            return False
        if torch._C._functorch.peek_interpreter_stack() is not None:
            return False
        leaves: Sequence[Any] = args
        if len(args) != 1 or kwargs or not isinstance(args[0], Tensor):
            leaves = [v for v in pytree.tree_leaves((args, kwargs)) if isinstance(v, Tensor)]
        recording = torch.is_grad_enabled()
        for tensor in leaves:
            if (recording and tensor.requires_grad) or not is_ordinary(tensor):
                return False
        if leaves and torch.is_autocast_enabled(leaves[0].device.type):
            self._warn_once(
                "autocast",
                "cvfast: under autocast the original network runs; for low precision on the fused "
                "kernels use cvfast.optimize(model, dtype=torch.bfloat16)",
            )
            return False
        return True

    def _check(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """First call: capture, verify and report."""
        with GATE.locked(self._lock):
            if self._checked:
                return
            start = time.perf_counter()
            self.report.notes.clear()
            # The network may draw random numbers: the caller's next ones must be those of one call.
            random_state = torch.random.fork_rng(_cuda_devices(args, kwargs))
            with torch.no_grad(), undone(self._network), random_state:
                self._observe(args, kwargs)
                try:
                    self._run(*_cloned(args), **_cloned(kwargs))
                except Exception as error:
                    self._disable(error, args, kwargs)
                verification = self._verify(args, kwargs)
            self._fill_report(verification, args, kwargs, time.perf_counter() - start)
            self.__dict__["_checked"] = True
            if verification is not None and not verification.ok:
                self._reject(verification)
            elif self._options.on_unsupported == "raise" and not self._options.dry_run:
                self._require_coverage()

    def _observe(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """One run of the original, to see which modules write to their own attributes, which a
        capture would not do, and which outputs require gradients."""
        attributes = Attributes(self._network)
        no_memory = torch.autograd.graph.saved_tensors_hooks(_nothing, _nothing)
        with GATE.shared(), torch.enable_grad(), no_memory:
            outputs = self._network.forward(*_cloned(args), **_cloned(kwargs))
        stateful = set(attributes.restore())
        for ours, working in zip(self._network.modules(), self._working.modules(), strict=True):
            if ours in stateful:
                self._exposure.stateful.add(working)
        if not torch.is_inference_mode_enabled():
            self.__dict__["_tracked"] = [
                isinstance(leaf, Tensor) and leaf.requires_grad
                for leaf in pytree.tree_leaves(outputs)
            ]

    def _disable(self, error: Exception, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """After a failure of ours; one that the original shares is raised by it."""
        self._run_original(_cloned(args), _cloned(kwargs))
        self.__dict__["_disabled"] = True
        message = f"{type(error).__name__}: {error}"
        self.report.notes.append(f"internal_error: {message}")
        warnings.warn(
            f"cvfast failed on {self.report.model}, which runs as it is; please report this: "
            f"{message}",
            RuntimeWarning,
            stacklevel=5,
        )

    def _verify(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Verification | None:
        failed = self._disabled and not self._options.dry_run
        if failed or self._options.verify == "off" or not self._runner.fused():
            return None
        eager, dtype = self._working, self._options.dtype
        if dtype is not None:
            eager = _Cast(self._working, dtype, self._result_dtype)
        return verify(self._run, eager, self._network, args, kwargs)

    def _fill_report(
        self,
        verification: Verification | None,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        seconds: float,
    ) -> None:
        report, runner = self.report, self._runner
        report.rows = runner.rows()
        report.verification = verification
        report.seconds = seconds
        report.notes += runner.all_notes()
        if self._options.dry_run:
            report.notes.append("dry run: the original network runs")
        if not runner.programs or (self._disabled and not self._options.dry_run):
            return
        program = runner.programs[0]
        flat = pytree.tree_leaves(_cast((args, kwargs), self._options.dtype))
        report.layout_copies = program.count_layout_copies(flat)
        schedule = program.schedule(flat) if program.planned else None
        report.execution = schedule.describe() if schedule is not None else None
        disagrees = verification is not None and not verification.ok
        if self._options.verify == "layers" or disagrees:
            try:
                verdicts = compare_layers(program, self._working, self._network, flat)
            except Exception as error:
                report.notes.append(f"layers were not compared: {type(error).__name__}: {error}")
                return
            for site, (_, verdict) in zip(program.sites, verdicts, strict=True):
                site.row.max_error = verdict.max_error
                if disagrees and not verdict.ok and not verification.first_disagreement:  # type: ignore[union-attr]
                    verification.first_disagreement = site.row.module  # type: ignore[union-attr]

    def _reject(self, verification: Verification) -> None:
        message = (
            f"cvfast: the optimised {self.report.model} differs from the original: {verification}"
        )
        self.__dict__["_disabled"] = True
        if self._options.on_unsupported == "raise":
            raise VerificationError(message)
        for row in self.report.fused:
            row.status, row.reason = "failed", "verification_failed"
        warnings.warn(f"{message}; the original runs instead", RuntimeWarning, stacklevel=4)

    def _require_coverage(self) -> None:
        left = [
            row for row in self.report.rows if row.status != "fused" and row.reason != "user_filter"
        ]
        if left:
            first = left[0]
            raise RuntimeError(
                f"cvfast: {len(left)} sites of {self.report.model} cannot be fused, the first is "
                f"{first.module or '(root)'} ({first.pattern}): {first.reason}: {first.detail}. "
                'on_unsupported="skip" leaves them as they are'
            )

    def _wants_gradients(self) -> bool:
        if self._exposure.handed_out or self._trainable is None:
            trainable = any(p.requires_grad for p in self._network.parameters())
            self.__dict__["_trainable"] = trainable
        return cast(bool, self._trainable)

    def _tracked_outputs(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[bool]:
        """Which outputs of the original require gradients."""
        if self._tracked is None:
            random_state = torch.random.fork_rng(_cuda_devices(args, kwargs))
            with undone(self._network), random_state:
                self._observe(args, kwargs)
        return cast("list[bool]", self._tracked)

    def _warn_once(self, key: str, message: str) -> None:
        if key not in self._warned:
            self._warned.add(key)
            warnings.warn(message, stacklevel=3)


class _Cast(nn.Module):
    """A network of another dtype, with inputs cast on the way in and results cast back."""

    def __init__(
        self, module: nn.Module, dtype: torch.dtype, result_dtype: torch.dtype | None
    ) -> None:
        super().__init__()
        self.module = module
        self.dtype = dtype
        self.result_dtype = result_dtype

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        args, kwargs = _cast((args, kwargs), self.dtype)
        return _cast(self.module.forward(*args, **kwargs), self.result_dtype)


def _dtype_of(module: nn.Module) -> torch.dtype | None:
    """The dtype that a network works in, by its first floating-point parameter."""
    return next((p.dtype for p in module.parameters() if p.is_floating_point()), None)


_NO_PARAMETER_GRADIENTS = (
    "cvfast: the fused network computes no gradients for its parameters; call .train() (or use "
    ".original) to train, or give an input that requires gradients"
)


def _without_parameter_gradients(result: Any, tracked: list[bool]) -> Any:
    """``result``, in which a backward pass from the ``tracked`` leaves says what to do about the
    missing gradients."""
    if isinstance(result, Tensor):  # tree_flatten takes 3 us
        return _raising([result])[0] if tracked == [True] else result
    leaves, spec = pytree.tree_flatten(result)
    places = [i for i, wanted in enumerate(tracked) if wanted]
    if len(tracked) != len(leaves) or not places:
        return result
    for i, leaf in zip(places, _raising([leaves[i] for i in places]), strict=True):
        leaves[i] = leaf
    return pytree.tree_unflatten(leaves, spec)


def _raising(tensors: list[Tensor]) -> list[Tensor]:
    """New tensors on the same memory, no views of these, whose backward pass raises."""
    anchor = torch.empty(0, requires_grad=True)
    delayed = torch._C._functions.DelayedError(_NO_PARAMETER_GRADIENTS, 1 + len(tensors))
    return list(delayed(anchor, *tensors)[1:])


def _cloned(tree: Any) -> Any:
    """For runs beside the caller's own: a network may write to its inputs."""
    return pytree.tree_map(lambda v: v.clone() if isinstance(v, Tensor) else v, tree)


def _nothing(tensor: Tensor) -> Tensor:
    return tensor.new_empty(0)


def _cuda_devices(*trees: Any) -> list[int]:
    leaves = pytree.tree_leaves(trees)
    return sorted({t.get_device() for t in leaves if isinstance(t, Tensor) and t.is_cuda})


def _is_floating(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def _cast(tree: Any, dtype: torch.dtype | None) -> Any:
    if dtype is None:
        return tree
    if _is_floating(tree):
        return tree.to(dtype)
    if type(tree) is tuple:  # of arguments: tree_map takes 10 us
        return tuple(_cast(value, dtype) for value in tree)
    return pytree.tree_map(lambda value: value.to(dtype) if _is_floating(value) else value, tree)


def split_inputs(example_inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and keyword arguments from a tensor, a sequence, or a mapping of keywords."""
    if isinstance(example_inputs, Mapping):
        return (), dict(example_inputs)
    if isinstance(example_inputs, (tuple, list)):
        return tuple(example_inputs), {}
    if isinstance(example_inputs, Tensor):
        return (example_inputs,), {}
    raise TypeError(
        "example_inputs must be a tensor, a tuple of positional arguments or a dict of keyword "
        f"arguments; got {type(example_inputs).__name__}"
    )
