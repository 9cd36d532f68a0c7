"""The record of what ran right on hardware: what it depends on, and when it stops to hold."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import torch

from cvfast import inventory, validation
from cvfast.launch import calls as shipped
from cvfast.launch.calls import Call
from cvfast.launch.depthwise import PASSES, Problem
from cvfast.ops._example import Example
from cvfast.validation import KERNELS, RECORD, ROOT, Kernel, Proof

FORWARD = Kernel("depthwise", "cuda", "forward")


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A checkout with a CUDA and a Triton kernel, and what they include."""
    files = {
        "csrc/cuda/depthwise.cu": '#include "cuda/kernel.cuh"\n#include <cuda_fp16.h>\n',
        "csrc/cuda/kernel.cuh": '#pragma once\n#include "launch.h"\n',
        "csrc/cuda/launch.h": '  #  include "common/types.h"\n#include "not/in/the/tree.h"\n',
        "csrc/common/types.h": '#include "cuda/kernel.cuh"  // a circle\n',
        "csrc/cuda/other.cu": "",
        "csrc/cuda/bindings.cpp": "",
        "kernels/__init__.py": "",
        "kernels/depthwise.py": "import triton\nfrom . import epilogue\n",
        "kernels/epilogue.py": "from .jit import jit\nfrom cvfast.launch import table\n",
        "kernels/jit.py": "import cvfast.kernels.tiles\n",
        "kernels/tiles.py": "",
        "kernels/pointwise.py": "",
        "cvfast/launch/table.py": "",
    }
    for name, text in files.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return tmp_path


def proof(root: Path, kernel: Kernel = FORWARD, **changes: object) -> Proof:
    present = validation.source_hash(kernel.op, kernel.backend, root)
    assert present is not None
    values = Proof(
        *kernel,
        source_hash=present,
        device="NVIDIA H200",
        capability="9.0",
        driver="580.1",
        torch="2.11.0",
        triton="3.6.0",
        cuda="13.0",
        date="2026-01-02T03:04:05+00:00",
        commit="0123456789",
        dirty=False,
        error_ratio=0.5,
        worst="float16 2x13x17x19",
        cases=7,
        tests=11,
    )
    return replace(values, **changes)  # type: ignore[arg-type]


def names(files: list[Path], root: Path) -> list[str]:
    return [path.relative_to(root).as_posix() for path in files]


def test_a_cuda_kernel_depends_on_its_headers(tree: Path) -> None:
    assert names(validation.source_files("depthwise", "cuda", tree), tree) == [
        "csrc/common/types.h", "csrc/cuda/bindings.cpp", "csrc/cuda/depthwise.cu",
        "csrc/cuda/kernel.cuh",
        "csrc/cuda/launch.h",
    ]  # fmt: skip


def test_a_triton_kernel_depends_on_what_it_imports_of_the_kernels(tree: Path) -> None:
    assert names(validation.source_files("depthwise", "triton", tree), tree) == [
        "kernels/depthwise.py", "kernels/epilogue.py", "kernels/jit.py", "kernels/tiles.py",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "backend", "changes"),
    [
        ("csrc/common/types.h", "cuda", True),
        ("csrc/cuda/depthwise.cu", "cuda", True),
        ("csrc/cuda/other.cu", "cuda", False),
        ("csrc/cuda/bindings.cpp", "cuda", True),
        ("kernels/jit.py", "cuda", False),
        ("kernels/tiles.py", "triton", True),
        ("kernels/pointwise.py", "triton", False),
        ("cvfast/launch/table.py", "triton", False),
        ("csrc/common/types.h", "triton", False),
    ],
)
def test_the_hash_follows_what_a_kernel_is_made_of(
    tree: Path, name: str, backend: str, changes: bool
) -> None:
    before = validation.source_hash("depthwise", backend, tree)
    with (tree / name).open("a") as file:
        file.write("// a change\n" if name.startswith("csrc") else "# a change\n")
    assert (validation.source_hash("depthwise", backend, tree) != before) == changes


def test_the_hash_does_not_depend_on_where_the_checkout_lies(tree: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    for path in validation.source_files("depthwise", "cuda", tree):
        target = copy / path.relative_to(tree)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(path.read_bytes())
    here, there = (validation.source_hash("depthwise", "cuda", root) for root in (tree, copy))
    assert here == there is not None


def test_a_kernel_is_proven_until_a_header_of_it_changes(tree: Path) -> None:
    assert str(validation.status(FORWARD, tree)) == "unproven: never run on hardware"
    validation.record([proof(tree)], tree / RECORD)
    found = validation.status(FORWARD, tree)
    assert str(found) == "proven: NVIDIA H200, 2026-01-02"
    assert found.proofs == (proof(tree),)
    assert validation.status(Kernel("depthwise", "cuda", "backward_input"), tree).state == (
        "unproven"
    )
    with (tree / "csrc/common/types.h").open("a") as file:
        file.write("constexpr int changed = 1;\n")
    assert str(validation.status(FORWARD, tree)) == (
        "unproven: changed since NVIDIA H200, 2026-01-02"
    )


def test_the_newest_proof_of_each_device_is_kept(tree: Path) -> None:
    path = tree / RECORD
    old, new = proof(tree), proof(tree, date="2026-02-03T00:00:00+00:00", tests=12)
    other = proof(tree, device="NVIDIA GeForce RTX 4090", capability="8.9")
    validation.record([old, other], path)
    validation.record([new], path)
    assert set(validation.load(tree)) == {new, other}
    found = validation.status(FORWARD, tree)
    assert found.reason == "NVIDIA H200, 2026-02-03; NVIDIA GeForce RTX 4090, 2026-01-02"


def test_an_error_beyond_the_policy_proves_nothing(tree: Path) -> None:
    for ratio in (1.01, float("nan")):
        with pytest.raises(ValueError, match="no proof"):
            validation.record([proof(tree, error_ratio=ratio)], tree / RECORD)
    assert not (tree / RECORD).exists()


def test_without_sources_nothing_is_claimed(tmp_path: Path) -> None:
    assert str(validation.status(FORWARD, tmp_path)) == "unknown: no sources here to compare"


def test_a_broken_record_is_named(tree: Path) -> None:
    path = tree / RECORD
    path.parent.mkdir(parents=True)
    path.write_text('{"proofs": [{"op": "depthwise"}]}')
    with pytest.raises(ValueError, match=r"validation\.json is not a validation record"):
        validation.load(tree)


def test_the_committed_record_is_one() -> None:
    if not (ROOT / RECORD).exists():
        pytest.skip("not a checkout")
    proofs = validation.load()
    assert {found.kernel for found in proofs} <= set(KERNELS)
    assert all(0 <= found.error_ratio <= 1 for found in proofs)
    assert list(json.loads((ROOT / RECORD).read_text())) == ["proofs"]


@pytest.mark.parametrize("kernel", KERNELS, ids=str)
def test_every_kernel_has_its_sources_here(kernel: Kernel) -> None:
    if not (ROOT / "csrc").exists():
        pytest.skip("not a checkout")
    assert validation.source_files(kernel.op, kernel.backend)


@pytest.fixture(scope="module")
def validate() -> ModuleType:
    return script("validate")


def script(name: str) -> ModuleType:
    path = ROOT / "benchmarks" / f"{name}.py"
    if not path.exists():
        pytest.skip("not a checkout")
    spec = importlib.util.spec_from_file_location(f"benchmarks_{name}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # Dataclasses look their module up.
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_nothing_is_proven_without_a_gpu(
    validate: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    output = tmp_path / "validation.json"
    monkeypatch.setattr(sys, "argv", ["validate.py", "--output", str(output)])
    assert validate.main() == 2
    assert "needs an NVIDIA GPU" in capsys.readouterr().err
    assert not output.exists()


def test_stand_ins_for_the_gpu_are_refused(
    validate: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(sys, "argv", ["validate.py"])
    assert validate.main() == 2
    assert "unset TRITON_INTERPRET" in capsys.readouterr().err


JUNIT = """<testsuites><testsuite>
<testcase classname="tests.ops.test_depthwise" name="test_forward[triton-float16]"/>
<testcase classname="tests.ops.test_depthwise" name="test_forward[cuda-float16]"/>
<testcase classname="tests.ops.test_depthwise" name="test_backward[cuda]"><failure/></testcase>
<testcase classname="tests.ops.test_depthwise" name="test_sanitizer[triton]"><skipped/></testcase>
<testcase classname="tests.ops.test_depthwise" name="test_forward[cpu]"/>
<testcase classname="tests.ops.test_pointwise" name="test_forward[triton]"/>
</testsuite></testsuites>
"""


def test_tests_are_counted_by_operator_and_backend(validate: ModuleType, tmp_path: Path) -> None:
    report = tmp_path / "gpu.xml"
    report.write_text(JUNIT)
    assert validate.read_tests(report, "depthwise", "triton") == validate.Tests(1, ())
    assert validate.read_tests(report, "pointwise", "triton") == validate.Tests(1, ())
    assert validate.read_tests(report, "depthwise", "cuda") == validate.Tests(
        1, ("tests.ops.test_depthwise.test_backward[cuda]",)
    )


def test_faults_of_any_kind_keep_a_kernel_from_being_proven(validate: ModuleType) -> None:
    calls = shipped.general_calls()[:3]
    names = [call.describe() for call in calls]
    passed = validate.Tests(3, ())
    finding = validate.examine(passed, zip(calls[:2], [0.25, 0.75], strict=True))
    assert (finding.worst, finding.where, finding.cases) == (0.75, names[1], 2)
    assert finding.faults == ()
    finding = validate.examine(passed, zip(calls, [0.5, 1.5, "RuntimeError: no"], strict=True))
    assert finding.faults == (
        f"{names[1]}: the error is 1.50 of what is allowed",
        f"{names[2]}: RuntimeError: no",
    )
    assert finding.cases == 2
    finding = validate.examine(validate.Tests(0, ("test_x",)), [])
    assert finding.faults == ("test_x failed", "no test of it ran")


CALL = Call("depthwise", Problem(2, 5, 7, 6, (3, 3), dtype=torch.float32), "forward", "none")


def test_what_a_kernel_raises_is_a_fault_and_not_the_end(validate: ModuleType) -> None:
    assert "tpu" in validate.attempt((CALL, "tpu", "cpu"))


def test_a_fault_of_one_kernel_is_none_of_the_next(
    validate: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    pools: list[ThreadPoolExecutor] = []

    class Pool(ThreadPoolExecutor):
        """Threads in place of processes; each pool counts."""

        def __init__(self, count: int, context: object, **options: object) -> None:
            super().__init__(count)
            pools.append(self)

    def attempt(job: float | str) -> float | str:
        if job == "dies":
            raise BrokenProcessPool("a process was terminated abruptly")
        return job

    monkeypatch.setattr(validate, "ProcessPoolExecutor", Pool)
    monkeypatch.setattr(validate, "attempt", attempt)
    processes = validate.Processes(2)
    assert processes.measure([0.1, 0.2]) == [0.1, 0.2]
    assert processes.measure([0.3, "CUDA error"]) == [0.3, "CUDA error"]
    assert len(pools) == 1
    assert processes.measure([0.4, "dies"]) == [0.4, "a process was terminated abruptly"]
    assert processes.measure([0.5]) == [0.5]
    assert len(pools) == 3
    processes.end()


@pytest.mark.parametrize("op", shipped.OPS)
def test_the_cases_cover_every_pass_and_dtype(validate: ModuleType, op: str) -> None:
    cases = validate.cases(op)
    assert {(c.pass_, c.problem.dtype) for c in cases} == {
        (pass_, dtype) for pass_ in shipped.column(op).passes for dtype in shipped.DTYPES
    }
    layers = shipped.network_calls([op], [validate.BATCH])
    assert {c.problem for c in layers if c.problem.dtype is torch.float16} <= {
        c.problem for c in cases
    }


@pytest.mark.gpu_kernels
@pytest.mark.parametrize("pass_", PASSES)
def test_the_measure_of_the_error(
    validate: ModuleType, monkeypatch: pytest.MonkeyPatch, pass_: str,
    gpu_kernels: Callable[[str], AbstractContextManager[str]],
) -> None:  # fmt: skip
    call = replace(CALL, pass_=pass_)
    with gpu_kernels("triton") as device:
        assert 0 <= validate.measure(call, "triton", device) <= 1
    right = inventory.example

    def wrong(call: Call, *, device: str) -> Example:
        example = right(call, device=device)
        definition = example.definition

        def kernel(backend: str, launch: object) -> list[torch.Tensor]:
            return [1.01 * result for result in definition(*example.inputs)]

        return replace(example, kernel=kernel)

    monkeypatch.setattr(inventory, "example", wrong)
    assert validate.measure(call, "triton", "cpu") == float("inf")


def test_the_table_says_where_a_kernel_is_proven(tree: Path) -> None:
    tables = script("tables")
    validation.record([proof(tree)], tree / RECORD)
    text = tables.validation(tree / "benchmarks" / "results")
    assert (
        "| `depthwise` | `cuda` | forward | **proven** | NVIDIA H200, driver 580.1, torch 2.11.0, "
        "triton 3.6.0, CUDA 13.0; 2026-01-02 | 0.50 | 11 tests, 7 shapes | 0123456789 |"
    ) in text
    assert (
        "| `depthwise` | `triton` | backward input | unproven | never run on hardware | - | - | - |"
    ) in text
