"""Builds CUDA sources as C++ over the host emulation.

    CVFAST_CUDA_EMULATION=$(python tests/emulation/build.py) pytest tests/ops

Objects and libraries are kept in build/emulation under a digest of what they are made from, so
that nothing is built twice; processes that build at once wait for each other.
"""

from __future__ import annotations

import fcntl
import functools
import hashlib
import importlib.metadata
import os
import shutil
import subprocess
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
CSRC = ROOT / "csrc"
OUTPUT = ROOT / "build" / "emulation"

COMMON = [
    "-std=c++20",
    "-O2",
    "-fPIC",
    "-fvisibility=hidden",
    "-DCVFAST_EMULATION",
    "-Wall",
    "-Wextra",
    "-Wno-unknown-pragmas",  # unroll
    "-fno-strict-aliasing",  # nvcc does not assume it
]
# Every access and every undefined operation of a kernel calls the run-time.
KERNEL = [
    "-xc++",
    "-g1",
    "-fsanitize=thread,alignment,null,bounds,signed-integer-overflow,integer-divide-by-zero,shift",
    "-ffp-contract=off",
]


def compiler() -> str | None:
    """The C++ compiler ($CXX, or g++), if there is one."""
    return shutil.which(os.environ.get("CXX", "g++"))


def cuda_library() -> Path:
    """The shared object of csrc/cuda whose operators serve CPU tensors, for
    CVFAST_CUDA_EMULATION.

    Raises:
        RuntimeError: if a source does not compile; the message holds the compiler's.
    """
    from torch.utils import cpp_extension

    # As setup.py builds the bindings.
    bindings = ["-DTORCH_TARGET_VERSION=0x020b000000000000"]
    bindings += [f"-isystem{path}" for path in cpp_extension.include_paths("cpu")]
    folders = cpp_extension.library_paths("cpu")
    link = [f"-L{path}" for path in folders] + [f"-Wl,-rpath,{path}" for path in folders]
    sources = [*(CSRC / "cuda").glob("*.cu"), *(CSRC / "cuda").glob("*.cpp")]
    return library("cvfast_cuda", sources, bindings=bindings, link=[*link, "-ltorch_cpu", "-lc10"])


def library(
    name: str,
    sources: Iterable[Path],
    *,
    csrc: Path = CSRC,
    bindings: Sequence[str] = (),
    link: Sequence[str] = (),
) -> Path:
    """A shared object of `sources` and the emulation's run-time.

    Args:
        name: begins the file's name.
        sources: .cu files, of which every access is checked, and .cpp files.
        csrc: where their headers are; a test may give a changed copy.
        bindings: further compiler arguments for .cpp files.
        link: further linker arguments.

    Raises:
        RuntimeError: if a source does not compile; the message holds the compiler's.
    """
    # The run-time first: of inline functions that both have, the linker keeps the first, and the
    # run-time's must not be those that call it.
    jobs = [(path, COMMON) for path in sorted((HERE / "runtime").glob("*.cpp"))]
    jobs += [
        (path, [*COMMON, *(KERNEL if path.suffix == ".cu" else bindings)])
        for path in sorted(sources)
    ]
    include = [f"-I{csrc}", f"-I{HERE / 'include'}"]
    folders = (csrc / "common", csrc / "cuda", HERE)
    headers = [path for folder in folders for path in sorted(folder.rglob("*.h"))]
    headers += sorted((csrc / "cuda").glob("*.cuh"))
    torch = importlib.metadata.version("torch")  # whose headers the bindings include
    digest = _digest(torch.encode(), *(path.read_bytes() for path in headers))
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(lambda job: _object(job[0], job[1], include, digest), jobs))
    key = _digest(*(str(path).encode() for path in objects), *(flag.encode() for flag in link))
    output = OUTPUT / f"{name}-{key}.so"
    _make(output, ["-shared", "-Wl,--no-undefined", *map(str, objects), *link])
    return output


def _object(source: Path, flags: Sequence[str], include: list[str], headers: str) -> Path:
    key = _digest(_version().encode(), headers.encode(), str(flags).encode(), source.read_bytes())
    output = OUTPUT / f"{source.stem}-{key}.o"
    _make(output, ["-c", *flags, *include, str(source)])
    return output


def _digest(*contents: bytes) -> str:
    digest = hashlib.sha256()
    for content in contents:
        digest.update(hashlib.sha256(content).digest())
    return digest.hexdigest()[:16]


@functools.cache
def _version() -> str:
    return subprocess.run(
        [_require_compiler(), "--version"], capture_output=True, text=True, check=True
    ).stdout


def _require_compiler() -> str:
    path = compiler()
    if path is None:
        raise RuntimeError("the host emulation needs a C++20 compiler: install g++ or set CXX")
    return path


def _make(output: Path, arguments: list[str]) -> None:
    """Runs the compiler unless `output` exists; one process does, others wait for it."""
    OUTPUT.mkdir(parents=True, exist_ok=True)
    with open(f"{output}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if output.exists():
            return
        partial = output.with_suffix(".partial")
        command = [_require_compiler(), *arguments, "-o", str(partial)]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        if result.returncode:
            raise RuntimeError(f"{' '.join(command)}\n{result.stderr}")
        partial.rename(output)


if __name__ == "__main__":
    print(cuda_library())
