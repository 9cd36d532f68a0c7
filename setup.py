"""Builds cvfast's shared objects; everything else is in pyproject.toml.

CVFAST_CUDA=auto|0|1   the CUDA kernels: where nvcc is found (default), never, or fail without it
TORCH_CUDA_ARCH_LIST   their architectures (default: DEFAULT_CUDA_ARCHS)
CVFAST_WERROR=1        compiler warnings are errors
MAX_JOBS               compilations that run at once
"""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup

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
# The PTX is what GPUs newer than these compile for themselves.
DEFAULT_CUDA_ARCHS = "8.0+PTX;8.6;8.9;9.0a;10.0a;12.0"


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
    # Kernels say fma() where they mean it: the compiler would fuse one instance of a function and
    # not the next, and results would depend on the cut into tasks.
    flags = {"cxx": [*common, *warnings, "-ffp-contract=off", "-fvisibility=hidden"]}
    if device == "cuda":
        host = ",".join(w for w in warnings if not w.startswith("-Wno"))
        # Kernels see no header of torch's; a file is compiled for two architectures at a time. With
        # line numbers for the profiler the shared object has 50 MB, and compressed for size 7.
        flags["nvcc"] = ["-std=c++20", "-O3", "-lineinfo", "--compress-mode=size", "--threads=2"]
        flags["nvcc"].append(f"-Xcompiler={host}")
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


def cuda_home() -> str | None:
    """The CUDA toolkit. A CPU build of PyTorch looks for none, but nvcc can build for it too."""
    if cpp_extension.CUDA_HOME is not None:
        return cpp_extension.CUDA_HOME
    places = [os.environ.get(name) for name in ("CUDA_HOME", "CUDA_PATH")] + ["/usr/local/cuda"]
    if nvcc := shutil.which("nvcc"):
        places.append(str(Path(nvcc).resolve().parents[1]))
    return next((p for p in places if p and (Path(p) / "bin" / "nvcc").exists()), None)


def wants_cuda() -> bool:
    choice = os.environ.get("CVFAST_CUDA", "auto")
    if choice not in ("auto", "0", "1"):
        sys.exit(f"CVFAST_CUDA={choice!r}: expected auto, 0 or 1")
    cpp_extension.CUDA_HOME = cuda_home()
    if choice == "1" and cpp_extension.CUDA_HOME is None:
        sys.exit("CVFAST_CUDA=1: no nvcc found; install the CUDA toolkit or set CUDA_HOME")
    return choice != "0" and cpp_extension.CUDA_HOME is not None


extensions = [extension("_C_cpu", sources("cpu", ".cpp"), "cpu", ["c10", "torch_cpu"])]
if wants_cuda():
    os.environ.setdefault("TORCH_CUDA_ARCH_LIST", DEFAULT_CUDA_ARCHS)
    extensions.append(
        extension("_C_cuda", sources("cuda", ".cpp", ".cu"), "cuda", ["c10", "torch_cpu", "cudart"])
    )

setup(
    # kernels/ is no package of its own: `kernels` is another project's name on PyPI.
    packages=[*find_packages(include=["cvfast", "cvfast.*"]), "cvfast.kernels"],
    package_dir={"cvfast": "cvfast", "cvfast.kernels": "kernels"},
    ext_modules=extensions,
    cmdclass={"build_ext": cpp_extension.BuildExtension.with_options(no_python_abi_suffix=True)},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
