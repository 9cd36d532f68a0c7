from __future__ import annotations

import itertools
from dataclasses import dataclass, replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from cvfast import backends, tolerance
from cvfast.ops.pointwise import (
    ACTIVATIONS,
    bytes_moved,
    output_size,
    pointwise,
    prepack,
    reference,
)
from cvfast.testing import (
    assert_close_to_float64,
    guarded,
    image,
    isa,
    isa_levels,
    poisoned_memory,
    threads,
)

pytestmark = [
    pytest.mark.usefixtures("cpu_extension"),
    pytest.mark.filterwarnings("ignore:TF32 acceleration on top of oneDNN"),
]

LEVELS = isa_levels()
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Case:
    batch: int = 1
    channels: int = 32
    out: int = 48
    size: tuple[int, int] = (14, 14)
    stride: tuple[int, int] = (1, 1)
    activation: str = "none"
    bias: bool = True
    prologue: bool = False
    gate: bool = False
    residual: bool = False
    dtype: torch.dtype = torch.float32
    kind: str = "normal"

    def vector(self, size: int, seed: int) -> Tensor:
        return image((1, size, 1, 1), self.dtype, seed=seed).reshape(size)

    def tensors(self) -> tuple[Tensor | None, ...]:
        """x, weight, bias, scale, shift, gate, residual."""
        n, c, o = self.batch, self.channels, self.out
        return (
            image((n, c, *self.size), self.dtype, kind=self.kind),
            image((o, c, 1, 1), self.dtype, seed=1),
            self.vector(o, 2) if self.bias else None,
            self.vector(c, 3) if self.prologue else None,
            self.vector(c, 4) if self.prologue else None,
            image((n, c, 1, 1), self.dtype, seed=5).reshape(n, c) if self.gate else None,
            image((n, o, *output_size(self.size, self.stride)), self.dtype, seed=6)
            if self.residual
            else None,
        )

    def reference(self, *tensors: Tensor | None) -> Tensor:
        return reference(*tensors, stride=self.stride, activation=self.activation)  # type: ignore[arg-type]

    def kernel_result(self, *tensors: Tensor | None, backend: str = "cpu") -> Tensor:
        x, weight, bias, scale, shift, gate, residual = tensors
        assert x is not None
        assert weight is not None
        return pointwise(
            x, weight, bias, stride=self.stride, scale=scale, shift=shift, gate=gate,
            residual=residual, activation=self.activation, backend=backend,
        )  # fmt: skip

    def __str__(self) -> str:
        changed = [f"{k}={v}" for k, v in vars(self).items() if v != getattr(Case, k)]
        return " ".join(changed).replace("torch.", "") or "default"


def check(case: Case) -> None:
    tensors = case.tensors()
    with poisoned_memory():
        y = case.kernel_result(*tensors)
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert_close_to_float64(y, case.reference, *tensors)


SHAPES = [
    Case(),
    # Output channels around every vector and panel: whole panels, half panels, their rests.
    *(Case(out=o, size=(5, 6)) for o in (1, 3, 4, 5, 8, 9, 12, 15, 16, 17, 20, 23, 24, 25, 31, 33)),
    *(Case(out=o, size=(3, 5)) for o in (40, 63, 64, 65, 72, 100)),
    # Input channels: odd numbers leave half a bfloat16 word, and half a step of the half panel.
    *(Case(channels=c, out=o) for c in (1, 2, 3, 7, 17, 33, 130) for o in (8, 33)),
    Case(channels=1000, out=40, size=(7, 7)),
    # Pixels 4096 bytes apart, in float32 and in 16 bits.
    Case(channels=1024, out=64, size=(7, 7)),
    Case(channels=2048, out=72, size=(4, 4)),
    # Pixel counts around every height of a tile.
    *(Case(size=(1, w), out=56) for w in range(1, 16)),
    *(Case(size=(w, 1), channels=19, out=23) for w in (1, 2, 13, 27, 29, 43)),
    Case(size=(65, 63), channels=16, out=24),
    Case(batch=3, size=(7, 7), channels=96),
    Case(batch=5, size=(1, 1), channels=100, out=130),
    Case(batch=0),
    Case(batch=0, gate=True, residual=True),
    # Strided sources.
    Case(stride=(2, 2)),
    Case(stride=(2, 2), size=(15, 9), batch=2, channels=24, out=40),
    Case(stride=(1, 2), size=(6, 7)),
    Case(stride=(3, 1), size=(8, 5), gate=True, batch=2),
    Case(stride=(4, 4), size=(3, 3)),
    # What surrounds the product.
    *(Case(activation=activation, out=40) for activation in ACTIVATIONS),
    *(Case(activation=a, residual=True, out=24, size=(7, 9)) for a in ACTIVATIONS),
    *(
        Case(prologue=p, gate=g, residual=r, batch=2, size=(5, 9), channels=35, out=27)
        for p, g, r in itertools.product((False, True), repeat=3)
    ),
    Case(prologue=True, gate=True, residual=True, stride=(2, 2), activation="relu", batch=2),
    Case(bias=False),
    Case(kind="offset"),
    Case(kind="offset", channels=577, out=24, prologue=True),
]
# float16 is widened before it is multiplied: half of the shapes show its loads and stores.
RUNS = [
    (case, dtype)
    for i, case in enumerate(dict.fromkeys(SHAPES))
    for dtype in (DTYPES if i % 2 == 0 else (torch.float32, torch.bfloat16))
]


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize(("case", "dtype"), RUNS, ids=lambda value: str(value).split(".")[-1])
def test_matches_float64(case: Case, dtype: torch.dtype, level: str) -> None:
    with isa(level):
        check(replace(case, dtype=dtype))


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    level=st.sampled_from(LEVELS or ("none",)),
    case=st.builds(
        Case,
        batch=st.integers(1, 3),
        channels=st.integers(1, 70),
        out=st.integers(1, 90),
        size=st.tuples(st.integers(1, 20), st.integers(1, 20)),
        stride=st.tuples(st.integers(1, 3), st.integers(1, 3)),
        activation=st.sampled_from(ACTIVATIONS),
        bias=st.booleans(),
        prologue=st.booleans(),
        gate=st.booleans(),
        residual=st.booleans(),
        dtype=st.sampled_from(DTYPES),
    ),
)
def test_matches_float64_at_random_shapes(level: str, case: Case) -> None:
    with isa(level):
        check(case)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("where", ["x", "residual", "gate", "weight"])
def test_nan_and_infinity_go_where_pytorch_puts_them(
    where: str, activation: str, dtype: torch.dtype, level: str
) -> None:
    case = Case(
        channels=5, out=41, size=(3, 30), activation=activation, dtype=dtype, residual=True,
        gate=True,
    )  # fmt: skip
    names = ("x", "weight", "bias", "scale", "shift", "gate", "residual")
    tensors = dict(zip(names, case.tensors(), strict=True))
    strange = torch.tensor([float("nan"), float("inf"), -float("inf")], dtype=dtype)
    spoiled = tensors[where]
    assert spoiled is not None
    if where == "x":
        spoiled[0, 1, 1, :3] = strange
    elif where == "residual":
        spoiled[0, 39:, 2, 7] = strange[:2]
    elif where == "gate":
        spoiled[0, 2] = strange[0]
    else:
        spoiled[[0, 17, 40], 3, 0, 0] = strange
    with isa(level):
        y = case.kernel_result(*tensors.values())
    wide = [None if t is None else t.double() for t in tensors.values()]
    expected = case.reference(*wide).to(dtype)
    assert expected.isnan().any()
    assert torch.equal(y.isnan(), expected.isnan())
    assert torch.equal(y.isposinf(), expected.isposinf())
    assert torch.equal(y.isneginf(), expected.isneginf())


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "case",
    [
        Case(channels=19, out=24, size=(9, 16)),
        Case(channels=48, out=33, size=(1, 1), residual=True),
        Case(channels=33, out=40, stride=(2, 2), residual=True, gate=True),
        Case(channels=34, out=3, prologue=True, residual=True, activation="relu"),
    ],
    ids=str,
)
def test_channel_slices_are_read_and_written_in_place_and_nothing_around_them(
    case: Case, dtype: torch.dtype, level: str
) -> None:
    case = replace(case, dtype=dtype, batch=2)
    x, weight, bias, scale, shift, gate, residual = case.tensors()
    assert x is not None
    assert weight is not None
    packed = prepack(weight, bias, dtype=dtype)
    vectors = [None if v is None else v.float() for v in (scale, shift)]
    for canary, border in itertools.product((float("nan"), 12.0), (0, 1)):
        source = guarded(x, canary=canary, border=border)
        added = None if residual is None else guarded(residual, canary=canary, border=border)
        shape = case.reference(x, weight, bias, scale, shift, gate, residual).shape
        target = guarded(torch.zeros(shape, dtype=dtype), canary=canary, border=border)
        with isa(level):
            torch.ops.cvfast.pointwise_cpu.out(
                source.tensor, packed, case.stride, *vectors, gate,
                None if added is None else added.tensor, case.activation, out=target.tensor,
            )  # fmt: skip
        for around in (source, target, *([added] if added else [])):
            around.assert_untouched()
        assert_close_to_float64(
            target.tensor, case.reference, x, weight, bias, scale, shift, gate, residual
        )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "case",
    [
        Case(channels=320, out=1000, size=(7, 7)),
        Case(channels=960, out=24, size=(7, 7), activation="relu6"),
        Case(channels=35, out=136, size=(57, 57), prologue=True),
        Case(batch=3, channels=130, out=72, size=(28, 28), gate=True, residual=True),
        Case(batch=2, channels=64, out=512, size=(28, 28), stride=(2, 2)),
        Case(batch=3, channels=1280, out=1000, size=(1, 1)),
        Case(batch=5, channels=960, out=240, size=(1, 1), gate=True),
    ],
    ids=str,
)
def test_threads_and_batch_do_not_change_a_bit(case: Case, dtype: torch.dtype) -> None:
    case = replace(case, dtype=dtype)
    tensors = case.tensors()
    with threads(1):
        alone = case.kernel_result(*tensors)
    for count in (2, 3, 5):
        with threads(count):
            assert torch.equal(case.kernel_result(*tensors), alone)
    x, weight, bias, scale, shift, gate, residual = tensors
    for i in range(case.batch):
        one = [None if t is None else t[i : i + 1] for t in (x, gate, residual)]
        y = case.kernel_result(one[0], weight, bias, scale, shift, *one[1:])
        assert torch.equal(y, alone[i : i + 1])


def test_levels_with_fused_multiply_add_agree_to_the_bit() -> None:
    case = Case(channels=77, out=41, residual=True, prologue=True, activation="hardswish")
    tensors = case.tensors()
    results = []
    for level in LEVELS:
        if level != "portable":
            with isa(level):
                results.append(case.kernel_result(*tensors))
    assert all(torch.equal(result, results[0]) for result in results)


@pytest.mark.parametrize("pixels", [1, 2, 3])
@pytest.mark.parametrize("channels", [120, 240, 577])
def test_few_pixels_are_summed_as_well_as_pytorch_does(channels: int, pixels: int) -> None:
    check(Case(channels=channels, out=1000, size=(1, pixels)))


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("channels", [24, 160, 577])
def test_a_large_bias_costs_small_products_no_digits(channels: int, level: str) -> None:
    case = Case(channels=channels, out=40)
    x, *others = case.tensors()
    assert x is not None
    tensors = (0.01 * x, *others)
    with isa(level):
        y = case.kernel_result(*tensors)
    assert_close_to_float64(y, case.reference, *tensors)


# Layouts and backends


def test_nchw_runs_on_the_reference_unless_the_kernel_is_asked_for() -> None:
    x, weight, bias, *_ = Case().tensors()
    assert x is not None
    assert weight is not None
    x = x.contiguous()
    y = pointwise(x, weight, bias)
    assert torch.equal(y, F.conv2d(x, weight, bias))
    with pytest.raises(backends.Unsupported, match="x is not channels-last") as failure:
        pointwise(x, weight, bias, backend="cpu")
    assert failure.value.reason.code == "layout"


def test_an_operand_in_another_layout_is_named() -> None:
    case = Case(residual=True, gate=True, batch=2)
    *rest, gate, residual = case.tensors()
    assert gate is not None
    assert residual is not None
    with pytest.raises(backends.Unsupported, match="residual is not channels-last"):
        case.kernel_result(*rest, gate, residual.contiguous())
    with pytest.raises(backends.Unsupported, match="gate's channels are not adjacent"):
        case.kernel_result(*rest, gate.t().contiguous().t(), residual)


def test_float64_runs_on_the_reference_unless_the_kernel_is_asked_for() -> None:
    x, weight, bias, *_ = Case(dtype=torch.float64).tensors()
    assert x is not None
    assert weight is not None
    assert torch.equal(pointwise(x, weight, bias), F.conv2d(x, weight, bias))
    with pytest.raises(backends.Unsupported, match=r"float64") as failure:
        pointwise(x, weight, bias, backend="cpu")
    assert failure.value.reason.code == "dtype"


def test_other_devices_have_no_cpu_kernel() -> None:
    x = torch.empty(1, 8, 4, 4, device="meta")
    weight = torch.empty(6, 8, 1, 1, device="meta")
    assert pointwise(x, weight).shape == (1, 6, 4, 4)
    with pytest.raises(backends.Unsupported) as failure:
        pointwise(x, weight, backend="cpu")
    assert failure.value.reason.code == "device"


def test_expanded_images_are_read_without_a_copy() -> None:
    x, weight, bias, *_ = Case(channels=20).tensors()
    assert x is not None
    assert weight is not None
    many = x.expand(3, -1, -1, -1)
    y = pointwise(many, weight, bias, backend="cpu")
    assert torch.equal(y, pointwise(x, weight, bias).expand_as(y))


X, W, B = torch.zeros(2, 8, 6, 6), torch.zeros(4, 8, 1, 1), torch.zeros(4)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"x": X[0]}, ValueError, r"x has shape \(8, 6, 6\), expected \[N, C, H, W\]"),
        ({"x": X[:, :, :0]}, ValueError, "only N may be zero"),
        ({"weight": torch.zeros(4, 8, 3, 3)}, ValueError, r"expected \[O, 8, 1, 1\]"),
        ({"weight": torch.zeros(4, 7, 1, 1)}, ValueError, "weight has shape"),
        ({"weight": torch.zeros(0, 8, 1, 1)}, ValueError, "weight has shape"),
        ({"bias": torch.zeros(7)}, ValueError, r"bias has shape \(7,\), expected \(4,\)"),
        ({"scale": torch.zeros(8)}, ValueError, "scale is given but shift is not"),
        ({"shift": torch.zeros(8)}, ValueError, "shift is given but scale is not"),
        ({"scale": B, "shift": B}, ValueError, r"scale has shape \(4,\), expected \(8,\)"),
        ({"gate": torch.zeros(8)}, ValueError, r"gate has shape \(8,\), expected \(2, 8\)"),
        ({"residual": X}, ValueError, r"residual has shape .* expected \(2, 4, 6, 6\)"),
        ({"residual": X[:, :4], "stride": 2}, ValueError, r"expected \(2, 4, 3, 3\)"),
        ({"weight": W.double()}, TypeError, "weight is torch.float64 but x is torch.float32"),
        ({"bias": B.half()}, TypeError, "bias is torch.float16"),
        ({"gate": torch.zeros(2, 8).half()}, TypeError, "gate is torch.float16"),
        ({"weight": W.to("meta")}, ValueError, "weight is on meta"),
        ({"x": X.int(), "weight": W.int(), "bias": None}, TypeError, "floating-point"),
        ({"stride": 0}, ValueError, r"stride=\(0, 0\)"),
        ({"stride": (1, 2, 3)}, ValueError, "stride"),
        ({"activation": "gelu"}, ValueError, "none, relu, relu6, hardswish, hardsigmoid"),
        ({"backend": "tpu"}, ValueError, "unknown backend 'tpu'"),
    ],
    ids=str,
)
def test_bad_input_is_named(
    arguments: dict[str, object], error: type[Exception], message: str
) -> None:
    arguments = {"x": X, "weight": W, "bias": B, **arguments}
    with pytest.raises(error, match=message):
        pointwise(**arguments)  # type: ignore[arg-type]


# Gradients

GRADIENT_CASES = [
    Case(batch=2, channels=3, out=4, size=(3, 2), dtype=torch.float64, activation=activation)
    for activation in ACTIVATIONS
] + [
    Case(
        batch=2, channels=3, out=2, size=(3, 4), dtype=torch.float64, stride=(2, 1), prologue=p,
        gate=g, residual=r, activation=a,
    )
    for p, g, r, a in (
        (True, False, False, "none"),
        (False, True, False, "relu"),
        (False, False, True, "relu6"),
        (True, True, True, "hardswish"),
    )
]  # fmt: skip


def call_operator(case: Case, *tensors: Tensor | None) -> Tensor:
    return torch.ops.cvfast.pointwise(*tensors, case.stride, case.activation)


@pytest.mark.parametrize("case", GRADIENT_CASES, ids=str)
def test_gradcheck(case: Case) -> None:
    inputs = [None if t is None else t.requires_grad_() for t in case.tensors()]
    assert torch.autograd.gradcheck(lambda *a: call_operator(case, *a), inputs)
    assert torch.autograd.gradgradcheck(lambda *a: call_operator(case, *a), inputs)


# In 16 bits a sum near a kink of ReLU falls on one side here and on the other in PyTorch.
@pytest.mark.parametrize(
    "case",
    [
        *(Case(activation=a, prologue=True) for a in ACTIVATIONS),
        Case(dtype=torch.bfloat16),
        Case(dtype=torch.float16),
    ],
    ids=str,
)
def test_gradients_equal_pytorchs(case: Case) -> None:
    case = replace(case, batch=2, channels=24, gate=True, residual=True)

    def gradients(function: object, *inputs: Tensor | None) -> tuple[Tensor, ...]:
        leaves = [None if t is None else t.detach().requires_grad_() for t in inputs]
        y = function(*leaves)  # type: ignore[operator]
        return torch.autograd.grad(y, [t for t in leaves if t is not None], torch.ones_like(y))

    inputs = case.tensors()
    actual = gradients(case.kernel_result, *inputs)
    baseline = gradients(case.reference, *inputs)
    expected = gradients(case.reference, *(None if t is None else t.double() for t in inputs))
    for a, e, b in zip(actual, expected, baseline, strict=True):
        verdict = tolerance.check(a, e, b)
        assert verdict, str(verdict)


@pytest.mark.parametrize("needed", range(7))
@pytest.mark.parametrize("activation", ["none", "relu", "hardswish"])
def test_only_needed_gradients_are_computed(activation: str, needed: int) -> None:
    case = Case(channels=8, size=(5, 5), activation=activation, prologue=True, gate=True,
                residual=True)  # fmt: skip
    inputs = [t for t in case.tensors() if t is not None]
    inputs[needed].requires_grad_()
    case.kernel_result(*inputs).sum().backward()
    expected = [t.detach().requires_grad_(t.requires_grad) for t in inputs]
    case.reference(*expected).sum().backward()
    for got, want in zip(inputs, expected, strict=True):
        assert (got.grad is None) == (want.grad is None)
        if got.grad is not None:
            torch.testing.assert_close(got.grad, want.grad, rtol=1e-4, atol=1e-4)


def test_saves_no_more_than_the_gradient_needs() -> None:
    x, weight, bias, *_ = Case(channels=8).tensors()
    assert x is not None
    assert weight is not None
    saved: list[Tensor] = []

    def pack(t: Tensor) -> Tensor:
        saved.append(t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        pointwise(x, weight.requires_grad_(), bias, backend="cpu")
    assert [t.data_ptr() for t in saved] == [x.data_ptr()]


def test_prepacked_refuses_to_drop_a_gradient() -> None:
    x, weight, bias, *_ = Case().tensors()
    assert x is not None
    assert weight is not None
    packed = prepack(weight, bias, dtype=x.dtype)
    arguments = (x.requires_grad_(), packed, 48, [1, 1], None, None, None, None, "relu")
    with pytest.raises(RuntimeError, match=r"no gradient.*cvfast.ops.pointwise"):
        torch.ops.cvfast.pointwise_cpu(*arguments)
    with torch.no_grad():
        y = torch.ops.cvfast.pointwise_cpu(*arguments)
    assert not y.requires_grad
    with pytest.raises(RuntimeError, match=r"no gradient.*cvfast.ops.pointwise"):
        torch.ops.cvfast.pointwise_cpu.out(*arguments[:2], *arguments[3:], out=y)


# The operators as torch sees them


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize(
    "case",
    [
        Case(activation="relu6"),
        Case(activation="hardswish", stride=(2, 2), bias=False, prologue=True),
        Case(dtype=torch.float64, activation="relu", gate=True, residual=True),
    ],
    ids=str,
)
def test_opcheck(case: Case, requires_grad: bool) -> None:
    tensors = [None if t is None else t.requires_grad_(requires_grad) for t in case.tensors()]
    arguments = (*tensors, case.stride, case.activation)
    torch.library.opcheck(torch.ops.cvfast.pointwise.default, arguments)


def test_opcheck_prepacked() -> None:
    case = Case(channels=20, stride=(2, 2), gate=True, residual=True)
    x, weight, bias, _, _, gate, residual = case.tensors()
    assert weight is not None
    packed = prepack(weight, bias, dtype=torch.float32)
    tail = (None, None, gate, residual, "relu6")
    torch.library.opcheck(
        torch.ops.cvfast.pointwise_cpu.default, (x, packed, case.out, [2, 2], *tail)
    )
    torch.library.opcheck(
        torch.ops.cvfast.pointwise_cpu.out,
        (x, packed, [2, 2], *tail),
        {"out": image((1, case.out, 7, 7))},
    )


def test_fake_has_the_strides_of_the_real_result() -> None:
    case = Case(batch=2, channels=20, size=(9, 11), stride=(2, 2))
    tensors = case.tensors()
    real = call_operator(case, *tensors)
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = call_operator(case, *(None if t is None else mode.from_tensor(t) for t in tensors))
    assert (fake.shape, fake.stride(), fake.dtype) == (real.shape, real.stride(), real.dtype)


class Layer(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        _, weight, bias, *_ = Case().tensors()
        self.weight, self.bias = torch.nn.Parameter(weight), torch.nn.Parameter(bias)

    def forward(self, x: Tensor) -> Tensor:
        return pointwise(x, self.weight, self.bias, activation="relu6") * 2


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiles_whole_with_dynamic_shapes(backend: str) -> None:
    torch.compiler.reset()
    layer = Layer()
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend=backend)
    for batch, size in ((2, (14, 14)), (3, (9, 20))):
        x = Case(batch=batch, size=size).tensors()[0]
        assert x is not None
        x.requires_grad_()
        y, expected = compiled(x), layer(x)
        torch.testing.assert_close(y, expected)
        assert y.stride() == expected.stride()
        leaves = [x, *layer.parameters()]
        torch.testing.assert_close(
            torch.autograd.grad(y.sum(), leaves),
            torch.autograd.grad(expected.sum(), leaves),
            rtol=1e-4,
            atol=1e-4,  # sums over whole images, in another order
        )


def test_flop_formula_equals_the_eager_count() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    case = Case(batch=2, channels=24, stride=(2, 2))
    x, weight, bias, *rest = case.tensors()
    assert weight is not None

    def count(function: object) -> int:
        with FlopCounterMode(display=False) as counter:
            function()  # type: ignore[operator]
        return counter.get_total_flops()

    eager = count(lambda: case.reference(x, weight, bias))
    assert eager > 0
    assert count(lambda: call_operator(case, x, weight, bias, *rest)) == eager
    packed = prepack(weight, bias, dtype=torch.float32)
    arguments = (x, packed, case.out, case.stride, None, None, None, None, "none")
    assert count(lambda: torch.ops.cvfast.pointwise_cpu(*arguments)) == eager


@pytest.mark.parametrize("dtype", DTYPES)
def test_byte_model_counts_each_tensor_once(dtype: torch.dtype) -> None:
    case = Case(batch=2, channels=16, out=64, dtype=dtype, residual=True)
    x, weight, bias, *_, residual = tensors = case.tensors()
    assert x is not None
    assert weight is not None
    assert residual is not None
    y = case.kernel_result(*tensors)
    packed = prepack(weight, bias, dtype=dtype)
    counted = bytes_moved(16, y.shape, dtype, residual=True)
    assert counted == x.nbytes + y.nbytes + residual.nbytes + packed.nbytes


# Preparation


def test_prepack_layout() -> None:
    weight, bias = torch.randn(24 + 5, 3, 1, 1), torch.randn(24 + 5)
    packed = prepack(weight, bias, dtype=torch.float32)
    assert packed.shape == (2 * 4, 16)  # 13 channels remain: too many for a half panel
    for channel in (0, 15, 16, 28):
        panel = packed[channel // 16 * 4 :, channel % 16]
        assert panel[0] == bias[channel]
        assert torch.equal(panel[1:4], weight[channel].flatten())
    assert packed[4:, 13:].eq(0).all()


def test_prepack_half_panel_interleaves_two_words_of_a_channel() -> None:
    weight, bias = torch.randn(16 + 5, 3, 1, 1), torch.randn(16 + 5)
    packed = prepack(weight, bias, dtype=torch.float32)
    assert packed.shape == (4 + 3, 16)
    for channel in (16, 20):
        lanes = packed[4:, 2 * (channel - 16) : 2 * (channel - 16) + 2].flatten()
        expected = torch.cat([bias[channel].reshape(1), torch.zeros(1), weight[channel].flatten()])
        assert torch.equal(lanes, F.pad(expected, (0, 1)))
    assert packed[4:, 10:].eq(0).all()


def test_prepack_bfloat16_holds_two_weights_a_word_and_a_float_bias() -> None:
    weight, bias = torch.randn(16, 3), torch.randn(16)
    packed = prepack(weight, bias, dtype=torch.bfloat16)
    assert packed.dtype == torch.int32
    assert packed.shape == (3, 16)
    assert torch.equal(packed[0].view(torch.float32), bias)
    pairs = packed[1:].contiguous().view(torch.bfloat16).reshape(2, 16, 2)
    expected = F.pad(weight.bfloat16(), (0, 1)).reshape(16, 2, 2).transpose(0, 1)
    assert torch.equal(pairs, expected)


def test_prepack_names_what_is_wrong() -> None:
    with pytest.raises(ValueError, match=r"weight has shape .* expected \[O, C, 1, 1\]"):
        prepack(torch.zeros(4, 4, 3, 3), dtype=torch.float32)
    with pytest.raises(ValueError, match=r"images of torch\.float64"):
        prepack(torch.zeros(4, 4), dtype=torch.float64)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"packed": torch.zeros(99, 8)}, "does not come from prepack"),
        ({"packed": torch.zeros(33, 16)}, "for 32 to 40 channels"),
        ({"packed": torch.zeros(83, 16, dtype=torch.int32)}, "does not come from prepack"),
        ({"x": torch.zeros(1, 32, 4, 4)}, "channels-last"),
        ({"x": torch.zeros(32, 4, 4)}, r"\[N, C, H, W\]"),
        ({"x": image((1, 32, 4, 4), torch.float64)}, "float32, bfloat16 or float16"),
        ({"stride": [0, 1]}, "two positive numbers"),
        ({"scale": torch.zeros(32)}, "scale and shift come together"),
        ({"scale": torch.zeros(32), "shift": torch.zeros(31)}, "shift must be 32"),
        ({"scale": torch.zeros(32).half(), "shift": torch.zeros(32)}, "scale must be 32"),
        ({"gate": torch.zeros(1, 31)}, r"gate must be \[1, 32\]"),
        ({"residual": torch.zeros(1, 40, 4, 4)}, "residual must be channels-last"),
        ({"residual": image((1, 40, 4, 3))}, r"residual must be \[1, 40, 4, 4\]"),
        ({"activation": "gelu"}, "unknown activation 'gelu'"),
    ],
    ids=str,
)
def test_prepacked_operator_checks_its_arguments(change: dict[str, object], message: str) -> None:
    arguments: dict[str, object] = {
        "x": image((1, 32, 4, 4)),
        "packed": torch.zeros(33 * 2 + 17, 16),
        "out_channels": 40,
        "stride": [1, 1],
        "scale": None,
        "shift": None,
        "gate": None,
        "residual": None,
        "activation": "none",
        **change,
    }
    with pytest.raises(RuntimeError, match=message):
        torch.ops.cvfast.pointwise_cpu(*arguments.values())


def test_prepacked_operator_checks_its_destination() -> None:
    packed = prepack(torch.zeros(40, 32), dtype=torch.float32)
    for out in (image((1, 40, 4, 3)), image((1, 40, 4, 4), torch.half), torch.zeros(1, 40, 4, 4)):
        with pytest.raises(RuntimeError, match="out must"):
            torch.ops.cvfast.pointwise_cpu.out(
                image((1, 32, 4, 4)), packed, [1, 1], None, None, None, None, "none", out=out
            )
