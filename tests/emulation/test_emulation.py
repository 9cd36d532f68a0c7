"""The emulator itself: correct kernels run and are right, what is wrong with others is named."""

from __future__ import annotations

import ctypes
import itertools
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from torch import Tensor

from . import Emulation, build

pytestmark = pytest.mark.skipif(build.compiler() is None, reason="needs g++ or $CXX")

SEEDS = range(3)
NVCC = shutil.which("nvcc") or shutil.which(
    "nvcc", path=os.path.join(os.environ.get("CUDA_HOME", "/usr/local/cuda"), "bin")
)
KERNELS = sorted((build.HERE / "kernels").glob("*.cu"))


@pytest.fixture(scope="module")
def emulation() -> Emulation:
    return Emulation(build.library("kernels", KERNELS))


@pytest.fixture(scope="module", params=SEEDS, ids=lambda seed: f"seed{seed}")
def seeded(request: pytest.FixtureRequest, emulation: Emulation) -> Emulation:
    """The library, in several orders of blocks and threads."""
    with emulation.seed(request.param):
        yield emulation


def call(emulation: Emulation, name: str, *arguments: Tensor | int) -> str | None:
    """Calls a test kernel; returns what the emulator had to say."""
    function = getattr(emulation.library, name)
    function.restype = ctypes.c_char_p
    values = [
        ctypes.c_void_p(a.data_ptr()) if isinstance(a, Tensor) else ctypes.c_int(a)
        for a in arguments
    ]
    message = function(*values)
    return message.decode() if message else None


def run(emulation: Emulation, name: str, *arguments: Tensor | int) -> None:
    message = call(emulation, name, *arguments)
    assert message is None, message


@pytest.mark.parametrize(("length", "threads"), [(1, 32), (100, 64), (1000, 256), (37, 1024)])
def test_reduction(seeded: Emulation, length: int, threads: int) -> None:
    x = torch.randint(-9, 9, (5, length)).float()
    out = torch.empty(5)
    run(seeded, "run_row_sums", out, x, 5, length, threads)
    torch.testing.assert_close(out, x.sum(1), rtol=0, atol=0)


@pytest.mark.parametrize("shape", [(1, 1), (16, 16), (33, 70)])
def test_transpose(seeded: Emulation, shape: tuple[int, int]) -> None:
    x = torch.randn(shape)
    out = torch.empty(shape[::-1])
    run(seeded, "run_transpose", out, x, *shape)
    torch.testing.assert_close(out, x.t(), rtol=0, atol=0)


@pytest.mark.parametrize(("slices", "count"), [(1, 64), (2, 10), (7, 200)])
def test_ring_of_asynchronous_copies(seeded: Emulation, slices: int, count: int) -> None:
    x = torch.randint(-9, 9, (slices, count, 4)).float()
    out = torch.empty(count, 4)
    run(seeded, "run_ring_sum", out, x, slices, count)
    torch.testing.assert_close(out, x.sum(0), rtol=0, atol=0)


@pytest.mark.parametrize("size", [4, 8])
def test_asynchronous_copies_fill_with_zeros(emulation: Emulation, size: int) -> None:
    x = torch.randn(20, size // 4)
    out = torch.empty(32, size // 4)
    run(emulation, "run_copy_narrow", out, x, 32, size, 20)
    assert torch.equal(out[:20], x)
    assert not out[20:].any()


DTYPES = (torch.float16, torch.bfloat16, torch.float32)  # float32 as TF32


@pytest.mark.parametrize("dtype", DTYPES)
def test_matmul(seeded: Emulation, dtype: torch.dtype) -> None:
    a = torch.randint(-8, 9, (16, 64)).to(dtype)
    b = torch.randint(-8, 9, (64, 8)).to(dtype)
    out = torch.empty(16, 8)
    run(seeded, "run_matmul", out, a, b, 64, DTYPES.index(dtype))
    torch.testing.assert_close(out, a.float() @ b.float(), rtol=0, atol=0)


def fragment_positions(dtype: torch.dtype) -> tuple[list, list, list]:
    """(row, column) of each element that a lane holds of a, b and c, in the order of its registers:
    the formulas of the PTX ISA, sections "Matrix fragments for mma.m16n8k16 with floating point
    type" and "mma.m16n8k8 .tf32"."""
    a, b, c = [], [], []
    for lane in range(32):
        group, member = lane >> 2, lane % 4
        if dtype == torch.float32:
            for i in range(4):
                row = group if i in (0, 2) else group + 8
                a.append((row, member if i < 2 else member + 4))
            b += [(member, group), (member + 4, group)]
        else:
            for i in range(8):
                row = group if 0 <= i < 2 or 4 <= i < 6 else group + 8
                column = member * 2 + (i & 1) + (8 if i >= 4 else 0)
                a.append((row, column))
            for i in range(4):
                b.append((member * 2 + (i & 1) + (8 if i >= 2 else 0), group))
        c += [(group if i < 2 else group + 8, member * 2 + (i & 1)) for i in range(4)]
    return a, b, c


def gather(matrix: Tensor, positions: list[tuple[int, int]]) -> Tensor:
    return matrix[[row for row, _ in positions], [column for _, column in positions]].contiguous()


@pytest.mark.parametrize("dtype", DTYPES)
def test_mma_takes_the_fragments_of_the_ptx_isa(emulation: Emulation, dtype: torch.dtype) -> None:
    depth = 8 if dtype == torch.float32 else 16
    a = torch.randint(-8, 9, (16, depth)).to(dtype)
    b = torch.randint(-8, 9, (depth, 8)).to(dtype)
    in_a, in_b, in_c = fragment_positions(dtype)
    c = torch.full((128,), 3.0)
    run(
        emulation,
        "run_mma_registers",
        c,
        gather(a, in_a),
        gather(b, in_b),
        DTYPES.index(dtype),
        32,
    )
    torch.testing.assert_close(c, gather(a.float() @ b.float() + 3, in_c), rtol=0, atol=0)


def test_tf32_drops_low_bits(emulation: Emulation) -> None:
    a = torch.full((128,), 1 + 2**-11)
    c = torch.zeros(128)
    run(emulation, "run_mma_registers", c, a, torch.ones(64), 2, 32)
    assert torch.equal(c, torch.full((128,), 8.0))


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_ldmatrix(emulation: Emulation, count: int, transposed: bool) -> None:
    x = torch.arange(count * 64, dtype=torch.int16)
    out = torch.empty(32, count, 2, dtype=torch.int16)
    run(emulation, "run_matrix_registers", out, x, count, int(transposed))
    for lane, matrix, half in itertools.product(range(32), range(count), range(2)):
        row, column = lane // 4, lane % 4 * 2 + half
        if transposed:
            row, column = column, row
        assert out[lane, matrix, half] == matrix * 64 + row * 8 + column


def test_votes(seeded: Emulation) -> None:
    x = torch.randn(96)
    out = torch.empty(4, dtype=torch.int32)
    run(seeded, "run_votes", out, x, 96)
    positive = x > 0
    ballot = sum(1 << lane for lane in range(32) if positive[lane])
    assert out[:3].tolist() == [int(positive.sum()), 1, 0]
    assert int(out[3]) % 2**32 == ballot


def test_atomics(seeded: Emulation) -> None:
    x = torch.randint(0, 16, (1000,), dtype=torch.int32)
    out = torch.empty(16, dtype=torch.int32)
    run(seeded, "run_histogram", out, x, 1000)
    assert torch.equal(out, torch.bincount(x, minlength=16).int())


@pytest.mark.parametrize("size", [4, 8, 16])
def test_hinted_loads_and_stores(emulation: Emulation, size: int) -> None:
    x = torch.randn(64, size // 4)
    out = torch.empty_like(x)
    run(emulation, "run_copy_hinted", out, x, 64, size)
    assert torch.equal(out, x)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bit_arithmetic(emulation: Emulation, dtype: torch.dtype) -> None:
    x = (torch.randn(512, 3) * torch.logspace(-3, 3, 512)[:, None]).to(dtype)
    out = torch.empty_like(x)
    run(emulation, "run_arithmetic", out, x, 512, int(dtype == torch.bfloat16))
    a, b, c = x.double().unbind(1)
    want = torch.stack([a + b, a * b, a * b + c], 1)
    assert torch.equal(out, want.to(dtype))


def broken(
    emulation: Emulation,
    name: str,
    *,
    threads: tuple[int, int, int] = (64, 1, 1),
    grid: tuple[int, int, int] = (1, 1, 1),
    shared: int = 256,
) -> str | None:
    function = getattr(emulation.library, f"broken_{name}")
    function.restype = ctypes.c_char_p
    x, out = torch.ones(80), torch.zeros(80)
    aligned = [ctypes.c_void_p(-(-t.data_ptr() // 16) * 16) for t in (out, x)]
    size = (ctypes.c_uint * 6)(*grid, *threads)
    message = function(*aligned, ctypes.c_size_t(shared), size)
    return message.decode() if message else None


DEFECTS = {
    "missing_barrier": "shared-memory race",
    "missing_first_barrier": "uninitialised shared memory|shared-memory race",
    "missing_warp_barrier": "shared-memory race",
    "warp_barrier_across_warps": "shared-memory race",
    "same_address": "shared-memory race",
    "missing_wait": "cp.async data not waited for",
    "wait_for_too_few": "cp.async data not waited for",
    "wait_without_barrier": "cp.async data not waited for|shared-memory race",
    "halo": "out of bounds of every tensor: reads 4 bytes",
    "write_past_end": "out of bounds of every tensor: writes 4 bytes",
    "write_input": "write to a tensor that is read-only",
    "null_pointer": "null pointer",
    "misaligned_load": "misaligned access.*float4.*not a multiple of 16",
    "misaligned_hinted_load": "misaligned access.*not a multiple of 8",
    "misaligned_store": "misaligned access.*float2.*not a multiple of 8",
    "misaligned_copy": "misaligned access.*not a multiple of 16",
    "past_dynamic": "out of bounds of shared memory: writes 4 bytes at offset 256 of the 256",
    "past_static": r"out of bounds of an array: index 64 of 'float \[64\]'",
    "past_registers": r"out of bounds of an array: index 4 of 'float \[4\]'",
    "divergent_branch": "divergent barrier",
    "early_exit": "divergent barrier",
    "shuffle_exited": "shuffle with an inactive lane",
    "shuffle_outside_mask": "shuffle with an inactive lane",
    "shuffle_branch": "divergent barrier",
    "uninitialised": "uninitialised shared memory",
    "index_overflow": "signed integer overflow",
}


@pytest.mark.parametrize("name", DEFECTS)
def test_broken_kernel_is_named(seeded: Emulation, name: str) -> None:
    message = broken(seeded, name)
    assert message is not None, "nothing was reported"
    with pytest.raises(RuntimeError, match=DEFECTS[name]):
        raise RuntimeError(message)
    assert f"::{name}(float*, float const*)" in message
    if not DEFECTS[name].startswith("divergent"):
        assert "at broken.cu:" in message
        assert "in block (0, 0, 0), thread (" in message
    assert broken(seeded, "nothing") is None, "the next launch is not affected"


LAUNCHES = {
    "too much shared memory": {"shared": (99 << 10) + 1},
    "too many threads": {"threads": (32, 33, 1)},
    "64 along z": {"threads": (1, 1, 65)},
    "empty block": {"threads": (64, 0, 1)},
    "empty grid": {"grid": (0, 1, 1)},
    "too large a grid": {"grid": (1, 65536, 1)},
}


@pytest.mark.parametrize("problem", LAUNCHES)
def test_bad_launch(emulation: Emulation, problem: str) -> None:
    message = broken(emulation, "nothing", **LAUNCHES[problem])
    assert message is not None
    assert problem in message
    assert "::nothing(" in message


def test_limit_is_the_architectures(emulation: Emulation) -> None:
    with emulation.architecture("sm_90"):
        assert broken(emulation, "nothing", shared=227 << 10) is None
        message = broken(emulation, "nothing", shared=228 << 10)
        assert message is not None
        assert "sm_90 allows a block 232448 bytes" in message
    assert broken(emulation, "nothing", shared=227 << 10) is not None


def test_static_shared_memory_counts(emulation: Emulation) -> None:
    assert broken(emulation, "static_and_dynamic", shared=59 << 10) is None
    message = broken(emulation, "static_and_dynamic", shared=60 << 10)
    assert message is not None
    assert "too much shared memory" in message
    assert "has written 40960 of static arrays" in message


def test_neighbours_of_a_slice_are_out_of_bounds(emulation: Emulation) -> None:
    out, x = torch.zeros(64), torch.ones(64)
    assert call(emulation, "broken_slice", out, x, 6) is None
    message = call(emulation, "broken_slice", out, x, 7)
    assert message is not None
    assert "out of bounds of every tensor" in message


def test_mma_of_a_part_of_a_warp(emulation: Emulation) -> None:
    registers = torch.zeros(128)
    message = call(emulation, "run_mma_registers", registers, registers, registers, 0, 24)
    assert message is not None
    assert "mma needs all 32 lanes" in message


def test_outputs_are_poisoned(emulation: Emulation) -> None:
    out, x = torch.zeros(16, 8), torch.zeros(16)
    run(emulation, "run_matmul", out, x, x, 0, 2)
    assert not out.any(), "an empty sum writes zeros over the poison"
    out = torch.zeros(80)
    size = (ctypes.c_uint * 6)(1, 1, 1, 64, 1, 1)
    run_nothing = emulation.library.broken_nothing
    run_nothing(ctypes.c_void_p(out.data_ptr()), ctypes.c_void_p(x.data_ptr()), 0, size)
    assert out[:64].isnan().all()
    assert not out[64:].any()


def test_seeds_change_the_order(emulation: Emulation) -> None:
    def report(seed: int) -> str | None:
        with emulation.seed(seed):
            return broken(emulation, "missing_first_barrier")

    assert report(5) == report(5)
    assert len({report(seed) for seed in range(4)}) > 1


@pytest.mark.skipif(NVCC is None, reason="needs nvcc")
@pytest.mark.parametrize("source", KERNELS, ids=lambda path: path.stem)
def test_what_is_emulated_is_cuda(source: Path, tmp_path: Path) -> None:
    architectures = ("80", "86", "89", "90a", "100a", "120")
    assert NVCC is not None
    command = [
        NVCC,
        *(f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in architectures),
        *(
            "-std=c++20",
            f"-I{build.CSRC}",
            "-Werror=all-warnings",
            "-Xcompiler=-Wall,-Wextra,-Werror",
        ),
        *("--threads=2", "-c", str(source), "-o", str(tmp_path / "kernels.o")),
    ]
    compilation = subprocess.run(command, capture_output=True, text=True, check=False)
    assert compilation.returncode == 0, compilation.stderr


def test_statistics_count(emulation: Emulation) -> None:
    before = emulation.statistics()
    run(emulation, "run_row_sums", torch.empty(5), torch.ones(5, 64), 5, 64, 64)
    after = emulation.statistics()
    assert after.launches == before.launches + 1
    assert after.blocks == before.blocks + 5
    assert after.threads == before.threads + 5 * 64
    assert after.barriers == before.barriers + 5
    # In each block 64 reads of x, 2 writes and 2 reads of partial sums, 1 write of the result; the
    # compiler may read the arguments and indices from memory as often as it likes.
    assert after.accesses >= before.accesses + 5 * 69
