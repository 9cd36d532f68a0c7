from __future__ import annotations

from pathlib import Path

import pytest

from cvfast import extension

CACHES = Path("/sys/devices/system/cpu/cpu0/cache")


def listed(level: int) -> list[int]:
    return [
        1024 * int((cache / "size").read_text().strip().removesuffix("K"))
        for cache in CACHES.glob("index*")
        if (cache / "level").read_text().strip() == str(level)
    ]


@pytest.mark.usefixtures("cpu_extension")
def test_caches_are_what_the_system_tells() -> None:
    l2, l3 = listed(2), listed(3)
    assert extension.cpu_l2_bytes() == (l2[0] if l2 else 1 << 20)
    assert extension.cpu_l3_bytes() == (l3[0] if l3 else extension.cpu_l2_bytes())
