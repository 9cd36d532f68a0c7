"""What ships is what the networks call, and a bad kernel among it is called bad."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from cvfast import inventory, validation
from cvfast.inventory import Build, Configuration
from cvfast.launch import calls
from cvfast.launch.calls import Call
from cvfast.launch.depthwise import Problem
from cvfast.perf import compiled
from cvfast.perf.compiled import Binary
from cvfast.perf.devices import ARCHITECTURES, architecture

CALL = Call("depthwise", Problem(1, 64, 8, 8, (3, 3), (1, 1), (1, 1)), "forward", "relu6")
CODE = {"LDG.E.128": 2, "STG.E.128": 1}
GOOD = Binary("toy", "sm_86", 32, 0, 1024, 512, CODE, {})


def configuration(**changes: object) -> Configuration:
    values = Configuration(
        op="depthwise",
        backend="cuda",
        pass_="forward",
        arch="sm_86",
        function="toy",
        key="key sm_86",
        launch=SimpleNamespace(rows=2, columns=4),
        threads=128,
        dynamic_shared=2048,
        blocks=10,
        expects=("LDG.128", "LDGSTS.128"),
        forbids=("STG.32", "STG.64"),
        call=CALL,
    )
    return replace(values, **changes)  # type: ignore[arg-type]


def judge(binary: Binary = GOOD, **changes: object) -> inventory.Row:
    return inventory.judge(configuration(**changes), Build({"toy": binary}), "unproven: new")


def test_a_good_kernel() -> None:
    row = judge()
    assert (row.status, row.failed) == ("ok", False)
    assert row.shared_bytes == 1024 + 2048
    # 4 warps a block: 12 blocks fill the 48 warps.
    assert row.occupancy == 1
    assert row.config == "toy rows=2 columns=4; 1x64x8x8 k3 s1 float16 relu6"
    fields = row.to_dict()
    assert fields["pass"] == "forward"
    assert {"op", "backend", "config", "registers", "occupancy", "validation"} <= set(fields)


@pytest.mark.parametrize(
    ("binary", "changes", "status"),
    [
        (replace(GOOD, local_bytes=64), {}, "spills 64 bytes"),
        (
            GOOD,
            {"dynamic_shared": 101376},
            "shared memory, 102400 bytes, over the 101376 of sm_86",
        ),
        (replace(GOOD, registers=128), {"threads": 1024}, "cannot be launched: too many registers"),
        (
            replace(GOOD, instructions={"LDG.E.64": 2, "STG.E.128": 1}),
            {},
            "no LDG.128 or LDGSTS.128",
        ),
        (
            replace(GOOD, local_bytes=8, instructions={"LDGSTS.E.128": 1, "STG.E": 4}),
            {},
            "spills 8 bytes; STG.32 is too narrow",
        ),
    ],
)
def test_a_bad_kernel_is_called_bad(binary: Binary, changes: dict, status: str) -> None:
    row = judge(binary, **changes)
    assert (row.status, row.failed) == (status, True)


def test_what_was_not_compiled_is_no_fault_and_what_does_not_compile_is() -> None:
    missing = inventory.judge(
        configuration(), Build({}, error="not compiled: nvcc is not here"), ""
    )
    assert not missing.failed
    assert missing.registers is None
    broken = inventory.judge(configuration(), Build({}, error="does not compile: line 1"), "")
    assert broken.failed
    absent = inventory.judge(configuration(function="other"), Build({"toy": GOOD}), "")
    assert absent.status == "no function other in the binary"


SPILLING = """
__global__ void __launch_bounds__(1024) toy(const float* in, float* out, int n) {
  float a[96];
#pragma unroll
  for (int i = 0; i < 96; ++i) a[i] = in[i * n + threadIdx.x];
  for (int round = 0; round < n; ++round) {
#pragma unroll
    for (int i = 0; i < 96; ++i) a[i] = a[i] * a[(i * 7 + 3) % 96] + 1.0f;
  }
#pragma unroll
  for (int i = 0; i < 96; ++i) out[i * n + threadIdx.x] = a[i];
}
"""


def test_a_kernel_that_spills_on_purpose_is_caught(tmp_path: Path) -> None:
    source = tmp_path / "toy.cu"
    source.write_text(SPILLING)
    try:
        cubin = compiled.compile_cuda(source, ARCHITECTURES["sm_86"])
        (binary,) = compiled.read(cubin)
    except compiled.ToolMissing as error:
        pytest.skip(str(error))
    row = judge(binary, threads=1024)
    assert row.failed
    assert row.status == (
        f"spills {binary.local_bytes} bytes; no LDG.128 or LDGSTS.128; STG.32 is too narrow"
    )
    assert row.instructions["LDL.32"] > 0


def test_unknown_names_are_refused() -> None:
    for wrong in ({"ops": ["softmax"]}, {"backends": ["cpu"]}, {"archs": ["sm_75"]}):
        with pytest.raises(ValueError, match="unknown"):
            inventory.configurations([CALL], **wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize("column", calls.COLUMNS, ids=lambda column: column.op)
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_every_call_has_a_launch_that_can_be_launched(column: calls.Column, arch: str) -> None:
    pytest.importorskip("triton")
    shipped = calls.general_calls([column.op]) + calls.sample_calls([column.op])
    found = inventory.configurations(shipped, ops=[column.op], archs=[arch])
    assert {(one.backend, one.pass_) for one in found} == {
        (backend, pass_) for backend in column.backends for pass_ in column.passes
    }
    limits = architecture(arch)
    for one in found:
        assert 32 <= one.threads <= 1024
        assert one.blocks >= 1
        assert (one.dynamic_shared or 0) <= limits.shared_per_block, one.config


def test_the_kernels_of_the_sample_have_no_faults() -> None:
    pytest.importorskip("triton")
    rows = inventory.inspect(inventory.configurations(calls.sample_calls(), archs=["sm_90"]))
    if missing := [row.status for row in rows if row.status.startswith(inventory.NOT_COMPILED)]:
        pytest.skip(missing[0])
    assert {validation.Kernel(row.op, row.backend, row.pass_) for row in rows} == {
        *validation.KERNELS
    }
    assert [f"{row.op} {row.config}: {row.status}" for row in rows if row.failed] == []


def test_products_of_narrow_numbers_are_to_use_matrix_units() -> None:
    class Launch:
        pass

    class Plain:
        matrix = False

    def expected(op: str, launch: object, **changes: object) -> bool:
        problem = SimpleNamespace(**{"dtype": torch.float16, "tf32": False, **changes})
        return inventory.uses_matrix_units(Call(op, problem, "forward", "none"), launch)

    assert expected("pointwise", Launch())
    assert expected("conv", Launch(), dtype=torch.bfloat16)
    assert expected("conv", Launch(), dtype=torch.float32, tf32=True)
    assert not expected("conv", Launch(), dtype=torch.float32)
    assert not expected("conv", Plain())
    assert not expected("depthwise", Launch())


def test_rounding_to_tf32_follows_the_problem_and_is_put_back() -> None:
    flags = torch.backends.cudnn, torch.backends.cuda.matmul
    before = [flag.allow_tf32 for flag in flags]
    for allowed in (True, False):
        with inventory.rounding(SimpleNamespace(tf32=allowed)):
            assert [flag.allow_tf32 for flag in flags] == [allowed, allowed]
    with inventory.rounding(CALL.problem):
        assert not any(flag.allow_tf32 for flag in flags)
    assert [flag.allow_tf32 for flag in flags] == before


def test_results_are_kept_and_found_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inventory, "_CACHE", tmp_path)
    compiled_keys: list[str] = []

    def compile_toy(unit: Configuration) -> Build:
        compiled_keys.append(unit.key)
        return Build({"toy": GOOD}, dynamic_shared=7)

    monkeypatch.setitem(inventory._COMPILE, "cuda", compile_toy)
    one, other = configuration(key="a"), configuration(key="b")
    twice = configuration(key="a", threads=64)
    first = inventory.build([one, other, twice], jobs=1)
    assert compiled_keys == ["a", "b"]
    assert first == inventory.build([one, other], jobs=1)
    assert compiled_keys == ["a", "b"]
    assert first["a"].binaries["toy"] == GOOD


def test_a_missing_tool_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inventory, "_CACHE", tmp_path)

    def missing(unit: Configuration) -> Build:
        raise compiled.ToolMissing("nvcc is not here")

    monkeypatch.setitem(inventory._COMPILE, "cuda", missing)
    (result,) = inventory.build([configuration()], jobs=1).values()
    assert result.error == "not compiled: nvcc is not here"
    assert list(tmp_path.iterdir()) == []
    assert inventory.inspect([configuration()], jobs=1)[0].validation == str(
        validation.status(configuration().kernel)
    )
