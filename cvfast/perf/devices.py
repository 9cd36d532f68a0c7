"""What NVIDIA GPUs offer: limits of each architecture, figures of each device, and occupancy.

The limits are those of the table "Technical Specifications per Compute Capability" of NVIDIA's
CUDA C++ Programming Guide 13.0; the rounding rules of `occupancy` are those of `cuda_occupancy.h`
of the CUDA 13.0 toolkit.
"""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass, replace
from typing import Any

import torch

WARP = 32
"""Threads per warp, on every architecture."""

MAX_THREADS = 1024
"""Threads per block, on every architecture."""

_SUB_PARTITIONS = 4
_SHARED_UNIT = 128


@dataclass(frozen=True)
class Architecture:
    """Limits of one compute capability. Memory is in bytes.

    Attributes:
        name: such as "sm_90".
        target: what the compilers are told, such as "90a".
        registers_per_sm: 32-bit registers of a multiprocessor, and the most of a block.
        registers_per_thread: the most a thread can have.
        register_unit: a warp's registers are handed out in multiples of this.
        shared_per_sm: shared memory of a multiprocessor.
        shared_per_block: the most a block can have, after opting in.
        shared_reserved: what the system takes of every block's shared memory on top.
        threads_per_sm, warps_per_sm, blocks_per_sm: the most resident at a time.
        fp32_lanes_per_sm: fused multiply-adds a cycle.
        load_bytes_per_cycle: what the L1 cache and shared memory deliver to a multiprocessor's
            registers in a cycle.
    """

    name: str
    target: str
    shared_per_sm: int
    shared_per_block: int
    threads_per_sm: int
    blocks_per_sm: int
    fp32_lanes_per_sm: int = 128
    registers_per_sm: int = 65536
    registers_per_thread: int = 255
    register_unit: int = 256
    shared_reserved: int = 1024
    load_bytes_per_cycle: int = 128

    @property
    def warps_per_sm(self) -> int:
        return self.threads_per_sm // WARP

    @property
    def capability(self) -> tuple[int, int]:
        """Major and minor compute capability: "sm_120" is (12, 0)."""
        number = int(self.name.removeprefix("sm_"))
        return number // 10, number % 10


_KIB = 1024

ARCHITECTURES = {
    architecture.name: architecture
    for architecture in (
        Architecture("sm_80", "80", 164 * _KIB, 163 * _KIB, 2048, 32, fp32_lanes_per_sm=64),
        Architecture("sm_86", "86", 100 * _KIB, 99 * _KIB, 1536, 16),
        Architecture("sm_89", "89", 100 * _KIB, 99 * _KIB, 1536, 24),
        Architecture("sm_90", "90a", 228 * _KIB, 227 * _KIB, 2048, 32),
        Architecture("sm_100", "100a", 228 * _KIB, 227 * _KIB, 2048, 32),
        Architecture("sm_120", "120", 100 * _KIB, 99 * _KIB, 1536, 24),
    )
}
"""The architectures that kernels are shipped for, by name."""


@dataclass(frozen=True)
class Device:
    """One GPU.

    Attributes:
        name: as `torch.cuda.get_device_name` gives it.
        sms: multiprocessors.
        clock_hz: boost clock.
        dram_bandwidth: of device memory by the data sheet, in bytes per second.
        l2_bytes, memory_bytes: sizes.
        half_matrix_flops: FLOP/s of the matrix units by the data sheet: dense products of float16
            or bfloat16, summed in float32.
    """

    name: str
    architecture: Architecture
    sms: int
    clock_hz: float
    dram_bandwidth: float
    l2_bytes: int
    memory_bytes: int
    half_matrix_flops: float

    def matrix_flops(self, dtype: torch.dtype) -> float:
        """FLOP/s of the matrix units on operands of ``dtype``; float32 is rounded to TF32, which
        runs at half the rate on every architecture here."""
        return self.half_matrix_flops / (1 if dtype.itemsize == 2 else 2)

    @property
    def fp32_flops(self) -> float:
        """FLOP/s of the float32 units, a fused multiply-add counted as two."""
        return 2.0 * self.sms * self.architecture.fp32_lanes_per_sm * self.clock_hz


_MIB = 1 << 20

# SMs, boost clock, bandwidth, L2 and matrix rate from NVIDIA's data sheets (A100 80GB SXM, H200
# SXM, HGX B200) and architecture white papers (GA102 2.1, Ada 2.1, RTX Blackwell 1.1); the H200's
# L2 as the driver reports it; memory as nvidia-smi reports it.
DEVICES = (
    Device(
        "NVIDIA A100-SXM4-80GB",
        ARCHITECTURES["sm_80"], 108, 1.410e9, 2.039e12, 40 * _MIB, 81920 * _MIB, 312e12,
    ),
    Device(
        "NVIDIA GeForce RTX 3090",
        ARCHITECTURES["sm_86"], 82, 1.695e9, 936.2e9, 6 * _MIB, 24576 * _MIB, 71.2e12,
    ),
    Device(
        "NVIDIA GeForce RTX 4090",
        ARCHITECTURES["sm_89"], 128, 2.520e9, 1.008e12, 72 * _MIB, 24564 * _MIB,
        165.2e12,
    ),
    Device(
        "NVIDIA H200",
        ARCHITECTURES["sm_90"], 132, 1.980e9, 4.8e12, 60 * _MIB, 143771 * _MIB, 989.5e12,
    ),
    Device(
        "NVIDIA B200",
        ARCHITECTURES["sm_100"], 148, 1.965e9, 8.0e12, 126 * _MIB, 183359 * _MIB, 2250e12,
    ),
    Device(
        "NVIDIA GeForce RTX 5090",
        ARCHITECTURES["sm_120"], 170, 2.407e9, 1.792e12, 96 * _MIB, 32607 * _MIB,
        209.5e12,
    ),
)  # fmt: skip
"""One device or more of each architecture; the first of each represents it."""


def architecture(name: str) -> Architecture:
    """The architecture called "sm_90", "sm_90a" or "90".

    Raises:
        ValueError: for one that kernels are not shipped for.
    """
    match = re.fullmatch(r"(?:sm_)?(\d+)[af]?", name)
    if match is None or (found := ARCHITECTURES.get(f"sm_{match[1]}")) is None:
        raise ValueError(f"unknown architecture {name!r}; choose from {', '.join(ARCHITECTURES)}")
    return found


def by_arch(name: str) -> Device:
    """The device that represents an architecture: `by_arch("sm_89")` is the RTX 4090.

    Raises:
        ValueError: for an architecture that kernels are not shipped for.
    """
    wanted = architecture(name)
    return next(device for device in DEVICES if device.architecture is wanted)


def find(name: str) -> Device:
    """The one device of `DEVICES` whose name holds `name`, or that of an architecture.

    Raises:
        ValueError: if none or several match.
    """
    matches = [device for device in DEVICES if name.lower() in device.name.lower()]
    if len(matches) == 1:
        return matches[0]
    try:
        return by_arch(name)
    except ValueError:
        names = ", ".join([*(device.name for device in DEVICES), *ARCHITECTURES])
        raise ValueError(f"no single device is called {name!r}; choose from {names}") from None


def current(index: int | None = None) -> Device:
    """The CUDA device `index`, by default the current one.

    A device of `DEVICES` gets its data-sheet bandwidth and clock; its SMs and memory are read off
    the device, which may be a slice of the whole. Any other is described from its properties.

    Raises:
        RuntimeError: without a CUDA device.
        ValueError: for a device older than compute capability 8.0.
    """
    return _current(torch.cuda.current_device() if index is None else index)


@functools.cache
def _current(index: int) -> Device:
    return from_properties(torch.cuda.get_device_properties(index))


def for_tensor(tensor: torch.Tensor) -> Device:
    """The device a kernel on this tensor is planned for.

    A CPU tensor means an interpreted or emulated kernel: it is planned for the RTX 4090, whose
    99 KiB of shared memory per block are the least of all.
    """
    return current(tensor.device.index) if tensor.is_cuda else by_arch("sm_89")


def from_properties(properties: Any) -> Device:
    """The device that `torch.cuda.get_device_properties` describes.

    Raises:
        ValueError: for a device older than compute capability 8.0.
    """
    limits = _limits(properties)
    known = next((device for device in DEVICES if device.name == properties.name), None)
    representative = _representative(properties.major, properties.minor)
    sms = properties.multi_processor_count
    share = sms / (known or representative).sms
    if known is not None:
        clock, bandwidth = known.clock_hz, known.dram_bandwidth
    else:
        # kHz, and two transfers a clock. Older versions of PyTorch report neither.
        clock = getattr(properties, "clock_rate", 0) * 1e3 or representative.clock_hz
        memory_clock = getattr(properties, "memory_clock_rate", 0) * 1e3
        bus_bytes = getattr(properties, "memory_bus_width", 0) / 8
        bandwidth = 2 * memory_clock * bus_bytes or share * representative.dram_bandwidth
    return Device(
        name=properties.name,
        architecture=limits,
        sms=sms,
        clock_hz=clock,
        dram_bandwidth=bandwidth,
        l2_bytes=properties.L2_cache_size,
        memory_bytes=properties.total_memory,
        half_matrix_flops=share * (known or representative).half_matrix_flops,
    )


def _representative(major: int, minor: int) -> Device:
    """The device of the newest known architecture that is no newer than the capability."""
    older = [device for device in DEVICES if device.architecture.capability <= (major, minor)]
    if not older:
        raise ValueError(
            f"compute capability {major}.{minor} is not supported: GPU kernels need 8.0 or newer"
        )
    return max(older, key=lambda device: device.architecture.capability)


def _limits(properties: Any) -> Architecture:
    name = f"sm_{properties.major}{properties.minor}"
    if name in ARCHITECTURES:
        return ARCHITECTURES[name]
    # Not one that is shipped for: the nearest, with the limits that the device reports itself.
    return replace(
        _representative(properties.major, properties.minor).architecture,
        name=name,
        target=f"{properties.major}{properties.minor}",
        threads_per_sm=properties.max_threads_per_multi_processor,
        registers_per_sm=properties.regs_per_multiprocessor,
        shared_per_sm=properties.shared_memory_per_multiprocessor,
        shared_per_block=properties.shared_memory_per_block_optin,
    )


@dataclass(frozen=True)
class Occupancy:
    """How many blocks of a kernel a multiprocessor holds at a time.

    Attributes:
        blocks_per_sm: 0 if the kernel cannot be launched at all.
        warps_per_sm: resident warps.
        fraction: of the architecture's resident warps.
        limiter: what keeps it from more: "threads", "blocks", "registers" or "shared memory".
    """

    blocks_per_sm: int
    warps_per_sm: int
    fraction: float
    limiter: str


def occupancy(
    architecture: Architecture, threads: int, registers: int, shared_bytes: int
) -> Occupancy:
    """Occupancy of a kernel of `threads` threads per block, as NVIDIA's calculator counts it.

    Args:
        registers: of one thread.
        shared_bytes: static and dynamic shared memory of a block, without the system's share.

    Raises:
        ValueError: unless threads is positive and the rest not negative.
    """
    if threads < 1 or registers < 0 or shared_bytes < 0:
        raise ValueError(
            "occupancy() needs threads >= 1, registers >= 0 and shared_bytes >= 0, got "
            f"{threads}, {registers}, {shared_bytes}"
        )
    warps = -(-threads // WARP)
    limits = {
        "threads": 0 if threads > MAX_THREADS else architecture.warps_per_sm // warps,
        "blocks": architecture.blocks_per_sm,
        "registers": _blocks_by_registers(architecture, warps, registers),
        "shared memory": _blocks_by_shared_memory(architecture, shared_bytes),
    }
    blocks = min(limits.values())
    limiter = next(name for name, limit in limits.items() if limit == blocks)
    resident = blocks * warps
    return Occupancy(blocks, resident, resident / architecture.warps_per_sm, limiter)


def _blocks_by_registers(architecture: Architecture, warps: int, registers: int) -> int:
    if registers > architecture.registers_per_thread:
        return 0
    per_warp = _round_up(max(registers, 1) * WARP, architecture.register_unit)
    # The check at launch counts a block's warps as if they filled all four sub-partitions.
    if per_warp * _round_up(warps, _SUB_PARTITIONS) > architecture.registers_per_sm:
        return 0
    per_partition = architecture.registers_per_sm // _SUB_PARTITIONS // per_warp
    return per_partition * _SUB_PARTITIONS // warps


def _blocks_by_shared_memory(architecture: Architecture, shared_bytes: int) -> int:
    if shared_bytes > architecture.shared_per_block:
        return 0
    per_block = _round_up(shared_bytes + architecture.shared_reserved, _SHARED_UNIT)
    return architecture.shared_per_sm // per_block


def _round_up(value: int, unit: int) -> int:
    return -(-value // unit) * unit
