from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager

import pytest


@pytest.fixture(scope="module")
def device(gpu_kernels: Callable[[str], AbstractContextManager[str]]) -> Iterator[str]:
    """Where Triton's kernels run: a GPU, or interpreted on the CPU.

    The kernels of cvfast.kernels read TRITON_INTERPRET at each launch (kernels/jit.py). Nothing of
    Triton itself is left switched over, so that other tests of the process compile as ever.
    """
    with gpu_kernels("triton") as name:
        yield name
