"""How long a kernel launch should take on a device, from its bytes, arithmetic and occupancy.

The model is simple enough to be refuted by the first measurement. A launch of B blocks, of which
the device holds R at a time, runs as floor(B / R) full waves and one partial wave. Each takes the
longest of five times, every one of which must pass whatever else the hardware overlaps:

- **bandwidth**: its share of the bytes that the launch moves from and to device memory, each input
  read once and each output written once, over `COPY_SHARE` of the data sheet's bandwidth;
- **latency**: by Little's law, one `LATENCY` for every time that each of its blocks reads as much
  as it can have in flight (`bytes_in_flight`), and at least one; nothing waits for writes;
- **issue**: its warp instructions over the four that a multiprocessor issues a cycle;
- **load/store**: the bytes its instructions move between registers and L1 or shared memory, over
  the 128 bytes a cycle of a multiprocessor;
- **matrix**: the multiply-adds of its matrix instructions over the data sheet's rate; on sm_90 over
  `MMA_SHARE` of that where these are the instructions of one warp (HMMA) and not of four (HGMMA).

A partial wave has only the multiprocessors and threads that its blocks fill. To all of this comes
`LAUNCH` once. What a thread executes follows from the compiled code: as many runs through its
core, the instructions from the first to the last multiply-add or matrix instruction, as the
multiply-adds of the launch ask for, and at least one; every byte of device memory passes L1 once
more. That leaves out what stands before and behind the core, such as addresses, asynchronous copies
and the last stores, and counts too much where the core holds code for image borders. Not modelled:
traffic between L2 and L1, bank conflicts, clocks below boost, waiting of one instruction for
another, and inputs that are still in L2 (the prediction is for a cold cache).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from cvfast.perf.compiled import Binary, census, multiply_adds
from cvfast.perf.devices import WARP, Device, Occupancy, occupancy

COPY_SHARE = 0.9
"""What a device-to-device copy reaches of the data sheet's bandwidth: 4.3 of 4.8 TB/s on an H200,
measured with PyTorch."""

LATENCY = 800e-9
"""Seconds from load to use while memory is busy. Idle, 480 to 540 cycles were measured on A100,
H100 and RTX 4090 (Luo et al., 2024, arXiv:2402.13499), 0.2 to 0.35 µs; busy, assumed three times
that."""

LAUNCH = 2e-6
"""Seconds of an empty kernel within a CUDA graph: assumed."""

MMA_SHARE = 0.62
"""Share of sm_90's matrix rate that instructions of one warp reach (Luo et al., 2024)."""

_SCHEDULERS = 4


@dataclass(frozen=True)
class Work:
    """What one launch has to do.

    Attributes:
        read, written: bytes from and to device memory, each element counted once.
        multiply_adds: of the whole launch.
    """

    read: int
    written: int
    multiply_adds: int

    @property
    def bytes(self) -> int:
        return self.read + self.written


@dataclass(frozen=True)
class Prediction:
    """Seconds of one launch, and why.

    Attributes:
        seconds: with a cold L2.
        roofline: bytes over the data sheet's bandwidth: what no kernel beats.
        copy: what copying as many bytes should take by the same model.
        waves: blocks over those that the device holds at a time.
        occupancy: of a multiprocessor with as many blocks as it holds.
        limiter: the longest of the times: "bandwidth", "latency", "issue", "load/store", "matrix"
            or "launch".
    """

    seconds: float
    roofline: float
    copy: float
    waves: float
    occupancy: Occupancy
    limiter: str

    @property
    def copy_share(self) -> float:
        """Fraction of copy bandwidth that the launch reaches."""
        return self.copy / self.seconds


def predict(
    device: Device, binary: Binary, work: Work, *, blocks: int, threads: int, dynamic_shared: int
) -> Prediction:
    """Predicts one launch of a compiled kernel.

    Args:
        binary: compiled for the device's architecture.
        blocks: of the whole grid.
        threads: of a block.
        dynamic_shared: bytes of shared memory asked for at launch.

    Raises:
        ValueError: if the kernel does not fit on the device, or there is no block.
    """
    if blocks < 1:
        raise ValueError(f"predict() needs at least one block, got {blocks}")
    held = occupancy(
        device.architecture, threads, binary.registers, binary.shared_bytes + dynamic_shared
    )
    if held.blocks_per_sm == 0:
        raise ValueError(
            f"{binary.name} does not fit on {device.name}: too much of its {held.limiter}"
        )
    resident = held.blocks_per_sm * device.sms
    bandwidth = COPY_SHARE * device.dram_bandwidth
    in_flight = bytes_in_flight(binary, threads, dynamic_shared)
    runs = _runs(binary, work.multiply_adds / (blocks * threads))
    warps = -(-threads // WARP)
    block_instructions = runs * warps * sum(binary.core.values())
    block_bytes = work.bytes / blocks
    matrix_adds = runs * threads * multiply_adds(binary.core)[1]
    block_l1_bytes = runs * threads * _l1_bytes(binary) + block_bytes

    names = ("bandwidth", "latency", "issue", "load/store", "matrix")
    terms = dict.fromkeys(names, 0.0)
    seconds = 0.0
    full, rest = divmod(blocks, resident)
    for wave, count in ((resident, full), (rest, 1)):
        if wave == 0 or count == 0:
            continue
        per_sm = wave / min(wave, device.sms)
        cycles = {
            "issue": per_sm * block_instructions / _SCHEDULERS,
            "load/store": per_sm * block_l1_bytes / device.architecture.load_bytes_per_cycle,
        }
        part = {
            "bandwidth": wave * block_bytes / bandwidth,
            "latency": LATENCY * max(1.0, work.read / blocks / in_flight),
            "matrix": 2 * per_sm * matrix_adds * device.sms / _matrix_flops(binary, device),
            **{name: value / device.clock_hz for name, value in cycles.items()},
        }
        seconds += count * max(part.values())
        for name, value in part.items():
            terms[name] += count * value
    terms["launch"] = LAUNCH
    return Prediction(
        seconds=LAUNCH + seconds,
        roofline=work.bytes / device.dram_bandwidth,
        copy=LAUNCH + work.bytes / bandwidth,
        waves=blocks / resident,
        occupancy=held,
        limiter=max(terms, key=lambda name: terms[name]),
    )


def bytes_in_flight(binary: Binary, threads: int, dynamic_shared: int) -> int:
    """Bytes that a block can have under way from device memory, at most.

    Where it copies asynchronously (LDGSTS), what its dynamic shared memory holds. Otherwise what a
    thread loads without going round a loop, up to half of its registers, times the threads.
    """
    to_registers = 0
    for name, count in binary.census().items():
        base, _, bits = name.partition(".")
        if base == "LDGSTS":
            return max(dynamic_shared, 16)
        if base == "LDG":
            to_registers += count * int(bits) // 8
    return threads * min(max(to_registers, 4), binary.registers * 4 // 2)


def _runs(binary: Binary, wanted: float) -> float:
    """How often a thread runs through the core to do so many multiply-adds; at least once."""
    once = sum(multiply_adds(binary.core))
    return max(1.0, wanted / once) if once else 1.0


def _matrix_flops(binary: Binary, device: Device) -> float:
    """FLOP/s that the binary's kind of matrix instructions reaches."""
    matrix = [opcode for opcode in binary.core if "MMA" in opcode]
    rounds = any("TF32" in opcode for opcode in matrix)
    rate = device.matrix_flops(torch.float32 if rounds else torch.float16)
    of_four_warps = any(opcode.startswith("HGMMA") for opcode in matrix)
    return rate * MMA_SHARE if binary.arch == "sm_90" and not of_four_warps else rate


def _l1_bytes(binary: Binary) -> int:
    """Bytes that one run of a thread through the core moves through L1 and shared memory."""
    moved = 0
    for name, count in census(binary.core).items():
        base, _, bits = name.partition(".")
        if base in ("LDG", "STG", "LDGSTS", "LDS", "STS", "LDSM", "STSM"):
            moved += count * int(bits) // 8
    return moved
