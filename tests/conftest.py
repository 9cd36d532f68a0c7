from __future__ import annotations

import pytest
import torch

from cvfast import extension


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def cpu_extension() -> None:
    """For tests of compiled kernels: without the extension they fail, and say what to do."""
    status = extension.load("cpu")
    if not status:
        pytest.fail(str(status))
