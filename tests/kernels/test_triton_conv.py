from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from cvfast import tolerance
from cvfast.backends import Unsupported
from cvfast.kernels import compiler
from cvfast.kernels import conv as kernels
from cvfast.launch.conv import GENERAL, Problem
from cvfast.launch.conv.triton import Launch, heuristic
from cvfast.ops import conv
from cvfast.ops.activation import Activation
from cvfast.perf import compiled, devices
from cvfast.testing import assert_close_to_float64, guarded, image, poisoned_memory

pytestmark = pytest.mark.gpu_kernels

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
TILE = Launch(16, 16, 16)
BASE = Problem(2, 20, 5, 6, 24, (3, 3), padding=(1, 1), dtype=torch.float32)

CASES = {
    "plain": (BASE, TILE),
    "full_blocks": (replace(BASE, channels=32), Launch(32, 32, 32)),
    "tile_beyond_everything": (replace(BASE, batch=1, out_channels=5), Launch(64, 64, 64)),
    "one_channel_out": (replace(BASE, out_channels=1), TILE),
    "odd_channels": (replace(BASE, channels=17, out_channels=19), TILE),
    "strided": (replace(BASE, stride=(2, 3), width=11), TILE),
    "dilated": (replace(BASE, dilation=(2, 1), padding=(2, 1)), TILE),
    "one_side_padded": (replace(BASE, padding=(0, 0, 1, 1), stride=(2, 2)), TILE),
    "much_padding": (replace(BASE, height=2, width=1, padding=(4, 3, 2, 5)), TILE),
    "row": (replace(BASE, kernel=(1, 7), padding=(0, 3)), TILE),
    "column": (replace(BASE, kernel=(7, 1), padding=(3, 0)), TILE),
    "one_tap": (replace(BASE, kernel=(1, 1), padding=(0, 0)), TILE),
    "one_pixel": (replace(BASE, height=1, width=1), TILE),
    "residual": (replace(BASE, residual=True), TILE),
    "two_sources": (replace(BASE, channels=32, channels2=17), TILE),
    "two_sources_full": (replace(BASE, channels=16, channels2=48), TILE),
    "few_and_second": (replace(BASE, channels=16, channels2=3, batch=1), TILE),
    "shares": (replace(BASE, residual=True), replace(TILE, splits=4)),
    "shares_one_step": (replace(BASE, channels=16), replace(TILE, splits=9)),
    "shares_empty": (replace(BASE, channels=16), replace(TILE, splits=8)),
    "shares_of_two_sources": (
        replace(BASE, channels=16, channels2=20, batch=1),
        replace(TILE, splits=5),
    ),
    "flat": (replace(BASE, channels=3, kernel=(7, 7), stride=(2, 2), padding=(3, 3)), TILE),
    "flat_dilated": (replace(BASE, channels=5, dilation=(1, 2), padding=(0, 1, 2, 3)), TILE),
    "flat_grey": (replace(BASE, channels=1), Launch(32, 16, 32)),
    "flat_shares": (replace(BASE, channels=3, residual=True), replace(TILE, splits=2)),
}


def run(
    problem: Problem, launch: Launch | None, activation: str, device: str
) -> tuple[Tensor, Any]:
    one = conv.example(problem, activation, device=device)
    with poisoned_memory():
        return one.run("triton", launch)[0], one


def check(problem: Problem, launch: Launch | None, activation: str, device: str) -> None:
    # oneDNN's 16-bit convolutions are no yardstick on every CPU.
    with torch.backends.mkldnn.flags(enabled=False):
        y, one = run(problem, launch, activation, device)
        assert y.is_contiguous(memory_format=torch.channels_last)
        (expected,), (baseline,) = (one.reference(dtype) for dtype in (torch.float64, y.dtype))
        verdict = tolerance.check(y, expected, baseline)
    assert verdict, str(verdict)


@pytest.mark.parametrize("name", CASES)
def test_matches_float64(name: str, device: str) -> None:
    check(*CASES[name], "relu", device)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["residual", "two_sources", "shares", "flat"])
def test_dtypes(name: str, dtype: torch.dtype, device: str) -> None:
    problem, launch = CASES[name]
    check(replace(problem, dtype=dtype), launch, "none", device)


@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("activation", conv.CPU_ACTIVATIONS)
def test_activations(activation: str, splits: int, device: str) -> None:
    check(replace(BASE, residual=True), replace(TILE, splits=splits), activation, device)


@settings(
    max_examples=12,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(data=st.data())
def test_random_calls(device: str, data: st.DataObject) -> None:
    def draw(low: int, high: int) -> int:
        return data.draw(st.integers(low, high))

    channels = draw(1, 40)
    second = draw(1, 20) if channels % 16 == 0 and draw(0, 1) else 0
    problem = Problem(
        draw(1, 2), channels, draw(1, 7), draw(1, 7), draw(1, 35),
        kernel=(draw(1, 3), draw(1, 3)), stride=(draw(1, 2), draw(1, 2)),
        padding=(draw(2, 3), draw(2, 3), draw(2, 3), draw(2, 3)),
        dilation=(draw(1, 2), draw(1, 2)), channels2=second, residual=bool(draw(0, 1)),
        dtype=data.draw(st.sampled_from(DTYPES)),
    )  # fmt: skip
    launch = Launch(*(data.draw(st.sampled_from((16, 32))) for _ in range(3)), splits=draw(1, 2))
    if kernels.launches.product(problem).steps(launch.block_k) < launch.splits:
        launch = replace(launch, splits=1)
    check(problem, launch, data.draw(st.sampled_from(conv.CPU_ACTIVATIONS)), device)


def reference(
    x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor, x2: Tensor | None = None
) -> Tensor:
    x = x if x2 is None else torch.cat([x, x2], 1)
    return conv.conv(
        x, weight, bias, padding=(1, 1), residual=residual, activation=Activation("relu")
    )


@pytest.mark.parametrize(("channels", "second"), [(20, 0), (16, 12), (3, 0)])
def test_slices_are_read_and_written_within_their_borders(
    channels: int, second: int, device: str
) -> None:
    # Canaries of NaN around what is read show in the result if they are used.
    x = guarded(image((2, channels, 4, 5)).to(device))
    x2 = guarded(image((2, second, 4, 5), seed=4).to(device)) if second else None
    residual = guarded(image((2, 9, 4, 5), seed=1).to(device))
    weight = image((9, channels + second, 3, 3), seed=2).to(device)
    bias = image((1, 9, 1, 1), seed=3).reshape(9).to(device)
    out = guarded(torch.full((2, 9, 4, 5), float("nan"), device=device), canary=7.0)
    second_image = None if x2 is None else x2.tensor
    y = conv.conv_triton(
        x.tensor, weight, bias, padding=(1, 1), residual=residual.tensor, x2=second_image,
        activation="relu", out=out.tensor,
    )  # fmt: skip
    assert y is out.tensor
    out.assert_untouched()
    inputs = (x.tensor, weight, bias, residual.tensor, second_image)
    assert_close_to_float64(y, reference, *inputs)


@pytest.mark.parametrize("channels", [1, 3, 15])
def test_few_channels_may_lie_in_planes(channels: int, device: str) -> None:
    planes = image((2, channels, 6, 5)).to(device).contiguous()
    weight = image((8, channels, 3, 3), seed=1).to(device)
    y = conv.conv_triton(planes, weight)
    assert torch.equal(y, conv.conv_triton(image((2, channels, 6, 5)).to(device), weight))
    assert_close_to_float64(y, F.conv2d, planes, weight)


@pytest.mark.parametrize("name", ["plain", "flat", "shares"])
def test_nan_and_infinity_pass(name: str, device: str) -> None:
    problem, launch = CASES[name]
    x = image((2, problem.channels, 5, 6), kind="nonfinite").to(device)
    weight = image((24, problem.channels, *problem.kernel), seed=1).to(device)
    out = torch.empty(
        2, 24, problem.out_height, problem.out_width, device=device
    ).contiguous(memory_format=torch.channels_last)  # fmt: skip
    packed = conv.prepack_gpu(weight, None, x.dtype)
    problem = replace(problem, residual=False)
    kernels.forward(x, *packed, None, None, problem, launch, "relu", out)

    def definition(x: Tensor, weight: Tensor) -> Tensor:
        return F.relu(F.conv2d(x, weight, None, problem.stride, problem.padding))  # type: ignore[arg-type]

    assert_close_to_float64(out, definition, x, weight)


def test_the_same_call_gives_the_same_bits(device: str) -> None:
    problem, launch = CASES["shares"]
    runs = [run(problem, launch, "none", device)[0] for _ in range(2)]
    assert torch.equal(*runs)


def test_batch_zero(device: str) -> None:
    weight = image((5, 20, 3, 3)).to(device)
    assert conv.conv_triton(image((0, 20, 4, 4)).to(device), weight).shape == (0, 5, 2, 2)


@pytest.mark.slow
def test_offsets_beyond_two_to_the_31(device: str) -> None:
    # Two images 2^31 + 64 elements apart; on the CPU, only the pages touched take memory.
    distance = 2**31 + 64
    values = image((2, 16, 4, 4), torch.float16).to(device)
    buffer = torch.empty(distance + 16 * 4 * 4, dtype=torch.float16, device=device)
    x = buffer.as_strided((2, 16, 4, 4), (distance, 1, 64, 16))
    x.copy_(values)
    weight = image((16, 16, 3, 3), torch.float16, seed=1).to(device)
    expected = conv.conv_triton(values, weight, padding=(1, 1))
    assert torch.equal(conv.conv_triton(x, weight, padding=(1, 1)), expected)
    conv.conv_triton(values, weight, padding=(1, 1), out=x)
    assert torch.equal(x, expected)


def test_operator(device: str) -> None:
    x, x2, residual = (image((1, c, 4, 5), seed=c).to(device) for c in (16, 8, 20))
    weight, bias = conv.prepack_gpu(image((20, 24, 3, 3)).to(device), None, x.dtype)
    arguments = (x, weight, bias, residual, x2, (3, 3), 20, (1, 1), (1, 1), (1, 1), "relu")
    torch.library.opcheck(torch.ops.cvfast.conv_triton.default, arguments)
    y = torch.ops.cvfast.conv_triton(*arguments)
    assert torch.equal(y, torch.ops.cvfast.conv_triton(x, weight, None, *arguments[3:]))
    fake = torch.ops.cvfast.conv_triton(
        *(a.to("meta") if isinstance(a, Tensor) else a for a in arguments)
    )
    assert (fake.shape, fake.stride()) == (y.shape, y.stride())
    with pytest.raises(RuntimeError, match="has no gradient"):
        torch.ops.cvfast.conv_triton(x.clone().requires_grad_(), *arguments[1:])


def test_problem_of_a_call() -> None:
    x = torch.empty(2, 32, 9, 8, device="meta").to(memory_format=torch.channels_last)
    out = torch.empty(2, 24, 4, 4, device="meta").to(memory_format=torch.channels_last)
    weight = torch.empty(9, 32, 32, device="meta")
    with torch.backends.cudnn.flags(allow_tf32=True):
        found = conv.problem(
            x, weight, None, None, None, (3, 3), (2, 2), (0, 1, 0, 0), (1, 1), "none", out=out
        )
    expected = Problem(
        2, 32, 9, 8, 24, (3, 3), (2, 2), (0, 1, 0, 0), dtype=torch.float32, tf32=True
    )
    assert found == expected
    x3 = torch.empty(2, 24, 4, 4, device="meta").to(memory_format=torch.channels_last)
    with torch.backends.cudnn.flags(allow_tf32=False):
        found = conv.problem(
            x, torch.cat([weight, weight], 1), None, x3, x, (3, 3), (2, 2), (0, 1, 0, 0), (1, 1),
            "none", out=out,
        )  # fmt: skip
    assert found == replace(expected, tf32=False, residual=True, channels2=32)


def test_an_example_counts_its_work() -> None:
    problem = replace(BASE, out_channels=32, residual=True)
    x, out = (2, 20, 5, 6), (2, 32, 5, 6)
    assert problem.flops() == conv.flops(x, (32, 20, 3, 3), out)
    unfused = conv.bytes_moved(x, (32, 20, 3, 3), out, 4)
    assert problem.bytes() == unfused + 4 * 2 * 32 * 30 + 4 * 32


def layout(*shape: int) -> Tensor:
    return torch.zeros(shape).contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"activation": "gelu"}, ValueError, "unknown activation 'gelu'"),
        ({"out": layout(1, 8, 6, 4)}, ValueError, r"out has shape \(1, 8, 6, 4\), expected"),
        ({"out": torch.zeros(1, 8, 6, 5)}, ValueError, "out is not channels-last"),
        ({"residual": layout(1, 8, 5, 5)}, ValueError, "residual has shape"),
        ({"residual": layout(1, 8, 6, 5).half()}, TypeError, "residual is torch.float16 but x is"),
        ({"x2": layout(1, 3, 6, 4)}, ValueError, "x2 has shape"),
        ({"x": torch.zeros(1, 20, 6, 5)}, ValueError, "x is not channels-last"),
        ({"weight": torch.zeros(9, 20, 16).half()}, ValueError, "weight is torch.float16"),
        ({"weight": torch.zeros(9, 21, 16)}, ValueError, "from cvfast.ops.conv.prepack_gpu"),
        ({"weight": torch.zeros(9, 20, 8)}, ValueError, "from cvfast.ops.conv.prepack_gpu"),
        ({"bias": torch.zeros(8)}, ValueError, r"bias is torch.float32 \(8,\)"),
        ({"bias": torch.zeros(16).half()}, ValueError, "bias is torch.float16"),
    ],
    ids=str,
)
def test_wrong_arguments_are_named(
    change: dict[str, Any], error: type[Exception], message: str, device: str
) -> None:
    arguments = {
        "x": layout(1, 20, 6, 5),
        "weight": torch.zeros(9, 20, 16),
        "bias": torch.zeros(16),
        "residual": None,
        "x2": None,
        **{
            name: value
            for name, value in change.items()
            if name in ("x", "weight", "bias", "residual", "x2")
        },
    }
    out = change.get("out", layout(1, 8, 6, 5))
    moved = [t if t is None else t.to(device) for t in arguments.values()]
    activation = change.get("activation", "none")
    with pytest.raises(error, match=message):
        torch.ops.cvfast.conv_triton.out(
            *moved, (3, 3), (1, 1), (1, 1), (1, 1), activation, out=out.to(device)
        )


def test_what_the_kernel_does_not_take_has_a_reason(device: str) -> None:
    weight = torch.zeros(4, 20, 3, 3, device=device)
    with pytest.raises(Unsupported, match="not channels-last"):
        conv.conv_triton(torch.zeros(1, 20, 5, 5, device=device), weight)
    with pytest.raises(Unsupported, match="float64"):
        conv.conv_triton(layout(1, 20, 5, 5).double().to(device), weight.double())
    with pytest.raises(ValueError, match="multiple of 16"):
        conv.conv_triton(layout(1, 12, 5, 5).to(device), weight, x2=layout(1, 8, 5, 5).to(device))
    with pytest.raises(ValueError, match="expected \\[K, C, R, S\\]"):
        conv.prepack_gpu(torch.zeros(4, 20), None, torch.float16)
    with pytest.raises(ValueError, match="float64"):
        conv.prepack_gpu(weight, None, torch.float64)


# On each architecture, a network's layer that takes large tiles, one that is shared out, and the
# stem; in float32 with exact products, and rounded to TF32.
LAYERS = (
    replace(BASE, batch=128, channels=128, out_channels=128, height=28, width=28, residual=True),
    replace(BASE, batch=1, channels=512, out_channels=512, height=7, width=7),
    replace(BASE, batch=32, channels=3, out_channels=64, height=112, width=112, kernel=(7, 7)),
    replace(BASE, batch=1, channels=64, channels2=64, out_channels=64, height=256, width=256),
)
HALF = [replace(problem, dtype=torch.float16) for problem in LAYERS]
FLOAT = [replace(LAYERS[0], tf32=True), LAYERS[0]]


@pytest.mark.parametrize("arch", devices.ARCHITECTURES)
@pytest.mark.parametrize("problem", [*HALF, *FLOAT], ids=Problem.describe)
def test_compiled_code(problem: Problem, arch: str) -> None:
    device = devices.by_arch(arch)
    launch = heuristic(problem, "forward", device)
    source = kernels.source(problem, launch, activation="relu")
    kernel = compiler.compiled(*source, int(arch.removeprefix("sm_")))
    (binary,) = compiled.read(kernel.asm["cubin"])
    assert binary.local_bytes == 0
    assert kernel.metadata.shared <= device.architecture.shared_per_block
    census = binary.census()
    matrix = [name for name in census if name.endswith("MMA")]
    if problem.dtype == torch.float32 and not problem.tf32:
        # sm_100 has instructions of two multiply-adds, FFMA2.
        assert not matrix and any(name.startswith("FFMA") for name in census)
    elif arch == "sm_90":
        assert matrix == ["HGMMA"]
    else:
        assert matrix
    if not problem.flat:
        # Tiles of x and of the weight come 16 bytes at a time, past the registers.
        assert census["LDGSTS.128"] > 0
    assert census["STG.128"] > 0


@pytest.mark.parametrize("problem_activation", GENERAL, ids=lambda pair: pair[0].describe())
def test_general_calls_compile(problem_activation: tuple[Problem, str]) -> None:
    problem, activation = problem_activation
    launch = heuristic(problem, "forward", devices.by_arch("sm_89"))
    kernel = compiler.compiled(*kernels.source(problem, launch, activation=activation), 89)
    assert compiled.read(kernel.asm["cubin"])[0].local_bytes == 0
