from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from cvfast.ops.elementwise import ACTIVATIONS, OPS, bytes_moved, reference
from cvfast.testing import (
    assert_close_to_float64,
    guarded,
    image,
    isa,
    isa_levels,
    poisoned_memory,
    threads,
)

pytestmark = pytest.mark.usefixtures("cpu_extension")

# Levels above avx512 change products alone; they have the code of avx512 for this one.
LEVELS = tuple(level for level in isa_levels() if not level.startswith("avx512_"))
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
RUN = torch.ops.cvfast.elementwise_cpu

# What of x's shape [N, C, H, W] the shape of y has.
Y_SHAPES = {
    "image": (1, 1, 1, 1),
    "gate": (1, 1, 0, 0),
    "channel": (0, 1, 0, 0),
    "one": (0, 1, 1, 1),
}


@dataclass(frozen=True)
class Case:
    shape: tuple[int, int, int, int] = (2, 35, 6, 7)
    op: str = "none"
    y: str = "image"
    activation: str = "none"
    scaled: bool = False
    dtype: torch.dtype = torch.float32
    data: str = "normal"

    def tensors(self) -> tuple[Tensor | None, ...]:
        """x, y, scale, shift; the vectors are exact in every dtype."""
        x = image(self.shape, self.dtype, kind=self.data)
        y = None
        if self.op != "none":
            kept = zip(self.shape, Y_SHAPES[self.y], strict=True)
            y = image([n if keep else 1 for n, keep in kept], self.dtype, seed=1)
        if not self.scaled:
            return x, y, None, None
        values = image((2, self.shape[1], 1, 1), torch.bfloat16, seed=2).float()
        return x, y, values[0].flatten(), values[1].flatten()

    def reference(self, *tensors: Tensor | None) -> Tensor:
        x, y, scale, shift = tensors
        assert x is not None
        return reference(x, y, self.op, self.activation, scale, shift)

    def run(self, x: Tensor, y: Tensor | None, *vectors: Tensor | None) -> Tensor:
        return RUN(x, y, self.op, self.activation, *vectors)

    def __str__(self) -> str:
        changed = [f"{k}={v}" for k, v in vars(self).items() if v != getattr(Case, k)]
        return " ".join(changed).replace("torch.", "") or "default"


def check(case: Case) -> None:
    tensors = case.tensors()
    with poisoned_memory():
        y = case.run(*tensors)  # type: ignore[arg-type]
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert_close_to_float64(y, case.reference, *tensors)


CASES = [
    *(Case(activation=activation) for activation in ACTIVATIONS),
    *(
        Case(op=op, y=y, scaled=scaled)
        for op, y, scaled in itertools.product(("add", "mul"), Y_SHAPES, (False, True))
    ),
    *(
        Case((1, channels, 3, 5), "mul", "gate", activation, True)
        for channels, activation in itertools.product((1, 7, 8, 16, 31, 64, 130), ("relu", "silu"))
    ),
    *(
        Case(shape, op, y)
        for shape in ((1, 1, 1, 1), (3, 20, 1, 1), (2, 5, 1, 40), (2, 64, 9, 1))
        for op, y in (("add", "image"), ("mul", "gate"), ("add", "channel"))
    ),
    Case((0, 8, 3, 3), "add"),
    Case((1, 64, 90, 31), "add", activation="relu"),
    Case((2, 24, 40, 40), "mul", "gate", activation="hardswish"),
    Case(data="offset", op="add", activation="silu"),
]


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("case", CASES, ids=str)
def test_matches_float64(case: Case, dtype: torch.dtype, level: str) -> None:
    with isa(level):
        check(replace(case, dtype=dtype))


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    level=st.sampled_from(LEVELS or ("none",)),
    case=st.builds(
        Case,
        shape=st.tuples(
            st.integers(1, 3), st.integers(1, 140), st.integers(1, 9), st.integers(1, 9)
        ),
        op=st.sampled_from(OPS),
        y=st.sampled_from(tuple(Y_SHAPES)),
        activation=st.sampled_from(ACTIVATIONS),
        scaled=st.booleans(),
        dtype=st.sampled_from(DTYPES),
    ),
)
def test_matches_float64_at_random_shapes(level: str, case: Case) -> None:
    with isa(level):
        check(case)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("op", OPS)
def test_nan_and_infinity_go_where_pytorch_puts_them(
    op: str, activation: str, dtype: torch.dtype, level: str
) -> None:
    case = Case(op=op, activation=activation, dtype=dtype, data="nonfinite", scaled=op == "none")
    tensors = case.tensors()
    with isa(level):
        y = case.run(*tensors)  # type: ignore[arg-type]
    expected = case.reference(*(None if t is None else t.double() for t in tensors)).to(dtype)
    assert expected.isnan().any()
    assert torch.equal(y.isnan(), expected.isnan())
    assert torch.equal(y.isposinf(), expected.isposinf())
    assert torch.equal(y.isneginf(), expected.isneginf())


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("activation", ["sigmoid", "silu"])
@pytest.mark.parametrize("around", [0.0, 1.0, -5.0, 30.0, 86.0, -86.0])
def test_exponentials_hold_over_the_whole_range(activation: str, around: float, level: str) -> None:
    x = (image((1, 64, 30, 30)) + around).contiguous(memory_format=torch.channels_last)
    with isa(level):
        y = RUN(x, None, "none", activation)
    assert_close_to_float64(y, Case(activation=activation).reference, x, None, None, None)


@pytest.mark.parametrize("level", LEVELS)
def test_the_tails_of_exponentials(level: str) -> None:
    x = torch.tensor([-1e30, -1e4, -104, -90, 90, 104, 1e4, 1e30]).reshape(1, 8, 1, 1)
    with isa(level):
        sigmoid, silu = (RUN(x, None, "none", name).flatten() for name in ("sigmoid", "silu"))
    torch.testing.assert_close(sigmoid, torch.tensor([0.0] * 4 + [1.0] * 4), rtol=0, atol=1e-38)
    torch.testing.assert_close(silu, x.flatten().clamp(min=0), rtol=0, atol=1e-36)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_16_bit_pattern_survives_a_copy(dtype: torch.dtype, level: str) -> None:
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    x = bits.view(dtype).reshape(64, 1024, 1, 1)
    with isa(level):
        y = RUN(x, None, "none", "none")
    assert torch.equal(y.isnan(), x.isnan())
    finite = ~x.isnan()
    assert torch.equal(y[finite].view(torch.int16), x[finite].view(torch.int16))


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "case",
    [
        Case(activation="silu"),
        Case(op="add", activation="relu"),
        Case((2, 64, 5, 6), "mul", "gate", scaled=True),
        Case((2, 8, 1, 1), "add"),
    ],
    ids=str,
)
def test_channel_slices_are_read_and_written_in_place_and_nothing_around_them(
    case: Case, dtype: torch.dtype, level: str
) -> None:
    case = replace(case, dtype=dtype)
    x, y, *vectors = case.tensors()
    assert x is not None
    for canary, border in itertools.product((float("nan"), 12.0), (0, 1)):
        source, target = (
            guarded(t, canary=canary, border=border) for t in (x, torch.zeros_like(x))
        )
        other = None if y is None else guarded(y, canary=canary, border=border)
        with isa(level):
            RUN.out(
                source.tensor, other and other.tensor, case.op, case.activation, *vectors,
                out=target.tensor,
            )  # fmt: skip
        for around in (source, target, *([other] if other else [])):
            around.assert_untouched()
        assert_close_to_float64(target.tensor, case.reference, x, y, *vectors)


def test_the_result_may_take_the_place_of_an_operand() -> None:
    case = Case((2, 40, 9, 9), "add", activation="relu")
    x, y, *_ = case.tensors()
    assert x is not None
    assert y is not None
    expected = case.run(x, y)
    for target in (x, y):
        left, right = x.clone(), y.clone()
        out = left if target is x else right
        RUN.out(left, right, "add", "relu", out=out)
        assert torch.equal(out, expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "case",
    [
        Case((3, 64, 57, 57), "add", activation="relu"),
        Case((1, 35, 113, 57), activation="silu"),
        Case((3, 130, 28, 28), "mul", "gate", scaled=True),
    ],
    ids=str,
)
def test_threads_and_batch_do_not_change_a_bit(case: Case, dtype: torch.dtype) -> None:
    x, y, *vectors = replace(case, dtype=dtype).tensors()
    assert x is not None
    with threads(1):
        alone = case.run(x, y, *vectors)
    for count in (2, 3, 5):
        with threads(count):
            assert torch.equal(case.run(x, y, *vectors), alone)
    for i in range(len(x)):
        one = case.run(x[i : i + 1], None if y is None else y[i : i + 1], *vectors)
        assert torch.equal(one, alone[i : i + 1])


# Bad input

X, V = torch.zeros(2, 8, 6, 6).contiguous(memory_format=torch.channels_last), torch.zeros(8)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"x": X[0]}, r"x must be \[N, C, H, W\], got 3 dimensions"),
        ({"x": X.contiguous()}, "x must be channels-last"),
        ({"x": X.double(), "y": X.double()}, "x must be float32, bfloat16 or float16"),
        ({"y": None}, "op 'add' takes a y"),
        ({"op": "none"}, "op 'none' takes no y"),
        ({"y": X[:, :4]}, r"y must be \[2, 8, 6, 6\]"),
        ({"y": X[:, :, :1]}, r"y must be \[2, 8, 6, 6\]"),
        ({"y": X[0]}, r"y must be \[2, 8, 6, 6\]"),
        ({"y": X.contiguous()}, "y must be channels-last"),
        ({"y": X.half()}, "y must have the dtype of x"),
        ({"op": "sub"}, "unknown op 'sub'; expected none, add or mul"),
        ({"activation": "gelu"}, "unknown activation 'gelu'; expected none, relu, .* or silu"),
        ({"scale": V}, "scale and shift come together"),
        ({"scale": V, "shift": V[1:]}, r"shift must be a contiguous float32 \[8\]"),
        ({"scale": V.half(), "shift": V}, r"scale must be a contiguous float32 \[8\]"),
    ],
    ids=str,
)
def test_bad_input_is_named(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        RUN(**{"x": X, "y": X, "op": "add", "activation": "none", **arguments})


def test_a_wrong_output_is_named() -> None:
    with pytest.raises(RuntimeError, match=r"out must be \[2, 8, 6, 6\]"):
        RUN.out(X, None, "none", "relu", out=X[:, :4])


def test_the_reference_names_bad_input_too() -> None:
    with pytest.raises(ValueError, match="unknown op 'sub'; expected none, add, mul"):
        reference(X, X, "sub")
    with pytest.raises(ValueError, match="unknown activation 'gelu'"):
        reference(X, None, "none", "gelu")


# The operators as torch sees them


def test_opcheck() -> None:
    case = Case((2, 8, 3, 3), "mul", "gate", "sigmoid", True)
    x, y, *vectors = case.tensors()
    arguments = (x, y, case.op, case.activation, *vectors)
    torch.library.opcheck(RUN.default, arguments)
    torch.library.opcheck(RUN.out, arguments, {"out": torch.empty_like(x)})


def test_a_gradient_is_refused() -> None:
    x = Case().tensors()[0]
    assert x is not None
    with pytest.raises(RuntimeError, match="elementwise_cpu has no gradient"):
        RUN(x.requires_grad_(), None, "none", "relu")
    with torch.no_grad():
        assert not RUN(x, None, "none", "relu").requires_grad


def test_byte_model_counts_each_operand_once() -> None:
    assert bytes_moved((2, 8, 6, 6), dtype=torch.bfloat16) == 2 * 2 * 576
    assert bytes_moved((2, 8, 6, 6), (2, 8, 1, 1)) == 4 * (2 * 576 + 16)
