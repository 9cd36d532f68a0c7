from __future__ import annotations

import pytest

from cvfast import extension
from cvfast.perf import environment


@pytest.fixture(scope="session", autouse=True)
def _cpu_extension() -> None:
    status = extension.load("cpu")
    if not status:
        pytest.fail(str(status))


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict) -> None:
    machine_info["cvfast"] = environment.capture()
