"""Builds cvfast's shared objects; everything else is in pyproject.toml.

CVFAST_CUDA=auto|0|1   the CUDA kernels: where nvcc is found (default), never, or fail without it
TORCH_CUDA_ARCH_LIST   their architectures (default: DEFAULT_CUDA_ARCHS)
CVFAST_WERROR=1        compiler warnings are errors
MAX_JOBS               compilations that run at once
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from setuptools import Extension, setup

try:
    from torch.utils import cpp_extension
except ModuleNotFoundError as error:
    sys.exit(
        f"{error}: cvfast compiles against the PyTorch that is installed, and this build "
        "environment has none.\nInstall PyTorch 2.11 or later, setuptools and ninja, then run\n\n"
        "    pip install --no-build-isolation .\n"
    )

ROOT = Path(__file__).parent
# The oldest PyTorch that the shared objects load into.
STABLE_ABI = "-DTORCH_TARGET_VERSION=0x020b000000000000"
DEFAULT_CUDA_ARCHS = "8.0;8.6;8.9;9.0a;10.0a;12.0"


def sources(folder: str, *suffixes: str) -> list[str]:
    files = (ROOT / "csrc" / folder).glob("*")
    return sorted(str(f.relative_to(ROOT)) for f in files if f.suffix in suffixes)


def extension(name: str, files: list[str], device: str, libraries: list[str]) -> Extension:
    headers = [f"-isystem{path}" for path in cpp_extension.include_paths(device)]
    # -g0: the -g that Python was built with would make the shared object twenty times as large.
    common = ["-std=c++20", "-O3", "-g0", STABLE_ABI, *headers]
    # GCC's AVX-512 headers hold deliberately uninitialised variables.
    warnings = ["-Wall", "-Wextra", "-Wno-maybe-uninitialized", "-Wno-uninitialized"]
    if os.environ.get("CVFAST_WERROR") == "1":
        warnings.append("-Werror")
    flags = {"cxx": [*common, *warnings, "-ffp-contract=fast", "-fvisibility=hidden"]}
    if device == "cuda":
        flags["nvcc"] = [*common, "--threads=2", "-lineinfo", "-DUSE_CUDA"]
        flags["cxx"].append("-DUSE_CUDA")
    return Extension(
        f"cvfast.{name}",
        files,
        include_dirs=[str(ROOT / "csrc")],
        library_dirs=cpp_extension.library_paths(device),
        libraries=libraries,
        extra_compile_args=flags,
        language="c++",
    )


def wants_cuda(files: list[str]) -> bool:
    choice = os.environ.get("CVFAST_CUDA", "auto")
    if choice not in ("auto", "0", "1"):
        sys.exit(f"CVFAST_CUDA={choice!r}: expected auto, 0 or 1")
    nvcc = cpp_extension.CUDA_HOME
    if choice == "1" and not files:
        sys.exit("CVFAST_CUDA=1: this version of cvfast has no CUDA sources in csrc/cuda")
    if choice == "1" and nvcc is None:
        sys.exit("CVFAST_CUDA=1: no nvcc found; install the CUDA toolkit or set CUDA_HOME")
    return choice != "0" and nvcc is not None and bool(files)


extensions = [extension("_C_cpu", sources("cpu", ".cpp"), "cpu", ["c10", "torch_cpu"])]
cuda_files = sources("cuda", ".cpp", ".cu")
if wants_cuda(cuda_files):
    os.environ.setdefault("TORCH_CUDA_ARCH_LIST", DEFAULT_CUDA_ARCHS)
    extensions.append(extension("_C_cuda", cuda_files, "cuda", ["c10", "torch_cpu", "cudart"]))

setup(
    ext_modules=extensions,
    cmdclass={"build_ext": cpp_extension.BuildExtension.with_options(no_python_abi_suffix=True)},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
