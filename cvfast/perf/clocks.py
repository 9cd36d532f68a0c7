"""A GPU's clocks, temperature, power and reasons for slowing down, read through NVML; never set.

NVML comes with every NVIDIA driver as ``libnvidia-ml.so.1``, and is called here without a package
in between. Where it is missing, measurements go on without it.
"""

from __future__ import annotations

import ctypes
import functools
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

# nvml.h: nvmlClockType_t, nvmlTemperatureSensors_t, nvmlClocksEventReasons.
_CLOCK_SM, _CLOCK_MEMORY = 1, 2
_TEMPERATURE_GPU = 0
REASONS = {
    0x001: "idle",
    0x002: "applications_clocks",
    0x004: "power_cap",
    0x008: "hardware_slowdown",
    0x010: "sync_boost",
    0x020: "thermal",
    0x040: "hardware_thermal",
    0x080: "hardware_power_brake",
    0x100: "display_clocks",
}


@dataclass(frozen=True)
class Sample:
    """The state of a GPU at one moment; ``None`` for what its driver does not tell.

    Attributes:
        sm_mhz, memory_mhz: clocks.
        temperature: of the chip, in degrees Celsius.
        power: in watts.
        reasons: why the clocks are below their maximum: values of `REASONS`.
    """

    sm_mhz: int | None = None
    memory_mhz: int | None = None
    temperature: int | None = None
    power: float | None = None
    reasons: tuple[str, ...] = ()


class Sampler(Protocol):
    """Whatever can tell the state of a GPU."""

    def sample(self) -> Sample: ...


class Nvml:
    """One GPU, by NVML.

    Args:
        uuid: of the GPU, as ``nvidia-smi -L`` prints it: CUDA's numbering is not NVML's.
        library: for tests.

    Raises:
        OSError: if NVML is not installed, or knows no such GPU.
    """

    def __init__(self, uuid: str, library: Any = None) -> None:
        self._nvml = library or ctypes.CDLL("libnvidia-ml.so.1")
        self._handle = ctypes.c_void_p()
        if self._nvml.nvmlInit_v2():
            raise OSError("NVML does not start: is the NVIDIA driver loaded?")
        found = self._nvml.nvmlDeviceGetHandleByUUID(uuid.encode(), ctypes.byref(self._handle))
        if found:
            raise OSError(f"NVML knows no GPU {uuid}: nvidia-smi -L lists those that it does")

    def sample(self) -> Sample:
        """Takes some tens of microseconds; does not disturb what runs."""
        power = self._unsigned("nvmlDeviceGetPowerUsage")
        bits = self._unsigned("nvmlDeviceGetCurrentClocksThrottleReasons", width=64) or 0
        return Sample(
            sm_mhz=self._unsigned("nvmlDeviceGetClockInfo", _CLOCK_SM),
            memory_mhz=self._unsigned("nvmlDeviceGetClockInfo", _CLOCK_MEMORY),
            temperature=self._unsigned("nvmlDeviceGetTemperature", _TEMPERATURE_GPU),
            power=None if power is None else power / 1000,
            reasons=tuple(name for bit, name in REASONS.items() if bits & bit),
        )

    def describe(self) -> dict[str, Any]:
        """What does not change while one measures: limits in MHz and watts, ECC, driver."""
        limit = self._unsigned("nvmlDeviceGetEnforcedPowerLimit")
        return {
            "max_sm_mhz": self._unsigned("nvmlDeviceGetMaxClockInfo", _CLOCK_SM),
            "max_memory_mhz": self._unsigned("nvmlDeviceGetMaxClockInfo", _CLOCK_MEMORY),
            "power_limit_watts": None if limit is None else limit / 1000,
            "ecc": self._ecc(),
            "driver": self._driver(),
        }

    def _unsigned(self, function: str, *arguments: int, width: int = 32) -> int | None:
        """The number that an NVML function writes; ``None`` if this GPU does not support it."""
        value: Any = ctypes.c_uint64() if width == 64 else ctypes.c_uint32()
        call = getattr(self._nvml, function, None)
        if call is None or call(self._handle, *arguments, ctypes.byref(value)):
            return None
        return int(value.value)

    def _ecc(self) -> bool | None:
        current, pending = ctypes.c_uint32(), ctypes.c_uint32()
        function = self._nvml.nvmlDeviceGetEccMode
        if function(self._handle, ctypes.byref(current), ctypes.byref(pending)):
            return None
        return bool(current.value)

    def _driver(self) -> str | None:
        text = ctypes.create_string_buffer(80)
        if self._nvml.nvmlSystemGetDriverVersion(text, ctypes.c_uint32(len(text))):
            return None
        return text.value.decode()


@functools.cache
def nvml(index: int) -> Nvml | None:
    """NVML's view of CUDA device `index`; ``None`` where there is no NVML."""
    uuid = str(torch.cuda.get_device_properties(index).uuid).removeprefix("GPU-")
    try:
        return Nvml(f"GPU-{uuid}")
    except OSError:
        return None


def summarize(samples: Sequence[Sample]) -> dict[str, Any] | None:
    """Range and median of the clocks, the highest temperature and power, and all reasons but idle.

    ``None`` without a sample.
    """
    if not samples:
        return None
    clocks = sorted(s.sm_mhz for s in samples if s.sm_mhz is not None)
    reasons = {reason for sample in samples for reason in sample.reasons}
    return {
        "samples": len(samples),
        "sm_mhz": {
            "min": clocks[0],
            "median": statistics.median(clocks),
            "max": clocks[-1],
        }
        if clocks
        else None,
        "memory_mhz": max(
            (s.memory_mhz for s in samples if s.memory_mhz is not None), default=None
        ),
        "temperature": max(
            (s.temperature for s in samples if s.temperature is not None), default=None
        ),
        "power_watts": max((s.power for s in samples if s.power is not None), default=None),
        "reasons": sorted(reasons - {"idle"}),
    }
