"""``cvfast.optimize``: from a network its user has to the same network on fused kernels.

capture -> match -> lower -> verify -> report, a module each. Importing this package imports no
torch; calling :func:`optimize` does.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import nn

    from .module import OptimizedModule
    from .options import FilterFn
    from .planner import Plan, plan
    from .profiling import Step, profile
    from .report import REASONS, Report, Row
    from .verify import Verification, VerificationError

__all__ = [
    "REASONS",
    "OptimizedModule",
    "Plan",
    "Report",
    "Row",
    "Step",
    "Verification",
    "VerificationError",
    "optimize",
    "plan",
    "profile",
]

_HOMES = {
    "OptimizedModule": "module",
    "Plan": "planner",
    "REASONS": "report",
    "plan": "planner",
    "profile": "profiling",
    "Report": "report",
    "Row": "report",
    "Step": "profiling",
    "Verification": "verify",
    "VerificationError": "verify",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)


def optimize(
    model: nn.Module,
    example_inputs: Any = None,
    *,
    dtype: torch.dtype | None = None,
    backend: str = "auto",
    memory_format: str | torch.memory_format = "auto",
    select: str = "heuristic",
    filter_fn: FilterFn | None = None,
    on_unsupported: str = "skip",
    verify: str = "auto",
    dry_run: bool = False,
    winograd: str = "F2",
    outputs: str = "copy",
) -> OptimizedModule:
    """A copy of ``model`` that runs on fused kernels; ``model`` itself is left untouched.

    The network is captured with ``torch.export`` (any batch and image size, where its code allows),
    batch norms are folded in float64, convolution sites lowered to the fastest kernel, and the
    result compared with the original in float64. All of it happens here if ``example_inputs`` is
    given, else at the first call.

    Args:
        model: the network, in evaluation mode; one in training mode is optimised once ``.eval()``
            is called.
        example_inputs: a tensor, a tuple of positional arguments, or a dict of keyword arguments.
        dtype: compute in this dtype: inputs are cast, results cast back. Default: the model's own.
        backend: ``"auto"``, or one of ``"reference"`` (folding only), ``"onednn"``, ``"cpu"``,
            ``"triton"``, ``"cuda"`` for all sites.
        memory_format: of activations inside the network: ``"auto"`` (channels-last on the CPU, in
            half precision, and where a kernel asks for it), ``"channels_last"``,
            ``"contiguous"``, or the torch constant. Outputs keep the layout that the original would
            give them.
        select: ``"heuristic"``, or ``"measure"`` to time each candidate here and keep what is
            faster.
        filter_fn: called with (module, qualified name) of each convolution; False leaves it
            unfused.
        on_unsupported: ``"skip"`` runs what cannot be fused as it was, with a reason in the report;
            ``"raise"`` raises instead.
        verify: ``"auto"`` compares the outputs, ``"layers"`` also every site's, ``"off"`` nothing.
        dry_run: plan, verify and report only: the result runs the original.
        winograd: what convolutions on the CPU may use where it is faster: ``"F2"``, Winograd's
            algorithms on tiles of two rows, F(2x2, 3x3) and F(2x4, 3x3), and along kernels of one
            row or column, as accurate as PyTorch, in bfloat16 within twice its error; ``"F4"``,
            also F(4x4, 3x3), which computes less with an error about twice as large
            (docs/kernels/conv.md); ``"off"``, none.
        outputs: on a GPU, ``"copy"`` results to fresh tensors, or ``"alias"``: hand them out where
            they were computed, valid until the next call with inputs of that size, which writes
            there; for callers that run the network from one thread and stream.

    Returns:
        The optimised network; its ``.report`` says what was fused, what was not and why.

    Raises:
        TypeError, ValueError: for an argument that is not as above.
        VerificationError: if the result disagrees with the original and ``on_unsupported="raise"``;
            with ``"skip"`` a warning is given and the original runs.
        RuntimeError: if a site cannot be fused and ``on_unsupported="raise"``.
    """
    import copy

    from torch import inference_mode, nn

    from .module import OptimizedModule, split_inputs
    from .options import Options

    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module; got {type(model).__name__}")
    options = Options(
        dtype=dtype,
        backend=backend,
        memory_format=memory_format,
        select=select,
        filter_fn=filter_fn,
        on_unsupported=on_unsupported,
        verify=verify,
        dry_run=dry_run,
        winograd=winograd,
        outputs=outputs,
    )
    source = model.original if isinstance(model, OptimizedModule) else model
    with inference_mode(False):  # its tensors could not be written to outside
        optimized = OptimizedModule(copy.deepcopy(source), options)
    if example_inputs is not None:
        args, kwargs = split_inputs(example_inputs)
        if optimized.training:
            optimized.report.notes.append(
                "the model is in training mode: .eval() leads to the fused kernels"
            )
        else:
            optimized.prepare(*args, **kwargs)
    return optimized
