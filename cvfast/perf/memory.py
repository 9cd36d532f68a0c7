"""Peak memory of inference beyond what a prepared network holds already. Linux only.

Resident memory is read from the kernel, so that every run-time is measured alike, whatever
allocator it brings. What a reading could get wrong, and what is done about it:

- memory that was freed while the network was converted still belongs to the process, and inference
  would use it unseen: the process runs with `ENVIRONMENT`, which hands blocks of 64 KiB and more
  back at once, and the rest is trimmed before the reading;
- a run-time that keeps its memory from call to call (an arena) would show nothing after a warm-up:
  the network has not run at this size before the reading;
- the peak of an earlier phase would hide this one: the kernel's high-water mark is reset.

Use a fresh process for each network: see `cvfast.perf.isolated`.
"""

from __future__ import annotations

import ctypes
import gc
import re
from collections.abc import Callable
from pathlib import Path

ENVIRONMENT = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
"""For the process that measures; glibc reads it when the process starts."""

CALLS = 3
"""ONNX Runtime lays its arena out after the first run, so the second may need more."""


def peak_growth(run: Callable[[], object], *, calls: int = CALLS) -> int:
    """Bytes by which resident memory grows at most while `run` runs `calls` times.

    Args:
        run: one inference of a network that is ready, and has not run on inputs of this size. Its
            result is dropped.

    Raises:
        OSError: where the kernel does not tell (any system but Linux).
    """
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:  # of glibc; musl holds nothing back
        trim(0)
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    before = _status("VmRSS")
    for _ in range(calls):
        run()
    return _status("VmHWM") - before


def _status(field: str) -> int:
    """A line of /proc/self/status, in bytes."""
    text = Path("/proc/self/status").read_text(encoding="ascii")
    found = re.search(rf"^{field}:\s*(\d+) kB", text, re.MULTILINE)
    if found is None:
        raise OSError(f"/proc/self/status has no {field}")
    return 1024 * int(found[1])
