from __future__ import annotations

import itertools
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from cvfast.ops.activation import Activation, activate_
from cvfast.ops.conv import (
    OneDnnWeight,
    bytes_moved,
    conv,
    conv_onednn,
    conv_torch,
    flops,
    fuses_activation,
    onednn_unsupported,
)
from cvfast.ops.layout import (
    channels_innermost,
    channels_last,
    is_channels_last,
    restore_layout,
)
from cvfast.testing import assert_close_to_float64, image, poisoned_memory

ACTIVATIONS = [
    Activation(),
    Activation("relu"),
    Activation("relu6"),
    Activation("hardswish"),
    Activation("hardsigmoid"),
    Activation("silu"),
    Activation("sigmoid"),
    Activation("tanh"),
    Activation("leaky_relu", (0.1,)),
    Activation("gelu", ("none",)),
    Activation("gelu", ("tanh",)),
]
GEOMETRIES = [
    {"kernel": (1, 1)},
    {"kernel": (3, 3), "padding": (1, 1)},
    {"kernel": (3, 3), "stride": (2, 2), "padding": (1, 1)},
    {"kernel": (5, 5), "padding": (4, 4), "dilation": (2, 2)},
    {"kernel": (1, 7), "padding": (0, 3)},
    {"kernel": (7, 1), "padding": (3, 0), "stride": (2, 1)},
    {"kernel": (3, 3), "groups": 3},
]


def run(
    kernel: str,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    activation: Activation,
    **geometry: object,
) -> Tensor:
    stride = list(geometry.get("stride", (1, 1)))
    padding = list(geometry.get("padding", (0, 0)))
    dilation = list(geometry.get("dilation", (1, 1)))
    groups = geometry.get("groups", 1)
    step = (activation.name, activation.parameters)
    if kernel == "torch":
        return conv_torch(x, weight, bias, residual, stride, padding, dilation, groups, *step)
    packed = OneDnnWeight(
        weight, x.shape, stride=stride, padding=padding, dilation=dilation, groups=groups
    )
    return conv_onednn(x, packed, bias, residual, *step)


@pytest.mark.parametrize("kernel", ["onednn", "torch"])
@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_against_float64(kernel: str, geometry: dict, dtype: torch.dtype) -> None:
    if kernel == "onednn" and onednn_unsupported(dtype, torch.device("cpu")):
        pytest.skip("oneDNN does not take this dtype here")
    geometry = dict(geometry)
    size = geometry.pop("kernel")
    groups = geometry.get("groups", 1)
    for (batch, h, w), with_bias, residual, layout in itertools.product(
        [(1, 19, 23), (3, 12, 15)],
        [True, False],
        [True, False],
        [torch.channels_last, torch.contiguous_format],
    ):
        x = image((batch, 15, h, w), dtype).contiguous(memory_format=layout)
        weight = image((33, 15 // groups, *size), dtype, seed=1).contiguous()
        bias = image((1, 33, 1, 1), dtype, seed=2).flatten() if with_bias else None
        reference = partial(conv, activation=Activation("silu"), **geometry)
        out_shape = reference(x, weight, bias).shape
        addend = image(tuple(out_shape), dtype, seed=3).contiguous(memory_format=layout)
        with poisoned_memory():
            actual = run(
                kernel,
                x,
                weight,
                bias,
                addend if residual else None,
                Activation("silu"),
                **geometry,
            )
        if residual:
            assert_close_to_float64(
                actual,
                lambda x, w, b, r, f=reference: f(x, w, b, residual=r),
                x,
                weight,
                bias,
                addend,
            )
        else:
            assert_close_to_float64(actual, reference, x, weight, bias)
        expected = torch.channels_last if kernel == "onednn" else layout
        assert actual.is_contiguous(memory_format=expected)


@pytest.mark.parametrize("kernel", ["onednn", "torch"])
@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
@pytest.mark.parametrize("residual", [False, True])
def test_activations_treat_nan_and_infinity_as_pytorch_does(
    kernel: str, activation: Activation, residual: bool
) -> None:
    x = image((1, 4, 3, 5))
    x[0, 0, 0, :3] = torch.tensor([float("nan"), float("inf"), -float("inf")])
    weight = torch.eye(4).reshape(4, 4, 1, 1)
    addend = image((1, 4, 3, 5), seed=3) if residual else None
    expected = conv(x, weight, residual=addend, activation=activation)
    actual = run(kernel, x, weight, None, addend, activation)
    torch.testing.assert_close(actual, expected, equal_nan=True)


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
def test_activation_in_place_equals_the_functional_one(activation: Activation) -> None:
    x = 4 * torch.randn(1000)
    expected = activation(x)
    assert activate_(x, activation.name, activation.parameters) is x
    assert torch.equal(x, expected)


def test_unknown_activation_lists_the_known() -> None:
    with pytest.raises(ValueError, match=r"relu6, hardswish.*got 'swoosh'"):
        Activation("swoosh")


def test_the_residual_is_read_not_written() -> None:
    x, weight = image((1, 4, 5, 5)), image((4, 4, 1, 1), seed=1).contiguous()
    addend = image((1, 4, 5, 5), seed=2)
    before = addend.clone()
    for kernel in ("onednn", "torch"):
        run(kernel, x, weight, None, addend, Activation("relu"))
        assert torch.equal(addend, before)


PLAIN = {"stride": (1, 1), "padding": (1, 1), "dilation": (1, 1), "groups": 1}


def test_another_input_shape_than_packed_for() -> None:
    weight = image((8, 6, 3, 3), seed=1).contiguous()
    packed = OneDnnWeight(weight, (1, 6, 56, 56), **PLAIN)
    for shape in ((1, 6, 3, 4), (8, 6, 30, 17), (1, 6, 56, 56)):
        x = image(shape)
        actual = conv_onednn(x, packed, None, None, "none")
        assert_close_to_float64(actual, partial(F.conv2d, padding=1), x, weight)


def test_shapes_that_prefer_one_layout_share_a_copy_and_memory_is_bounded() -> None:
    weight = image((320, 960, 1, 1), seed=1).contiguous()
    packed = OneDnnWeight(weight, (1, 960, 7, 7), **{**PLAIN, "padding": (0, 0)})
    for size in range(1, 3 * OneDnnWeight.MAX_SHAPES):
        first = packed.packed_for(torch.Size((1, 960, size, 5)))
        assert packed.packed_for(torch.Size((1, 960, size, 5))) is first
        assert torch.equal(first.to_dense(), weight)
    assert len(packed._layouts) < 8
    assert len(packed._packed) <= OneDnnWeight.MAX_SHAPES


def test_why_onednn_does_not_serve() -> None:
    assert onednn_unsupported(torch.float32, torch.device("cpu")) is None
    assert "float64" in str(onednn_unsupported(torch.float64, torch.device("cpu")))
    assert "meta" in str(onednn_unsupported(torch.float32, torch.device("meta")))


def test_which_activations_cost_no_pass() -> None:
    assert fuses_activation("none", residual=True)
    assert fuses_activation("silu", residual=False)
    assert not fuses_activation("silu", residual=True)
    assert not fuses_activation("relu", residual=False)


@pytest.mark.parametrize("groups", [1, 3])
def test_flops_equal_the_counter_of_pytorch(groups: int) -> None:
    x, weight = torch.randn(2, 6, 9, 11), torch.randn(12, 6 // groups, 3, 3)
    with FlopCounterMode(display=False) as counter:
        out = F.conv2d(x, weight, stride=2, groups=groups)
    assert flops(x.shape, weight.shape, out.shape) == counter.get_total_flops()


def test_bytes_moved_counts_every_tensor_once_and_each_pass_twice() -> None:
    shapes = (1, 2, 3, 4), (5, 2, 1, 1), (1, 5, 3, 4)
    assert bytes_moved(*shapes, 4) == 4 * (24 + 10 + 60)
    assert bytes_moved(*shapes, 4, passes=2) == 4 * (24 + 10 + 60 + 4 * 60)


def test_layouts() -> None:
    x = torch.randn(2, 6, 4, 5)
    nhwc = x.contiguous(memory_format=torch.channels_last)
    assert is_channels_last(nhwc) and not is_channels_last(x)
    assert channels_last(nhwc) is nhwc and is_channels_last(channels_last(x))
    part = nhwc[:, 1:4]
    assert channels_innermost(part) is part and not is_channels_last(part)
    assert is_channels_last(channels_innermost(x))
    assert restore_layout(nhwc, x).is_contiguous()
    assert restore_layout(nhwc, nhwc) is nhwc
    assert torch.equal(restore_layout(nhwc, x), x)
