"""Device tables and occupancy, against figures worked by hand and NVIDIA's own calculator."""

from __future__ import annotations

import itertools
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from cvfast.perf import devices
from cvfast.perf.devices import ARCHITECTURES, DEVICES, occupancy


def header() -> Path | None:
    """`cuda_occupancy.h`, of a toolkit on PATH or of Triton's package."""
    import importlib.util

    folders = []
    if (nvcc := shutil.which("nvcc")) is not None:
        folders.append(Path(nvcc).resolve().parents[1] / "include")
    if (spec := importlib.util.find_spec("triton")) is not None and spec.origin is not None:
        folders.append(Path(spec.origin).parent / "backends" / "nvidia" / "include")
    return next((f for f in folders if (f / "cuda_occupancy.h").is_file()), None)


def test_every_architecture_has_a_device() -> None:
    assert {device.architecture.name for device in DEVICES} == set(ARCHITECTURES)
    for name in ARCHITECTURES:
        assert devices.by_arch(name).architecture.name == name


def test_a_device_is_found_by_part_of_its_name_or_by_its_architecture() -> None:
    assert devices.find("H200").name == "NVIDIA H200"
    assert devices.find("rtx 4090").sms == 128
    assert devices.find("sm_89") is devices.find("4090")
    assert devices.find("90a") is devices.find("H200")
    for vague in ("RTX", "V100", "sm_75", ""):
        with pytest.raises(ValueError, match="RTX 5090"):
            devices.find(vague)


def test_an_unknown_architecture_names_the_known_ones() -> None:
    with pytest.raises(ValueError, match="sm_80, sm_86"):
        devices.architecture("sm_75")


def test_peak_rates_are_those_of_the_data_sheets() -> None:
    # TFLOP/s of float32 as NVIDIA advertises them.
    advertised = {"A100": 19.5, "3090": 35.6, "4090": 82.6, "H200": 66.9, "5090": 104.8}
    for name, tflops in advertised.items():
        assert devices.find(name).fp32_flops / 1e12 == pytest.approx(tflops, rel=0.005)


@pytest.mark.parametrize(
    ("arch", "threads", "registers", "shared", "blocks", "limiter"),
    [
        # 64 registers: 2048 a warp, 8 warps in a partition's 16384, 32 warps, 4 blocks of 8.
        ("sm_90", 256, 64, 0, 4, "registers"),
        # 65 registers round up to 72: 2304 a warp, 7 in a partition, 28 warps, 3 blocks of 8.
        ("sm_90", 256, 65, 0, 3, "registers"),
        # 48 warps of 8 are 6 blocks; 64 warps are 8.
        ("sm_89", 256, 32, 0, 6, "threads"),
        ("sm_90", 256, 32, 0, 8, "threads"),
        # One warp a block: the number of blocks is what ends first.
        ("sm_86", 32, 16, 0, 16, "blocks"),
        ("sm_120", 32, 16, 0, 24, "blocks"),
        # 48 KiB and 1 KiB for the system: 2 blocks in 100 KiB, 4 in 228, 3 in 164.
        ("sm_120", 128, 32, 48 * 1024, 2, "shared memory"),
        ("sm_100", 128, 32, 48 * 1024, 4, "shared memory"),
        ("sm_80", 128, 32, 48 * 1024, 3, "shared memory"),
        # Exactly the limit of a block, and one byte beyond it.
        ("sm_86", 128, 32, 99 * 1024, 1, "shared memory"),
        ("sm_86", 128, 32, 99 * 1024 + 1, 0, "shared memory"),
        # 1024 threads of 65 registers would need 73728 of 65536.
        ("sm_90", 1024, 65, 0, 0, "registers"),
        ("sm_90", 1056, 16, 0, 0, "threads"),
        ("sm_90", 128, 256, 0, 0, "registers"),
    ],
)
def test_occupancy_worked_by_hand(
    arch: str, threads: int, registers: int, shared: int, blocks: int, limiter: str
) -> None:
    found = occupancy(ARCHITECTURES[arch], threads, registers, shared)
    assert (found.blocks_per_sm, found.limiter) == (blocks, limiter)
    assert found.warps_per_sm == blocks * -(-threads // 32)
    assert found.fraction == found.warps_per_sm / ARCHITECTURES[arch].warps_per_sm


@pytest.mark.parametrize("bad", [(0, 32, 0), (32, -1, 0), (32, 32, -1)])
def test_occupancy_rejects_what_no_launch_can_have(bad: tuple[int, int, int]) -> None:
    with pytest.raises(ValueError, match="threads >= 1"):
        occupancy(ARCHITECTURES["sm_80"], *bad)


THREADS = (1, 32, 33, 64, 96, 128, 160, 192, 256, 320, 384, 512, 768, 1000, 1024, 1056)
REGISTERS = (16, 24, 31, 32, 33, 40, 63, 64, 65, 72, 96, 128, 129, 168, 200, 254, 255)
SHARED = (0, 1, 512, 4096, 9999, 24576, 31744, 49152, 65536, 100 * 1024, 101376, 101377, 166912,
          166913, 232448, 232449)  # fmt: skip

CALCULATOR = """
#include <climits>
#include <cstddef>
#include <cstdio>
#include <cuda_occupancy.h>
int main() {
  int major, minor, threads, registers;
  unsigned long shared, per_sm, per_block;
  int max_threads;
  while (scanf("%d %d %d %lu %lu %d %d %lu", &major, &minor, &max_threads, &per_sm, &per_block,
               &threads, &registers, &shared) == 8) {
    cudaOccDeviceProp device;
    device.computeMajor = major;
    device.computeMinor = minor;
    device.maxThreadsPerBlock = 1024;
    device.maxThreadsPerMultiprocessor = max_threads;
    device.regsPerBlock = 65536;
    device.regsPerMultiprocessor = 65536;
    device.warpSize = 32;
    device.sharedMemPerBlock = 49152;
    device.sharedMemPerMultiprocessor = per_sm;
    device.numSms = 1;
    device.sharedMemPerBlockOptin = per_block;
    device.reservedSharedMemPerBlock = 1024;
    cudaOccFuncAttributes kernel;
    kernel.maxThreadsPerBlock = 1024;
    kernel.numRegs = registers;
    kernel.sharedSizeBytes = 0;
    kernel.partitionedGCConfig = PARTITIONED_GC_OFF;
    kernel.shmemLimitConfig = FUNC_SHMEM_LIMIT_OPTIN;
    kernel.maxDynamicSharedSizeBytes = per_block;
    kernel.numBlockBarriers = 1;
    cudaOccDeviceState state;
    state.carveoutConfig = SHAREDMEM_CARVEOUT_MAX_SHARED;
    cudaOccResult result;
    cudaOccError error =
        cudaOccMaxActiveBlocksPerMultiprocessor(&result, &device, &kernel, &state, threads, shared);
    printf("%d\\n", error ? -1 : result.activeBlocksPerMultiprocessor);
  }
}
"""


def test_occupancy_is_what_nvidias_calculator_counts(tmp_path: Path) -> None:
    include = header()
    if include is None or shutil.which("g++") is None:
        pytest.skip("needs g++ and cuda_occupancy.h, of the CUDA toolkit or of Triton's package")
    (tmp_path / "calculator.cpp").write_text(CALCULATOR)
    program = tmp_path / "calculator"
    subprocess.run(
        ["g++", "-w", "-I", str(include), str(tmp_path / "calculator.cpp"), "-o", str(program)],
        check=True,
    )
    cases = list(itertools.product(ARCHITECTURES.values(), THREADS, REGISTERS, SHARED))
    lines = [
        f"{a.capability[0]} {a.capability[1]} {a.threads_per_sm} {a.shared_per_sm} "
        f"{a.shared_per_block} {threads} {registers} {shared}"
        for a, threads, registers, shared in cases
    ]
    answer = subprocess.run(
        [str(program)], input="\n".join(lines), capture_output=True, text=True, check=True
    )
    expected = [int(line) for line in answer.stdout.split()]
    found = [occupancy(*case).blocks_per_sm for case in cases]
    wrong = [
        (case[0].name, *case[1:], ours, theirs)
        for case, ours, theirs in zip(cases, found, expected, strict=True)
        if ours != max(theirs, 0)
    ]
    assert wrong == []
    assert sum(blocks > 0 for blocks in found) > 1000


def properties(**changes: object) -> SimpleNamespace:
    """What PyTorch reports of an RTX 4090, changed."""
    values: dict[str, object] = {
        "name": "NVIDIA GeForce RTX 4090",
        "major": 8,
        "minor": 9,
        "multi_processor_count": 128,
        "L2_cache_size": 72 << 20,
        "total_memory": 25_250_000_000,
        "clock_rate": 2_520_000,
        "memory_clock_rate": 10_501_000,
        "memory_bus_width": 384,
        "max_threads_per_multi_processor": 1536,
        "regs_per_multiprocessor": 65536,
        "shared_memory_per_multiprocessor": 102400,
        "shared_memory_per_block_optin": 101376,
    }
    return SimpleNamespace(**(values | changes))


def test_a_known_device_gets_its_data_sheet() -> None:
    device = devices.from_properties(properties())
    known = devices.find("RTX 4090")
    assert device.architecture is known.architecture
    assert device.dram_bandwidth == known.dram_bandwidth
    assert device.memory_bytes == 25_250_000_000


def test_an_unknown_device_is_described_from_its_properties() -> None:
    device = devices.from_properties(
        properties(name="NVIDIA GeForce RTX 4080", multi_processor_count=76, memory_bus_width=256)
    )
    assert device.sms == 76
    # 10.501 GHz, two transfers a clock, 32 bytes wide.
    assert device.dram_bandwidth == pytest.approx(672e9, rel=1e-3)


def test_where_no_memory_clock_is_reported_bandwidth_follows_the_multiprocessors() -> None:
    silent = properties(name="NVIDIA L4", multi_processor_count=64)
    del silent.memory_clock_rate, silent.memory_bus_width, silent.clock_rate
    device = devices.from_properties(silent)
    assert device.dram_bandwidth == pytest.approx(1008e9 / 2)
    assert device.clock_hz == 2.52e9


def test_an_architecture_between_the_known_ones_keeps_its_own_limits() -> None:
    orin = properties(
        name="Orin",
        major=8,
        minor=7,
        shared_memory_per_multiprocessor=167936,
        shared_memory_per_block_optin=166912,
    )
    limits = devices.from_properties(orin).architecture
    assert (limits.name, limits.target, limits.capability) == ("sm_87", "87", (8, 7))
    assert (limits.shared_per_block, limits.warps_per_sm, limits.blocks_per_sm) == (166912, 48, 16)


def test_an_old_device_is_refused() -> None:
    with pytest.raises(ValueError, match=r"compute capability 7\.5 is not supported"):
        devices.from_properties(properties(name="Tesla T4", major=7, minor=5))


def test_a_cpu_tensor_is_planned_for_the_smallest_shared_memory() -> None:
    device = devices.for_tensor(torch.empty(1))
    assert device.architecture.shared_per_block == min(
        architecture.shared_per_block for architecture in ARCHITECTURES.values()
    )


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_this_device_agrees_with_its_table() -> None:
    found = torch.cuda.get_device_properties(0)
    device = devices.current(0)
    assert devices.for_tensor(torch.empty(1, device="cuda:0")) is device
    limits = device.architecture
    assert limits.shared_per_sm == found.shared_memory_per_multiprocessor
    assert limits.shared_per_block == found.shared_memory_per_block_optin
    assert limits.threads_per_sm == found.max_threads_per_multi_processor
    assert limits.registers_per_sm == found.regs_per_multiprocessor
