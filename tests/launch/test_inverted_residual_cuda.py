"""Launch parameters of the inverted residual's CUDA kernels, and the kernels at all of them."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from cvfast import backends, extension
from cvfast.launch.inverted_residual import Problem, cuda
from cvfast.launch.inverted_residual.cuda import Launch
from cvfast.ops import inverted_residual as op
from cvfast.perf import devices
from cvfast.testing import assert_close_to_float64, guarded, image

CSRC = Path(__file__).parents[2] / "csrc" / "cuda"
SMALLEST = devices.find("RTX 4090")  # in shared memory
DEVICES = [devices.find(name) for name in ("A100", "RTX 4090", "H200", "B200", "RTX 5090")]
KERNELS = [(3, 1), (3, 2), (5, 1), (5, 2)]
DTYPES = [torch.float16, torch.bfloat16]

pytestmark = pytest.mark.filterwarnings("ignore:TF32 acceleration on top of oneDNN")


def problem(
    kernel: int = 3,
    stride: int = 1,
    *,
    batch: int = 2,
    channels: int = 24,
    hidden: int = 72,
    out: int = 40,
    size: tuple[int, int] = (14, 15),
    expands: bool = True,
    residual: bool = False,
    dtype: torch.dtype = torch.float16,
) -> Problem:
    return Problem(
        batch,
        channels,
        hidden if expands else channels,
        out,
        *size,
        kernel=(kernel, kernel),
        stride=(stride, stride),
        padding=(kernel // 2, kernel // 2),
        expands=expands,
        residual=residual,
        dtype=dtype,
    )


# Every block of MobileNet v2, and those that v3 and EfficientNet-Lite0 add: 5x5, the first half of
# squeeze-excite blocks (no output channels), and the largest.
NETWORKS = [
    problem(3, 1, channels=32, out=16, size=(112, 112), expands=False),
    problem(3, 2, channels=16, hidden=96, out=24, size=(112, 112)),
    problem(3, 1, channels=24, hidden=144, out=24, size=(56, 56), residual=True),
    problem(3, 2, channels=24, hidden=144, out=32, size=(56, 56)),
    problem(3, 1, channels=32, hidden=192, out=32, size=(28, 28), residual=True),
    problem(3, 2, channels=32, hidden=192, out=64, size=(28, 28)),
    problem(3, 1, channels=64, hidden=384, out=96, size=(14, 14)),
    problem(3, 1, channels=96, hidden=576, out=96, size=(14, 14), residual=True),
    problem(3, 2, channels=96, hidden=576, out=160, size=(14, 14)),
    problem(3, 1, channels=160, hidden=960, out=320, size=(7, 7)),
    problem(5, 2, channels=24, hidden=72, out=0, size=(56, 56)),
    problem(5, 1, channels=40, hidden=120, out=0, size=(28, 28)),
    problem(5, 1, channels=160, hidden=960, out=0, size=(7, 7)),
    problem(3, 2, channels=16, out=0, size=(112, 112), expands=False),
    problem(5, 2, channels=24, hidden=144, out=40, size=(56, 56)),
    problem(5, 1, channels=192, hidden=1152, out=192, size=(7, 7), residual=True),
    problem(3, 1, channels=192, hidden=1152, out=320, size=(7, 7)),
]


@pytest.fixture
def device(gpu_kernels: Callable[[str], AbstractContextManager[str]]) -> Iterator[str]:
    """Where the kernels run; their operators are loaded."""
    with gpu_kernels("cuda") as device:
        status = extension.load("cuda")
        assert status, str(status)
        yield device


def test_kernels_are_those_that_are_compiled() -> None:
    source = (CSRC / "inverted_residual_launch.cuh").read_text()
    for kernel, stride, width in itertools.product(cuda.KERNELS, cuda.STRIDES, cuda.REGISTERS):
        assert f"BlockTraits<{kernel}, {stride}, {width}>" in source
    counted = len(cuda.KERNELS) * len(cuda.STRIDES) * len(cuda.REGISTERS)
    assert source.count("BlockTraits<") == counted


def test_limits_are_those_of_the_source() -> None:
    kernel = (CSRC / "inverted_residual_kernel.cuh").read_text()
    checks = (CSRC / "inverted_residual.cu").read_text()
    assert f"kChunk = {cuda.CHUNK};" in kernel
    assert f"kBlockThreads = {cuda.MAX_THREADS};" in kernel
    assert f"kStrip = {cuda.STRIP};" in kernel
    assert f"kHeight = {cuda.HEIGHT};" in kernel
    assert "kMaxSide = std::numeric_limits<uint8_t>::max()" in checks
    assert cuda.MAX_SIDE == 255
    assert "kSizeLimit = int64_t{1} << 24;" in checks
    assert cuda.SIZE_LIMIT == 1 << 24


@pytest.mark.parametrize("target", DEVICES, ids=lambda d: d.architecture.name)
@pytest.mark.parametrize("batch", [1, 256])
def test_candidates_can_be_launched(target: devices.Device, batch: int) -> None:
    for p in (replace(p, batch=batch) for p in NETWORKS):
        found = cuda.candidates(p, "forward", target)
        assert found[0] == cuda.heuristic(p, "forward", target)
        assert len(set(found)) == len(found) <= 32
        for launch in found:
            cuda.validate(p, launch)
            cost = cuda.cost(p, launch, target)
            assert math.isfinite(cost.seconds)
            assert cost.held.blocks_per_sm >= 1
            assert cost.recompute >= 1 - 1e-9
            assert cuda.shared_bytes(p, launch) <= target.architecture.shared_per_block
            x, y, z = cuda.grid(p, launch)
            assert 1 <= x < 2**31
            assert 1 <= y <= cuda.MAX_SPLITS
            assert z == 1


@pytest.mark.parametrize("target", DEVICES, ids=lambda d: d.architecture.name)
def test_small_planes_fill_the_device(target: devices.Device) -> None:
    p = problem(channels=160, hidden=960, out=160, size=(7, 7), batch=1)
    x, y, _ = cuda.grid(p, cuda.heuristic(p, "forward", target))
    assert x * y > target.sms / 2
    assert y > 1, "at batch 1 a plane alone has too few tiles"
    many = cuda.heuristic(replace(p, batch=2048), "forward", target)
    assert many.splits == 1


def test_predictions_are_bounded_by_memory_and_by_arithmetic() -> None:
    for target in DEVICES:
        for p in (replace(p, batch=256) for p in NETWORKS):
            launch = cuda.heuristic(p, "forward", target)
            seconds = cuda.predict(p, launch, "forward", target)
            assert p.bytes() / target.dram_bandwidth < seconds
            assert seconds < 400 * p.bytes() / target.dram_bandwidth


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"dtype": torch.float32}, "takes float16 and bfloat16, not torch.float32"),
        ({"kernel": (7, 7)}, "compiled for 3x3 and 5x5"),
        ({"kernel": (3, 5)}, "compiled for 3x3 and 5x5"),
        ({"stride": (1, 2)}, "compiled for strides 1 and 2"),
        ({"stride": (3, 3)}, "compiled for strides 1 and 2"),
        ({"out_channels": 656}, "656 output channels are more than the 640"),
        ({"expands": False}, "the hidden channels are those of x"),
        ({"height": 1 << 25}, "beyond which 32 bits do not count"),
        ({"out_channels": 0, "width": 300}, "rows of 300 outputs"),
    ],
)
def test_what_is_not_compiled_has_a_reason(changes: dict[str, object], reason: str) -> None:
    p = replace(problem(), **changes)  # type: ignore[arg-type]
    assert reason in (cuda.unsupported(p) or "")
    with pytest.raises(ValueError, match=reason.split(",")[0]):
        cuda.heuristic(p, "forward", SMALLEST)
    with pytest.raises(ValueError, match=reason.split(",")[0]):
        cuda.validate(p, Launch(4, 4, 1, 2, 2, 2))


@pytest.mark.parametrize(
    ("launch", "reason"),
    [
        (Launch(0, 4, 1, 2, 2, 2), "expected counts of at least 1"),
        (Launch(4, 4, 1, 2, 2, 2, 4), "at most 3 splits"),
        (Launch(4, 4, 1, 4, 4, 2), "512 threads"),
        (Launch(4, 4, 1, 2, 2, 3), r"width=3, expected 0 without a projection, else one of \[2, 5"),
        (Launch(4, 4, 1, 2, 2, 0), "width=0"),
        (Launch(9, 8, 1, 2, 2, 2), "72 outputs of 40 channels"),
        (Launch(4, 4, 1, 4, 1, 2), "16 outputs of 40 channels"),
        (Launch(1, 256, 1, 2, 2, 2), "at most 255 input rows"),
    ],
)
def test_launches_are_checked(launch: Launch, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        cuda.validate(problem(), launch)
    with pytest.raises(ValueError, match="pass_='sideways'"):
        cuda.validate(problem(), Launch(4, 4, 1, 2, 2, 2), "sideways")


def test_means_need_whole_rows() -> None:
    with pytest.raises(ValueError, match="means of rows need tiles as wide as the image"):
        cuda.validate(problem(out=0), Launch(2, 8, 1, 4, 1, 0))


def test_nothing_fits_into_no_shared_memory() -> None:
    tiny = replace(SMALLEST, architecture=replace(SMALLEST.architecture, shared_per_block=4096))
    with pytest.raises(
        ValueError, match=r"no tile of 24-72-40 3x3 at 2x14x15.* fits into the 4096"
    ):
        cuda.heuristic(problem(), "forward", tiny)


@pytest.mark.gpu_kernels
def test_shared_memory_is_what_the_kernels_take(device: str) -> None:
    for p in NETWORKS:
        for launch in cuda.candidates(p, "forward", SMALLEST):
            counted = torch.ops.cvfast.inverted_residual_cuda_shared_bytes(
                p.channels, p.hidden, p.out_channels, (p.height, p.width), p.kernel[0],
                p.stride[0], p.expands, launch.as_ints(),
            )  # fmt: skip
            assert counted == cuda.shared_bytes(p, launch)


@dataclass(frozen=True)
class Block:
    """Inputs of one call, and what it computes."""

    problem: Problem
    activations: tuple[str, str, str] = ("relu6", "relu6", "none")
    kind: str = "normal"

    def tensors(self, device: str) -> list[Tensor | None]:
        """x, expand, its bias, depthwise, its bias, project, its bias, residual."""
        p = self.problem

        def draw(seed: int, *shape: int) -> Tensor:
            fan_in = math.prod(shape[1:])
            values = image((1, shape[0], 1, fan_in), torch.float32, seed=seed)
            weight = values[0, :, 0].reshape(shape) / fan_in**0.5
            return weight.to(p.dtype).to(device)

        size = (p.batch, p.channels, p.height, p.width)
        found: list[Tensor | None] = [image(size, p.dtype, kind=self.kind).to(device)]
        for seed, wanted, shape in (
            (1, p.expands, (p.hidden, p.channels, 1, 1)),
            (3, True, (p.hidden, 1, *p.kernel)),
            (5, p.projects, (p.out_channels, p.hidden, 1, 1)),
        ):
            found.append(draw(seed, *shape) if wanted else None)
            found.append(draw(seed + 1, shape[0]) if wanted else None)
        out_size = (p.batch, p.out_channels, p.out_height, p.out_width)
        found.append(image(out_size, p.dtype, seed=7).to(device) if p.residual else None)
        return found

    def reference(self, x: Tensor, *weights: Tensor | None) -> Tensor:
        """The output; the first half's, with its means beside it."""
        expand, expand_bias, depthwise, depthwise_bias, project, project_bias, residual = weights
        assert depthwise is not None
        p = self.problem
        first, second, last = self.activations
        if expand is not None:
            x = op.pointwise_reference(x, expand, expand_bias, activation=first)
        top, left, bottom, right = (*p.padding, *p.padding)[:4]
        padded = F.pad(x, (left, right, top, bottom))
        # Through oneDNN some 16-bit depthwise convolutions are wrong (torch 2.13).
        with torch.backends.mkldnn.flags(enabled=False):
            d, means = op.squeeze_reference(
                padded, None, None, depthwise, depthwise_bias, p.stride, (0, 0), "none", second
            )
        if project is None:
            return torch.cat([d, means], 3)
        return op.pointwise_reference(d, project, project_bias, residual=residual, activation=last)

    def run(
        self, launch: Launch, tensors: list[Tensor | None], out: Tensor | None = None
    ) -> Tensor:
        """The kernel's output; the first half's, with its means beside it."""
        p = self.problem
        x, expand, expand_bias, depthwise, depthwise_bias, project, project_bias, residual = tensors
        assert x is not None
        assert depthwise is not None
        geometry = (p.hidden, p.kernel, p.stride, p.padding, *self.activations[:2])
        packed = op._gpu_packed(x, expand, expand_bias, depthwise, depthwise_bias)
        if out is None:
            channels = p.out_channels or p.hidden
            out = op._empty(x, channels, (p.out_height, p.out_width))
        if project is None:
            means = op._empty(x, p.hidden, (p.out_height, 1))
            torch.ops.cvfast.inverted_residual_squeeze_cuda_launch(
                x, *packed, *geometry, launch.as_ints(), out=out, row_means=means
            )
            return torch.cat([out, means], 3)
        matrix = op.prepack_gpu(project, project_bias, x.dtype)
        torch.ops.cvfast.inverted_residual_cuda_launch(
            x, *packed, *matrix, residual, *geometry, self.activations[2], launch.as_ints(), out=out
        )
        return out

    def check(self, launch: Launch, device: str, sliced: bool = False) -> None:
        """Runs it, perhaps between channel slices, against float64."""
        cuda.validate(self.problem, launch)
        tensors = self.tensors(device)
        plain = list(tensors)
        around = None
        if sliced:
            for i in (0, 7):
                given = tensors[i]
                tensors[i] = None if given is None else guarded(given).tensor
            p = self.problem
            size = (p.batch, p.out_channels or p.hidden, p.out_height, p.out_width)
            around = guarded(torch.zeros(size, dtype=p.dtype, device=device), canary=12.0)
        result = self.run(launch, tensors, None if around is None else around.tensor)
        assert_close_to_float64(result, self.reference, *plain)
        if around is not None:
            around.assert_untouched()


# Kinds of blocks, scaled down. Launches cut planes unevenly, span images, split hidden channels,
# and leave warps without work.
BLOCKS = {
    "one tile": (problem(size=(7, 7), batch=1, out=32), Launch(7, 7, 1, 2, 1, 2)),
    "tiles that overhang": (problem(size=(9, 11)), Launch(4, 8, 1, 1, 2, 2)),
    "residual": (problem(out=24, size=(8, 6), residual=True), Launch(3, 5, 1, 1, 1, 2)),
    "several images": (problem(size=(5, 4), batch=5), Launch(5, 4, 3, 2, 2, 5)),
    "splits": (problem(size=(6, 6), hidden=150, residual=True), Launch(6, 6, 1, 2, 2, 2, 5)),
    "uneven splits": (problem(size=(6, 6), hidden=136), Launch(3, 6, 1, 2, 2, 2, 2)),
    "wide output": (problem(size=(4, 4), out=176, hidden=40), Launch(4, 4, 2, 1, 4, 5)),
    "no expansion": (problem(size=(9, 9), channels=72, expands=False), Launch(4, 9, 1, 2, 2, 5)),
    "no expansion, split": (
        problem(size=(7, 7), channels=72, expands=False),
        Launch(4, 7, 1, 4, 2, 2, 3),
    ),
    "first half": (problem(size=(9, 7), out=0), Launch(4, 7, 1, 2, 1, 0)),
    "first half, split": (problem(size=(4, 5), out=0, batch=3), Launch(4, 5, 2, 4, 1, 0, 3)),
    "first half, no expansion": (
        problem(size=(6, 5), out=0, channels=40, expands=False),
        Launch(5, 5, 1, 2, 1, 0),
    ),
    "one pixel": (problem(size=(1, 1), batch=3), Launch(1, 1, 2, 1, 2, 2)),
    "one row": (problem(size=(1, 13)), Launch(1, 6, 1, 1, 2, 2)),
    "one column": (problem(size=(13, 1)), Launch(5, 1, 1, 1, 2, 2)),
    "one channel": (problem(channels=1, hidden=1, out=1, size=(5, 5)), Launch(5, 5, 1, 1, 1, 2)),
}


@pytest.mark.gpu_kernels
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("kernel", "stride"), KERNELS)
@pytest.mark.parametrize("name", BLOCKS)
def test_every_kernel_agrees_with_float64(
    name: str, kernel: int, stride: int, dtype: torch.dtype, device: str
) -> None:
    p, launch = BLOCKS[name]
    p = replace(
        p,
        kernel=(kernel, kernel),
        stride=(stride, stride),
        padding=(kernel // 2, kernel // 2),
        dtype=dtype,
    )
    if not p.projects:
        launch = replace(launch, columns=max(launch.columns, p.out_width))
    Block(p).check(launch, device)
    odd = replace(p, channels=p.channels - (p.channels > 1))
    odd = replace(odd, hidden=odd.hidden if odd.expands else odd.channels)
    odd = replace(odd, out_channels=max(p.out_channels - 3, min(p.out_channels, 1)))
    chunks = -(-odd.hidden // cuda.CHUNK)
    Block(odd).check(replace(launch, splits=min(launch.splits, chunks)), device, sliced=True)


@pytest.mark.gpu_kernels
@pytest.mark.parametrize("p", NETWORKS, ids=Problem.describe)
def test_the_blocks_of_networks_scaled_down(p: Problem, device: str) -> None:
    def less(n: int) -> int:
        return max(1, n // 4)

    small = replace(
        p,
        channels=less(p.channels),
        hidden=less(p.hidden),
        out_channels=less(p.out_channels) if p.projects else 0,
        height=min(p.height, 14) // 2 * 2 + p.height % 2,
        width=min(p.width, 14) // 2 * 2 + p.width % 2,
    )
    for target in (SMALLEST, devices.find("H200")):
        Block(small).check(cuda.heuristic(small, "forward", target), device)


@pytest.mark.gpu_kernels
@pytest.mark.parametrize("padding", [(0, 0), (0, 1, 2, 0), (3, 0, 0, 3), (0, 0, 1, 1)])
@pytest.mark.parametrize("stride", [1, 2])
def test_each_side_is_padded_by_itself(padding: tuple[int, ...], stride: int, device: str) -> None:
    # A bias without an input is no zero: what is padded is the expanded tensor.
    p = replace(problem(3, stride, size=(6, 7), out=16), padding=padding)
    Block(p).check(Launch(3, 4, 1, 1, 1, 2), device)


@pytest.mark.gpu_kernels
@pytest.mark.parametrize(
    "activations",
    [
        ("none", "none", "none"),
        ("relu", "hardswish", "relu6"),
        ("hardswish", "relu", "hardswish"),
        ("relu6", "none", "relu"),
    ],
)
def test_activations(activations: tuple[str, str, str], device: str) -> None:
    p = problem(size=(6, 5), out=24, residual=True)
    Block(p, activations).check(Launch(3, 5, 1, 1, 1, 2), device)
    Block(p, activations).check(Launch(3, 5, 1, 1, 1, 2, 3), device)


@pytest.mark.gpu_kernels
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nan_passes_where_pytorch_lets_it_pass(dtype: torch.dtype, device: str) -> None:
    p = problem(size=(9, 9), out=24, dtype=dtype, batch=1)
    block = Block(p, ("relu6", "relu", "none"))
    tensors = block.tensors(device)
    assert tensors[0] is not None
    tensors[0][0, 3, 4, 4] = math.nan
    result = block.run(Launch(5, 5, 1, 2, 1, 2), tensors)
    wrong = result.isnan().any(1)[0]
    assert wrong[3:6, 3:6].all()
    assert wrong.sum() == 9


@pytest.mark.gpu_kernels
def test_splits_and_tiles_change_the_order_of_sums_only(device: str) -> None:
    block = Block(problem(size=(8, 8), hidden=96, out=24))
    tensors = block.tensors(device)
    first = block.run(Launch(8, 8, 1, 2, 1, 2), tensors)
    # Tiles change no sum at all; splits, their order, which is the same each time.
    assert torch.equal(first, block.run(Launch(3, 5, 1, 1, 1, 2), tensors))
    assert torch.equal(first, block.run(Launch(8, 8, 2, 4, 2, 5), tensors))
    split = [block.run(Launch(8, 8, 1, 2, 1, 2, 3), tensors) for _ in range(2)]
    assert torch.equal(*split)


@pytest.mark.gpu_kernels
def test_no_image_is_no_work(device: str) -> None:
    block = Block(problem(batch=0, size=(5, 5)))
    assert block.run(Launch(5, 5, 1, 1, 2, 2), block.tensors(device)).shape == (0, 40, 5, 5)


@pytest.mark.gpu_kernels
@pytest.mark.parametrize(
    ("launch", "message"),
    [
        ([4, 4, 1, 2, 2, 2], "launch has 6 numbers, expected 7"),
        ([4, 4, 1, 2, 2, 2, -1], "launch holds -1"),
        ([4, 0, 1, 2, 2, 2, 1], "every count must be at least 1"),
        ([4, 4, 1, 4, 4, 2, 1], "at most 256 threads"),
        ([4, 4, 1, 2, 2, 3, 1], "no inverted_residual kernel is compiled for 3x3, stride 1"),
        ([4, 4, 1, 2, 2, 0, 1], "a width is of a projection"),
        ([9, 8, 1, 2, 2, 2, 1], "the warps sum 64 outputs of 64 channels"),
        ([4, 4, 1, 4, 1, 2, 1], "the warps sum 128 outputs of 32 channels"),
        ([4, 4, 1, 2, 2, 2, 4], "more splits than the 3 chunks"),
        ([1, 256, 1, 8, 1, 5, 1], "at most 255 input rows"),
    ],
)
def test_kernels_refuse_what_they_are_not_compiled_for(
    launch: list[int], message: str, device: str
) -> None:
    block = Block(problem())
    with pytest.raises(RuntimeError, match=message):
        block.run(Launch(*launch) if len(launch) == 7 else _Numbers(launch), block.tensors(device))


class _Numbers(Launch):
    """A launch of another version: other integers."""

    def __init__(self, numbers: list[int]) -> None:
        object.__setattr__(self, "numbers", numbers)

    def as_ints(self) -> list[int]:
        return self.numbers  # type: ignore[attr-defined]


@pytest.mark.gpu_kernels
def test_operands_that_do_not_fit_are_named(device: str) -> None:
    block = Block(problem())
    launch = Launch(4, 4, 1, 2, 2, 2)
    x, *rest = block.tensors(device)
    assert x is not None
    with pytest.raises(RuntimeError, match="float32 is served by backend triton"):
        block.run(launch, [x.float(), *(None if t is None else t.float() for t in rest)])
    for out, message in (
        (torch.zeros(2, 40, 14, 14), r"out must be \[2, 40, 14, 15\]"),
        (torch.zeros(2, 40, 14, 15), "out must be channels-last"),
        (image((2, 40, 14, 15), torch.float32), "out must have the dtype"),
    ):
        given = out if "dtype" in message else out.half()
        if "channels-last" not in message:
            given = given.contiguous(memory_format=torch.channels_last)
        with pytest.raises(RuntimeError, match=message):
            block.run(launch, [x, *rest], given.to(device))
    wrong = Block(problem(channels=25)).tensors(device)
    with pytest.raises(RuntimeError, match=r"expand must be \[24, 80\]"):
        block.run(launch, [x, *wrong[1:]])


@pytest.mark.gpu_kernels
@pytest.mark.filterwarnings("ignore:no tuned launch parameters")
@pytest.mark.parametrize("squeeze", [False, True])
def test_operators_run_on_backend_cuda(squeeze: bool, device: str) -> None:
    block = Block(
        problem(size=(7, 6), out=0 if squeeze else 40), ("hardswish", "hardswish", "none")
    )
    tensors = block.tensors(device)
    x, *weights, _ = tensors
    options = {"expand_activation": "hardswish", "depthwise_activation": "hardswish"}
    if squeeze:
        result = torch.cat(
            op.inverted_residual_squeeze(x, *weights[:4], **options, backend="cuda"), 3
        )
    else:
        result = op.inverted_residual(x, *weights, **options, backend="cuda")
    assert_close_to_float64(result, block.reference, *tensors)
    packed = op._gpu_packed(x, *weights[:4])
    geometry = ((3, 3), (1, 1), (1, 1), "hardswish", "hardswish")
    if squeeze:
        operator = torch.ops.cvfast.inverted_residual_squeeze_cuda
        torch.library.opcheck(operator.default, (x, *packed, 72, *geometry))
    else:
        operator = torch.ops.cvfast.inverted_residual_cuda
        matrix = op.prepack_gpu(weights[4], weights[5], x.dtype)
        torch.library.opcheck(
            operator.default, (x, *packed, *matrix, None, 72, 40, *geometry, "none")
        )


@pytest.mark.gpu_kernels
def test_what_the_kernel_does_not_take_is_refused_with_the_reason(device: str) -> None:
    x, *weights, _ = Block(problem(7, size=(9, 9))).tensors(device)
    with pytest.raises(backends.Unsupported, match=r"compiled for 3x3 and 5x5.*\[shape\]"):
        op.inverted_residual(x, *weights, padding=3, backend="cuda")
    x, *weights, _ = Block(problem(size=(9, 9))).tensors(device)
    with pytest.raises(backends.Unsupported, match=r"does not fuse hardsigmoid \[activation\]"):
        op.inverted_residual(x, *weights, activation="hardsigmoid", backend="cuda")


@pytest.mark.gpu_kernels
@pytest.mark.parametrize("p", [NETWORKS[2], NETWORKS[11], NETWORKS[0]], ids=Problem.describe)
def test_examples_agree_with_their_definition(p: Problem, device: str) -> None:
    p = replace(p, height=6, width=8, padding=(*p.padding, *p.padding))
    example = op.example(p, "relu6", device=device)
    launch = cuda.heuristic(p, "forward", SMALLEST)
    for got, want, exact in zip(
        example.run("cuda", launch), example.reference(p.dtype), example.reference(torch.float64),
        strict=True,
    ):  # fmt: skip
        assert_close_to_float64(got, lambda t: t, exact.to(p.dtype))
        assert got.shape == want.shape
