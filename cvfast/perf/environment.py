"""What a measurement was taken on: everything needed to read a number a year later."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
from dataclasses import asdict
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from cvfast.perf import clocks

PACKAGES = (
    "cvfast",
    "torch",
    "triton",
    "numpy",
    "onnx",
    "onnxruntime",
    "openvino",
    "torchvision",
    "timm",
)

COMPILERS = {
    "g++": ("g++", "--version"),
    "nvcc": ("nvcc", "--version"),
    "ninja": ("ninja", "--version"),
}

# The features that decide which kernels a CPU can run, as /proc/cpuinfo names them.
_ISA_FLAGS = (
    "sse4_2",
    "avx",
    "f16c",
    "fma",
    "avx2",
    "avx512f",
    "avx512bw",
    "avx512dq",
    "avx512vl",
    "avx512_vnni",
    "avx512_bf16",
    "avx512_fp16",
    "avx_vnni",
    "amx_bf16",
    "amx_int8",
    "asimd",
    "asimdhp",
    "bf16",
    "sve",
)


def capture() -> dict[str, Any]:
    """Describes machine, software and source tree, ready for JSON.

    Keys: ``date`` (UTC, ISO 8601), ``cpu``, ``memory_bytes``, ``gpus``, ``os``, ``python``,
    ``packages`` (installed versions, ``None`` where one is absent), ``compilers``, ``threads``,
    ``cuda``, ``git``. Reads version metadata without importing the packages.
    """
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "cpu": cpu(),
        "memory_bytes": _memory_bytes(),
        "gpus": gpus(),
        "os": platform.platform(),
        "python": platform.python_version(),
        "packages": {name: package_version(name) for name in PACKAGES},
        "compilers": {name: compiler_version(name) for name in COMPILERS},
        "threads": torch.get_num_threads(),
        "cuda": cuda(),
        "git": git(),
    }


def cpu() -> dict[str, Any]:
    """CPU model, usable cores, clocks in MHz where readable, torch's ISA level, ISA flags."""
    text = _read("/proc/cpuinfo")
    family, model = _cpuinfo(text, "cpu family"), _cpuinfo(text, "model")
    clocks = [float(mhz) for mhz in re.findall(r"^cpu MHz\s*:\s*([\d.]+)", text, re.MULTILINE)]
    flags = set((_cpuinfo(text, "flags") or _cpuinfo(text, "Features") or "").split())
    return {
        "model": _cpuinfo(text, "model name") or platform.processor() or platform.machine(),
        "family_model": f"{family}/{model}" if family and model else None,
        "architecture": platform.machine(),
        "cores": _usable_cores(),
        "clock_mhz": round(max(clocks), 1) if clocks else None,
        "max_clock_mhz": _max_clock_mhz(),
        "isa": torch.backends.cpu.get_cpu_capability(),
        "flags": [flag for flag in _ISA_FLAGS if flag in flags],
    }


def gpus() -> list[dict[str, Any]]:
    """Each CUDA device torch can use.

    Name, compute capability, multiprocessors, memory and L2 in bytes, driver. Where NVML tells:
    ECC, highest clocks in MHz, power limit in watts, and ``now``, a `clocks.Sample`.
    """
    if not torch.cuda.is_available():
        return []
    return [_gpu(index) for index in range(torch.cuda.device_count())]


def _gpu(index: int) -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(index)
    nvml = clocks.nvml(index)
    return {
        "name": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory_bytes": properties.total_memory,
        "l2_bytes": properties.L2_cache_size,
        "driver": _kernel_module_version(),
        **({**nvml.describe(), "now": asdict(nvml.sample())} if nvml else {}),
    }


def cuda() -> dict[str, Any]:
    """Versions of CUDA and cuDNN that torch runs on, and the switches that change its results."""
    return {
        "runtime": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "cudnn_benchmark": torch.backends.cudnn.benchmark,
        "cudnn_deterministic": torch.backends.cudnn.deterministic,
        "cudnn_allow_tf32": torch.backends.cudnn.allow_tf32,
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
    }


def _kernel_module_version() -> str | None:
    text = _read("/proc/driver/nvidia/version")
    found = re.search(r"Kernel Module(?:\s+for \S+)?\s+([\d.]+)", text)
    return found.group(1) if found else None


def package_version(name: str) -> str | None:
    """The installed version of a distribution, or ``None``; imports nothing."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def compiler_version(name: str) -> str | None:
    """The version line of a tool in `COMPILERS`; ``None`` if it is not on PATH or fails."""
    command = COMPILERS[name]
    if shutil.which(command[0]) is None:
        return None
    output = _run(command)
    if not output:
        return None
    lines = output.splitlines()
    return next((line for line in lines if "release" in line), lines[0]).strip()


def git() -> dict[str, Any]:
    """Commit and dirty flag of the checkout cvfast is imported from; both ``None`` outside one."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return {"commit": None, "dirty": None}
    commit = _run(("git", "-C", str(root), "rev-parse", "--verify", "--quiet", "HEAD"))
    status = _run(("git", "-C", str(root), "status", "--porcelain", "--untracked-files=no"))
    return {"commit": commit or None, "dirty": None if status is None else bool(status)}


def _usable_cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _memory_bytes() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):
        return None


def _max_clock_mhz() -> float | None:
    khz = _read("/sys/devices/system/cpu/cpu0/cpufreq/cpuinfo_max_freq").strip()
    return int(khz) / 1000 if khz.isdigit() else None


def _cpuinfo(text: str, key: str) -> str | None:
    found = re.search(rf"^{re.escape(key)}\s*:\s*(.+)$", text, re.MULTILINE)
    return found.group(1).strip() if found else None


def _read(path: str) -> str:
    try:
        return Path(path).read_text(errors="replace")
    except OSError:
        return ""


def _run(command: tuple[str, ...]) -> str | None:
    """Standard output of a command, or ``None`` if it could not run or failed."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
