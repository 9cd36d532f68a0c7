from __future__ import annotations

import json

import pytest

from cvfast.perf import clocks


class Library:
    """libnvidia-ml.so.1 of a GPU at 1755 of 1980 MHz; functions return 0, or an error code."""

    def __init__(self, uuid=b"GPU-1", start=0, unsupported=()):
        self.uuid, self.start, self.unsupported = uuid, start, unsupported

    def nvmlInit_v2(self):
        return self.start

    def nvmlDeviceGetHandleByUUID(self, uuid, handle):
        return 0 if uuid == self.uuid else 6

    def _write(self, name, pointer, value):
        if name in self.unsupported:
            return 3
        pointer._obj.value = value
        return 0

    def nvmlDeviceGetClockInfo(self, handle, kind, pointer):
        return self._write("clock", pointer, {1: 1755, 2: 3201}[kind])

    def nvmlDeviceGetMaxClockInfo(self, handle, kind, pointer):
        return self._write("clock", pointer, {1: 1980, 2: 3201}[kind])

    def nvmlDeviceGetTemperature(self, handle, sensor, pointer):
        return self._write("temperature", pointer, 61)

    def nvmlDeviceGetPowerUsage(self, handle, pointer):
        return self._write("power", pointer, 698_500)

    def nvmlDeviceGetEnforcedPowerLimit(self, handle, pointer):
        return self._write("power", pointer, 700_000)

    def nvmlDeviceGetCurrentClocksThrottleReasons(self, handle, pointer):
        return self._write("reasons", pointer, 0x24)

    def nvmlDeviceGetEccMode(self, handle, current, pending):
        return self._write("ecc", current, 1)

    def nvmlSystemGetDriverVersion(self, text, size):
        text.value = b"580.159.03"
        return 0


def test_sample():
    assert clocks.Nvml("GPU-1", Library()).sample() == clocks.Sample(
        sm_mhz=1755,
        memory_mhz=3201,
        temperature=61,
        power=698.5,
        reasons=("power_cap", "thermal"),
    )


def test_description():
    assert clocks.Nvml("GPU-1", Library()).describe() == {
        "max_sm_mhz": 1980,
        "max_memory_mhz": 3201,
        "power_limit_watts": 700.0,
        "ecc": True,
        "driver": "580.159.03",
    }


def test_what_a_gpu_does_not_support_is_none():
    nvml = clocks.Nvml("GPU-1", Library(unsupported=("power", "ecc", "reasons", "clock")))
    sample = nvml.sample()
    assert (sample.sm_mhz, sample.power, sample.reasons) == (None, None, ())
    assert sample.temperature == 61
    assert nvml.describe()["ecc"] is None
    assert nvml.describe()["power_limit_watts"] is None


def test_function_missing_from_an_old_driver_is_none():
    class Old(Library):
        nvmlDeviceGetPowerUsage = None

    assert clocks.Nvml("GPU-1", Old()).sample().power is None


def test_unknown_gpu_and_missing_driver_are_errors():
    with pytest.raises(OSError, match="no GPU GPU-2"):
        clocks.Nvml("GPU-2", Library())
    with pytest.raises(OSError, match="driver"):
        clocks.Nvml("GPU-1", Library(start=9))


def test_without_nvml_there_is_none(monkeypatch):
    class Properties:
        uuid = "1"

    def missing(name):
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(clocks.torch.cuda, "get_device_properties", lambda index: Properties())
    monkeypatch.setattr(clocks.ctypes, "CDLL", missing)
    clocks.nvml.cache_clear()
    assert clocks.nvml(0) is None
    clocks.nvml.cache_clear()
    monkeypatch.setattr(clocks.ctypes, "CDLL", lambda name: Library())
    assert clocks.nvml(0).sample().sm_mhz == 1755
    clocks.nvml.cache_clear()


def test_summary():
    samples = [
        clocks.Sample(sm_mhz=1980, temperature=40, power=300.0, reasons=("idle",)),
        clocks.Sample(sm_mhz=1700, temperature=60, power=700.0, reasons=("power_cap",)),
        clocks.Sample(sm_mhz=1950, temperature=50),
    ]
    assert json.loads(json.dumps(clocks.summarize(samples))) == {
        "samples": 3,
        "sm_mhz": {"min": 1700, "median": 1950, "max": 1980},
        "memory_mhz": None,
        "temperature": 60,
        "power_watts": 700.0,
        "reasons": ["power_cap"],
    }
    assert clocks.summarize([]) is None
    assert clocks.summarize([clocks.Sample()])["sm_mhz"] is None
