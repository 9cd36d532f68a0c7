"""cvfast against its peers on one network: verified and timed in one interleaved run."""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

import torch

import cvfast
from cvfast.cli import specs
from cvfast.perf import flops, isolated, memory, peers, roofline, timing

PEER_K = 10.0
"""A peer's error may be this many times eager's. Wider than what cvfast is held to: it is there to
notice a peer that computes something else, not to rule out a faster one that rounds differently."""


def compare(
    spec: str,
    *,
    batch: int = 1,
    threads: int = 1,
    dtype: torch.dtype = torch.float32,
    names: Sequence[str] = peers.NAMES,
    size: int | None = None,
    min_time: float = 1.0,
    with_memory: bool = False,
) -> dict[str, Any]:
    """Optimises the network `spec`, checks it and every peer against float64, and times them all.

    Returns a row ready for JSON. ``variants`` maps ``cvfast`` and each peer to its `Timing` in
    seconds, ``error`` (relative, to float64), ``ok``, ``setup_seconds``, ``flops_per_second``, with
    `with_memory` also ``memory_bytes`` (`memory_growth`) and, for peers, ``speedup``: how many
    times as long the peer takes as cvfast. ``speedup`` is ``None`` unless both passed their check.
    ``unavailable`` maps the other peers, and memory that could not be measured, to the reason.
    ``best_peer`` is the fastest peer that passed, ``eager_error`` eager's in the same dtype,
    ``execution`` the report's, with the arena's predicted bytes.

    Sets torch's number of threads, process-wide.
    """
    torch.set_num_threads(threads)
    model = specs.load(spec)
    shape = specs.input_shape(spec, model, size)
    x = specs.example(shape, batch)
    truth = specs.Truth(model, x, dtype)
    work = flops.count(model, (x,))

    start = time.perf_counter()
    optimized = cvfast.optimize(model, (x,), dtype=None if dtype is x.dtype else dtype)

    @torch.no_grad()
    def run() -> Any:
        return optimized(x)

    outputs = peers.flatten(run())
    setup = {"cvfast": time.perf_counter() - start}
    verdicts = {"cvfast": truth.check(outputs)}
    own = optimized.report.verification
    if own is not None and not own.ok:
        # What runs then is the original: its time must not stand for cvfast's.
        verdicts["cvfast"] = dataclasses.replace(verdicts["cvfast"], ok=False, message=str(own))
    calls: dict[str, Callable[[], Any]] = {"cvfast": run}
    unavailable: dict[str, str] = {}
    for name in names:
        try:
            peer = peers.build(name, model, x, threads=threads, dtype=dtype)
        except peers.PeerUnavailable as error:
            unavailable[name] = str(error)
            continue
        calls[name], setup[name] = peer.run, peer.setup_seconds
        verdicts[name] = truth.check(peer.outputs(), k=PEER_K)

    timings = timing.interleave(calls, min_time=min_time)
    grown: dict[str, int] = {}
    for name in calls if with_memory else ():
        try:
            grown[name] = isolated.call(
                memory_growth, spec, name, batch, threads, dtype, size,
                environment=memory.ENVIRONMENT,
            )  # fmt: skip
        except (RuntimeError, OSError) as error:
            unavailable[f"memory of {name}"] = f"memory of {name}: {error}"
    variants: dict[str, dict[str, Any]] = {}
    for name, measured in timings.items():
        verdict = verdicts[name]
        variants[name] = {
            **measured.to_dict(),
            "flops_per_second": work / measured.median,
            "setup_seconds": setup[name],
            "error": verdict.error,
            "limit": verdict.limit,
            "ok": verdict.ok,
            "message": verdict.message,
        }
        if name in grown:
            variants[name]["memory_bytes"] = grown[name]
        if name != "cvfast":
            valid = verdict.ok and verdicts["cvfast"].ok
            ratio = timing.ratio(measured, timings["cvfast"]) if valid else None
            variants[name]["speedup"] = ratio
    rivals = [name for name in variants if name != "cvfast" and variants[name]["ok"]]
    best = min(rivals, key=lambda name: variants[name]["median"]) if rivals else None
    return {
        "model": spec,
        "shape": [batch, *shape],
        "dtype": str(dtype).removeprefix("torch."),
        "threads": threads,
        "flops": work,
        "peak_flops_per_second": peak(threads, dtype),
        "coverage": optimized.report.coverage,
        "execution": asdict(optimized.report.execution) if optimized.report.execution else None,
        "eager_error": verdicts["cvfast"].baseline_error,
        "ok": verdicts["cvfast"].ok,
        "best_peer": best,
        "speedup": variants[best]["speedup"] if best else None,
        "variants": variants,
        "unavailable": unavailable,
    }


def memory_growth(
    spec: str, contender: str, batch: int, threads: int, dtype: torch.dtype, size: int | None
) -> int:
    """Bytes that inference of cvfast or a peer needs beyond the prepared network and its input.

    For a process of its own, with `cvfast.perf.memory.ENVIRONMENT`. cvfast is prepared on one image
    more, since a plan for the batch itself would bring its memory along; on images of the same
    size, since another may ask for other padding, a new capture and weights packed anew.
    """
    torch.set_num_threads(threads)
    model = specs.load(spec)
    shape = specs.input_shape(spec, model, size)
    x = specs.example(shape, batch)
    if contender != "cvfast":
        run = peers.prepare(contender, model, x, threads=threads, dtype=dtype)
        del model
        return memory.peak_growth(run)
    more = specs.example(shape, batch + 1)
    optimized = cvfast.optimize(model, (more,), dtype=None if dtype is x.dtype else dtype)
    del model, more
    with torch.no_grad():
        return memory.peak_growth(lambda: optimized(x))


@functools.cache
def peak(threads: int, dtype: torch.dtype) -> float:
    """FLOP/s that the FMA units sustain on `threads` threads; measured once per process."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        return roofline.peak_flops(dtype)
    finally:
        torch.set_num_threads(before)
