from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from cvfast.ops import layout
from cvfast.testing import guarded, image, poisoned_memory, threads

pytestmark = pytest.mark.usefixtures("cpu_extension")

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
OPS = torch.ops.cvfast

LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x.contiguous(),
    "channels-last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "channel slice": lambda x: guarded(x).tensor,
    "plane slice": lambda x: torch.nn.functional.pad(x.contiguous(), (1, 2, 1, 0))[
        ..., 1:, 1 : 1 + x.shape[3]
    ],
    "turned": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
    "every second": lambda x: torch.repeat_interleave(x, 2, dim=3)[..., ::2],
}


def bits(x: Tensor) -> Tensor:
    return x.contiguous().view(torch.int32 if x.dtype.itemsize == 4 else torch.int16)


SHAPES = [
    (1, 3, 224, 200),
    (2, 64, 13, 17),
    (3, 35, 9, 8),
    (1, 130, 1, 1),
    (2, 1, 5, 70),
    (1, 16, 16, 16),
    (1, 1000, 3, 2),
    (4, 7, 1, 9),
    (0, 3, 4, 4),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(
    ("source", "target"), list(itertools.product(LAYOUTS, LAYOUTS)), ids=lambda s: s
)
def test_copies_every_bit_between_layouts(
    source: str, target: str, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    x = image(shape, dtype, kind="nonfinite")
    out = LAYOUTS[target](torch.zeros_like(x))
    OPS.copy_layout_cpu.out(LAYOUTS[source](x), out=out)
    assert torch.equal(bits(out), bits(x))


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    shape=st.tuples(*(st.integers(1, 40),) * 4),
    orders=st.tuples(*(st.permutations(range(4)),) * 2),
    dtype=st.sampled_from(DTYPES),
)
def test_copies_between_any_orders_of_axes(
    shape: tuple[int, ...], orders: tuple[list[int], list[int]], dtype: torch.dtype
) -> None:
    def in_order(x: Tensor, order: list[int]) -> Tensor:
        back = [order.index(i) for i in range(4)]
        return x.permute(order).contiguous().permute(back)

    x = in_order(image(shape, dtype), orders[0])
    out = in_order(torch.full_like(x, float("nan")), orders[1])
    OPS.copy_layout_cpu.out(x, out=out)
    assert torch.equal(out, x)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_to_channels_last(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x = image(shape, dtype).contiguous()
    with poisoned_memory():
        y = OPS.to_channels_last_cpu(x)
    assert layout.is_channels_last(y)
    assert torch.equal(y, x)
    slice_ = guarded(torch.zeros_like(y))
    OPS.to_channels_last_cpu.out(x, out=slice_.tensor)
    slice_.assert_untouched()
    assert torch.equal(slice_.tensor, x)


def test_planes_around_the_copy_are_left_alone() -> None:
    x = image((2, 19, 9, 11))
    buffer = torch.full((2, 25, 12, 20), 7.0)
    inside = torch.zeros_like(buffer, dtype=torch.bool)
    inside[:, 2:21, 1:10, 3:14] = True
    OPS.copy_layout_cpu.out(x, out=buffer[:, 2:21, 1:10, 3:14])
    assert torch.equal(buffer[:, 2:21, 1:10, 3:14], x)
    assert (buffer[~inside] == 7).all()


def test_threads_do_not_change_the_copy() -> None:
    x = image((2, 70, 57, 59)).contiguous()
    for count in (1, 2, 3, 5):
        with threads(count):
            assert torch.equal(OPS.to_channels_last_cpu(x), x)


def test_expanded_images_are_read_without_a_copy() -> None:
    x = image((1, 20, 7, 7)).expand(3, -1, -1, -1)
    assert torch.equal(OPS.to_channels_last_cpu(x), x)


X = torch.zeros(2, 8, 6, 6)


@pytest.mark.parametrize(
    ("x", "out", "message"),
    [
        (X[0], X, r"must be \[N, C, H, W\] of one size"),
        (X, X[:, :4], r"must be \[N, C, H, W\] of one size"),
        (X, X.half(), "out must have the dtype of x"),
        (X.double(), X.double(), "x must be float32, bfloat16 or float16"),
    ],
)
def test_bad_input_is_named(x: Tensor, out: Tensor, message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        OPS.copy_layout_cpu.out(x, out=out)


def test_to_channels_last_names_bad_input() -> None:
    with pytest.raises(RuntimeError, match=r"x must be \[N, C, H, W\], got 3 dimensions"):
        OPS.to_channels_last_cpu(X[0])
    with pytest.raises(RuntimeError, match="out must be channels-last"):
        OPS.to_channels_last_cpu.out(X, out=torch.empty_like(X))


def test_opcheck() -> None:
    torch.library.opcheck(OPS.to_channels_last_cpu.default, (X,))
    out = torch.empty_like(X, memory_format=torch.channels_last)
    torch.library.opcheck(OPS.to_channels_last_cpu.out, (X,), {"out": out})
    torch.library.opcheck(OPS.copy_layout_cpu.out, (X,), {"out": torch.empty_like(X)})


def test_a_gradient_is_refused() -> None:
    with pytest.raises(RuntimeError, match=r"to_channels_last_cpu has no gradient.*contiguous"):
        OPS.to_channels_last_cpu(X.clone().requires_grad_())
