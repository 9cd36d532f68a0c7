"""Every GPU kernel configuration that ships, compiled for every architecture and looked at.

What ships follows from the networks and from lists of calls beyond them (`cvfast.launch.calls`).
For each call, the launch parameters that a user of an architecture's device would get (tuned table
or heuristic) decide which kernel runs and how it is launched; calls that end in the same kernel are
one configuration. CUDA kernels are compiled from the checkout's sources with nvcc, or else read out
of the built shared object.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import itertools
import json
import logging
import math
import multiprocessing
import os
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from cvfast import validation
from cvfast.launch import table
from cvfast.launch.calls import BACKENDS, OPS, Call, column
from cvfast.ops._example import Example
from cvfast.perf import compiled, environment
from cvfast.perf.compiled import Binary, ToolMissing
from cvfast.perf.devices import (
    ARCHITECTURES,
    DEVICES,
    MAX_THREADS,
    WARP,
    architecture,
    by_arch,
    occupancy,
)
from cvfast.validation import ROOT, Kernel

SAMPLE_ARCHS = ("sm_86", "sm_90")
"""For a quick look: the least blocks and shared memory, and the most used data-centre GPU."""


@dataclass(frozen=True)
class Configuration:
    """One kernel with its launch parameters, on one architecture.

    Attributes:
        op, backend, pass_: what it computes, and in what.
        arch: such as "sm_90".
        function: its name in the source.
        key: of all that the compiler is given; configurations with one key share a binary.
        launch: the launch parameters.
        threads: of a block.
        dynamic_shared: shared memory asked for at launch, in bytes; None: the compiler decides.
        blocks: of the grid of `call`.
        expects: instructions of which the binary must hold one; any will do if there are none.
        forbids: instructions of which it must hold none.
        call: the first call that ends here; None if none does.
    """

    op: str
    backend: str
    pass_: str
    arch: str
    function: str
    key: str
    launch: Any
    threads: int
    dynamic_shared: int | None
    blocks: int
    expects: tuple[str, ...]
    forbids: tuple[str, ...]
    call: Call | None

    @property
    def kernel(self) -> Kernel:
        return Kernel(self.op, self.backend, self.pass_)

    @property
    def identity(self) -> tuple[Any, ...]:
        """What tells it from the others of its operator, backend and architecture."""
        return self.key, self.function, self.threads, self.dynamic_shared

    @property
    def config(self) -> str:
        """One line: the function, its launch parameters and a call that ends here."""
        fields = {} if self.launch is None else vars(self.launch)
        parameters = [f"{name}={value}" for name, value in fields.items()]
        example = "no call of the inventory" if self.call is None else self.call.describe()
        return f"{' '.join([self.function, *parameters])}; {example}"


@dataclass(frozen=True)
class Row:
    """What `cvfast kernels` says of one configuration. Sizes are in bytes.

    Attributes:
        registers, spill_bytes: of a thread; spilled are also arrays indexed at run time.
        shared_bytes: of a block, static and dynamic.
        occupancy: fraction of the resident warps.
        instructions: see `cvfast.perf.compiled.Binary.census`.
        status: "ok", or what is wrong.
        validation: whether its source is proven on hardware.
    """

    op: str
    backend: str
    pass_: str
    config: str
    arch: str
    threads: int
    registers: int | None
    spill_bytes: int | None
    shared_bytes: int | None
    occupancy: float | None
    instructions: dict[str, int]
    code_bytes: int | None
    status: str
    validation: str

    @property
    def failed(self) -> bool:
        """Whether something is wrong with the kernel; not so where a tool to see it is missing."""
        return self.status != "ok" and not self.status.startswith(NOT_COMPILED)

    def to_dict(self) -> dict[str, Any]:
        """For JSON; the key of `pass_` is "pass"."""
        fields = asdict(self)
        return {name.rstrip("_"): value for name, value in fields.items()}


NOT_COMPILED = "not compiled: "


def example(call: Call, *, device: str | torch.device, seed: int = 0) -> Example:
    """Random inputs of a call, on which its kernels can be run: of the operator's module."""
    home = column(call.op).home
    module = importlib.import_module(f"cvfast.ops.{home or call.op}")
    make = getattr(module, f"{call.op}_example" if home else "example")
    passes = {} if call.pass_ == "forward" else {"pass_": call.pass_}
    found: Example = make(call.problem, call.activation, **passes, device=device, seed=seed)
    return found


@contextmanager
def rounding(problem: Any) -> Iterator[None]:
    """Inside, PyTorch's float32 products are rounded to TF32 where those of the problem are."""
    allowed = getattr(problem, "tf32", False)
    matmul = torch.backends.cuda.matmul
    before, matmul.allow_tf32 = matmul.allow_tf32, allowed
    try:
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=allowed):
            yield
    finally:
        matmul.allow_tf32 = before


def configurations(
    calls: Iterable[Call],
    *,
    ops: Sequence[str] = OPS,
    backends: Sequence[str] = BACKENDS,
    archs: Sequence[str] = tuple(ARCHITECTURES),
    tuned: bool = False,
) -> list[Configuration]:
    """The kernels that `calls` end in, each once per architecture, with their launches.

    Args:
        tuned: also every entry of the tuned tables that ship.

    Raises:
        ValueError: for an op, backend or architecture that does not exist.
    """
    for given, known in ((ops, OPS), (backends, BACKENDS)):
        if wrong := [name for name in given if name not in known]:
            raise ValueError(f"unknown: {', '.join(wrong)}; choose from {', '.join(known)}")
    calls = tuple(calls)
    found: dict[tuple[Any, ...], Configuration] = {}
    for op, backend, arch in itertools.product(ops, backends, archs):
        name = architecture(arch).name
        served = (call for call in calls if call.op == op and call.served_by(backend))
        launches = [
            (call, launch)
            for call in served
            if (launch := launch_of(backend, name, call)) is not None
        ]
        if tuned:
            launches += _tuned(op, backend, name)
        for call, launch in launches:
            for configuration in configure(backend, name, call, launch):
                found.setdefault((op, backend, name, configuration.identity), configuration)
    return list(found.values())


def configure(backend: str, arch: str, call: Call, launch: Any) -> tuple[Configuration, ...]:
    """The kernels that one call launches with `launch`, the one that does the work first."""
    return tuple(_DESCRIBE[backend](arch, call, launch))


def launch_of(backend: str, arch: str, call: Call) -> Any:
    """The launch parameters that a call gets on the device that represents an architecture; None
    where a backend that does not serve every call has none that fit there."""
    logger = logging.getLogger("cvfast.launch")
    before = logger.disabled
    # That no table was tuned for a device is no news here.
    logger.disabled = True
    try:
        return table.choose(call.op, backend, call.problem, call.pass_, by_arch(arch))
    except ValueError:
        if hasattr(table.parameters(call.op, backend), "unsupported"):
            return None
        raise
    finally:
        logger.disabled = before


def _tuned(op: str, backend: str, arch: str) -> list[tuple[Call, Any]]:
    """Every entry of the tables of devices of an architecture."""
    found = []
    for file in sorted(table.folder().glob(f"{op}.{backend}.*.json")):
        entries = table.Table.from_json(file.read_text(encoding="utf-8"))
        device = next((known for known in DEVICES if known.name == entries.device), None)
        if device is not None and device.architecture.name == arch:
            found += [
                (Call(op, entry.problem, entry.pass_, "relu6"), entry.launch)
                for entry in entries.entries
            ]
    return found


def _describe_cuda(arch: str, call: Call, launch: Any) -> Iterator[Configuration]:
    op, problem, pass_ = call.op, call.problem, call.pass_
    parameters = table.parameters(op, "cuda")
    main, *sums = map(_plain, parameters.kernels(problem, launch, pass_, call.activation))
    first = Configuration(
        op,
        "cuda",
        pass_,
        arch,
        function=main,
        key=_cuda_key(op, main, arch),
        launch=launch,
        threads=parameters.threads(launch),
        dynamic_shared=parameters.shared_bytes(problem, launch, pass_),
        blocks=math.prod(parameters.grid(problem, launch, pass_)),
        expects=_matrix(arch, call, launch)
        or (_WIDE_LOADS if _tile(main) and _aligned(call) else ()),
        forbids=(),
        call=call,
    )
    yield first
    for function in sums:
        # Adds up what the blocks of the main kernel left, through a float for each thread.
        yield replace(
            first,
            function=function,
            key=_cuda_key(op, function, arch),
            launch=None,
            threads=MAX_THREADS,
            dynamic_shared=4 * MAX_THREADS,
            expects=(),
        )


def _uncalled(key: str, found: Sequence[Configuration], result: Build) -> Iterator[Configuration]:
    """What is in a CUDA binary and no call ends in: the tuner may still choose it."""
    called = {one.function for one in found if one.key == key}
    first = next(one for one in found if one.key == key)
    if first.backend != "cuda":
        return
    for function in sorted(result.binaries.keys() - called):
        yield replace(
            first,
            pass_=next((name for name in column(first.op).passes if name in function), "forward"),
            function=function,
            launch=None,
            threads=table.parameters(first.op, "cuda").MAX_THREADS,
            dynamic_shared=0,
            expects=_WIDE_LOADS if _tile(function) else (),
            call=None,
        )


# Which of an operator's files holds the kernels for an element type.
_FILES = {"<float": "float", "<__half": "half", "<__nv_bfloat16": "bfloat16"}


def _cuda_key(op: str, function: str, arch: str) -> str:
    types = (name for start, name in _FILES.items() if start in function)
    file = "_".join([op, *list(types)[:1]])
    return f"{_cuda_hash(op)} {file} {arch}"


@functools.cache
def _cuda_hash(op: str) -> str | None:
    return validation.source_hash(op, "cuda")


def _describe_triton(arch: str, call: Call, launch: Any) -> Iterator[Configuration]:
    source, options = _triton_source(call, launch)
    grid = table.parameters(call.op, "triton").grid(call.problem, launch, call.pass_)
    yield Configuration(
        call.op,
        "triton",
        call.pass_,
        arch,
        function=source.fn.__name__,
        key=f"{source.hash()} {sorted(options.items())} {arch}",
        launch=launch,
        threads=WARP * options["num_warps"],
        dynamic_shared=None,
        blocks=math.prod(grid),
        expects=_matrix(arch, call, launch),
        forbids=_narrower(call, launch.vector) if call.op == "depthwise" else (),
        call=call,
    )


def _triton_source(call: Call, launch: Any) -> Any:
    kernels = importlib.import_module(f"cvfast.kernels.{call.op}")
    return kernels.source(call.problem, launch, call.pass_, call.activation)


_DESCRIBE = {"cuda": _describe_cuda, "triton": _describe_triton}

_WIDE_LOADS = ("LDG.128", "LDGSTS.128")
_MATRIX_INSTRUCTIONS = ("HGMMA", "HMMA", "UTCHMMA")


def uses_matrix_units(call: Call, launch: Any) -> bool:
    """Whether the kernel is to use matrix units: for products of 16-bit numbers and of TF32, unless
    the launch parameters say otherwise (`matrix`)."""
    if not column(call.op).matrix or not getattr(launch, "matrix", True):
        return False
    return call.problem.dtype is not torch.float32 or call.problem.tf32


def _matrix(arch: str, call: Call, launch: Any) -> tuple[str, ...]:
    if not uses_matrix_units(call, launch):
        return ()
    # Four warps multiply 64 rows at a time: there the instructions of one warp are the slower way.
    wide = getattr(launch, "block_m", 0) >= 64 and launch.num_warps >= 4
    return ("HGMMA",) if arch == "sm_90" and wide else _MATRIX_INSTRUCTIONS


def _wide(function: str, call: Call) -> tuple[str, ...]:
    return _WIDE_LOADS if _tile(function) and _aligned(call) else ()


def _tile(function: str) -> bool:
    """Whether a CUDA kernel copies tiles to shared memory."""
    return "_tile" in function


def _narrower(call: Call, vector: int) -> tuple[str, ...]:
    """Accesses to images of less than the `vector` channels of a thread."""
    bits = 8 * vector * call.problem.dtype.itemsize
    narrow = [width for width in (8, 16, 32, 64) if width < bits]
    # With a depth multiplier a thread's channels are fewer in the image than in the result; the
    # gradient of the weights is stored as float32, and small.
    loads = [] if call.problem.multiplier > 1 else [f"LDG.{width}" for width in narrow]
    stores = [] if call.pass_ == "backward_weight" else [f"STG.{width}" for width in narrow]
    return (*loads, *stores)


def _aligned(call: Call) -> bool:
    """Whether the channels of every pixel fill 16 bytes."""
    problem = call.problem
    return problem.channels * problem.dtype.itemsize % 16 == 0 and problem.multiplier == 1


@dataclass(frozen=True)
class Build:
    """What came of compiling one key.

    Attributes:
        binaries: by the name of the function in the source.
        dynamic_shared: bytes that the compiler decided on, where it does.
        error: why there is no binary; empty if there is.
    """

    binaries: dict[str, Binary]
    dynamic_shared: int = 0
    error: str = ""


def build(found: Sequence[Configuration], *, jobs: int | None = None) -> dict[str, Build]:
    """Compiles each key of the configurations once; results are kept in the checkout's build
    folder.

    Args:
        jobs: processes; by default as many as cores.
    """
    units = list({configuration.key: configuration for configuration in found}.values())
    # The largest sources first, so that no core waits for one at the end.
    units.sort(key=lambda unit: unit.backend != "cuda")
    kept = {unit.key: _kept(unit) for unit in units}
    missing = [unit for unit in units if kept[unit.key] is None]
    jobs = min(jobs or len(os.sched_getaffinity(0)), len(missing))
    if jobs <= 1:
        made = [_compile(unit) for unit in missing]
    else:
        # Forked processes would inherit locks that torch's threads hold.
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(jobs, mp_context=context) as pool:
            made = list(pool.map(_compile, missing))
    for unit, result in zip(missing, made, strict=True):
        kept[unit.key] = result
    return {key: result for key, result in kept.items() if result is not None}


def inspect(found: Sequence[Configuration], *, jobs: int | None = None) -> list[Row]:
    """Compiles the configurations and judges each; see `Row`."""
    builds = build(found, jobs=jobs)
    proofs = validation.load()
    states = {
        kernel: str(validation.status(kernel, proofs=proofs)) for kernel in validation.KERNELS
    }
    everything = [*found]
    for key, result in builds.items():
        everything += _uncalled(key, found, result)
    return [judge(one, builds[one.key], states[one.kernel]) for one in everything]


def judge(configuration: Configuration, result: Build, state: str) -> Row:
    """The row of one configuration, whose source is in `state`."""
    binary = result.binaries.get(configuration.function)
    row = Row(
        op=configuration.op,
        backend=configuration.backend,
        pass_=configuration.pass_,
        config=configuration.config,
        arch=configuration.arch,
        threads=configuration.threads,
        registers=None,
        spill_bytes=None,
        shared_bytes=None,
        occupancy=None,
        instructions={},
        code_bytes=None,
        status=result.error or f"no function {configuration.function} in the binary",
        validation=state,
    )
    if binary is None:
        return row
    limits = architecture(configuration.arch)
    shared = binary.shared_bytes + dynamic_shared(configuration, result)
    held = occupancy(limits, configuration.threads, binary.registers, shared)
    census = binary.census()
    faults = []
    if binary.local_bytes:
        faults.append(f"spills {binary.local_bytes} bytes")
    if shared > limits.shared_per_block:
        faults.append(
            f"shared memory, {shared} bytes, over the {limits.shared_per_block} of {limits.name}"
        )
    elif held.blocks_per_sm == 0:
        faults.append(f"cannot be launched: too many {held.limiter}")
    expects = configuration.expects
    if expects and not any(name in census for name in expects):
        faults.append(f"no {' or '.join(expects)}")
    faults += [f"{name} is too narrow" for name in configuration.forbids if name in census]
    return replace(
        row,
        registers=binary.registers,
        spill_bytes=binary.local_bytes,
        shared_bytes=shared,
        occupancy=held.fraction,
        instructions=census,
        code_bytes=binary.code_bytes,
        status="; ".join(faults) or "ok",
    )


def dynamic_shared(configuration: Configuration, result: Build) -> int:
    """Bytes of shared memory asked for at launch."""
    given = configuration.dynamic_shared
    return result.dynamic_shared if given is None else given


def _compile(unit: Configuration) -> Build:
    try:
        result = _COMPILE[unit.backend](unit)
    except ToolMissing as error:
        return Build({}, error=f"{NOT_COMPILED}{error}")
    except Exception as error:  # of nvcc or of any pass of Triton's compiler
        return Build({}, error=f"does not compile: {type(error).__name__}: {error}")
    _keep(unit, result)
    return result


def _compile_cuda(unit: Configuration) -> Build:
    source = ROOT / "csrc" / "cuda" / f"{unit.key.split()[1]}.cu"
    if source.is_file():
        cubins = [
            compiled.compile_cuda(
                source, architecture(unit.arch), include=[ROOT / "csrc"], flags=_NVCC_FLAGS
            )
        ]
    else:
        library = Path(__file__).parent / "_C_cuda.so"
        if not library.is_file():
            raise ToolMissing(f"neither {source.name} nor {library.name} is here: reinstall cvfast")
        cubins = compiled.extract(library)
    binaries = [binary for cubin in cubins for binary in compiled.read(cubin)]
    return Build({_plain(binary.name): binary for binary in binaries if binary.arch == unit.arch})


# Those of setup.py that change the code.
_NVCC_FLAGS = ("-O3", "-std=c++20", "--expt-relaxed-constexpr", "-DUSE_CUDA")


def _plain(function: str) -> str:
    """A function's name in one spelling."""
    for part in (" ", "{anonymous}::", "(anonymousnamespace)::"):
        function = function.replace(part, "")
    return function


def compile_triton(call: Call, launch: Any, arch: str) -> Any:
    """A call's Triton kernel, compiled for an architecture (`triton.compiler.CompiledKernel`)."""
    compiler = importlib.import_module("cvfast.kernels.compiler")
    major, minor = architecture(arch).capability
    return compiler.compiled(*_triton_source(call, launch), 10 * major + minor)


def _compile_triton(unit: Configuration) -> Build:
    assert unit.call is not None  # only binaries of CUDA hold more than what is called
    kernel = compile_triton(unit.call, unit.launch, unit.arch)
    (binary,) = compiled.read(kernel.asm["cubin"])
    return Build({unit.function: binary}, dynamic_shared=kernel.metadata.shared)


_COMPILE = {"cuda": _compile_cuda, "triton": _compile_triton}

_CACHE = ROOT / "build" / "kernels"


def _cache_file(unit: Configuration) -> Path:
    versions = (environment.package_version("triton"), environment.compiler_version("nvcc"))
    described = f"{unit.key} {versions} {_NVCC_FLAGS}".encode()
    # The reader of binaries decides what a kept result means.
    digest = hashlib.sha256(described + Path(compiled.__file__).read_bytes())
    return _CACHE / f"{digest.hexdigest()}.json"


def _kept(unit: Configuration) -> Build | None:
    try:
        content = json.loads(_cache_file(unit).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    binaries = {name: Binary(**fields) for name, fields in content["binaries"].items()}
    return Build(binaries, content["dynamic_shared"])


def _keep(unit: Configuration, result: Build) -> None:
    """Writes a result for the next run; where there is no checkout to write to, keeps nothing."""
    if not (ROOT / "setup.py").is_file():
        return
    path = _cache_file(unit)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(f".{os.getpid()}")
    partial.write_text(json.dumps(asdict(result)), encoding="utf-8")
    # Another process may be writing the same file.
    partial.replace(path)
