"""What ships is what the networks call, and a bad kernel among it is called bad."""

from __future__ import annotations

import importlib.util
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from cvfast import inventory, validation
from cvfast.inventory import Build, Call, Configuration
from cvfast.launch.depthwise import PASSES, Problem
from cvfast.perf import compiled
from cvfast.perf.compiled import Binary
from cvfast.perf.devices import ARCHITECTURES, architecture

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
CALL = Call(Problem(1, 64, 8, 8, (3, 3), (1, 1), (1, 1)), "forward", "relu6")
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


def shapes_of_the_papers() -> set[tuple[int, int, int, int, str]]:
    """The layers of benchmarks/shapes.py, which come from the papers' tables."""
    spec = importlib.util.spec_from_file_location("shapes", BENCHMARKS / "shapes.py")
    assert spec is not None and spec.loader is not None
    shapes = importlib.util.module_from_spec(spec)
    sys.modules["shapes"] = shapes
    spec.loader.exec_module(shapes)
    return {
        (layer.channels, layer.size, layer.kernel, layer.stride, layer.activation)
        for layer in shapes.mobilenet_depthwise_layers()
    }


def test_the_networks_layers_are_those_of_the_papers() -> None:
    expected = shapes_of_the_papers()
    found = {
        (p.channels, p.height, p.kernel[0], p.stride[0], activation)
        for name in inventory.NETWORKS
        if name.startswith("mobilenet")
        for p, activation in inventory._depthwise_layers(name)
    }
    assert found == expected


def test_every_layer_ships_at_every_batch_dtype_and_pass() -> None:
    calls = inventory.network_calls()
    assert len(calls) == len(set(calls))
    layers = {replace(c.problem, batch=1, dtype=torch.float16) for c in calls}
    for batch in inventory.BATCHES:
        for dtype in inventory.DTYPES:
            for pass_ in PASSES:
                assert layers == {
                    replace(c.problem, batch=1, dtype=torch.float16)
                    for c in calls
                    if (c.problem.batch, c.problem.dtype, c.pass_) == (batch, dtype, pass_)
                }


def test_backward_kernels_are_asked_only_for_activations_that_they_undo() -> None:
    calls = (*inventory.network_calls(), *inventory.general_calls())
    assert {call.activation for call in calls if call.pass_ == "forward"} == {
        "none", "relu", "relu6", "hardswish",
    }  # fmt: skip
    assert {call.activation for call in calls if call.pass_ != "forward"} == {
        "none", "relu", "relu6",
    }  # fmt: skip


def test_the_sample_is_a_small_part_of_every_kind() -> None:
    every, sample = inventory.network_calls() + inventory.general_calls(), inventory.sample_calls()
    assert set(sample) <= set(every)
    assert len(set(sample)) == len(sample) < len(every) / 20
    for pass_ in PASSES:
        kinds = {(c.problem.kernel, c.problem.stride) for c in sample if c.pass_ == pass_}
        assert {((3, 3), (1, 1)), ((3, 3), (2, 2)), ((5, 5), (1, 1))} <= kinds
        assert any(c.problem.channels % 2 for c in sample if c.pass_ == pass_)


def test_unknown_names_are_refused() -> None:
    for wrong in ({"ops": ["pool"]}, {"backends": ["cpu"]}, {"archs": ["sm_75"]}):
        with pytest.raises(ValueError, match="unknown"):
            inventory.configurations([CALL], **wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize("backend", inventory.BACKENDS)
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_every_call_has_a_launch_that_can_be_launched(backend: str, arch: str) -> None:
    pytest.importorskip("triton")
    calls = inventory.general_calls() + inventory.sample_calls()
    found = inventory.configurations(calls, backends=[backend], archs=[arch])
    assert {one.pass_ for one in found} == set(PASSES)
    limits = architecture(arch)
    for one in found:
        assert 32 <= one.threads <= 1024
        assert one.blocks >= 1
        assert (one.dynamic_shared or 0) <= limits.shared_per_block, one.config


def test_the_kernels_of_the_sample_have_no_faults() -> None:
    pytest.importorskip("triton")
    rows = inventory.inspect(inventory.configurations(inventory.sample_calls(), archs=["sm_90"]))
    if missing := [row.status for row in rows if row.status.startswith(inventory.NOT_COMPILED)]:
        pytest.skip(missing[0])
    assert {(row.backend, row.pass_) for row in rows} == {
        (backend, pass_) for backend in inventory.BACKENDS for pass_ in PASSES
    }
    assert [f"{row.config}: {row.status}" for row in rows if row.failed] == []


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
