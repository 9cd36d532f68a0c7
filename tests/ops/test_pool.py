from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from cvfast.ops.pool import KINDS, bytes_moved, global_reference, output_size, reference
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
OPS = torch.ops.cvfast


@dataclass(frozen=True)
class Case:
    kind: str = "max"
    batch: int = 1
    channels: int = 32
    size: tuple[int, int] = (14, 14)
    kernel: tuple[int, int] = (3, 3)
    stride: tuple[int, int] = (2, 2)
    padding: tuple[int, int] = (1, 1)
    dilation: tuple[int, int] = (1, 1)
    ceil_mode: bool = False
    count_include_pad: bool = True
    divisor: int | None = None
    scaled: bool = False
    dtype: torch.dtype = torch.float32
    data: str = "normal"

    def image(self) -> Tensor:
        return image((self.batch, self.channels, *self.size), self.dtype, kind=self.data)

    @property
    def arguments(self) -> tuple[Any, ...]:
        """All but x."""
        dilation = self.dilation if self.kind == "max" else (1, 1)
        divisor = self.divisor if self.kind == "avg" else None
        return (
            self.kind, self.kernel, self.stride, self.padding, dilation, self.ceil_mode,
            self.count_include_pad, divisor, *self.vectors(),
        )  # fmt: skip

    def vectors(self) -> tuple[Tensor, Tensor] | tuple[None, None]:
        """scale and shift, exact in every dtype."""
        if not self.scaled or self.kind == "max":
            return None, None
        values = image((2, self.channels, 1, 1), torch.bfloat16, seed=1).float()
        return values[0].flatten(), values[1].flatten()

    def reference(self, x: Tensor) -> Tensor:
        return reference(x, *self.arguments)

    @property
    def valid(self) -> bool:
        sizes = output_size(
            self.size, self.kernel, self.stride, self.padding, self.arguments[4], self.ceil_mode
        )
        return min(sizes) > 0

    def __str__(self) -> str:
        changed = [f"{k}={v}" for k, v in vars(self).items() if v != getattr(Case, k)]
        return " ".join(changed).replace("torch.", "") or "default"


def check(case: Case) -> None:
    x = case.image()
    with poisoned_memory():
        y = OPS.pool_cpu(x, *case.arguments)
    assert y.is_contiguous(memory_format=torch.channels_last)
    if case.kind == "max":
        assert torch.equal(y, case.reference(x))
    else:
        assert_close_to_float64(y, case.reference, x)


def both(**fields: Any) -> list[Case]:
    return [Case(kind=kind, **fields) for kind in KINDS]


SHAPES = [
    *both(),
    *both(stride=(1, 1)),
    *both(kernel=(2, 2), padding=(0, 0)),
    *both(kernel=(2, 2), padding=(1, 1), size=(9, 13)),
    *both(kernel=(1, 1), padding=(0, 0)),
    *both(kernel=(5, 3), stride=(1, 2), padding=(2, 0), size=(11, 17)),
    *both(kernel=(7, 7), stride=(7, 7), padding=(0, 0)),
    *both(kernel=(14, 14), stride=(1, 1), padding=(0, 0), channels=300),
    *both(kernel=(2, 2), stride=(3, 3), padding=(0, 0), size=(17, 16)),
    *both(kernel=(2, 2), stride=(3, 3), padding=(1, 1), size=(17, 16), ceil_mode=True),
    # The last window: within the image, in its padding, beyond both, or dropped.
    *(
        case
        for size, stride in itertools.product((5, 6, 7, 8), (2, 3))
        for case in both(size=(size, size + 1), stride=(stride, stride), ceil_mode=True)
    ),
    *both(kernel=(4, 4), stride=(4, 4), padding=(0, 0), size=(3, 9), ceil_mode=True),
    Case(dilation=(2, 3), size=(9, 11)),
    Case(dilation=(4, 4), size=(9, 9), stride=(1, 1)),
    # Windows that lie between the pixels of their taps hold nothing.
    Case(kernel=(2, 2), dilation=(3, 3), padding=(1, 1), size=(2, 2), stride=(1, 1)),
    *(
        Case(kind="avg", count_include_pad=count, divisor=divisor, ceil_mode=ceil, size=(7, 8))
        for count, divisor, ceil in itertools.product((False, True), (None, 5, -3), (False, True))
    ),
    # Channels around every vector width, and several blocks of them.
    *(case for c in (1, 3, 8, 15, 17, 31, 33, 65, 129) for case in both(channels=c, size=(6, 5))),
    *both(channels=700, size=(13, 12)),
    *both(channels=24, size=(1, 1)),
    *both(channels=40, size=(1, 50)),
    *both(channels=40, size=(50, 1)),
    *both(batch=3, channels=48, size=(5, 9)),
    *both(batch=0),
    Case(kind="avg", data="offset"),
    *(
        Case(kind="avg", scaled=True, kernel=(2, 2), padding=(0, 0), channels=c, batch=2)
        for c in (16, 35, 700)
    ),
    Case(kind="avg", scaled=True, count_include_pad=False, ceil_mode=True, size=(6, 9)),
]


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("case", SHAPES, ids=str)
def test_equals_pytorch(case: Case, dtype: torch.dtype, level: str) -> None:
    with isa(level):
        check(replace(case, dtype=dtype))


KERNELS = st.tuples(st.integers(1, 6), st.integers(1, 6))
PAIRS = st.tuples(st.integers(1, 4), st.integers(1, 4))


@settings(max_examples=300, deadline=None, derandomize=True)
@given(
    level=st.sampled_from(LEVELS or ("none",)),
    case=st.builds(
        Case,
        kind=st.sampled_from(KINDS),
        batch=st.integers(1, 3),
        channels=st.integers(1, 70),
        size=st.tuples(st.integers(1, 20), st.integers(1, 20)),
        kernel=KERNELS,
        stride=PAIRS,
        padding=st.tuples(st.integers(0, 3), st.integers(0, 3)),
        dilation=PAIRS,
        ceil_mode=st.booleans(),
        count_include_pad=st.booleans(),
        divisor=st.one_of(st.none(), st.integers(1, 9)),
        scaled=st.booleans(),
        dtype=st.sampled_from(DTYPES),
    )
    .map(lambda c: replace(c, padding=tuple(map(min, c.padding, (k // 2 for k in c.kernel)))))
    .filter(lambda c: c.valid),
)
def test_equals_pytorch_at_random_shapes(level: str, case: Case) -> None:
    with isa(level):
        check(case)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", both(channels=37, stride=(1, 1), data="nonfinite"), ids=str)
def test_nan_and_infinity_go_where_pytorch_puts_them(
    case: Case, dtype: torch.dtype, level: str
) -> None:
    case = replace(case, dtype=dtype)
    x = case.image()
    with isa(level):
        results = [
            (OPS.pool_cpu(x, *case.arguments), case.reference(x.double())),
            (OPS.global_pool_cpu(x), global_reference(x.double())),
        ]
    for y, expected in results:
        expected = expected.to(dtype)
        assert expected.isnan().any()
        assert torch.equal(y.isnan(), expected.isnan())
        assert torch.equal(y.isposinf(), expected.isposinf())
        assert torch.equal(y.isneginf(), expected.isneginf())


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_maximum_of_16_bits_knows_every_number(dtype: torch.dtype, level: str) -> None:
    """Both zeros, subnormals, infinities and NaN of either sign, each against three others."""
    every = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int16)
    order = torch.Generator().manual_seed(0)
    pixels = [every[torch.randperm(len(every), generator=order)].view(dtype) for _ in range(4)]
    x = torch.stack(pixels, 1).reshape(64, 1024, 2, 2)
    x = x.contiguous(memory_format=torch.channels_last)
    with isa(level):
        y = OPS.pool_cpu(x, "max", (2, 2), (2, 2), (0, 0), (1, 1), False, True, None, None, None)
    expected = x.double().amax((2, 3), keepdim=True)
    assert expected.isnan().any()
    torch.testing.assert_close(y.double(), expected, rtol=0, atol=0, equal_nan=True)


# The mean of whole images


@dataclass(frozen=True)
class GlobalCase:
    shape: tuple[int, int, int, int]
    scaled: bool = False
    dtype: torch.dtype = torch.float32
    data: str = "normal"

    def tensors(self) -> tuple[Tensor, Tensor | None, Tensor | None]:
        x = image(self.shape, self.dtype, kind=self.data)
        case = Case(kind="avg", channels=self.shape[1], scaled=self.scaled)
        return x, *case.vectors()

    def __str__(self) -> str:
        return "x".join(map(str, self.shape)) + f" {self.data}" + " scaled" * self.scaled


GLOBAL_CASES = [
    GlobalCase((2, channels, *size), scaled, data=data)
    for channels, size, data in (
        *((c, (7, 7), "normal") for c in (1, 8, 15, 16, 17, 33, 64, 130, 1280)),
        *((35, size, "normal") for size in ((1, 1), (1, 15), (17, 1), (3, 33), (16, 16))),
        (20, (112, 112), "normal"),
        (20, (112, 112), "offset"),
        (40, (60, 67), "offset"),
    )
    for scaled in (False, True)
] + [GlobalCase((0, 8, 3, 3))]


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("case", GLOBAL_CASES, ids=str)
def test_the_mean_of_images_matches_float64(
    case: GlobalCase, dtype: torch.dtype, level: str
) -> None:
    tensors = replace(case, dtype=dtype).tensors()
    with poisoned_memory(), isa(level):
        y = OPS.global_pool_cpu(*tensors)
    assert y.shape == (*case.shape[:2], 1, 1)
    assert_close_to_float64(y, global_reference, *tensors)


@pytest.mark.parametrize("level", LEVELS)
def test_the_mean_of_many_alike_pixels_is_exact_to_two_units(level: str) -> None:
    x = torch.full((1, 16, 331, 337), 0.1).contiguous(memory_format=torch.channels_last)
    with isa(level):
        error = (OPS.global_pool_cpu(x) / 0.1 - 1).abs().max()
    assert error <= 2 * torch.finfo(torch.float32).eps


# Where images lie


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "case",
    [
        *both(channels=19, size=(9, 16)),
        *both(channels=48, size=(5, 6), kernel=(2, 2), padding=(0, 0)),
        Case(kind="avg", channels=33, scaled=True, ceil_mode=True),
    ],
    ids=str,
)
def test_channel_slices_are_read_and_written_in_place_and_nothing_around_them(
    case: Case, dtype: torch.dtype, level: str
) -> None:
    case = replace(case, dtype=dtype, batch=2)
    x = case.image()
    for canary, border in itertools.product((float("nan"), 12.0), (0, 1)):
        source = guarded(x, canary=canary, border=border)
        target = guarded(torch.zeros_like(case.reference(x)), canary=canary, border=border)
        means = guarded(x.new_zeros(2, case.channels, 1, 1), canary=canary, border=border)
        with isa(level):
            OPS.pool_cpu.out(source.tensor, *case.arguments, out=target.tensor)
            OPS.global_pool_cpu.out(source.tensor, *case.vectors(), out=means.tensor)
        for around in (source, target, means):
            around.assert_untouched()
        assert_close_to_float64(target.tensor, case.reference, x)
        assert_close_to_float64(means.tensor, global_reference, x, *case.vectors())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "case",
    [
        *both(channels=700, size=(28, 28)),
        *both(channels=64, size=(113, 57)),
        Case(kind="avg", batch=3, channels=130, scaled=True, kernel=(2, 2), padding=(0, 0)),
    ],
    ids=str,
)
def test_threads_and_batch_do_not_change_a_bit(case: Case, dtype: torch.dtype) -> None:
    case = replace(case, dtype=dtype)
    x = case.image()

    def run(x: Tensor) -> tuple[Tensor, Tensor]:
        return OPS.pool_cpu(x, *case.arguments), OPS.global_pool_cpu(x, *case.vectors())

    with threads(1):
        alone = run(x)
    for count in (2, 3, 5):
        with threads(count):
            assert all(map(torch.equal, run(x), alone))
    for i in range(case.batch):
        assert all(map(torch.equal, run(x[i : i + 1]), (y[i : i + 1] for y in alone)))


def test_expanded_images_are_read_without_a_copy() -> None:
    x = Case(channels=20).image()
    many = x.expand(3, -1, -1, -1)
    arguments = Case(kind="avg").arguments
    assert torch.equal(
        OPS.pool_cpu(many, *arguments), OPS.pool_cpu(x, *arguments).expand(3, -1, -1, -1)
    )
    assert torch.equal(OPS.global_pool_cpu(many), OPS.global_pool_cpu(x).expand(3, -1, -1, -1))


def test_images_of_one_column_may_have_any_column_stride() -> None:
    x = torch.randn(2, 24, 9, 5).contiguous(memory_format=torch.channels_last)[..., 2:3]
    for kind in KINDS:
        y = OPS.pool_cpu(x, kind, (3, 1), (2, 1), (1, 0), (1, 1), False, True, None)
        expected = reference(x, kind, (3, 1), (2, 1), (1, 0))
        torch.testing.assert_close(y, expected)


# Bad input

X, V = torch.zeros(2, 8, 6, 6).contiguous(memory_format=torch.channels_last), torch.zeros(8)
GOOD: dict[str, Any] = {
    "x": X, "kind": "avg", "kernel_size": [3, 3], "stride": [2, 2], "padding": [1, 1],
    "dilation": [1, 1], "ceil_mode": False, "count_include_pad": True, "divisor_override": None,
}  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"x": X[0]}, r"x must be \[N, C, H, W\], got 3 dimensions"),
        ({"x": X.contiguous()}, "x must be channels-last"),
        ({"x": X.double()}, "x must be float32, bfloat16 or float16"),
        ({"x": X[:, :, :0]}, "larger than the padded image 0x6"),
        ({"kind": "min"}, "unknown kind 'min'; expected max or avg"),
        ({"kernel_size": [3, 3, 3]}, "take two numbers each"),
        ({"kernel_size": [0, 3]}, "must be positive"),
        ({"stride": [0, 2]}, "must be positive"),
        ({"padding": [2, 1]}, "padding must lie between 0 and half the kernel size, got 2 for 3"),
        ({"padding": [-1, 1]}, "padding must lie between 0"),
        ({"kernel_size": [9, 3]}, "larger than the padded image 6x6"),
        ({"dilation": [2, 2]}, "kind avg takes dilation 1"),
        ({"divisor_override": 0}, "divisor_override must not be 0"),
        ({"kind": "max", "divisor_override": 2}, "are for kind avg"),
        ({"kind": "max", "scale": V, "shift": V}, "are for kind avg"),
        ({"scale": V}, "scale and shift come together"),
        ({"scale": V[1:], "shift": V}, r"scale must be a contiguous float32 \[8\]"),
        ({"scale": V, "shift": V.half()}, r"shift must be a contiguous float32 \[8\]"),
    ],
    ids=str,
)
def test_bad_input_is_named(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        OPS.pool_cpu(**{**GOOD, **arguments})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((X[0],), r"x must be \[N, C, H, W\]"),
        ((X.contiguous(),), "x must be channels-last"),
        ((X[:, :, :0],), "x has no pixels"),
        ((X, V), "scale and shift come together"),
        ((X, V, V[:3]), r"shift must be a contiguous float32 \[8\]"),
    ],
    ids=str,
)
def test_bad_input_of_the_global_mean_is_named(arguments: tuple[Tensor, ...], message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        OPS.global_pool_cpu(*arguments)


def test_a_wrong_output_is_named() -> None:
    with pytest.raises(RuntimeError, match=r"out must be \[2, 8, 3, 3\]"):
        OPS.pool_cpu.out(**GOOD, out=X)
    with pytest.raises(RuntimeError, match=r"out must be \[2, 8, 1, 1\]"):
        OPS.global_pool_cpu.out(X, out=X)
    with pytest.raises(RuntimeError, match="out must have the dtype of x"):
        OPS.global_pool_cpu.out(X, out=X[:, :, :1, :1].half())


# The operators as torch sees them


def test_opcheck() -> None:
    for case in (Case(ceil_mode=True), Case(kind="avg", scaled=True)):
        x = case.image()
        torch.library.opcheck(OPS.pool_cpu.default, (x, *case.arguments))
        out = torch.empty_like(OPS.pool_cpu(x, *case.arguments))
        torch.library.opcheck(OPS.pool_cpu.out, (x, *case.arguments), {"out": out})
        torch.library.opcheck(OPS.global_pool_cpu.default, (x, *case.vectors()))
        out = torch.empty_like(OPS.global_pool_cpu(x))
        torch.library.opcheck(OPS.global_pool_cpu.out, (x, *case.vectors()), {"out": out})


def test_a_gradient_is_refused() -> None:
    x = Case().image().requires_grad_()
    with pytest.raises(RuntimeError, match=r"pool_cpu has no gradient: .*max_pool2d or avg_pool2d"):
        OPS.pool_cpu(x, *Case().arguments)
    with pytest.raises(
        RuntimeError, match=r"global_pool_cpu has no gradient: .*adaptive_avg_pool2d"
    ):
        OPS.global_pool_cpu(x)
    with torch.no_grad():
        assert not OPS.global_pool_cpu(x).requires_grad


def test_global_reference_is_adaptive_pooling() -> None:
    x = Case(dtype=torch.float64).image()
    torch.testing.assert_close(global_reference(x), F.adaptive_avg_pool2d(x, 1))


def test_byte_model_counts_each_image_once() -> None:
    assert bytes_moved((2, 8, 6, 6), (2, 8, 3, 3), torch.bfloat16) == 2 * (576 + 144)
