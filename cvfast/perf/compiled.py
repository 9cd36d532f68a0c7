"""What a compiled GPU kernel needs and does: registers, local and shared memory, instructions.

Everything is read out of the finished binary (a cubin, or the cubins inside a shared object) with
NVIDIA's `cuobjdump`, so a kernel of Triton and one of nvcc are judged alike, without a GPU.
"""

from __future__ import annotations

import ctypes
import ctypes.util
import functools
import importlib.util
import os
import re
import shutil
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from cvfast.perf.devices import WARP, Architecture, architecture

_INSTRUCTION_BYTES = 16

_TOOLKIT = (
    "install the CUDA toolkit and put its bin folder on PATH, or name the toolkit in CUDA_HOME"
)
_MEND = {
    "nvcc": _TOOLKIT,
    "cuobjdump": f"pip install triton, whose package carries it; or {_TOOLKIT}",
    "nvdisasm": f"pip install triton, whose package carries it; or {_TOOLKIT}",
}


class ToolMissing(RuntimeError):
    """A program of the CUDA toolkit is not on this machine; the message says how to get it."""


class CompilationFailed(RuntimeError):
    """nvcc refused a source; the message is what it printed."""


@dataclass(frozen=True)
class Binary:
    """One kernel as compiled for one architecture. Sizes are in bytes.

    Attributes:
        function: its name as a linker sees it (mangled).
        arch: such as "sm_90".
        registers: of a thread.
        local_bytes: local memory of a thread: spilled registers, and arrays indexed at run time.
        shared_bytes: static shared memory of a block, without what the system reserves.
        code_bytes: of the instructions.
        instructions: how often each occurs, by opcode with its modifiers, such as "LDG.E.128".
        core: the same from the first to the last multiply-add (FFMA) or matrix instruction: the
            code that does the work, without what prepares it and what stands beside it for special
            cases.
    """

    function: str
    arch: str
    registers: int
    local_bytes: int
    shared_bytes: int
    code_bytes: int
    instructions: dict[str, int]
    core: dict[str, int]

    @property
    def name(self) -> str:
        """`function` as the source writes it, template arguments included, parameters left out."""
        return demangle(self.function)

    def census(self) -> dict[str, int]:
        """`census` of all instructions."""
        return census(self.instructions)


def census(instructions: Mapping[str, int]) -> dict[str, int]:
    """Counts of the instructions that tell how a kernel works, absent ones left out.

    Memory instructions carry the bits a thread moves ("LDG.128"), matrix instructions their opcode
    ("HMMA", "HGMMA", "UTCHMMA").
    """
    groups: Counter[str] = Counter()
    for opcode, count in instructions.items():
        if (group := _group(opcode)) is not None:
            groups[group] += count
    return dict(sorted(groups.items()))


_MEMORY = {"LDG", "STG", "LDGSTS", "LDS", "STS", "LDL", "STL", "LD", "ST"}
_MATRIX = {"HMMA", "IMMA", "QMMA", "DMMA", "BMMA", "OMMA"}
_MULTIPLY_ADDS = {"FFMA", "FFMA2"}
_OTHER = {*_MULTIPLY_ADDS, "BAR", "SHFL", "RED", "ATOMG", "UBLKCP", "UTMALDG", "UTMASTG"}
_WIDTH = re.compile(r"U?S?(8|16|32|64|128|256)")


def _group(opcode: str) -> str | None:
    base, *modifiers = opcode.split(".")
    if base in ("LDSM", "STSM"):
        # Of matrices of 8 x 8 16-bit numbers: 4 bytes a thread each.
        return f"{base}.{32 * int(modifiers[-1]) if modifiers[-1] in ('2', '4') else 32}"
    if base in _MEMORY:
        widths = [int(match[1]) for part in modifiers if (match := _WIDTH.fullmatch(part))]
        return f"{base}.{max(widths, default=32)}"
    if _is_matrix(base):
        return base
    return base if base in _OTHER else None


def _is_matrix(base: str) -> bool:
    return base in _MATRIX or base.endswith("GMMA") or bool(re.fullmatch(r"UTC\w*MMA", base))


_SHAPES = {"16816": 16 * 8 * 16, "1688": 16 * 8 * 8, "1684": 16 * 8 * 4, "884": 8 * 8 * 4}
_GROUP_SHAPE = re.compile(r"(\d+)x(\d+)x(\d+)")


def multiply_adds(instructions: Mapping[str, int]) -> tuple[float, float]:
    """Multiply-adds of a thread that runs through the instructions once: of the float32 units, and
    its share of those of the matrix units.

    Matrix instructions whose opcode does not tell the size (those of sm_100) count as none.
    """
    counts = census(instructions)
    plain = counts.get("FFMA", 0) + 2 * counts.get("FFMA2", 0)
    matrix = 0.0
    for opcode, count in instructions.items():
        base, _, rest = opcode.partition(".")
        if base == "HMMA":
            shape = rest.partition(".")[0]
            matrix += count * _SHAPES.get(shape, 0) / WARP
        elif base == "HGMMA" and (match := _GROUP_SHAPE.search(rest)):
            rows, columns, depth = map(int, match.groups())
            matrix += count * rows * columns * depth / (4 * WARP)
    return plain, matrix


def tool(name: str) -> str:
    """Path of "nvcc", "cuobjdump" or "nvdisasm": of CUDA_HOME, PATH or Triton's package.

    Raises:
        ToolMissing: if there is none.
    """
    folders = []
    if home := os.environ.get("CUDA_HOME"):
        folders.append(f"{home}/bin")
    folders += os.environ.get("PATH", os.defpath).split(os.pathsep)
    # The CUDA toolkit's own place, which few have on PATH.
    folders.append("/usr/local/cuda/bin")
    if (triton := _triton_tools()) is not None:
        folders.append(triton)
    found = shutil.which(name, path=os.pathsep.join(folders))
    if found is None:
        raise ToolMissing(f"{name} is not here: {_MEND[name]}")
    return found


@functools.cache
def _triton_tools() -> str | None:
    spec = importlib.util.find_spec("triton")
    if spec is None or spec.origin is None:
        return None
    return str(Path(spec.origin).parent / "backends" / "nvidia" / "bin")


def compile_cuda(
    source: Path,
    target: Architecture,
    *,
    include: Iterable[Path] = (),
    flags: Sequence[str] = ("-O3", "-std=c++20"),
) -> bytes:
    """The cubin that nvcc makes of one source file.

    Raises:
        ToolMissing: without nvcc.
        CompilationFailed: with nvcc's message.
    """
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        command = [
            *(tool("nvcc"), "-cubin", f"-arch=sm_{target.target}", *flags),
            *(f"-I{path}" for path in include),
            *(str(source), "-o", str(cubin)),
        ]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        if result.returncode != 0:
            raise CompilationFailed(f"{source.name}, sm_{target.target}: {result.stderr.strip()}")
        return cubin.read_bytes()


def read(cubin: bytes) -> list[Binary]:
    """Every kernel in a cubin.

    Raises:
        ToolMissing: without cuobjdump and nvdisasm.
        ValueError: if it is no cubin.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        return parse(_cuobjdump("-res-usage", "-sass", str(path)))


def extract(shared_object: Path) -> list[bytes]:
    """The cubins inside a shared object, of every architecture it was built for.

    Raises:
        ToolMissing: without cuobjdump.
        ValueError: if there is none in it.
    """
    with tempfile.TemporaryDirectory() as folder:
        _cuobjdump("-xelf", "all", str(shared_object.resolve()), cwd=folder)
        return [path.read_bytes() for path in sorted(Path(folder).glob("*.cubin"))]


def _cuobjdump(*arguments: str, cwd: str | None = None) -> str:
    cuobjdump, nvdisasm = tool("cuobjdump"), tool("nvdisasm")
    # cuobjdump calls nvdisasm by name.
    path = os.pathsep.join((str(Path(nvdisasm).parent), os.environ.get("PATH", os.defpath)))
    result = subprocess.run(
        [cuobjdump, *arguments],
        capture_output=True,
        text=True,
        check=False,
        cwd=cwd,
        env=os.environ | {"PATH": path},
    )
    if result.returncode != 0 or "fatal" in result.stderr:
        raise ValueError(f"cuobjdump: {(result.stderr or result.stdout).strip()}")
    return result.stdout


_USAGE = re.compile(
    r"^\s*Function (?P<name>\S+):\n"
    r"\s*REG:(?P<registers>\d+) STACK:(?P<stack>\d+) SHARED:(?P<shared>\d+) LOCAL:(?P<local>\d+)",
    re.MULTILINE,
)
_CODE = re.compile(r"^\s*code for (sm_\d+)", re.MULTILINE)
_FUNCTION = re.compile(r"^\s*Function : (\S+)$", re.MULTILINE)
_SASS = re.compile(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?\w+\s+)?([A-Z][A-Z0-9_.a-z]*)", re.MULTILINE)


def parse(text: str) -> list[Binary]:
    """Reads what `cuobjdump -res-usage -sass` prints of one cubin.

    Raises:
        ValueError: if it names no architecture.
    """
    code = _CODE.search(text)
    if code is None:
        raise ValueError("no code in what cuobjdump printed; is this a cubin?")
    name = code[1]
    sections = _FUNCTION.split(text[code.end() :])
    listings = dict(zip(sections[1::2], sections[2::2], strict=True))
    binaries = []
    for usage in _USAGE.finditer(text[: code.start()]):
        opcodes = _SASS.findall(listings[usage["name"]])
        binaries.append(
            Binary(
                function=usage["name"],
                arch=name,
                registers=int(usage["registers"]),
                local_bytes=int(usage["stack"]) + int(usage["local"]),
                shared_bytes=_static_shared(name, int(usage["shared"])),
                code_bytes=_INSTRUCTION_BYTES * len(opcodes),
                instructions=dict(Counter(opcodes)),
                core=dict(Counter(_core(opcodes))),
            )
        )
    return binaries


def _core(opcodes: Sequence[str]) -> Sequence[str]:
    bases = [opcode.partition(".")[0] for opcode in opcodes]
    adds = [i for i, base in enumerate(bases) if base in _MULTIPLY_ADDS or _is_matrix(base)]
    return opcodes[adds[0] : adds[-1] + 1] if adds else opcodes


def _static_shared(arch: str, reported: int) -> int:
    """From compute capability 9.0 on, a cubin counts the system's share with the kernel's own."""
    limits = architecture(arch)
    counted = limits.capability >= (9, 0) and reported >= limits.shared_reserved
    return reported - limits.shared_reserved if counted else reported


def demangle(function: str) -> str:
    """A C++ name without its parameters: "_ZN3toy4copyILi64EEEvPi" is "toy::copy<64>"."""
    if not function.startswith("_Z") or (library := _cxx_library()) is None:
        return function
    status = ctypes.c_int()
    pointer = library.__cxa_demangle(function.encode(), None, None, ctypes.byref(status))
    if status.value != 0:
        return function
    text = ctypes.cast(pointer, ctypes.c_char_p).value or b""
    ctypes.CDLL(None).free(ctypes.c_void_p(pointer))
    return _without_parameters(text.decode())


@functools.cache
def _cxx_library() -> ctypes.CDLL | None:
    name = ctypes.util.find_library("stdc++") or "libstdc++.so.6"
    try:
        library = ctypes.CDLL(name)
    except OSError:
        return None
    library.__cxa_demangle.restype = ctypes.c_void_p
    return library


def _without_parameters(signature: str) -> str:
    """Drops the return type of a template and the parameter list."""
    # As g++ writes it, without parentheses.
    signature = signature.replace("(anonymous namespace)", "{anonymous}")
    depth = start = 0
    for index, character in enumerate(signature):
        # Parentheses within template arguments, as of "(Kind)1", are no parameter list.
        if character == "<":
            depth += 1
        elif character == ">":
            depth -= 1
        elif character == " " and depth == 0:
            start = index + 1
        elif character == "(" and depth == 0:
            return signature[start:index]
    return signature[start:]
