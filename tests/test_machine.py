from __future__ import annotations

from pathlib import Path

import pytest

from cvfast import extension

CACHES = Path("/sys/devices/system/cpu/cpu0/cache")


@pytest.mark.usefixtures("cpu_extension")
def test_l2_is_what_the_system_tells() -> None:
    sizes = [
        1024 * int((cache / "size").read_text().strip().removesuffix("K"))
        for cache in CACHES.glob("index*")
        if (cache / "level").read_text().strip() == "2"
    ]
    assert extension.cpu_l2_bytes() == (sizes[0] if sizes else 1 << 20)
