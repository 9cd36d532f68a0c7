"""`bench_depthwise.py --device cuda`: the depthwise kernels on a GPU, forward and backward.

Contenders: cvfast's CUDA and Triton kernels; eager `conv2d` with bias and activation on
channels-last and on NCHW tensors; the former under Inductor with max-autotune; and, as the limit, a
device-to-device copy of as many bytes as the layer has to move. All are timed with cold L2 and with
warm, on a filled stream, so that what launching takes the host counts for none of them.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Callable, Hashable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))
from results_file import Budget, Results, same_origin
from shapes import DepthwiseLayer

from cvfast import backends, tolerance
from cvfast.ops import depthwise as public
from cvfast.ops.depthwise import bytes_moved, prepack, prepacked_op, reference
from cvfast.perf import clocks, environment, gpu_timing, timing

DEVICE = "cuda"
BACKENDS = ("cuda", "triton")
COPY = "copy"
PASSES = ("forward", "backward")
KINKS = {"none": (), "relu": (0.0,), "relu6": (0.0, 6.0), "hardswish": (-3.0, 3.0)}
CHUNK = 16  # images that are compared with float64 at a time

Calls = dict[str, Callable[[], Any]]


def name(backend: str) -> str:
    """How a backend of cvfast's is called among the contenders."""
    return f"cvfast_{backend}"


def geometry(layer: DepthwiseLayer) -> tuple[list[int], list[int], list[int], list[int]]:
    """Kernel size, stride, padding and dilation of a layer, as the operators take them."""
    return [layer.kernel] * 2, [layer.stride] * 2, [layer.kernel // 2] * 2, [1, 1]


def eager(layer: DepthwiseLayer, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    _, s, p, d = geometry(layer)
    return reference(x, weight, bias, s, p, d, layer.activation)


def contenders(
    layer: DepthwiseLayer, which: str, x: Tensor, weight: Tensor, bias: Tensor, grad: Tensor | None,
    *, inductor: bool = True,
) -> tuple[Calls, dict[str, str]]:  # fmt: skip
    """Each contender's call, and why the others are missing.

    The call of a forward pass returns y, of a backward pass the gradients of x, weight and bias.
    An error of cvfast's own kernels, other than too little memory, is raised.
    """
    forwards: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {}
    unavailable: dict[str, str] = {}
    for backend in BACKENDS:
        reason = backends.supports("depthwise", backend, x)
        if reason is not None:
            unavailable[name(backend)] = str(reason)
        elif which == "forward":
            forwards[name(backend)] = _packed(layer, backend, prepack(weight, bias))
        else:
            forwards[name(backend)] = _public(layer, backend)
    forwards["eager_nhwc"] = forwards["eager_nchw"] = lambda *args: eager(layer, *args)
    if inductor:
        # Graphs of Inductor's own would copy the input into their pool first.
        torch.compiler.reset()
        compiled = torch.compile(
            forwards["eager_nhwc"], dynamic=False, mode="max-autotune-no-cudagraphs"
        )
        forwards["inductor"] = compiled
    calls: Calls = {}
    for contender, forward in forwards.items():
        memory_format = torch.contiguous_format if contender == "eager_nchw" else None
        try:
            call = _bind(forward, x, weight, bias, grad, memory_format)
            call()
        except Exception as error:
            if contender.startswith("cvfast") and not isinstance(error, torch.OutOfMemoryError):
                raise
            unavailable[contender] = f"{type(error).__name__}: {error}".splitlines()[0]
        else:
            calls[contender] = call
    elements = least_bytes(layer, which, x) // x.element_size() // 2
    source = torch.empty(elements, dtype=x.dtype, device=x.device).normal_()
    target = torch.empty_like(source)
    calls[COPY] = lambda: target.copy_(source)
    return calls, unavailable


def _packed(layer: DepthwiseLayer, backend: str, packed: Tensor) -> Callable[..., Tensor]:
    op, geo = prepacked_op(backend), geometry(layer)
    return lambda x, weight, bias: op(x, packed, *geo, layer.activation)


def _public(layer: DepthwiseLayer, backend: str) -> Callable[..., Tensor]:
    def forward(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        _, stride, padding, _ = geometry(layer)
        return public(
            x, weight, bias, stride=stride, padding=padding, activation=layer.activation,
            backend=backend,
        )  # fmt: skip

    return forward


def _bind(
    forward: Callable[..., Tensor], x: Tensor, weight: Tensor, bias: Tensor, grad: Tensor | None,
    memory_format: torch.memory_format | None,
) -> Callable[[], Any]:  # fmt: skip
    """The forward call on these tensors; with a gradient, the backward call after one forward."""
    if memory_format is not None:
        x = x.contiguous(memory_format=memory_format)
        grad = None if grad is None else grad.contiguous(memory_format=memory_format)
    if grad is None:

        @torch.no_grad()
        def call() -> Tensor:
            return forward(x, weight, bias)

        return call
    inputs = [t.detach().requires_grad_() for t in (x, weight, bias)]
    with torch.enable_grad():
        y = forward(*inputs)
    return lambda: torch.autograd.grad(y, inputs, grad, retain_graph=True)


def least_bytes(layer: DepthwiseLayer, which: str, x: Tensor) -> int:
    """What a layer must read and write at least, each tensor once.

    Forward: x, weights, y. Backward: x, the gradient of y and, for the mask of a ReLU, y; the
    gradients of x and weights. Hard-swish is counted so too, though it needs x again.
    """
    kernel, *_ = geometry(layer)
    out = (x.shape[0], layer.channels, layer.out_size, layer.out_size)
    forward = bytes_moved(x.shape, kernel, out, x.dtype)
    if which == "forward":
        return forward
    y = out[0] * out[1] * out[2] * out[3] * x.element_size()
    return forward + x.numel() * x.element_size() + (y if layer.activation != "none" else 0)


def gradient(layer: DepthwiseLayer, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """A gradient of y drawn from N(0, 1), zero where rounding decides on which side of a kink of
    the activation an element lies: there no two implementations need agree."""
    _, s, p, d = geometry(layer)
    parts = []
    margin = 4 * torch.finfo(x.dtype).eps
    generator = torch.Generator(x.device).manual_seed(1)
    for chunk in x.split(CHUNK):
        y = reference(chunk.double(), weight.double(), bias.double(), s, p, d, "none")
        drawn = torch.randn(y.shape, generator=generator, device=x.device)
        for kink in KINKS[layer.activation]:
            drawn[(y - kink).abs() < margin * y.abs().clamp(min=1)] = 0
        parts.append(drawn.to(dtype=x.dtype, memory_format=torch.channels_last))
    return torch.cat(parts)


def verify(
    layer: DepthwiseLayer, x: Tensor, weight: Tensor, bias: Tensor, grad: Tensor | None, result: Any
) -> tolerance.Verdict:
    """Judges a call's result by the numbers policy: the worst of its tensors.

    Of what has a batch, the first and the last images are compared.
    """
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        if grad is None:
            ends = _ends(x)
            expected = [eager(layer, ends.double(), weight.double(), bias.double())]
            baseline, actual = [eager(layer, ends, weight, bias)], [_ends(result)]
        else:
            actual = [_ends(result[0]), *result[1:]]
            call = _bind(lambda *args: eager(layer, *args), x, weight, bias, grad, None)
            first, *rest = call()
            baseline = [_ends(first), *rest]
            expected = _backward_in_float64(layer, x, weight, bias, grad)
    verdicts = [
        tolerance.check(a, e, b) for a, e, b in zip(actual, expected, baseline, strict=True)
    ]
    return max(verdicts, key=lambda verdict: (not verdict.ok, verdict.error))


def _ends(t: Tensor) -> Tensor:
    half = CHUNK // 2
    return t if len(t) <= CHUNK else torch.cat([t[:half], t[-half:]])


def _backward_in_float64(
    layer: DepthwiseLayer, x: Tensor, weight: Tensor, bias: Tensor, grad: Tensor
) -> list[Tensor]:
    """The gradient of x for the images of `_ends`, and those of weight and bias."""

    def backward(x: Tensor, grad: Tensor) -> list[Tensor]:
        call = _bind(
            lambda *args: eager(layer, *args),
            x.double(), weight.double(), bias.double(), grad.double(), None,
        )  # fmt: skip
        return list(call())

    image, *sums = backward(_ends(x), _ends(grad))
    if len(x) <= CHUNK:
        return [image, *sums]
    chunks = [backward(a, b)[1:] for a, b in zip(x.split(CHUNK), grad.split(CHUNK), strict=True)]
    return [image, *(torch.stack(parts).sum(0) for parts in zip(*chunks, strict=True))]


def measure(
    layer: DepthwiseLayer, which: str, batch: int, dtype: torch.dtype,
    *, bandwidth: float, inductor: bool, min_time: float,
) -> dict[str, Any]:  # fmt: skip
    """One row: seconds of each contender with cold and warm L2, bytes per second, the checks."""
    x, weight, bias = layer.tensors(batch, dtype, DEVICE)
    grad = gradient(layer, x, weight, bias) if which == "backward" else None
    calls, unavailable = contenders(layer, which, x, weight, bias, grad, inductor=inductor)
    ours = [name(backend) for backend in BACKENDS if name(backend) in calls]
    verdicts = {n: verify(layer, x, weight, bias, grad, calls[n]()) for n in ours}
    log: list[clocks.Sample] = []
    timings = {
        l2: gpu_timing.interleave_cuda(
            calls, cold_l2=l2 == "cold", min_rounds=3, min_time=min_time, max_time=5.0, log=log
        )
        for l2 in ("cold", "warm")
    }
    return {
        **setting(layer, which, batch, dtype),
        "verified": bool(verdicts) and all(verdict.ok for verdict in verdicts.values()),
        "checks": {
            n: {"ok": v.ok, "error": v.error, "eager": v.baseline_error, "message": v.message}
            for n, v in verdicts.items()
        },
        **summary(timings, least_bytes(layer, which, x), bandwidth),
        "unavailable": unavailable,
        "clocks": clocks.summarize(log),
    }


def summary(
    timings: dict[str, dict[str, timing.Timing]], nbytes: int, bandwidth: float
) -> dict[str, Any]:
    """What follows from the times: rates, and how many times as long the baselines take.

    Ratios are with cold L2 and to the faster of cvfast's kernels.
    """
    cold = timings["cold"]
    rates = {contender: nbytes / t.median for contender, t in cold.items()}
    ours = [name(backend) for backend in BACKENDS if name(backend) in cold]
    best = min(ours, key=lambda n: cold[n].median) if ours else None
    return {
        "bytes": nbytes,
        "seconds": {l2: {n: t.to_dict() for n, t in each.items()} for l2, each in timings.items()},
        "bytes_per_second": rates,
        "share_of_copy_bandwidth": {n: rate / bandwidth for n, rate in rates.items()},
        "best": best,
        "speedup": {
            n: timing.ratio(t, cold[best]) for n, t in cold.items() if best and n not in ours
        },
    }


def setting(layer: DepthwiseLayer, which: str, batch: int, dtype: torch.dtype) -> dict[str, Any]:
    return {
        "layer": layer.name,
        "pass": which,
        "batch": batch,
        "dtype": str(dtype).removeprefix("torch."),
    }


def key(row: dict[str, Any]) -> Hashable:
    return row["layer"], row["pass"], row["batch"], row["dtype"]


def settings(
    layers: Iterable[DepthwiseLayer], passes: list[str], batches: list[int], dtypes: list[str]
) -> Iterator[tuple[DepthwiseLayer, str, int, torch.dtype]]:
    """What is measured, most wanted first: MobileNet v2 before the other networks, and dtypes,
    batches and passes in the order given."""
    ordered = sorted(layers, key=lambda layer: layer.model != "mobilenet_v2")
    for dtype, batch, which, layer in itertools.product(dtypes, batches, passes, ordered):
        yield layer, which, batch, getattr(torch, dtype)


def describe(row: dict[str, Any]) -> str:
    """One line."""
    label = f"{row['layer']:44s} {row['pass']:8s} b{row['batch']} {row['dtype']}"
    failed = [n for n, check in row["checks"].items() if not check["ok"]]
    if not row["verified"]:
        return f"{label}  FAILED: {', '.join(failed) or 'no kernel of cvfast ran'}"
    best, cold = row["best"], row["seconds"]["cold"]
    share = row["share_of_copy_bandwidth"]
    speedups = "  ".join(f"{n} {ratio:.2f}x" for n, ratio in row["speedup"].items())
    return (
        f"{label} {best} {1e6 * cold[best]['median']:.1f} us, warm "
        f"{1e6 * row['seconds']['warm'][best]['median']:.1f} us, "
        f"{1e-9 * row['bytes_per_second'][best]:.0f} GB/s = {share[best]:.0%} of copy | {speedups}"
    )


def run(args: argparse.Namespace, layers: Iterable[DepthwiseLayer], default: Path) -> int:
    """Measures what `args` ask for and is not in the file yet; 1 if a check failed."""
    if not torch.cuda.is_available():
        sys.exit("--device cuda: PyTorch sees no CUDA device")
    budget = Budget(args.budget)
    results = Results(args.json or default, key)
    captured = environment.capture()
    if results.rows and not same_origin(results.head["environment"], captured):
        print(f"{results.path}: made elsewhere or from other code; measured anew")
        results.rows = []
    bandwidth = gpu_timing.copy_bandwidth()
    results.head = {"environment": captured, "copy_bandwidth": bandwidth}
    print(f"device-to-device copy: {1e-9 * bandwidth:.0f} GB/s, read and written")
    wanted = [
        one
        for one in settings(layers, args.passes, args.batch, args.dtype)
        if args.filter in one[0].name and key(setting(*one)) not in results
    ]
    measured = 0
    for layer, which, batch, dtype in budget.while_it_lasts(wanted):
        try:
            row = measure(
                layer, which, batch, dtype,
                bandwidth=bandwidth, inductor=not args.no_inductor, min_time=args.min_time,
            )  # fmt: skip
        except torch.OutOfMemoryError as error:
            print(f"{layer.name} {which} b{batch}: skipped, out of memory: {error}", flush=True)
            continue
        results.add(row)
        measured += 1
        print(describe(row), flush=True)
        torch.cuda.empty_cache()
    print(f"{measured} of {len(wanted)} settings measured")
    return 0 if results.rows and all(row["verified"] for row in results.rows) else 1
