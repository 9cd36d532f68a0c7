from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from cvfast.kernels import compiler
from cvfast.kernels import depthwise as kernels
from cvfast.launch.depthwise import PASSES, Problem
from cvfast.launch.depthwise.triton import Launch, heuristic
from cvfast.ops.depthwise import ACTIVATIONS, apply_activation, prepack, reference, unpack
from cvfast.perf import compiled, devices
from cvfast.testing import assert_close_to_float64, guarded, image, poisoned_memory

pytestmark = pytest.mark.gpu_kernels

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Case:
    batch: int = 1
    channels: int = 8
    size: tuple[int, int] = (6, 5)
    kernel: tuple[int, int] = (3, 3)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, ...] = (1, 1)
    dilation: tuple[int, int] = (1, 1)
    multiplier: int = 1
    activation: str = "none"
    dtype: torch.dtype = torch.float32
    kind: str = "normal"
    rows: int = 0  # 0: the heuristic's launch
    columns: int = 2
    vector: int = 4
    wide: int = 8
    splits: int = 1

    @property
    def problem(self) -> Problem:
        return Problem(
            self.batch,
            self.channels,
            *self.size,
            self.kernel,
            self.stride,
            self.padding,
            self.dilation,
            self.multiplier,
            self.dtype,
        )

    def launch(self, pass_: str) -> Launch:
        if not self.rows:
            return heuristic(self.problem, pass_, devices.by_arch("sm_89"))
        launch = Launch(
            self.rows, self.columns, self.vector, self.wide, num_warps=1, splits=self.splits
        )
        return launch if pass_ == "backward_weight" else replace(launch, splits=1)

    def tensors(self, device: str) -> tuple[Tensor, Tensor, Tensor]:
        out = self.channels * self.multiplier
        x = image((self.batch, self.channels, *self.size), self.dtype, kind=self.kind)
        weight = image((out, 1, *self.kernel), self.dtype, seed=1).contiguous()
        bias = image((1, out, 1, 1), self.dtype, seed=2).reshape(out)
        return x.to(device), weight.to(device), bias.to(device)

    def gradient(self, y: Tensor) -> Tensor:
        return image(y.shape, self.dtype, seed=3).to(y.device)

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        top, left, bottom, right = (*self.padding, *self.padding)[:4]
        x = torch.nn.functional.pad(x, (left, right, top, bottom))
        # Through oneDNN some 16-bit depthwise convolutions are wrong (torch 2.13).
        with torch.backends.mkldnn.flags(enabled=False):
            return reference(x, weight, bias, self.stride, (0, 0), self.dilation, "none")

    def reference(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return apply_activation(self.linear(x, weight, bias), self.activation)

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        packed = prepack(weight, bias, multiplier=self.multiplier)
        launch = self.launch("forward")
        return kernels.forward(x, packed, self.problem, launch, self.activation)

    def masked(self, grad: Tensor, output: Tensor) -> Tensor:
        """The gradient before the activation, as PyTorch computes it."""
        if self.activation == "relu":
            return torch.ops.aten.threshold_backward(grad, output, 0)
        if self.activation == "relu6":
            # hardtanh_backward, but for NaN, which PyTorch's vectorised CPU code masks and its CUDA
            # code and scalar CPU code do not.
            return grad.masked_fill((output <= 0) | (output >= 6), 0)
        return grad

    def gradients(self, x: Tensor, weight: Tensor, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Of image, weight and bias by autograd, from the gradient before the activation."""
        inputs = [t.detach().requires_grad_() for t in (x, weight)]
        bias = torch.zeros_like(weight[:, 0, 0, 0]).requires_grad_()
        grads = torch.autograd.grad(self.linear(*inputs, bias), (*inputs, bias), grad)
        return grads[0], grads[1], grads[2]

    @property
    def valid(self) -> bool:
        return min(self.problem.out_height, self.problem.out_width) > 0

    def __str__(self) -> str:
        changed = [f"{k}={v}" for k, v in vars(self).items() if v != getattr(Case, k)]
        return " ".join(changed).replace("torch.", "") or "default"


def check_forward(case: Case, device: str) -> None:
    x, weight, bias = case.tensors(device)
    with poisoned_memory():
        y = case.forward(x, weight, bias)
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert_close_to_float64(y, case.reference, x, weight, bias)


def check_backward(case: Case, device: str) -> None:
    x, weight, bias = case.tensors(device)
    y = case.forward(x, weight, bias)
    grad = case.gradient(y)
    packed = prepack(weight, bias, multiplier=case.multiplier)
    with poisoned_memory():
        grad_x = kernels.backward_input(
            grad, y, packed, case.problem, case.launch("backward_input"), case.activation
        )
        grad_packed = kernels.backward_weight(
            grad, y, x, case.problem, case.launch("backward_weight"), case.activation
        )
    assert grad_x.is_contiguous(memory_format=torch.channels_last)
    masked = case.masked(grad, y)
    grad_weight, grad_bias = unpack(grad_packed, case.channels, case.kernel)
    lanes = torch.arange(grad_packed.shape[1] * 16).reshape(-1, 1, 16) < case.channels
    assert grad_packed.masked_select(~lanes.to(grad_packed.device)).eq(0).all()

    def expected(index: int) -> Callable[..., Tensor]:
        return lambda x, weight, grad: case.gradients(x, weight, grad)[index]

    inputs = (x, weight, masked)
    assert_close_to_float64(grad_x, expected(0), *inputs)
    assert_close_to_float64(grad_weight.to(case.dtype), expected(1), *inputs)
    assert_close_to_float64(grad_bias.to(case.dtype), expected(2), *inputs)


CASES = [
    Case(),
    # Patches larger than the image, that divide it, and that leave a rest.
    *(
        Case(size=(9, 7), rows=rows, columns=columns, batch=2)
        for rows, columns in ((1, 1), (3, 7), (4, 2), (8, 2), (16, 3))
    ),
    # Vectors and chunks of channels with and without a rest.
    *(
        Case(channels=c, rows=2, vector=v, wide=w)
        for c, v, w in ((1, 1, 1), (7, 2, 4), (8, 4, 8), (17, 4, 8), (24, 8, 16), (33, 1, 16))
    ),
    Case(kernel=(5, 5), padding=(2, 2), rows=2, vector=2),
    Case(stride=(2, 2), size=(7, 8), rows=4),
    Case(stride=(2, 3), size=(9, 11), rows=2, columns=3),
    Case(stride=(3, 3), kernel=(2, 2), padding=(0, 0), size=(8, 9), rows=3, columns=3),
    Case(kernel=(1, 7), padding=(0, 3), rows=2),
    Case(kernel=(4, 2), padding=(1, 2), rows=3),
    Case(kernel=(1, 1), padding=(0, 0), rows=2),
    Case(dilation=(2, 2), padding=(2, 2), rows=3),
    Case(dilation=(1, 3), padding=(0, 2), size=(4, 7), rows=2),
    # More taps than are kept in registers.
    Case(kernel=(11, 10), padding=(5, 4), channels=2, size=(2, 4)),
    # Padding: none, uneven, wider than the kernel (rows and columns of bias alone).
    Case(padding=(0, 0)),
    Case(padding=(0, 2)),
    Case(padding=(4, 5), size=(3, 2), rows=2),
    Case(padding=(4, 4), stride=(2, 2), size=(1, 1), rows=2),
    # Padding of one side alone, as TensorFlow's "same" has it.
    Case(padding=(0, 0, 1, 1), stride=(2, 2), size=(6, 4), rows=2),
    Case(padding=(3, 0, 1, 2), kernel=(3, 2), size=(4, 5), rows=2),
    Case(size=(1, 9), batch=3),
    Case(size=(9, 1)),
    Case(multiplier=2, rows=2),
    Case(multiplier=3, channels=5, stride=(2, 2), vector=1, wide=4, rows=2),
    Case(batch=5, size=(3, 3), splits=3, rows=2),
    Case(kind="offset"),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_forward_matches_float64(case: Case, device: str) -> None:
    check_forward(case, device)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_backward_matches_float64(case: Case, device: str) -> None:
    check_backward(case, device)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_sixteen_bit_types_and_activations(
    activation: str, dtype: torch.dtype, device: str
) -> None:
    case = Case(channels=12, rows=2, dtype=dtype, activation=activation)
    check_forward(case, device)
    if activation != "hardswish":
        check_backward(case, device)


@settings(
    max_examples=8,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.filter_too_much, HealthCheck.function_scoped_fixture],
)
@given(
    case=st.builds(
        Case,
        batch=st.integers(1, 2),
        channels=st.integers(1, 20),
        size=st.tuples(st.integers(1, 6), st.integers(1, 6)),
        kernel=st.tuples(st.integers(1, 3), st.integers(1, 3)),
        stride=st.tuples(st.integers(1, 3), st.integers(1, 3)),
        padding=st.tuples(st.integers(0, 5), st.integers(0, 5)),
        dilation=st.tuples(st.integers(1, 3), st.integers(1, 3)),
        multiplier=st.integers(1, 2),
        activation=st.sampled_from(ACTIVATIONS[:3]),
        dtype=st.sampled_from(DTYPES),
    ).filter(lambda case: case.valid),
)
def test_matches_float64_at_random_shapes(device: str, case: Case) -> None:
    check_forward(case, device)
    check_backward(case, device)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_nan_and_infinity_go_where_pytorch_puts_them(
    activation: str, dtype: torch.dtype, device: str
) -> None:
    case = Case(
        channels=20, size=(7, 6), rows=3, kind="nonfinite", activation=activation, dtype=dtype
    )
    x, weight, bias = case.tensors(device)
    y = case.forward(x, weight, bias)
    expected = case.reference(x.double(), weight.double(), bias.double()).to(dtype)
    assert expected.isnan().any()
    assert torch.equal(y.isnan(), expected.isnan())
    assert torch.equal(y.isposinf(), expected.isposinf())
    assert torch.equal(y.isneginf(), expected.isneginf())


@pytest.mark.parametrize("activation", ["relu", "relu6"])
def test_a_nan_output_passes_its_gradient(activation: str, device: str) -> None:
    case = Case(kernel=(1, 1), padding=(0, 0), activation=activation)
    x, weight, bias = case.tensors(device)
    y = case.forward(x, weight, bias)
    y[0, :, 2, 3] = torch.tensor([float("nan"), 0.0, -0.0, 6.0, 3.0, float("nan"), 7.0, -1.0])
    grad = case.gradient(y)
    packed = prepack(torch.ones_like(weight))
    launch = case.launch("backward_input")
    grad_x = kernels.backward_input(grad, y, packed, case.problem, launch, activation)
    assert torch.equal(grad_x, case.masked(grad, y))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "case",
    [
        Case(channels=11, size=(3, 4), rows=2),
        Case(channels=16, stride=(2, 2), rows=2, vector=8, wide=16),
        Case(
            channels=3, size=(3, 3), dilation=(2, 1), padding=(2, 1), multiplier=2, rows=1, wide=4
        ),
    ],
    ids=str,
)
def test_channel_slices_are_read_in_place_and_nothing_around_them(
    case: Case, dtype: torch.dtype, device: str
) -> None:
    case = replace(case, dtype=dtype, batch=2, activation="relu")
    x, weight, bias = case.tensors(device)
    packed = prepack(weight, bias, multiplier=case.multiplier)
    plain = case.forward(x, weight, bias)
    grad = case.gradient(plain)
    for canary in (float("nan"), 12.0):
        around = [guarded(t, canary=canary) for t in (x, plain, grad)]
        x_slice, y_slice, grad_slice = (g.tensor for g in around)
        with poisoned_memory():
            y = case.forward(x_slice, weight, bias)
            results = [
                backward(grad_slice, y_slice, rest, case.problem, case.launch(name), "relu")
                for backward, rest, name in (
                    (kernels.backward_input, packed, "backward_input"),
                    (kernels.backward_weight, x_slice, "backward_weight"),
                )
            ]
        for buffer in around:
            buffer.assert_untouched()
        assert torch.equal(y, plain)
        assert torch.equal(
            results[0],
            kernels.backward_input(
                grad, plain, packed, case.problem, case.launch("backward_input"), "relu"
            ),
        )
        assert torch.equal(
            results[1],
            kernels.backward_weight(
                grad, plain, x, case.problem, case.launch("backward_weight"), "relu"
            ),
        )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "case",
    [
        Case(channels=11, rows=4),
        Case(channels=16, stride=(2, 2), rows=2, vector=8, wide=16),
        Case(channels=5, size=(1, 4), multiplier=2, rows=2, vector=1, wide=4),
    ],
    ids=str,
)
def test_writes_into_a_channel_slice_and_nothing_around_it(
    case: Case, dtype: torch.dtype, device: str
) -> None:
    case = replace(case, dtype=dtype, batch=2, activation="relu6")
    x, weight, bias = case.tensors(device)
    packed = prepack(weight, bias, multiplier=case.multiplier)
    plain = case.forward(x, weight, bias)
    around = guarded(torch.full_like(plain, float("nan")), canary=12.0)
    launch = case.launch("forward")
    y = kernels.forward(x, packed, case.problem, launch, "relu6", around.tensor)
    assert y is around.tensor
    assert torch.equal(y, plain)
    around.assert_untouched()


@pytest.mark.slow
def test_offsets_beyond_two_to_the_31(device: str) -> None:
    # Two images 2^31 + 64 elements apart; on the CPU, only the pages touched take memory.
    distance = 2**31 + 64
    case = Case(batch=2, size=(4, 4), dtype=torch.float16, rows=2)
    values, weight, bias = case.tensors(device)
    buffer = torch.empty(distance + 8 * 4 * 4, dtype=torch.float16, device=device)
    x = buffer.as_strided((2, 8, 4, 4), (distance, 1, 32, 8))
    x.copy_(values)
    assert torch.equal(case.forward(x, weight, bias), case.forward(values, weight, bias))
    grad = case.gradient(values)
    launch = case.launch("backward_weight")
    assert torch.equal(
        kernels.backward_weight(grad, None, x, case.problem, launch),
        kernels.backward_weight(grad, None, values, case.problem, launch),
    )


def test_lanes_counted_in_64_bits(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # What more than 2^31 lanes switch on, on an image that fits.
    plan = kernels._plan

    def wide(*args: object) -> object:
        narrow = plan(*args)
        assert not narrow.constants["WIDE"]
        return replace(narrow, constants={**narrow.constants, "WIDE": True})

    monkeypatch.setattr(kernels, "_plan", wide)
    check_forward(Case(batch=2, channels=11, rows=2, columns=3, vector=2, wide=4), device)


def test_batch_zero(device: str) -> None:
    case = Case(batch=0)
    x, weight, bias = case.tensors(device)
    y = case.forward(x, weight, bias)
    assert y.shape == (0, 8, 6, 5)
    packed, problem = prepack(weight, bias), case.problem
    grad_x = kernels.backward_input(y, None, packed, problem, case.launch("backward_input"))
    assert grad_x.shape == x.shape
    launch = case.launch("backward_weight")
    assert kernels.backward_weight(y, None, x, problem, launch).eq(0).all()


def test_the_gradient_of_the_weights_is_the_same_at_every_run(device: str) -> None:
    case = Case(batch=3, channels=19, size=(3, 3), rows=2, wide=16, splits=4)
    x, _, _ = case.tensors(device)
    grad = case.gradient(x)
    launch = case.launch("backward_weight")
    runs = [kernels.backward_weight(grad, None, x, case.problem, launch) for _ in range(3)]
    assert torch.equal(runs[0], runs[1])
    assert torch.equal(runs[0], runs[2])


def test_images_expanded_and_one_pixel_wide(device: str) -> None:
    case = Case(batch=3, rows=2)
    x, weight, bias = replace(case, batch=1).tensors(device)
    y = case.forward(x.expand(3, -1, -1, -1), weight, bias)
    assert torch.equal(y, replace(case, batch=1).forward(x, weight, bias).expand_as(y))
    # One channel: NCHW is channels-last too.
    single = Case(channels=1, size=(4, 5), vector=1, wide=1, rows=2)
    x, weight, bias = single.tensors(device)
    assert_close_to_float64(
        single.forward(x.contiguous(), weight, bias), single.reference, x, weight, bias
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(1, 8, 6, 4)}, "x is torch.float32"),
        ({"x": torch.zeros(1, 8, 6, 5)}, "x is not channels-last"),
        ({"x": image((1, 8, 6, 5), torch.float16)}, "expected torch.float32"),
        ({"packed": torch.zeros(1, 1, 9, 16)}, "cvfast.ops.depthwise.prepack"),
        ({"packed": torch.zeros(1, 1, 10, 16).double()}, "cvfast.ops.depthwise.prepack"),
        ({"packed": torch.zeros(1, 1, 10, 16, device="meta")}, "different devices: cpu, cpu, meta"),
        ({"activation": "gelu"}, "unknown activation 'gelu'"),
        ({"out": torch.zeros(1, 8, 6, 4)}, r"out is torch.float32 \(1, 8, 6, 4\)"),
        ({"out": torch.zeros(1, 8, 6, 5)}, "out is not channels-last"),
        ({"launch": Launch(2, 2, 3, 6, 1)}, "vector=3"),
        ({"launch": Launch(0, 2, 4, 8, 1)}, "rows=0: expected at least 1"),
    ],
    ids=str,
)
def test_wrong_arguments_are_named(change: dict[str, object], message: str) -> None:
    case = Case(rows=2)
    arguments: dict[str, object] = {
        "x": image((1, 8, 6, 5)),
        "packed": torch.zeros(1, 1, 10, 16),
        "problem": case.problem,
        "launch": case.launch("forward"),
        "activation": "none",
        **change,
    }
    with pytest.raises(ValueError, match=message):
        kernels.forward(*arguments.values())


def test_a_gradient_through_an_activation_needs_the_output() -> None:
    case = Case()
    grad, packed = image((1, 8, 6, 5)), torch.zeros(1, 1, 10, 16)
    launch = case.launch("backward_input")
    with pytest.raises(ValueError, match="the gradient of relu needs the output"):
        kernels.backward_input(grad, None, packed, case.problem, launch, "relu")
    with pytest.raises(ValueError, match="unknown activation 'hardswish'"):
        kernels.backward_input(grad, grad, packed, case.problem, launch, "hardswish")


ARCHITECTURES = tuple(devices.ARCHITECTURES)


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("pass_", PASSES)
def test_compiles_without_spills(pass_: str, arch: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")  # which compiled() must not heed
    architecture = devices.architecture(arch)
    problem = Problem(256, 72, 14, 14, (3, 3), (2, 2), (1, 1))
    launch = heuristic(problem, pass_, devices.by_arch(arch))
    major, minor = architecture.capability
    kernel = compiler.compiled(*kernels.source(problem, launch, pass_), 10 * major + minor)
    (binary,) = compiled.read(kernel.asm["cubin"])
    assert binary.local_bytes == 0
    held = devices.occupancy(architecture, launch.lanes, binary.registers, binary.shared_bytes)
    assert held.warps_per_sm >= 12
    # Vectors of four float16, of pixels and, as far as the pass has them, of float32 weights.
    assert "ld.global.v2.b32" in kernel.asm["ptx"]
    if pass_ != "backward_weight":
        assert "ld.global.v4.b32" in kernel.asm["ptx"]
        assert "st.global.v2.b32" in kernel.asm["ptx"]
