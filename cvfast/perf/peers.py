"""The run-times that cvfast is compared with, each set up as its own documentation advises.

`build` returns a `Peer` that has already run once, or raises `PeerUnavailable` with the reason: a
comparison that lacks a peer says so.
"""

from __future__ import annotations

import copy
import logging
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from cvfast.perf import gpu_timing

NAMES = ("eager", "eager_channels_last", "inductor", "onnxruntime", "openvino")
CUDA_NAMES = ("eager", "eager_channels_last", "eager_graph", "max_autotune")

_OPENVINO_PRECISION = {torch.float32: "f32", torch.bfloat16: "bf16"}


class PeerUnavailable(RuntimeError):
    """A peer is not installed, or cannot run this model; the message says which and why."""


@dataclass(frozen=True)
class Peer:
    """A model on one run-time, bound to one input.

    Attributes:
        name: one of `NAMES`, on a CUDA device of `CUDA_NAMES`.
        run: one inference on the bound input; returns when it is done, on a CUDA device when it is
            enqueued. What it returns, the next one may overwrite.
        setup_seconds: conversion, compilation and the first run.
    """

    name: str
    run: Callable[[], Any]
    setup_seconds: float

    def outputs(self) -> list[torch.Tensor]:
        """The output tensors of one inference, in tree order."""
        return flatten(self.run())


def flatten(outputs: Any) -> list[torch.Tensor]:
    """The tensors of a model's output (tensor, tuple, list, dict, nested), in tree order."""
    return [leaf for leaf in pytree.tree_leaves(outputs) if isinstance(leaf, torch.Tensor)]


def build(
    name: str,
    model: nn.Module,
    example: torch.Tensor,
    *,
    threads: int,
    dtype: torch.dtype = torch.float32,
) -> Peer:
    """Prepares `model` on the peer `name` for inference on `example`.

    Args:
        name: one of `NAMES`; on a CUDA device, one of `CUDA_NAMES`: eager PyTorch in either layout,
            channels-last captured in a CUDA graph (``eager_graph``), and
            ``torch.compile(mode="max-autotune")``, channels-last, batch norms folded by freezing,
            which brings its own CUDA graphs.
        model: in eval mode, float32, on the device of `example`; left untouched.
        example: (N, C, H, W) float32 input. Peers that want it channels-last get it so, converted
            once.
        threads: CPU threads. Also set for torch, process-wide.
        dtype: what the peer computes in: float32, bfloat16 or, on a CUDA device, float16. OpenVINO
            takes and returns float32 and computes inside in `dtype`; the torch peers take a
            converted model and input.

    Building ``inductor`` or ``max_autotune`` resets Dynamo, so that neither its recompilation limit
    nor the shapes of an earlier build affect this one; what was compiled before compiles again at
    its next call.

    Raises:
        ValueError: for a name that is none of the above.
        PeerUnavailable: if the peer is not installed, or fails on this model.
    """
    start = time.perf_counter()
    run = prepare(name, model, example, threads=threads, dtype=dtype)
    with _reported(name):
        run()
        if example.is_cuda:
            torch.cuda.synchronize(example.device)
    return Peer(name, run, time.perf_counter() - start)


def prepare(
    name: str,
    model: nn.Module,
    example: torch.Tensor,
    *,
    threads: int,
    dtype: torch.dtype = torch.float32,
) -> Callable[[], Any]:
    """`build` without the first run, but for Inductor, which compiles in it.

    Returns:
        `Peer.run`.
    """
    builders = _CUDA_BUILDERS if example.is_cuda else _BUILDERS
    if name not in builders:
        raise ValueError(f"unknown peer {name!r}; choose from {', '.join(builders)}")
    torch.set_num_threads(threads)
    with _reported(name):
        return builders[name](copy.deepcopy(model), example, threads, dtype)


@contextmanager
def _reported(name: str) -> Iterator[None]:
    """Keeps a peer quiet, and turns what it raises into `PeerUnavailable`."""
    try:
        with _quiet():
            yield
    except PeerUnavailable:
        raise
    except ModuleNotFoundError as error:
        raise PeerUnavailable(
            f"{name}: {error.name} is not installed: pip install {error.name}"
        ) from error
    except Exception as error:
        raise PeerUnavailable(f"{name}: {type(error).__name__}: {_first_line(error)}") from error


_Builder = Callable[[nn.Module, torch.Tensor, int, torch.dtype], Callable[[], Any]]


def _eager(
    model: nn.Module, example: torch.Tensor, threads: int, dtype: torch.dtype
) -> Callable[[], Any]:
    return _torch_call(model.to(dtype), example.to(dtype))


def _eager_channels_last(
    model: nn.Module, example: torch.Tensor, threads: int, dtype: torch.dtype
) -> Callable[[], Any]:
    return _torch_call(
        model.to(dtype=dtype, memory_format=torch.channels_last),  # type: ignore[call-overload]
        example.to(dtype=dtype, memory_format=torch.channels_last),
    )


def _inductor(
    model: nn.Module, example: torch.Tensor, threads: int, dtype: torch.dtype
) -> Callable[[], Any]:
    return _frozen(model.to(dtype), example.to(dtype))


def _max_autotune(
    model: nn.Module, example: torch.Tensor, threads: int, dtype: torch.dtype
) -> Callable[[], Any]:
    return _frozen(
        model.to(dtype=dtype, memory_format=torch.channels_last),  # type: ignore[call-overload]
        example.to(dtype=dtype, memory_format=torch.channels_last),
        mode="max-autotune",
    )


def _frozen(model: nn.Module, example: torch.Tensor, mode: str | None = None) -> Callable[[], Any]:
    """Inductor with the weights as constants, batch norms folded into them."""
    import torch._inductor.config as inductor_config

    torch.compiler.reset()
    compiled = torch.compile(model, dynamic=False, mode=mode)
    run = _torch_call(compiled, example)
    # Freezing is read while the first call compiles.
    with inductor_config.patch(freezing=True):
        run()
    return run


def _eager_graph(
    model: nn.Module, example: torch.Tensor, threads: int, dtype: torch.dtype
) -> Callable[[], Any]:
    return gpu_timing.capture(_eager_channels_last(model, example, threads, dtype))


def _onnxruntime(
    model: nn.Module, example: torch.Tensor, threads: int, dtype: torch.dtype
) -> Callable[[], Any]:
    import onnxruntime

    if dtype is not torch.float32:
        raise PeerUnavailable(f"onnxruntime: its CPU kernels do not cover {dtype}; use float32")
    program = torch.onnx.export(model, (example,), dynamo=True, verbose=False)
    assert program is not None  # dynamo=True returns one
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(
        program.model_proto.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    feed = {session.get_inputs()[0].name: example.contiguous().numpy()}

    def run() -> list[torch.Tensor]:
        return [torch.from_numpy(array) for array in session.run(None, feed)]

    return run


def _openvino(
    model: nn.Module, example: torch.Tensor, threads: int, dtype: torch.dtype
) -> Callable[[], Any]:
    import openvino

    if dtype not in _OPENVINO_PRECISION:
        raise PeerUnavailable(f"openvino: no {dtype} inference on the CPU; use float32 or bfloat16")
    converted = openvino.convert_model(model, example_input=example, input=[list(example.shape)])
    compiled = openvino.Core().compile_model(
        converted,
        "CPU",
        {
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_NUM_THREADS": threads,
            "INFERENCE_PRECISION_HINT": _OPENVINO_PRECISION[dtype],
        },
    )
    request = compiled.create_infer_request()
    feed = {0: example.contiguous().numpy()}

    def run() -> list[torch.Tensor]:
        results = request.infer(feed, share_inputs=True, share_outputs=True)
        return [torch.from_numpy(results[output]) for output in compiled.outputs]

    return run


_BUILDERS: dict[str, _Builder] = {
    "eager": _eager,
    "eager_channels_last": _eager_channels_last,
    "inductor": _inductor,
    "onnxruntime": _onnxruntime,
    "openvino": _openvino,
}

_CUDA_BUILDERS: dict[str, _Builder] = {
    "eager": _eager,
    "eager_channels_last": _eager_channels_last,
    "eager_graph": _eager_graph,
    "max_autotune": _max_autotune,
}


def _torch_call(model: Callable[[torch.Tensor], Any], example: torch.Tensor) -> Callable[[], Any]:
    @torch.no_grad()
    def run() -> Any:
        return model(example)

    return run


@contextmanager
def _quiet() -> Iterator[None]:
    """Keeps the exporters' warnings and progress out of the output; errors still raise."""
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:300] if lines else "no message"
