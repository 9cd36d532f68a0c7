"""Host emulation of CUDA: runs the sources of csrc/cuda on the CPU, and checks them as it goes.

`build.cuda_library()` compiles them; `Emulation` sets the architecture and the order of threads of
a library so built. See docs/emulation.md.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from cvfast.perf import devices

DEFAULT_ARCHITECTURE = "sm_89"


@dataclass(frozen=True)
class Statistics:
    """What has run since the library was loaded; `accesses` are those that were checked, i.e. of
    memory other than a thread's own stack."""

    launches: int
    blocks: int
    threads: int
    barriers: int
    accesses: int


class Emulation:
    """Settings of an emulated library; of the process, not of a thread."""

    def __init__(self, path: Path) -> None:
        self.library = ctypes.CDLL(str(path))
        self.library.cvfast_emulation_seed.argtypes = [ctypes.c_uint64]
        self.library.cvfast_emulation_architecture.argtypes = [ctypes.c_char_p, ctypes.c_size_t]
        self._set_architecture(DEFAULT_ARCHITECTURE)

    @contextmanager
    def seed(self, seed: int) -> Iterator[None]:
        """Runs blocks and threads in the orders that `seed` gives; afterwards those of seed 0."""
        self.library.cvfast_emulation_seed(seed)
        try:
            yield
        finally:
            self.library.cvfast_emulation_seed(0)

    @contextmanager
    def architecture(self, name: str) -> Iterator[None]:
        """Keeps to the limits of architecture `name`, such as "sm_86"; afterwards to sm_89's.

        Raises:
            ValueError: if cvfast.perf.devices does not know it.
        """
        self._set_architecture(name)
        try:
            yield
        finally:
            self._set_architecture(DEFAULT_ARCHITECTURE)

    def _set_architecture(self, name: str) -> None:
        limit = devices.architecture(name).shared_per_block
        self.library.cvfast_emulation_architecture(name.encode(), limit)

    def statistics(self) -> Statistics:
        counts = (ctypes.c_uint64 * 5)()
        self.library.cvfast_emulation_statistics(counts)
        return Statistics(*counts)
