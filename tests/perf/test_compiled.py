"""Reading compiled kernels: the parsers against real compiler output, good and bad kernels."""

from __future__ import annotations

import shutil
import subprocess
from collections import Counter
from pathlib import Path

import pytest

from cvfast.perf import compiled
from cvfast.perf.compiled import Binary
from cvfast.perf.devices import ARCHITECTURES, occupancy

SOURCE = """
namespace toy {

// Sixteen bytes a thread, through static shared memory.
template <int Threads>
__global__ void copy(const int4* in, int4* out, int n) {
  __shared__ int4 tile[Threads];
  const int i = blockIdx.x * Threads + threadIdx.x;
  if (i >= n) return;
  tile[threadIdx.x] = in[i];
  __syncthreads();
  out[i] = tile[(threadIdx.x + 1) % Threads];
}
template __global__ void copy<64>(const int4*, int4*, int);
template __global__ void copy<3072>(const int4*, int4*, int);

// Four bytes a thread, through dynamic shared memory.
__global__ void narrow(const float* in, float* out) {
  extern __shared__ float tile[];
  tile[threadIdx.x] = in[threadIdx.x];
  __syncthreads();
  out[threadIdx.x] = tile[0];
}

// 96 values live across a loop, where 1024 threads leave 64 registers each.
__global__ void __launch_bounds__(1024) spilling(const float* in, float* out, int n) {
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

// Indexed at run time, an array cannot stay in registers.
__global__ void indexed(const float* in, float* out, int n) {
  float a[64];
#pragma unroll
  for (int i = 0; i < 64; ++i) a[i] = in[i * 32 + threadIdx.x];
  for (int i = 0; i < n; ++i) a[(i * n) % 64] += 1.0f;
  out[threadIdx.x] = a[n % 64];
}

}  // namespace toy
"""


def need(*tools: str) -> None:
    for tool in tools:
        try:
            compiled.tool(tool)
        except compiled.ToolMissing as error:
            pytest.skip(str(error))


@pytest.fixture(scope="session")
def cubins(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    need("nvcc", "cuobjdump", "nvdisasm")
    source = tmp_path_factory.mktemp("toy") / "toy.cu"
    source.write_text(SOURCE)
    return {
        name: compiled.compile_cuda(source, ARCHITECTURES[name])
        for name in ("sm_80", "sm_90", "sm_120")
    }


@pytest.fixture(scope="session", params=["sm_80", "sm_90", "sm_120"])
def toys(request: pytest.FixtureRequest, cubins: dict[str, bytes]) -> dict[str, Binary]:
    binaries = compiled.read(cubins[request.param])
    assert {binary.arch for binary in binaries} == {request.param}
    return {binary.name: binary for binary in binaries}


def test_every_kernel_is_found_under_its_name(toys: dict[str, Binary]) -> None:
    names = {"copy<64>", "copy<3072>", "narrow", "spilling", "indexed"}
    assert set(toys) == {f"toy::{name}" for name in names}


def test_a_clean_kernel(toys: dict[str, Binary]) -> None:
    copy = toys["toy::copy<64>"]
    assert copy.local_bytes == 0
    assert copy.shared_bytes == 64 * 16
    assert 8 <= copy.registers <= 32
    assert copy.code_bytes % 128 == 0
    census = copy.census()
    assert {name: census[name] for name in ("LDG.128", "STS.128", "LDS.128", "STG.128")} == {
        "LDG.128": 1, "STS.128": 1, "LDS.128": 1, "STG.128": 1,
    }  # fmt: skip
    assert census["BAR"] == 1


def test_narrow_accesses_are_seen_and_dynamic_memory_is_not_static(toys: dict[str, Binary]) -> None:
    narrow = toys["toy::narrow"]
    assert narrow.shared_bytes == 0
    census = narrow.census()
    assert census["LDG.32"] == census["STG.32"] == 1
    assert not any(name.endswith(".128") for name in census)


def test_spilled_registers_are_seen(toys: dict[str, Binary]) -> None:
    spilling = toys["toy::spilling"]
    assert spilling.registers == 64
    assert spilling.local_bytes >= 128
    census = spilling.census()
    assert census["FFMA"] == 96
    for name in ("LDL", "STL"):
        assert any(group.startswith(f"{name}.") for group in census)


def test_the_core_runs_from_the_first_multiply_add_to_the_last(toys: dict[str, Binary]) -> None:
    spilling = toys["toy::spilling"]
    assert spilling.core["FFMA"] == 96
    assert not any(opcode.startswith(("LDG", "STG")) for opcode in spilling.core)
    assert sum(spilling.core.values()) < sum(spilling.instructions.values())
    without = toys["toy::narrow"]
    assert without.core == without.instructions


def test_an_array_indexed_at_run_time_is_seen(toys: dict[str, Binary]) -> None:
    assert toys["toy::indexed"].local_bytes == 64 * 4


def test_too_much_shared_memory_shows_as_no_occupancy(toys: dict[str, Binary]) -> None:
    copy = toys["toy::copy<3072>"]
    assert copy.shared_bytes == 49152
    limits = ARCHITECTURES[copy.arch]
    assert occupancy(limits, 256, copy.registers, copy.shared_bytes).blocks_per_sm >= 1
    too_much = occupancy(limits, 256, copy.registers, limits.shared_per_block + 1)
    assert too_much.blocks_per_sm == 0


def test_ptxas_counts_the_same_registers_and_shared_memory(tmp_path: Path) -> None:
    need("nvcc", "cuobjdump", "nvdisasm")
    source, cubin = tmp_path / "toy.cu", tmp_path / "toy.cubin"
    source.write_text(SOURCE)
    report = subprocess.run(
        [compiled.tool("nvcc"), "-cubin", "-arch=sm_90a", "-O3", "-Xptxas", "-v",
         str(source), "-o", str(cubin)],
        capture_output=True, text=True, check=True,
    ).stderr  # fmt: skip
    binaries = {binary.function: binary for binary in compiled.read(cubin.read_bytes())}
    sections = report.split("Compiling entry function '")[1:]
    assert len(sections) == len(binaries)
    for section in sections:
        binary = binaries[section.partition("'")[0]]
        assert f"Used {binary.registers} registers" in section
        assert f"{binary.local_bytes} bytes stack frame" in section
        if binary.shared_bytes:
            assert f" {binary.shared_bytes} bytes smem" in section
        else:
            assert "smem" not in section


def test_cubins_come_out_of_a_shared_object(tmp_path: Path) -> None:
    need("nvcc", "cuobjdump", "nvdisasm")
    source, library = tmp_path / "toy.cu", tmp_path / "toy.so"
    source.write_text(SOURCE)
    subprocess.run(
        [compiled.tool("nvcc"), "-shared", "-Xcompiler", "-fPIC",
         "-gencode=arch=compute_80,code=sm_80", "-gencode=arch=compute_90a,code=sm_90a",
         str(source), "-o", str(library)],
        check=True, capture_output=True,
    )  # fmt: skip
    binaries = [b for cubin in compiled.extract(library) for b in compiled.read(cubin)]
    found = Counter(binary.arch for binary in binaries if binary.name.startswith("toy::"))
    assert found == {"sm_80": 5, "sm_90": 5}


def test_what_is_no_cubin_is_refused() -> None:
    need("cuobjdump", "nvdisasm")
    with pytest.raises(ValueError, match="cuobjdump"):
        compiled.read(b"not an ELF file")
    with pytest.raises(ValueError, match="no code"):
        compiled.parse("\nResource usage:\n")


def test_a_source_that_does_not_compile_is_shown(tmp_path: Path) -> None:
    need("nvcc")
    source = tmp_path / "wrong.cu"
    source.write_text("__global__ void k() { undeclared = 1; }\n")
    with pytest.raises(compiled.CompilationFailed, match="undeclared"):
        compiled.compile_cuda(source, ARCHITECTURES["sm_80"])


def test_a_missing_tool_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name, path=None: None)
    with pytest.raises(compiled.ToolMissing, match="nvcc is not here: install the CUDA toolkit"):
        compiled.tool("nvcc")
    with pytest.raises(compiled.ToolMissing, match="pip install triton"):
        compiled.tool("cuobjdump")


@pytest.mark.parametrize(
    ("opcode", "group"),
    [
        ("LDG.E.128", "LDG.128"),
        ("LDG.E.ENL2.256", "LDG.256"),
        ("LDG.E.U16.CONSTANT", "LDG.16"),
        ("LDG.E", "LDG.32"),
        ("LDGSTS.E.BYPASS.128", "LDGSTS.128"),
        ("STG.E.EF.64", "STG.64"),
        ("STS.U8", "STS.8"),
        ("LDL.LU", "LDL.32"),
        ("LDSM.16.M88.4", "LDSM.128"),
        ("LDSM.16.MT88.2", "LDSM.64"),
        ("LDSM.16.M88", "LDSM.32"),
        ("HMMA.16816.F32", "HMMA"),
        ("HGMMA.64x128x16.F32", "HGMMA"),
        ("UTCHMMA.2CTA", "UTCHMMA"),
        ("FFMA2", "FFMA2"),
        ("IMAD.MOV.U32", None),
        ("LDC.64", None),
    ],
)
def test_instructions_are_grouped(opcode: str, group: str | None) -> None:
    binary = Binary("k", "sm_90", 1, 0, 0, 16, {opcode: 3}, {})
    assert binary.census() == ({group: 3} if group else {})


@pytest.mark.parametrize(
    ("mangled", "name"),
    [
        ("_ZN3toy4copyILi64EEEvPK4int4PS1_i", "toy::copy<64>"),
        ("_ZN12_GLOBAL__N_14copyEPf", "{anonymous}::copy"),
        ("_Z1kPf", "k"),
        ("_patches", "_patches"),
        ("_Zbroken", "_Zbroken"),
    ],
)
def test_names_are_demangled(mangled: str, name: str) -> None:
    assert compiled.demangle(mangled) == name


def test_an_enumerator_among_template_arguments_is_no_parameter_list() -> None:
    # template <Kind K> void k(float*), with K = Kind(1), an enumeration of the namespace toy.
    assert compiled.demangle("_ZN3toy1kILNS_4KindE1EEEvPf") == "toy::k<(toy::Kind)1>"
