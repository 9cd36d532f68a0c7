"""Launch parameters of the CUDA depthwise kernels, and the kernels at all of them."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from cvfast import extension
from cvfast.launch.depthwise import PASSES, Problem, cuda
from cvfast.ops.depthwise import apply_activation, prepack, unpack
from cvfast.perf import devices
from cvfast.testing import assert_close_to_float64, guarded, image

CSRC = Path(__file__).parents[2] / "csrc" / "cuda"
SMALLEST = devices.find("RTX 4090")  # in shared memory
DEVICES = [devices.find(name) for name in ("A100", "RTX 4090", "H200", "B200", "RTX 5090")]
KERNELS = [(3, 1), (3, 2), (5, 1), (5, 2), (7, 1), (7, 2)]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def problem(
    kernel: int = 3,
    stride: int = 1,
    *,
    batch: int = 2,
    channels: int = 24,
    size: tuple[int, int] = (14, 15),
    dtype: torch.dtype = torch.float16,
) -> Problem:
    return Problem(
        batch,
        channels,
        *size,
        kernel=(kernel, kernel),
        stride=(stride, stride),
        padding=(kernel // 2, kernel // 2),
        dtype=dtype,
    )


@pytest.fixture
def device(gpu_kernels: Callable[[str], AbstractContextManager[str]]) -> Iterator[str]:
    """Where the kernels run; their operators are loaded."""
    with gpu_kernels("cuda") as device:
        status = extension.load("cuda")
        assert status, str(status)
        yield device


def test_tiles_are_those_that_are_compiled() -> None:
    source = (CSRC / "depthwise_launch.cuh").read_text()
    for pass_, tiles in cuda.TILES.items():
        for (kernel, stride), shapes in tiles.items():
            transposed = pass_ == "backward_input" and stride > 1
            for rows, columns in shapes:
                name = "TransposedTile" if transposed else "Tile"
                assert f"{name}<{kernel}, {stride}, {rows}, {columns}>" in source
    counted = sum(len(t) for tiles in cuda.TILES.values() for t in tiles.values())
    # The forward kernels of stride 1 compute the gradient by the input too.
    shared = sum(len(t) for key, t in cuda.TILES["forward"].items() if key[1] == 1)
    ladders = source[source.index("using ForwardTiles") : source.index("inline float ceiling_of")]
    assert ladders.count("Tile<") == counted - shared


def test_limits_are_those_of_the_source() -> None:
    kernel, launch = ((CSRC / f"depthwise_{n}.cuh").read_text() for n in ("kernel", "launch"))
    assert f"kTileThreads = {cuda.MAX_THREADS};" in kernel
    assert f"kGeneralChannels = {cuda.GENERAL_CHANNELS}, " in kernel
    assert f"kGeneralLines = {cuda.GENERAL_LINES};" in kernel
    assert f"kMaxGridY = {cuda.MAX_WORKERS};" in launch
    assert "kTileLimit = int64_t{1} << 24;" in launch
    assert cuda.TILE_LIMIT == 1 << 24


@pytest.mark.parametrize("pass_", PASSES)
@pytest.mark.parametrize("target", DEVICES[1:3], ids=lambda d: d.architecture.name)
@pytest.mark.parametrize(("kernel", "stride"), KERNELS)
def test_candidates_can_be_launched(
    target: devices.Device, kernel: int, stride: int, pass_: str
) -> None:
    for channels, size, dtype in itertools.product((3, 144), (7, 56), DTYPES[:2]):
        p = problem(kernel, stride, channels=channels, size=(size, size), dtype=dtype)
        found = cuda.candidates(p, pass_, target)
        assert found[0] == cuda.heuristic(p, pass_, target)
        assert len(set(found)) == len(found) <= 32
        assert all(launch.tiled == cuda.tileable(p, pass_) for launch in found)
        for launch in found:
            cuda.validate(p, launch, pass_)
            assert math.isfinite(cuda.predict(p, launch, pass_, target))
            assert cuda.shared_bytes(p, launch, pass_) <= target.architecture.shared_per_block
            occupied = devices.occupancy(
                target.architecture,
                cuda.threads(launch),
                cuda.registers(p, launch, pass_),
                cuda.shared_bytes(p, launch, pass_),
            )
            assert occupied.blocks_per_sm >= 1
            x, y, z = cuda.grid(p, launch, pass_)
            assert 1 <= x < 2**31
            assert 1 <= y <= 65535
            assert z == 1


@pytest.mark.parametrize("pass_", PASSES)
@pytest.mark.parametrize(
    "change",
    [
        {"multiplier": 2},
        {"dilation": (2, 2)},
        {"kernel": (3, 5)},
        {"stride": (1, 2)},
        {"kernel": (4, 4)},
        {"batch": 0},
        {"channels": 2**25},
    ],
    ids=str,
)
def test_everything_else_runs_on_the_general_kernels(change: dict, pass_: str) -> None:
    p = replace(problem(), **change)
    (launch,) = cuda.candidates(p, pass_, SMALLEST)
    assert not launch.tiled
    assert cuda.shared_bytes(p, launch, pass_) == (1024 if pass_ == "backward_weight" else 0)
    cuda.validate(p, launch, pass_)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"workers": 0}, "0 workers"),
        ({"workers": 65536}, "65536 workers"),
        ({"thread_columns": 5}, r"\(2, 5\) outputs a thread"),
        ({"words": 6}, "words=6"),
        ({"down": 0}, "0x2 threads"),
        ({"across": 64}, "expected 1 to 256"),
        ({"stages": 3}, "stages=3"),
    ],
)
def test_validate_names_what_does_not_fit(change: dict, message: str) -> None:
    good = cuda.Launch(True, 2, 7, 4, 2, 8, 2, 100)
    cuda.validate(problem(), good, "forward")
    with pytest.raises(ValueError, match=message):
        cuda.validate(problem(), replace(good, **change), "forward")
    with pytest.raises(ValueError, match="no tile kernel"):
        cuda.validate(replace(problem(), multiplier=2), good, "forward")
    with pytest.raises(ValueError, match="pass_='sideways'"):
        cuda.validate(problem(), good, "sideways")


@pytest.mark.gpu_kernels
@pytest.mark.parametrize("pass_", PASSES)
def test_shared_memory_is_what_the_kernels_take(pass_: str, device: str) -> None:
    for (kernel, stride), dtype in itertools.product(KERNELS, DTYPES):
        p = problem(kernel, stride, channels=40, dtype=dtype)
        for launch in cuda.candidates(p, pass_, SMALLEST):
            if launch.tiled:
                counted = torch.ops.cvfast.depthwise_cuda_shared_bytes(
                    kernel, stride, dtype.itemsize, pass_, launch.as_ints()
                )
                assert counted == cuda.shared_bytes(p, launch, pass_)


def test_predictions_are_bounded_by_memory() -> None:
    for device in DEVICES:
        p = problem(batch=256, channels=144, size=(56, 56))
        launch = cuda.heuristic(p, "forward", device)
        moved = 2 * p.batch * p.channels * (56 * 56) * 2
        seconds = cuda.predict(p, launch, "forward", device)
        assert 1 < seconds * device.dram_bandwidth / moved < 2


def all_launches(p: Problem, pass_: str) -> list[cuda.Launch]:
    """One of each compiled kernel and number of stages, and the general kernel."""
    found = {}
    for launch in cuda.candidates(p, pass_, SMALLEST, limit=10**6):
        key = (launch.tiled, launch.thread_rows, launch.thread_columns, launch.stages)
        found.setdefault(key, replace(launch, workers=min(launch.workers, 5)))
    return [*found.values(), cuda.Launch(tiled=False, workers=3)]


def forward(x: Tensor, weight: Tensor, bias: Tensor, p: Problem, activation: str) -> Tensor:
    y = F.conv2d(x, weight, bias, p.stride, p.padding, p.dilation, groups=p.channels)
    return apply_activation(y, activation)


@pytest.mark.gpu_kernels
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("channels", "sliced"), [(24, False), (24, True), (13, False)])
@pytest.mark.parametrize(("kernel", "stride"), KERNELS)
def test_every_kernel_agrees_with_float64(
    kernel: int,
    stride: int,
    channels: int,
    sliced: bool,
    dtype: torch.dtype,
    device: str,
) -> None:
    p = problem(kernel, stride, channels=channels, size=(13, 17), dtype=dtype)
    x = image((p.batch, channels, 13, 17), dtype).to(device)
    if sliced:
        x = guarded(x).tensor
    weight = torch.randn(channels, 1, kernel, kernel, device=device).to(dtype)
    bias = torch.randn(channels, device=device).to(dtype)
    packed = prepack(weight, bias)
    geometry = (p.kernel, p.stride, p.padding, p.dilation)
    for launch in all_launches(p, "forward"):
        y = torch.ops.cvfast.depthwise_cuda_launch(x, packed, *geometry, "relu6", launch.as_ints())
        assert_close_to_float64(y, lambda x, w, b: forward(x, w, b, p, "relu6"), x, weight, bias)

    grad = image(tuple(y.shape), dtype, seed=1).to(device)

    def gradients(grad: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
        masked = torch.ops.aten.hardtanh_backward(grad, y.to(grad.dtype), 0, 6)
        needs = [True, True, True]
        return torch.ops.aten.convolution_backward(
            masked, x, weight, [channels], p.stride, p.padding, p.dilation, False, [0, 0],
            channels, needs,
        )  # fmt: skip

    given = guarded(grad).tensor if sliced else grad
    for launch in all_launches(p, "backward_input"):
        grad_x = torch.ops.cvfast.depthwise_backward_input_cuda_launch(
            given, y, prepack(weight), x.shape[2:], *geometry, "relu6", launch.as_ints()
        )
        assert_close_to_float64(grad_x, lambda *t: gradients(*t)[0], grad, x, weight)
    for launch in all_launches(p, "backward_weight"):
        sums = torch.ops.cvfast.depthwise_backward_weight_cuda_launch(
            given, y, x, *geometry, "relu6", launch.as_ints()
        )
        grad_weight, grad_bias = (t.to(dtype) for t in unpack(sums, channels, p.kernel))
        assert_close_to_float64(grad_weight, lambda *t: gradients(*t)[1], grad, x, weight)
        assert_close_to_float64(grad_bias, lambda *t: gradients(*t)[2], grad, x, weight)
        again = torch.ops.cvfast.depthwise_backward_weight_cuda_launch(
            given, y, x, *geometry, "relu6", launch.as_ints()
        )
        assert torch.equal(sums, again)
        lanes = sums.permute(0, 1, 3, 2).flatten(0, 2)
        assert lanes[channels:].eq(0).all()


@pytest.mark.gpu_kernels
@pytest.mark.parametrize(
    ("launch", "message"),
    [
        ([1, 2, 7], "launch has 3 numbers, expected 8"),
        ([1, 2, 7, 4, 2, 8, 1, 0], "at least one worker"),
        ([1, 2, 7, 4, 2, 8, 1, -1], "-1, which is no count"),
        ([1, 3, 3, 4, 2, 8, 1, 1], "no depthwise kernel is compiled for 3x3, stride 1"),
        ([1, 2, 7, 4, 2, 6, 1, 1], "words must be a multiple of 4"),
        ([1, 2, 7, 16, 8, 8, 1, 1], "at most 256 threads"),
        ([1, 2, 7, 4, 2, 8, 3, 1], "stages must be 1 or 2"),
        ([1, 2, 7, 0, 2, 8, 1, 1], "every count must lie between 1 and 256"),
        ([1, 2, 7, 4, 2, 8, 1, 65536], "at most 65535 workers"),
    ],
)
def test_kernels_refuse_what_they_are_not_compiled_for(
    launch: list[int],
    message: str,
    device: str,
) -> None:
    x = image((1, 16, 8, 8)).to(device)
    packed = prepack(torch.ones(16, 1, 3, 3, device=device))
    with pytest.raises(RuntimeError, match=message):
        torch.ops.cvfast.depthwise_cuda_launch(
            x, packed, [3, 3], [1, 1], [1, 1], [1, 1], "none", launch
        )


@pytest.mark.gpu_kernels
def test_weight_gradient_skips_what_lies_outside(
    device: str,
) -> None:
    # The window over the lower right corner ends one row and column short of these infinities.
    p = problem(3, 2, batch=1, channels=8, size=(8, 8), dtype=torch.float32)
    p = replace(p, padding=(0, 0))
    x = image((1, 8, 8, 8)).to(device)
    x[..., -1, :] = math.inf
    x[..., -1] = math.inf
    grad = image((1, 8, 3, 3), seed=1).to(device)
    for launch in all_launches(p, "backward_weight"):
        sums = torch.ops.cvfast.depthwise_backward_weight_cuda_launch(
            grad, None, x, p.kernel, p.stride, p.padding, p.dilation, "none", launch.as_ints()
        )
        assert sums.isfinite().all()
