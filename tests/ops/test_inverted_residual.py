from __future__ import annotations

import itertools
from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from cvfast import backends, tolerance
from cvfast.ops.depthwise import prepack as prepack_depthwise
from cvfast.ops.inverted_residual import (
    ACTIVATIONS,
    bytes_moved,
    flops,
    fuses,
    inverted_residual,
    inverted_residual_squeeze,
    output_size,
    reference,
    squeeze_reference,
)
from cvfast.ops.pointwise import prepack as prepack_pointwise
from cvfast.testing import (
    Guarded,
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
PAIRS = tuple(itertools.product((1, 2), repeat=2))


@dataclass(frozen=True)
class Case:
    batch: int = 1
    channels: int = 16
    hidden: int = 48  # that of x without an expansion
    out: int = 24
    size: tuple[int, int] = (14, 14)
    kernel: tuple[int, int] = (3, 3)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (1, 1)
    expand: bool = True
    bias: bool = True
    residual: bool = False
    activations: tuple[str, str, str] = ("relu6", "relu6", "none")
    dtype: torch.dtype = torch.float32
    kind: str = "normal"

    @property
    def out_size(self) -> tuple[int, int]:
        return output_size(self.size, self.kernel, self.stride, self.padding)

    def weight(self, seed: int, channels: int, *rest: int) -> Tensor:
        fan_in = image((channels, *rest), self.dtype).stride(0)
        return image((channels, *rest), self.dtype, seed=seed) / fan_in**0.5

    def vector(self, size: int, seed: int) -> Tensor | None:
        return image((1, size, 1, 1), self.dtype, seed=seed).reshape(size) if self.bias else None

    def tensors(self) -> tuple[Tensor | None, ...]:
        """x, expand, its bias, depthwise, its bias, project, its bias, residual."""
        c = self.channels if self.expand else self.hidden
        return (
            image((self.batch, c, *self.size), self.dtype, kind=self.kind),
            self.weight(1, self.hidden, c, 1, 1) if self.expand else None,
            self.vector(self.hidden, 2) if self.expand else None,
            self.weight(3, self.hidden, 1, *self.kernel),
            self.vector(self.hidden, 4),
            self.weight(5, self.out, self.hidden, 1, 1),
            self.vector(self.out, 6),
            image((self.batch, self.out, *self.out_size), self.dtype, seed=7)
            if self.residual
            else None,
        )

    def reference(self, *tensors: Tensor | None) -> Tensor:
        return reference(*tensors, self.stride, self.padding, *self.activations)  # type: ignore[arg-type]

    def row_means(self, *tensors: Tensor | None) -> Tensor:
        return squeeze_reference(
            *tensors[:5],
            self.stride,
            self.padding,
            *self.activations[:2],  # type: ignore[arg-type]
        )[1]

    def depthwise_output(self, *tensors: Tensor | None) -> Tensor:
        return squeeze_reference(
            *tensors[:5],
            self.stride,
            self.padding,
            *self.activations[:2],  # type: ignore[arg-type]
        )[0]

    def run(self, *tensors: Tensor | None, backend: str = "cpu") -> Tensor:
        first, second, last = self.activations
        return inverted_residual(
            *tensors[:7], residual=tensors[7], stride=self.stride, padding=self.padding,  # type: ignore[arg-type]
            expand_activation=first, depthwise_activation=second, activation=last, backend=backend,
        )  # fmt: skip

    def squeeze(self, *tensors: Tensor | None, backend: str = "cpu") -> tuple[Tensor, Tensor]:
        first, second, _ = self.activations
        return inverted_residual_squeeze(
            *tensors[:5], stride=self.stride, padding=self.padding,  # type: ignore[arg-type]
            expand_activation=first, depthwise_activation=second, backend=backend,
        )  # fmt: skip

    def __str__(self) -> str:
        changed = [f"{k}={v}" for k, v in vars(self).items() if v != getattr(Case, k)]
        return " ".join(changed).replace("torch.", "") or "default"


def check(case: Case) -> None:
    tensors = case.tensors()
    with poisoned_memory():
        y = case.run(*tensors)
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert_close_to_float64(y, case.reference, *tensors)


def check_squeeze(case: Case) -> None:
    tensors = case.tensors()
    with poisoned_memory():
        d, means = case.squeeze(*tensors)
    for result in (d, means):
        assert result.is_contiguous(memory_format=torch.channels_last)
    assert_close_to_float64(d, case.depthwise_output, *tensors)
    assert_close_to_float64(means, case.row_means, *tensors)


SHAPES = [
    Case(),
    # Hidden channels around vectors, panels and chunks; odd ones leave half a bfloat16 word.
    *(Case(hidden=h, size=(5, 6)) for h in (1, 2, 7, 16, 17, 24, 33, 64, 72, 100)),
    *(Case(hidden=h, expand=False, size=(6, 5)) for h in (1, 8, 19, 35, 64)),
    # Input and output channels: panels, half panels, their rests.
    *(Case(channels=c, out=o, size=(6, 7)) for c in (1, 5, 19, 40) for o in (1, 9, 16, 27, 40)),
    # Windows.
    *(Case(kernel=(k, k), padding=(k // 2, k // 2), size=(9, 11)) for k in (1, 3, 5, 7)),
    *(Case(kernel=(5, 5), padding=(2, 2), stride=s, size=(15, 13)) for s in PAIRS),
    *(Case(stride=s, size=(13, 16), batch=2) for s in PAIRS),
    Case(stride=(3, 3), size=(11, 13)),
    Case(stride=(4, 5), size=(17, 19)),
    Case(kernel=(2, 4), padding=(0, 1), size=(8, 9)),
    Case(kernel=(3, 5), padding=(3, 4), stride=(2, 1), size=(6, 7)),
    Case(kernel=(3, 3), padding=(0, 0), size=(9, 9)),
    Case(kernel=(3, 3), padding=(5, 6), size=(4, 4)),
    *(Case(kernel=(3, 3), stride=s, expand=False, size=(11, 12)) for s in PAIRS),
    # Images smaller than the window, one row, one column.
    *(Case(size=s) for s in ((1, 1), (1, 9), (9, 1), (2, 2))),
    Case(kernel=(5, 5), padding=(2, 2), size=(2, 3), stride=(2, 2)),
    # Strips and chunks: images whose hidden rows fill the caches, and hidden tensors that do.
    Case(channels=24, hidden=144, out=24, size=(56, 56), residual=True),
    Case(channels=16, hidden=96, out=24, size=(57, 113), stride=(2, 2)),
    Case(channels=32, hidden=32, out=16, size=(33, 112), expand=False),
    Case(channels=64, hidden=390, out=72, size=(14, 14), residual=True),
    Case(channels=40, hidden=960, out=41, size=(7, 7)),
    Case(channels=24, hidden=700, out=24, size=(28, 29), stride=(2, 2)),
    Case(channels=16, hidden=1000, out=17, size=(15, 14), expand=False),
    # What surrounds the products.
    *(Case(activations=(a, b, c), residual=True)
      for a, b, c in zip(ACTIVATIONS, ACTIVATIONS[1:] + ACTIVATIONS[:1], ACTIVATIONS[::-1],
                         strict=True)),
    Case(bias=False),
    Case(residual=True, batch=3),
    Case(batch=0),
    Case(channels=1024, hidden=64, size=(3, 5)),  # pixels 4096 bytes apart
    Case(kind="offset", activations=("none", "none", "none")),
]  # fmt: skip
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


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize(
    ("case", "dtype"),
    [run for i, run in enumerate(RUNS) if i % 3 == 0],
    ids=lambda value: str(value).split(".")[-1],
)
def test_first_half_matches_float64(case: Case, dtype: torch.dtype, level: str) -> None:
    with isa(level):
        check_squeeze(replace(case, dtype=dtype))


RANDOM_CASES = st.builds(
    Case,
    batch=st.integers(1, 3),
    channels=st.integers(1, 40),
    hidden=st.integers(1, 300),
    out=st.integers(1, 60),
    size=st.tuples(st.integers(1, 20), st.integers(1, 30)),
    kernel=st.tuples(st.integers(1, 5), st.integers(1, 7)),
    stride=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    padding=st.tuples(st.integers(2, 4), st.integers(3, 4)),
    expand=st.booleans(),
    bias=st.booleans(),
    residual=st.booleans(),
    activations=st.tuples(*[st.sampled_from(ACTIVATIONS)] * 3),
    dtype=st.sampled_from(DTYPES),
)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(level=st.sampled_from(LEVELS or ("none",)), case=RANDOM_CASES, squeeze=st.booleans())
def test_matches_float64_at_random_shapes(level: str, case: Case, squeeze: bool) -> None:
    with isa(level):
        (check_squeeze if squeeze else check)(case)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("expand", [False, True])
def test_nan_and_infinity_go_where_pytorch_puts_them(
    expand: bool, dtype: torch.dtype, level: str
) -> None:
    case = Case(
        channels=5, hidden=21, out=19, size=(30, 31), expand=expand, residual=True, dtype=dtype,
        activations=("relu", "relu6", "hardswish"),
    )  # fmt: skip
    tensors = case.tensors()
    x, residual = tensors[0], tensors[7]
    assert x is not None
    assert residual is not None
    strange = torch.tensor([float("nan"), float("inf"), -float("inf")], dtype=dtype)
    x[0, 1, 3, :3] = strange
    x[0, 2, 29, 30] = strange[0]
    residual[0, 1, 15, 7:10] = strange
    with isa(level):
        y = case.run(*tensors)
    wide = [None if t is None else t.double() for t in tensors]
    expected = case.reference(*wide).to(dtype)
    assert expected.isnan().any()
    assert not expected.isnan().all()
    assert torch.equal(y.isnan(), expected.isnan())
    assert torch.equal(y.isposinf(), expected.isposinf())
    assert torch.equal(y.isneginf(), expected.isneginf())


def packed(case: Case, *tensors: Tensor | None) -> tuple[Tensor | None, Tensor, Tensor]:
    _, expand, expand_bias, depthwise, depthwise_bias, project, project_bias, _ = tensors
    assert depthwise is not None
    assert project is not None
    return (
        None if expand is None else prepack_pointwise(expand, expand_bias, dtype=case.dtype),
        prepack_depthwise(depthwise, depthwise_bias),
        prepack_pointwise(project, project_bias, dtype=case.dtype),
    )


def around(source: Tensor | None, canary: float, border: int) -> Guarded | None:
    return None if source is None else guarded(source, canary=canary, border=border)


SLICED = [
    Case(channels=19, hidden=33, out=24, size=(9, 16)),
    Case(channels=12, hidden=24, out=12, size=(6, 7), residual=True),
    Case(channels=8, hidden=40, out=20, size=(9, 10), stride=(2, 2), residual=True),
    Case(hidden=27, out=33, size=(7, 5), expand=False, residual=True),
    Case(channels=24, hidden=600, out=24, size=(15, 14), residual=True),
]


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", SLICED, ids=str)
def test_channel_slices_are_read_and_written_in_place_and_nothing_around_them(
    case: Case, dtype: torch.dtype, level: str
) -> None:
    case = replace(case, dtype=dtype, batch=2)
    tensors = case.tensors()
    x, residual = tensors[0], tensors[7]
    expand, depthwise, project = packed(case, *tensors)
    for canary, border in itertools.product((float("nan"), 12.0), (0, 1)):
        source, added = around(x, canary, border), around(residual, canary, border)
        shape = case.reference(*tensors).shape
        target = guarded(torch.zeros(shape, dtype=dtype), canary=canary, border=border)
        assert source is not None
        with isa(level):
            torch.ops.cvfast.inverted_residual_cpu.out(
                source.tensor, expand, depthwise, project,
                None if added is None else added.tensor, case.hidden, case.kernel, case.stride,
                case.padding, *case.activations, out=target.tensor,
            )  # fmt: skip
        for guard in (source, target, *([added] if added else [])):
            guard.assert_untouched()
        assert_close_to_float64(target.tensor, case.reference, *tensors)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", SLICED, ids=str)
def test_the_first_half_writes_slices_and_nothing_around_them(
    case: Case, dtype: torch.dtype, level: str
) -> None:
    case = replace(case, dtype=dtype, batch=2)
    tensors = case.tensors()
    expand, depthwise, _ = packed(case, *tensors)
    d_shape = case.depthwise_output(*tensors).shape
    for border in (0, 1):
        source = around(tensors[0], float("nan"), border)
        d = guarded(torch.zeros(d_shape, dtype=dtype), border=border)
        means = guarded(torch.zeros((*d_shape[:3], 1), dtype=dtype), border=border)
        assert source is not None
        with isa(level):
            torch.ops.cvfast.inverted_residual_squeeze_cpu.out(
                source.tensor, expand, depthwise, case.hidden, case.kernel, case.stride,
                case.padding, *case.activations[:2], out=d.tensor, row_means=means.tensor,
            )  # fmt: skip
        for guard in (source, d, means):
            guard.assert_untouched()
        assert_close_to_float64(d.tensor, case.depthwise_output, *tensors)
        assert_close_to_float64(means.tensor, case.row_means, *tensors)


BIT_CASES = [
    Case(channels=16, hidden=96, out=24, size=(112, 112), stride=(2, 2)),
    Case(channels=24, hidden=144, out=24, size=(56, 56), residual=True, batch=3),
    Case(channels=64, hidden=384, out=64, size=(14, 14), residual=True),
    Case(channels=160, hidden=960, out=160, size=(7, 7), batch=2),
    Case(hidden=128, out=128, size=(56, 56), expand=False),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", BIT_CASES, ids=str)
def test_threads_and_batch_do_not_change_a_bit(case: Case, dtype: torch.dtype) -> None:
    case = replace(case, dtype=dtype)
    tensors = case.tensors()

    def results(*tensors: Tensor | None) -> list[Tensor]:
        return [case.run(*tensors), *case.squeeze(*tensors)]

    with threads(1):
        alone = results(*tensors)
    for count in (2, 3, 5):
        with threads(count):
            for one, other in zip(results(*tensors), alone, strict=True):
                assert torch.equal(one, other)
    x, *weights, residual = tensors
    assert x is not None
    for i in range(case.batch):
        added = None if residual is None else residual[i : i + 1]
        for one, whole in zip(results(x[i : i + 1], *weights, added), alone, strict=True):
            assert torch.equal(one, whole[i : i + 1])


@pytest.mark.parametrize("case", BIT_CASES, ids=str)
def test_levels_with_fused_multiply_add_agree_to_the_bit(case: Case) -> None:
    tensors = case.tensors()
    results = []
    for level in LEVELS:
        if level != "portable":
            with isa(level):
                results.append(case.run(*tensors))
    assert all(torch.equal(result, results[0]) for result in results)


@pytest.mark.parametrize("level", LEVELS)
def test_equals_the_three_kernels_one_by_one(level: str) -> None:
    # One chunk and one order of summation: the same tiles give the same bits.
    case = Case(channels=24, hidden=96, out=24, size=(28, 28), residual=True)
    tensors = case.tensors()
    x, residual = tensors[0], tensors[7]
    assert x is not None
    expand, depthwise, project = packed(case, *tensors)
    first, second, last = case.activations
    ops = torch.ops.cvfast
    with isa(level):
        hidden = ops.pointwise_cpu(x, expand, 96, [1, 1], None, None, None, None, first)
        d = ops.depthwise_cpu(hidden, depthwise, [3, 3], [1, 1], [1, 1], [1, 1], second)
        y = ops.pointwise_cpu(d, project, 24, [1, 1], None, None, None, residual, last)
        fused = case.run(*tensors)
    assert torch.equal(fused, y)


def test_four_paddings_pad_each_side() -> None:
    # TensorFlow's "same" at stride 2: below and right alone.
    case = Case(size=(8, 9), stride=(2, 2), padding=(0, 0))
    tensors = case.tensors()
    x, *weights = tensors
    assert x is not None
    wide = replace(case, size=(9, 10))
    padded = torch.zeros(1, 16, 9, 10).to(memory_format=torch.channels_last)
    padded[:, :, :8, :9] = x
    expand, depthwise, project = packed(case, *tensors)
    activations = ("none", "relu6", "none")  # of the padding too: an expansion without bias
    weights[1] = None
    tensors = (x, *weights)
    expand, depthwise, project = packed(case, *tensors)
    y = torch.ops.cvfast.inverted_residual_cpu(
        x, expand, depthwise, project, None, 48, 24, [3, 3], [2, 2], [0, 0, 1, 1], *activations
    )
    expected = replace(wide, activations=activations).run(padded, *weights)
    assert torch.equal(y, expected)


# Backends, bad input, counts


def test_falls_back_on_the_reference_and_says_why() -> None:
    *rest, residual = Case(residual=True).tensors()
    case = Case(residual=True)
    assert residual is not None
    nchw = residual.contiguous()
    assert torch.equal(case.run(*rest, nchw, backend="auto"), case.reference(*rest, nchw))
    with pytest.raises(backends.Unsupported, match="residual is not channels-last"):
        case.run(*rest, nchw)
    wide = [None if t is None else t.double() for t in (*rest, residual)]
    assert torch.equal(case.run(*wide, backend="auto"), case.reference(*wide))
    with pytest.raises(backends.Unsupported, match="float64"):
        case.run(*wide)
    with pytest.raises(backends.Unsupported, match="x is on meta"):
        case.run(*(None if t is None else t.to("meta") for t in (*rest, residual)))


@pytest.mark.parametrize("squeeze", [False, True])
def test_gradients_are_those_of_the_reference(squeeze: bool) -> None:
    case = Case(size=(5, 5))
    run = case.squeeze if squeeze else case.run
    x, *rest = case.tensors()
    assert x is not None
    x.requires_grad_()
    with pytest.raises(backends.Unsupported, match="the kernel has no gradient"):
        run(x, *rest)
    y = run(x, *rest, backend="auto")
    total = sum(t.sum() for t in y) if squeeze else y.sum()  # type: ignore[union-attr]
    total.backward()  # type: ignore[union-attr]
    assert x.grad is not None
    with torch.no_grad():
        run(x, *rest)
    depthwise = rest[2]
    weights = packed(case, x, *rest)
    with pytest.raises(RuntimeError, match="inverted_residual_cpu has no gradient"):
        torch.ops.cvfast.inverted_residual_cpu(
            x, *weights, None, 48, 24, [3, 3], [1, 1], [1, 1], *case.activations
        )
    with pytest.raises(RuntimeError, match='backend="reference"'):
        torch.ops.cvfast.inverted_residual_squeeze(
            x, rest[0], None, depthwise, None, [1, 1], [1, 1], "relu", "relu"
        )


W1, W2, W3 = torch.zeros(6, 4, 1, 1), torch.zeros(6, 1, 3, 3), torch.zeros(5, 6, 1, 1)
X = torch.zeros(2, 4, 8, 8)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"x": X[0]}, ValueError, r"x has shape \(4, 8, 8\), expected \[N, C, H, W\]"),
        ({"x": X[:, :, :0]}, ValueError, "only N may be zero"),
        ({"x": X.int()}, TypeError, "x is torch.int32, expected a floating-point dtype"),
        ({"expand": torch.zeros(6, 3, 1, 1)}, ValueError, r"expected \(6, 4, 1, 1\)"),
        ({"expand": torch.zeros(6, 4)}, ValueError, r"expected \[E, 4, 1, 1\]"),
        ({"expand": None}, ValueError, r"depthwise has shape .* expected \[4, 1, kh, kw\]"),
        ({"expand": None, "expand_bias": torch.zeros(6)}, ValueError, "but expand is not"),
        ({"depthwise": torch.zeros(6, 2, 3, 3)}, ValueError, r"expected \[6, 1, kh, kw\]"),
        ({"depthwise_bias": torch.zeros(5)}, ValueError, r"expected \(6,\)"),
        ({"depthwise": torch.zeros(6, 1, 11, 11)}, ValueError, "larger than the image 8x8"),
        ({"project": torch.zeros(5, 4, 1, 1)}, ValueError, r"expected \(5, 6, 1, 1\)"),
        ({"project": torch.zeros(0, 6, 1, 1)}, ValueError, r"expected \[O, 6, 1, 1\]"),
        ({"residual": X}, ValueError, r"residual has shape .* expected \(2, 5, 8, 8\)"),
        ({"project": W3.double()}, TypeError, "project is torch.float64 but x is torch.float32"),
        ({"depthwise": W2.to("meta")}, ValueError, "depthwise is on meta"),
        ({"stride": 0}, ValueError, r"stride=\(0, 0\): expected at least 1"),
        ({"padding": (1, 2, 3)}, ValueError, "expected one number or two"),
        ({"activation": "gelu"}, ValueError, "unknown activation 'gelu'"),
        ({"backend": "tpu"}, ValueError, "unknown backend 'tpu'"),
    ],
    ids=str,
)
def test_bad_input_is_named(
    arguments: dict[str, object], error: type[Exception], message: str
) -> None:
    defaults = {
        "x": X, "expand": W1, "expand_bias": None, "depthwise": W2, "depthwise_bias": None,
        "project": W3, "project_bias": None,
    }  # fmt: skip
    with pytest.raises(error, match=message):
        inverted_residual(**{**defaults, **arguments})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"x": torch.zeros(1, 16, 14, 14)}, "x must be channels-last"),
        ({"x": torch.zeros(1, 16, 0, 14).to(memory_format=torch.channels_last)}, "no pixels"),
        ({"expand": torch.zeros(7, 16)}, "expand does not come from pointwise.prepack"),
        ({"expand": None}, "without expand it is x's 16 channels"),
        ({"depthwise": torch.zeros(1, 3, 9, 16)}, "depthwise does not come from depthwise.prepack"),
        ({"project": torch.zeros(7, 16)}, "project does not come from pointwise.prepack"),
        ({"residual": torch.zeros(1, 24, 14, 14)}, "residual must be channels-last"),
        ({"residual": torch.zeros(1, 24, 7, 7)}, r"residual must be \[1, 24, 14, 14\]"),
        ({"kernel_size": [3]}, "kernel_size and stride take two numbers each"),
        ({"stride": [0, 1]}, "must be positive"),
        ({"padding": [1, 1, 1]}, "two numbers .* or four"),
        ({"padding": [-1, 1]}, "padding must not be negative"),
        ({"padding": [0, 0], "kernel_size": [15, 3]}, "larger than the padded image"),
        ({"activation": "gelu"}, "activation"),
    ],
    ids=str,
)
def test_the_kernel_names_bad_operands(arguments: dict[str, object], message: str) -> None:
    case = Case()
    tensors = case.tensors()
    expand, depthwise, project = packed(case, *tensors)
    defaults = {
        "x": tensors[0], "expand": expand, "depthwise": depthwise, "project": project,
        "residual": None, "hidden": 48, "out_channels": 24, "kernel_size": [3, 3],
        "stride": [1, 1], "padding": [1, 1], "expand_activation": "relu6",
        "depthwise_activation": "relu6", "activation": "none",
    }  # fmt: skip
    with pytest.raises(RuntimeError, match=message):
        torch.ops.cvfast.inverted_residual_cpu(**{**defaults, **arguments})


@pytest.mark.parametrize("expand", [False, True])
def test_opcheck_and_flops(expand: bool) -> None:
    case = Case(size=(6, 7), stride=(2, 2), expand=expand, batch=2)
    tensors = case.tensors()
    x, *_, residual = tensors
    geometry = ([2, 2], [1, 1])
    block = (*tensors, *geometry, *case.activations)
    half = (*tensors[:5], *geometry, *case.activations[:2])
    first, depthwise, project = packed(case, *tensors)
    packed_geometry = ([3, 3], [2, 2], [1, 1])
    packed_block = (
        x, first, depthwise, project, residual, 48, 24, *packed_geometry, *case.activations,
    )  # fmt: skip
    packed_half = (x, first, depthwise, 48, *packed_geometry, *case.activations[:2])
    ops = torch.ops.cvfast
    n, c, *size = x.shape  # type: ignore[union-attr]
    for op, arguments, out in (
        (ops.inverted_residual, block, 24),
        (ops.inverted_residual_squeeze, half, 0),
        (ops.inverted_residual_cpu, packed_block, 24),
        (ops.inverted_residual_squeeze_cpu, packed_half, 0),
    ):
        torch.library.opcheck(op.default, arguments)
        with FlopCounterMode(display=False) as counter:
            op(*arguments)
        expected = flops((n, c, *size), 48, out, (3, 3), case.out_size, expand=expand)
        assert counter.get_total_flops() == expected
    with FlopCounterMode(display=False) as counter:
        case.reference(*tensors)
    assert counter.get_total_flops() == flops(
        (n, c, *size), 48, 24, (3, 3), case.out_size, expand=expand
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("expand", [False, True])
def test_bytes_are_those_of_the_operands(expand: bool, dtype: torch.dtype) -> None:
    case = Case(channels=32, hidden=64, out=16, expand=expand, dtype=dtype, batch=2)
    tensors = case.tensors()
    x = tensors[0]
    assert x is not None
    operands = [x, *packed(case, *tensors), case.reference(*tensors)]
    expected = sum(t.numel() * t.element_size() for t in operands if t is not None)
    channels = x.shape[1]
    assert expected == bytes_moved(
        (2, channels, 14, 14), 64, 16, (3, 3), (14, 14), dtype, expand=expand
    )


@pytest.mark.parametrize(
    ("channels", "hidden", "out", "size", "stride", "batch", "threads", "expected"),
    [
        (16, 96, 24, 112, 2, 1, 1, True),
        (24, 144, 24, 56, 1, 1, 2, True),
        (24, 144, 24, 56, 1, 1, 16, False),  # 4 rows a thread
        (24, 144, 24, 56, 1, 16, 16, True),  # an image a thread
        (64, 384, 64, 14, 1, 1, 1, False),  # 301 kB stay in L2
        (64, 384, 64, 14, 1, 8, 1, True),
        (160, 960, 160, 7, 1, 8, 1, False),
        (40, 120, None, 28, 1, 8, 2, True),
        (80, 480, None, 14, 1, 8, 2, False),
    ],
)
def test_fuses_where_measurements_say(
    channels: int, hidden: int, out: int | None, size: int, stride: int, batch: int, threads: int,
    expected: bool,
) -> None:  # fmt: skip
    for level in LEVELS:
        with isa(level):
            answer = fuses(
                (batch, channels, size, size), hidden, out, kernel_size=(3, 3),
                stride=(stride, stride), expands=True, threads=threads,
            )  # fmt: skip
        # AMX multiplies so many channels faster in kernels of their own.
        apart = level == "avx512_amx" and min(channels, hidden, out or hidden) >= 64
        assert answer is (expected and not apart)


def test_separable_blocks_fuse_for_the_output_of_the_depthwise_convolution() -> None:
    def answer(hidden: int, out: int | None, size: int) -> bool:
        return fuses(
            (1, hidden, size, size), hidden, out, kernel_size=(3, 3), stride=(1, 1), expands=False
        )

    assert answer(32, 16, 112)
    assert not answer(512, 512, 14)
    assert not answer(32, None, 112)  # nothing is kept out of memory


@pytest.mark.parametrize(("expands", "hidden"), [(True, 192), (False, 256)])
def test_by_amx_blocks_fuse_whose_products_take_all_channels_at_once(
    expands: bool, hidden: int
) -> None:
    for level in LEVELS:
        with isa(level):
            answers = [
                fuses(
                    (8, 32 if expands else count, 28, 28), count, 32, kernel_size=(3, 3),
                    stride=(1, 1), expands=expands, dtype=torch.bfloat16,
                )
                for count in (hidden, hidden + 32)
            ]  # fmt: skip
        assert answers == [True, level != "avx512_amx"]


def test_compiles_whole() -> None:
    case = Case(size=(6, 6))
    tensors = case.tensors()
    compiled = torch.compile(case.run, fullgraph=True, backend="eager")
    assert torch.equal(compiled(*tensors), case.run(*tensors))


def test_a_large_bias_costs_small_products_no_digits() -> None:
    case = Case(channels=160, hidden=160, out=32, size=(7, 7), activations=("none",) * 3)
    tensors = [None if t is None else t.clone() for t in case.tensors()]
    for i in (1, 5):
        tensors[i].mul_(0.02)  # type: ignore[union-attr]
    verdict = tolerance.check(
        case.run(*tensors),
        case.reference(*(None if t is None else t.double() for t in tensors)),
        case.reference(*tensors),
    )
    assert verdict, str(verdict)
