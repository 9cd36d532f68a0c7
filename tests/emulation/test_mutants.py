"""Defects planted in the kernels are caught: by the emulator, or by the numbers."""

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
from cvfast.launch.inverted_residual.cuda import Launch as BlockLaunch
from cvfast.ops.depthwise import prepack
from cvfast.ops.inverted_residual import reference as block_reference
from cvfast.ops.pointwise import prepack_gpu

from . import Emulation, build

pytestmark = pytest.mark.skipif(build.compiler() is None, reason="needs g++ or $CXX")

KERNEL = "cuda/depthwise_kernel.cuh"
LAUNCH = "cuda/depthwise_launch.cuh"
BLOCK_KERNEL = "cuda/inverted_residual_kernel.cuh"
BLOCK_LAUNCH = "cuda/inverted_residual_launch.cuh"
TILE = "cuda/tile.cuh"
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


def planted(mutant: Mutant, folder: Path) -> Path:
    """A copy of csrc with the defect, in `folder`."""
    csrc = folder / "csrc"
    for name in ("common", "cuda"):
        shutil.copytree(build.CSRC / name, csrc / name)
    source = csrc / mutant.file
    text, places = re.subn(mutant.old, mutant.new, source.read_text())
    assert places == 1, f"{mutant.old!r} has {places} places in {mutant.file} now"
    source.write_text(text)
    return csrc


@pytest.mark.parametrize("name", MUTANTS)
def test_defect_is_caught(name: str, tmp_path: Path) -> None:
    mutant = MUTANTS[name]
    message = outcome(
        planted(mutant, tmp_path),
        channels=mutant.channels,
        pixel=mutant.pixel,
        stages=mutant.stages,
    )
    with pytest.raises(RuntimeError, match=mutant.caught):
        raise RuntimeError(message)


UNORDERED = "shared-memory race|cp.async data not waited for|uninitialised shared memory"

BLOCK_MUTANTS = {
    "no barrier after what a block prepares": Mutant(
        BLOCK_KERNEL, r"(prepare\(\);\s*)__syncthreads\(\);", r"\1", UNORDERED
    ),
    "no barrier before a chunk": Mutant(
        BLOCK_KERNEL, r"(cp_async_wait<0>\(\);\s*)__syncthreads\(\);", r"\1", UNORDERED
    ),
    "no barrier before the depthwise convolution": Mutant(
        BLOCK_KERNEL, r"(expand\(chunk\);\s*)__syncthreads\(\);", r"\1", UNORDERED
    ),
    "no wait for the weights": Mutant(
        BLOCK_KERNEL, r"cp_async_wait<0>", "cp_async_wait<1>", "cp.async data not waited for"
    ),
    "weights copied before the last were used up": Mutant(
        BLOCK_KERNEL,
        r"(__syncthreads\(\);\s*)(prefetch_used\(chunk\);)",
        r"\2 \1",
        UNORDERED,
    ),
    "one set of depthwise weights": Mutant(
        BLOCK_KERNEL, r"chunk % 2 \* kPanels", "0 * kPanels", UNORDERED
    ),
    "no barrier between a warp's fragments": Mutant(
        BLOCK_KERNEL, r"__syncwarp\(\);(\s*store_sums)", r"\1", "shared-memory race"
    ),
    "what lies outside is not cleared": Mutant(
        BLOCK_KERNEL, r"if \(!covered\)", "if (false)", "uninitialised shared memory"
    ),
    "the last rows are not cleared": Mutant(
        BLOCK_KERNEL, r"clear_last\(args\.shared\.filtered[^;]*;", "", "uninitialised shared memory"
    ),
    "pixels outside are expanded": Mutant(
        BLOCK_KERNEL,
        r"skip_columns = max\(0, -in_left\)",
        "skip_columns = 0",
        "out of bounds of every tensor",
    ),
    "the halo of the last tile is wider than the image": Mutant(
        BLOCK_KERNEL, r"args\.x\.width - in_left\)", "args.x.width - in_left + 1)", "out of bounds"
    ),
    "all outputs of a strip are stored": Mutant(
        BLOCK_KERNEL, r"p\.x \+ o < columns", "true", f"out of bounds|{UNORDERED}|{WRONG}"
    ),
    "the tap after the next": Mutant(
        BLOCK_KERNEL, r"= j - o \* Traits::kStride", "= j - o * Traits::kStride - (j > 4)", WRONG
    ),
    "16-byte copies whatever the alignment": Mutant(
        BLOCK_LAUNCH, r"whole\(args\.x, args\.channels, 16\)", "true", "misaligned access", pixel=25
    ),
    "reads beyond the channels": Mutant(
        TILE,
        r"c < channels \? source",
        "true ? source",
        "out of bounds of every tensor",
        channels=13,
    ),
    "too little shared memory for hidden": Mutant(
        "cuda/inverted_residual.cu",
        r"matrix\(l\.images \* rectangle_rows \* rectangle_columns\(s, l\), kChunk\)",
        "matrix(8, kChunk)",
        f"out of bounds of shared memory|{UNORDERED}|{WRONG}",
    ),
}


def block_outcome(csrc: Path, *, channels: int, pixel: int) -> str:
    """Runs the inverted residual built from `csrc`: an empty string, or what was wrong."""
    sources = [
        build.HERE / "mutants" / "inverted_residual.cu",
        csrc / "cuda" / "inverted_residual.cu",
    ]
    emulation = Emulation(build.library("mutant_block", sources, csrc=csrc))
    run = emulation.library.run_inverted_residual
    run.restype = ctypes.c_char_p
    height, width, hidden, out_channels = 9, 11, 72, 24
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).half()

    image = draw(height, width, pixel)
    expand, depthwise = draw(hidden, channels, 1, 1) / 4, draw(hidden, 1, 3, 3) / 3
    project = draw(out_channels, hidden, 1, 1) / 8
    biases = [draw(size) for size in (hidden, hidden, out_channels)]
    x = image[..., :channels].permute(2, 0, 1)[None].double()
    want = block_reference(
        x, expand.double(), biases[0].double(), depthwise.double(), biases[1].double(),
        project.double(), biases[2].double(), None, (1, 1), (1, 1), "relu6", "relu6", "none",
    )  # fmt: skip
    packed = (
        *prepack_gpu(expand, biases[0], torch.float16),
        prepack(depthwise, biases[1]),
        *prepack_gpu(project, biases[2], torch.float16),
    )
    # Tiles that overhang, three chunks of hidden channels, and two warps that share the sums.
    launch = BlockLaunch(4, 7, 1, down=2, across=1, width=2)
    numbers = (ctypes.c_int64 * len(launch.as_ints()))(*launch.as_ints())
    for seed in range(2):
        out = torch.empty(1, height, width, out_channels, dtype=torch.float16)
        tensors = [ctypes.c_void_p(t.data_ptr()) for t in (image, *packed, out)]
        sizes = (channels, hidden, out_channels, height, width, pixel)
        with emulation.seed(seed):
            message = run(*tensors, *sizes, numbers, len(numbers))
        if message:
            return message.decode()
        if not torch.allclose(out.permute(0, 3, 1, 2).double(), want, rtol=2e-2, atol=2e-2):
            return WRONG
    return ""


@pytest.mark.parametrize(("channels", "pixel"), [(24, 24), (24, 25), (13, 24)])
def test_without_a_defect_nothing_is_found_in_a_block(channels: int, pixel: int) -> None:
    assert block_outcome(build.CSRC, channels=channels, pixel=pixel) == ""


@pytest.mark.parametrize("name", BLOCK_MUTANTS)
def test_defect_of_a_block_is_caught(name: str, tmp_path: Path) -> None:
    mutant = BLOCK_MUTANTS[name]
    message = block_outcome(planted(mutant, tmp_path), channels=mutant.channels, pixel=mutant.pixel)
    with pytest.raises(RuntimeError, match=mutant.caught):
        raise RuntimeError(message)
