"""Which GPU kernels ran right on real hardware as their source is now, and which changed since.

Compiled is not proven. `benchmarks/validate.py` runs the tests of every kernel on a GPU and writes,
with the worst error, a hash of the sources the result depends on: the kernel's file and everything
it includes, not the launch parameters, which choose how fast the same result is computed. A kernel
whose hash is not in the record is unproven.
"""

from __future__ import annotations

import ast
import hashlib
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

from cvfast.launch.calls import COLUMNS

ROOT = Path(__file__).resolve().parents[1]
"""The checkout that cvfast is imported from; of an installed wheel, a folder without sources."""

RECORD = Path("benchmarks/results/validation.json")
"""Within a checkout."""


class Kernel(NamedTuple):
    """What is proven at a time: the kernels of one pass of an operator on one backend."""

    op: str
    backend: str
    pass_: str


KERNELS = tuple(
    Kernel(column.op, backend, pass_)
    for column in COLUMNS
    for backend in column.backends
    for pass_ in column.passes
)
"""Every GPU kernel of cvfast."""

_SOURCES = {"triton": ("kernels/{}.py",), "cuda": ("csrc/cuda/{}.cu", "csrc/cuda/{}_*.cu")}


@dataclass(frozen=True)
class Proof:
    """One kernel's tests passed on one device.

    Attributes:
        op, backend, pass_: the kernel.
        source_hash: of its sources at that time.
        device, capability, driver: what it ran on; capability such as "9.0".
        torch, triton, cuda: versions; None for a package that was not there.
        date, commit, dirty: when, and from which commit, changed or not.
        error_ratio: the worst error against float64 over what the policy allows: below 1.
        worst: the case it was found in.
        cases, tests: how many comparisons and how many tests passed.
    """

    op: str
    backend: str
    pass_: str
    source_hash: str
    device: str
    capability: str
    driver: str | None
    torch: str | None
    triton: str | None
    cuda: str | None
    date: str
    commit: str | None
    dirty: bool | None
    error_ratio: float
    worst: str
    cases: int
    tests: int

    @property
    def kernel(self) -> Kernel:
        return Kernel(self.op, self.backend, self.pass_)


@dataclass(frozen=True)
class Status:
    """Whether a kernel is proven.

    Attributes:
        state: "proven", "unproven" or "unknown".
        reason: where and when it was proven, or why not.
        proofs: those of the present source, newest first.
    """

    state: str
    reason: str
    proofs: tuple[Proof, ...] = ()

    def __str__(self) -> str:
        return f"{self.state}: {self.reason}"


def main_files(op: str, backend: str, root: Path = ROOT) -> list[Path]:
    """The files that a kernel is compiled from; empty without sources."""
    patterns = (pattern.format(op) for pattern in _SOURCES[backend])
    return sorted(path for pattern in patterns for path in root.glob(pattern))


def source_files(op: str, backend: str, root: Path = ROOT) -> list[Path]:
    """`main_files` and all of cvfast's own that they include; empty without sources."""
    uses = _includes if backend == "cuda" else _imports
    found: dict[Path, None] = {}
    waiting = main_files(op, backend, root)
    if backend == "cuda" and waiting:
        waiting.append(root / "csrc/cuda/bindings.cpp")  # the strides and sizes come from there
    while waiting:
        path = waiting.pop().resolve()
        if path not in found:
            found[path] = None
            waiting += uses(path, root)
    return sorted(found)


_INCLUDE = re.compile(r'^\s*#\s*include\s*"([^"]+)"', re.MULTILINE)


def _includes(path: Path, root: Path) -> Iterator[Path]:
    for name in _INCLUDE.findall(path.read_text(encoding="utf-8")):
        folders = (path.parent, root / "csrc")
        yield from [f / name for f in folders if (f / name).is_file()][:1]


_PACKAGE = "cvfast.kernels."


def _imports(path: Path, root: Path) -> Iterator[Path]:
    """Modules of the kernels' own package, however they are imported."""
    package = root / "kernels"
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = (_PACKAGE if node.level else "") + (node.module or "")
            names = [base, *(f"{base.rstrip('.')}.{alias.name}" for alias in node.names)]
        for name in names:
            if name.startswith(_PACKAGE):
                module = name.removeprefix(_PACKAGE).split(".")
                file = package.joinpath(*module).with_suffix(".py")
                if file.is_file():
                    yield file


def source_hash(op: str, backend: str, root: Path = ROOT) -> str | None:
    """SHA-256 over names and contents of `source_files`; None without sources."""
    files = source_files(op, backend, root)
    if not files:
        return None
    digest = hashlib.sha256()
    for path in files:
        content = path.read_bytes()
        name = path.relative_to(root.resolve()).as_posix()
        digest.update(f"{name}\0{len(content)}\0".encode() + content)
    return digest.hexdigest()


def load(root: Path = ROOT) -> list[Proof]:
    """The record of a checkout; empty without one.

    Raises:
        ValueError: if the file is there and no record.
    """
    path = root / RECORD
    if not path.exists():
        return []
    try:
        return [Proof(**row) for row in json.loads(path.read_text(encoding="utf-8"))["proofs"]]
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is not a validation record: {error}") from error


def status(kernel: Kernel, root: Path = ROOT, proofs: Iterable[Proof] | None = None) -> Status:
    """Whether `kernel`, as its source stands in the checkout `root`, is proven."""
    present = source_hash(kernel.op, kernel.backend, root)
    if present is None:
        return Status("unknown", "no sources here to compare")
    own = [proof for proof in (load(root) if proofs is None else proofs) if proof.kernel == kernel]
    own.sort(key=lambda proof: proof.date, reverse=True)
    valid = tuple(proof for proof in own if proof.source_hash == present)
    if valid:
        places = dict.fromkeys(f"{proof.device}, {proof.date[:10]}" for proof in valid)
        return Status("proven", "; ".join(places), valid)
    if own:
        return Status("unproven", f"changed since {own[0].device}, {own[0].date[:10]}")
    return Status("unproven", "never run on hardware")


def record(proofs: Iterable[Proof], path: Path) -> None:
    """Adds proofs to the record in the file `path`: per kernel and device, the newest is kept.

    Raises:
        ValueError: if a proof's error exceeds what is allowed.
    """
    rows: dict[tuple[Any, ...], dict[str, Any]] = {}
    if path.exists():
        for row in json.loads(path.read_text(encoding="utf-8"))["proofs"]:
            rows[row["op"], row["backend"], row["pass_"], row["device"]] = row
    for proof in proofs:
        if not proof.error_ratio <= 1:
            raise ValueError(
                f"{proof.kernel} is no proof: its error is {proof.error_ratio} of what is allowed"
            )
        rows[proof.op, proof.backend, proof.pass_, proof.device] = asdict(proof)
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"proofs": [rows[key] for key in sorted(rows)]}, indent=2)
    fresh = path.with_suffix(".part")
    fresh.write_text(text + "\n", encoding="utf-8")
    fresh.replace(path)  # whole, also where the process is ended meanwhile
