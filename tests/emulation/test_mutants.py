"""Defects planted in the depthwise kernel are caught: by the emulator, or by the numbers."""

from __future__ import annotations

import ctypes
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from cvfast.launch.depthwise.cuda import Launch
from cvfast.ops.depthwise import prepack

from . import Emulation, build

pytestmark = pytest.mark.skipif(build.compiler() is None, reason="needs g++ or $CXX")

KERNEL = "cuda/depthwise_kernel.cuh"
LAUNCH = "cuda/depthwise_launch.cuh"
WRONG = "wrong result"


@dataclass(frozen=True)
class Mutant:
    """An edit of a source file, and what it must lead to.

    Attributes:
        old, new: regular expression and what replaces it; it matches in one place of the file.
        caught: pattern of the message.
        channels: of the image that shows it, whose pixels lie `pixel` elements apart.
        stages: of the launch that shows it.
    """

    file: str
    old: str
    new: str
    caught: str
    channels: int = 20
    pixel: int = 24
    stages: int = 2


MUTANTS = {
    "no barrier after the copy": Mutant(
        KERNEL,
        r"__syncthreads\(\);(\s*use\()",
        r"\1",
        "shared-memory race|cp.async data not waited for|uninitialised",
    ),
    "no barrier before the next copy": Mutant(
        KERNEL,
        r"(\buse\([^;]*;)\s*__syncthreads\(\);",
        r"\1",
        "shared-memory race|cp.async data not waited for",
        stages=1,
    ),
    "wait for too few copies": Mutant(
        KERNEL, r"cp_async_wait<1>", "cp_async_wait<2>", "cp.async data not waited for"
    ),
    "halo one column too wide": Mutant(
        KERNEL,
        r"(left \+ column\)) < (static_cast<unsigned>\(in.width\))",
        r"\1 <= \2",
        f"out of bounds of every tensor|{WRONG}",
    ),
    "halo one row too low": Mutant(
        KERNEL, r"in\.height - top\b", "in.height - top + 1", "out of bounds of every tensor"
    ),
    "16-byte copies whatever the alignment": Mutant(
        KERNEL, r"if \(aligned\)", "if (true)", "misaligned access", pixel=25
    ),
    "reads beyond the channels": Mutant(
        KERNEL,
        r"channel \+ c < channels \?",
        "true ?",
        "out of bounds of every tensor",
        channels=13,
    ),
    "a tap too far": Mutant(
        KERNEL, r"return i - o \* Stride;", "return i - o * Stride - (i > 7);", WRONG
    ),
    "rectangles of the wrong size in shared memory": Mutant(
        LAUNCH,
        r"plane\.rows = static_cast<int>\(y\.size\);",
        "plane.rows = static_cast<int>(y.size) + 1;",
        "out of bounds of shared memory",
    ),
}


def outcome(csrc: Path, *, channels: int, pixel: int, stages: int) -> str:
    """Runs the kernel built from `csrc`: an empty string, or what was wrong."""
    sources = [build.HERE / "mutants" / "depthwise.cu", csrc / "cuda" / "depthwise.cu"]
    emulation = Emulation(build.library("mutant", sources, csrc=csrc))
    run = emulation.library.run_depthwise
    run.restype = ctypes.c_char_p
    height, width = 13, 17
    image = torch.randn(height, width, pixel)
    weight, bias = torch.randn(channels, 1, 3, 3), torch.randn(channels)
    x, packed = image[..., :channels], prepack(weight, bias)
    want = F.conv2d(
        x.permute(2, 0, 1)[None].double(),
        weight.double(),
        bias.double(),
        padding=1,
        groups=channels,
    )
    # Two rectangles of 4 x 28 pixels, 16 channels: enough to overlap copies and use in one block.
    launch = Launch(True, 2, 7, down=2, across=4, words=16, stages=stages)
    numbers = (ctypes.c_int64 * len(launch.as_ints()))(*launch.as_ints())
    for seed in range(2):
        out = torch.empty(1, height, width, channels)
        tensors = [ctypes.c_void_p(t.data_ptr()) for t in (image, packed, out)]
        with emulation.seed(seed):
            message = run(*tensors, channels, height, width, pixel, numbers, len(numbers))
        if message:
            return message.decode()
        if not torch.allclose(out.permute(0, 3, 1, 2).double(), want, rtol=1e-5, atol=1e-5):
            return WRONG
    return ""


@pytest.mark.parametrize("stages", [1, 2])
@pytest.mark.parametrize(("channels", "pixel"), [(20, 24), (20, 25), (13, 24)])
def test_without_a_defect_nothing_is_found(channels: int, pixel: int, stages: int) -> None:
    assert outcome(build.CSRC, channels=channels, pixel=pixel, stages=stages) == ""


@pytest.mark.parametrize("name", MUTANTS)
def test_defect_is_caught(name: str, tmp_path: Path) -> None:
    mutant = MUTANTS[name]
    csrc = tmp_path / "csrc"
    for folder in ("common", "cuda"):
        shutil.copytree(build.CSRC / folder, csrc / folder)
    source = csrc / mutant.file
    text, places = re.subn(mutant.old, mutant.new, source.read_text())
    assert places == 1, f"the defect {name!r} has {places} places in {mutant.file} now"
    source.write_text(text)
    message = outcome(csrc, channels=mutant.channels, pixel=mutant.pixel, stages=mutant.stages)
    with pytest.raises(RuntimeError, match=mutant.caught):
        raise RuntimeError(message)
