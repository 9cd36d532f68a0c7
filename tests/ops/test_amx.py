"""Products by AMX: what its tiles and the pieces of float32 could get wrong."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from cvfast import extension
from cvfast.ops.conv import choose_algorithm, conv_cpu
from cvfast.ops.pointwise import pointwise
from cvfast.testing import assert_close_to_float64, image, isa, isa_levels, threads

pytestmark = [
    pytest.mark.usefixtures("cpu_extension"),
    pytest.mark.skipif("avx512_amx" not in isa_levels(), reason="needs AMX"),
]

LARGEST = torch.finfo(torch.float32).max


@pytest.fixture(autouse=True)
def at_amx() -> Iterator[None]:
    with isa("avx512_amx"):
        yield


def weights(out: int, channels: int, seed: int = 1) -> Tensor:
    return image((out, channels, 1, 1), seed=seed)


def product(x: Tensor, weight: Tensor) -> Tensor:
    pixels = x.numel() // x.shape[1]
    assert extension.cpu_amx_takes_floats(pixels, weight.shape[1], weight.shape[0])
    return pointwise(x, weight, backend="cpu")


@pytest.mark.parametrize("channels", [128, 129, 160, 255, 256, 257, 1000, 2048])
@pytest.mark.parametrize("size", [(8, 8), (7, 13), (17, 15)])
def test_float_products_in_pieces_are_as_exact_as_pytorchs(
    channels: int, size: tuple[int, int]
) -> None:
    x, weight = image((1, channels, *size)), weights(136, channels)
    assert_close_to_float64(product(x, weight), F.conv2d, x, weight)


def test_many_pixels_take_fewer_channels() -> None:
    x, weight = image((1, 66, 28, 28)), weights(72, 66)
    assert_close_to_float64(product(x, weight), F.conv2d, x, weight)


def test_small_layers_and_other_levels_multiply_floats_as_they_are() -> None:
    takes = extension.cpu_amx_takes_floats
    assert takes(64, 128, 128) and takes(784, 64, 64)
    assert not (takes(63, 128, 128) or takes(64, 127, 128) or takes(783, 64, 200))
    with isa("avx512"):
        assert not takes(784, 128, 128)


def test_numbers_of_all_magnitudes() -> None:
    x, weight = image((1, 128, 9, 9)), weights(128, 128)
    scales = 2.0 ** torch.randint(-40, 40, (128, 1, 1), generator=torch.Generator().manual_seed(2))
    x, weight = x * scales, weight / scales[:, 0, 0].view(1, -1, 1, 1)
    assert_close_to_float64(product(x, weight), F.conv2d, x, weight)


def test_the_largest_numbers_do_not_overflow_when_they_are_split() -> None:
    x, weight = image((1, 128, 8, 8)), weights(128, 128) * 2.0**-10
    x[0, 3, 2], x[0, 5, :, 1] = LARGEST, -LARGEST
    assert product(x, weight).isfinite().all()
    assert_close_to_float64(product(x, weight), F.conv2d, x, weight)


@pytest.mark.parametrize("bits", [0x7F800000, 0x7FC00000, 0x7F800001, 0x7FFFFFFF, -1])
@pytest.mark.parametrize("where", ["x", "weight"])
def test_infinities_and_every_nan_stay_in_their_place(bits: int, where: str) -> None:
    x, weight = image((1, 128, 8, 9)), weights(136, 128)
    weight[0] = 1.0  # its lower pieces are zero, and infinity times zero is NaN
    special = torch.tensor(bits, dtype=torch.int32).view(torch.float32)
    if where == "x":
        x[0, 7, 3, 4] = special
    else:
        weight[2, 7] = special
    y, expected = product(x, weight), F.conv2d(x, weight)
    assert torch.equal(y.isnan(), expected.isnan())
    assert torch.equal(y.isinf(), expected.isinf())
    assert torch.equal(y[y.isinf()], expected[expected.isinf()])
    others = expected.isfinite()
    torch.testing.assert_close(y[others], expected[others], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_number_of_threads_changes_no_bit(dtype: torch.dtype) -> None:
    x, weight = image((3, 160, 15, 13), dtype), weights(168, 160).to(dtype)
    kernel = image((48, 160, 3, 3), dtype, seed=4)
    results = []
    for count in (1, 2, 3):
        with threads(count):
            both = product(x, weight), conv_cpu(x, kernel, padding=(1, 1))
            results.append(both)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_dense_bfloat16_runs_direct() -> None:
    for size, channels in ((56, 64), (14, 256), (7, 512)):
        shape, kernel = (1, channels, size, size), (channels, channels, 3, 3)
        chosen = choose_algorithm(
            shape, kernel, padding=(1, 1), allow_bf16=True, dtype=torch.bfloat16
        )
        assert chosen == "direct"
    assert choose_algorithm((1, 64, 56, 56), (64, 64, 3, 3), padding=(1, 1)) == "winograd_f2x4"
