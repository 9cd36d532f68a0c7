"""The building blocks: signatures, state-dict layout, shapes, costs and what they promise."""

from __future__ import annotations

import pytest
import torch
import torch.nn as nn
from torch import Tensor

from cvfast.models import (
    BasicBlock,
    BasicConv2d,
    Bottleneck,
    DenseBlock,
    DenseLayer,
    DepthwiseSeparableConv,
    DoubleConv,
    HighwayConv2d,
    InceptionModule,
    InvertedResidual,
    InvertedResidualBlock,
    PlainBlock,
    SqueezeExcitation,
    conv1x1,
    conv3x3,
    factorize_5x5,
    factorize_asymmetric,
)


def conv_weights(module: nn.Module) -> int:
    return sum(m.weight.numel() for m in module.modules() if isinstance(m, nn.Conv2d))


def zero_last_bn(block: nn.Module) -> None:
    bns = [m for m in block.modules() if isinstance(m, nn.BatchNorm2d)]
    nn.init.zeros_(bns[-1].weight)


def receptive_field(module: nn.Module) -> tuple[int, int]:
    """Height and width of the input region that the centre of the output depends on."""
    for m in module.modules():
        if isinstance(m, nn.Conv2d):
            nn.init.ones_(m.weight)
    x = torch.ones(1, 4, 21, 21, requires_grad=True)
    module.eval()(x)[0, :, 10, 10].sum().backward()
    touched = x.grad[0].abs().sum(0) > 0
    return int(touched.any(1).sum()), int(touched.any(0).sum())


SHAPES = [
    (BasicBlock(64, 64), (2, 64, 9, 7), (2, 64, 9, 7)),
    (BasicBlock(64, 128, 2, conv1x1(64, 128, 2)), (2, 64, 9, 7), (2, 128, 5, 4)),
    (PlainBlock(64, 128, 2), (2, 64, 9, 7), (2, 128, 5, 4)),
    (Bottleneck(256, 64), (2, 256, 9, 7), (2, 256, 9, 7)),
    (Bottleneck(64, 64, 2, conv1x1(64, 256, 2)), (2, 64, 9, 7), (2, 256, 5, 4)),
    (BasicConv2d(3, 8, kernel_size=7, stride=2, padding=3), (2, 3, 9, 7), (2, 8, 5, 4)),
    (InceptionModule(192, 64, 96, 128, 16, 32, 32), (2, 192, 9, 7), (2, 256, 9, 7)),
    (DepthwiseSeparableConv(32, 64), (2, 32, 9, 7), (2, 64, 9, 7)),
    (DepthwiseSeparableConv(32, 64, stride=2), (2, 32, 9, 7), (2, 64, 5, 4)),
    (InvertedResidual(24, 24, 1, 6), (2, 24, 9, 7), (2, 24, 9, 7)),
    (InvertedResidual(24, 32, stride=2, expand_ratio=6), (2, 24, 9, 7), (2, 32, 5, 4)),
    (DenseBlock(4, 64, 12), (2, 64, 9, 7), (2, 112, 9, 7)),
    (DoubleConv(3, 64), (2, 3, 9, 7), (2, 64, 9, 7)),
    (HighwayConv2d(16), (2, 16, 9, 7), (2, 16, 9, 7)),
    (SqueezeExcitation(16, 8), (2, 16, 9, 7), (2, 16, 9, 7)),
    (factorize_5x5(8, 16), (2, 8, 9, 7), (2, 16, 9, 7)),
    (factorize_asymmetric(8, 16, 7), (2, 8, 9, 7), (2, 16, 9, 7)),
]


@pytest.mark.parametrize(
    ("block", "input_shape", "output_shape"), SHAPES, ids=lambda v: type(v).__name__[:24]
)
def test_shapes_and_gradients(
    block: nn.Module, input_shape: tuple[int, ...], output_shape: tuple[int, ...]
) -> None:
    x = torch.randn(input_shape, requires_grad=True)
    y = block(x)
    assert y.shape == output_shape
    y.square().sum().backward()
    for tensor in (x, *block.parameters()):
        assert tensor.grad is not None
        assert torch.isfinite(tensor.grad).all()


@pytest.mark.parametrize(
    ("block", "prefixes"),
    [
        (BasicBlock(8, 8), ["conv1", "bn1", "conv2", "bn2"]),
        (Bottleneck(8, 2), ["conv1", "bn1", "conv2", "bn2", "conv3", "bn3"]),
        (BasicConv2d(3, 8, kernel_size=1), ["conv", "bn"]),
        (
            InceptionModule(8, 1, 1, 1, 1, 1, 1),
            [
                f"{branch}.{part}"
                for branch in (
                    *("branch1", "branch2.0", "branch2.1"),
                    *("branch3.0", "branch3.1", "branch4.1"),
                )
                for part in ("conv", "bn")
            ],
        ),
        (
            DepthwiseSeparableConv(8, 8),
            ["depthwise.0", "depthwise.1", "pointwise.0", "pointwise.1"],
        ),
        (InvertedResidual(8, 8, 1, 6), [f"conv.{i}" for i in (0, 1, 3, 4, 6, 7)]),
        (InvertedResidual(8, 8, 1, 1), [f"conv.{i}" for i in (0, 1, 3, 4, 6, 7)]),
        (DenseLayer(8, 4), ["bn1", "conv1", "bn2", "conv2"]),
        (
            DenseBlock(1, 8, 4),
            [f"layers.0.{m}" for m in ("bn1", "conv1", "bn2", "conv2")],
        ),
        (DoubleConv(3, 8), [f"conv.{i}" for i in (0, 1, 3, 4)]),
    ],
    ids=lambda v: type(v).__name__,
)
def test_state_dict_layout(block: nn.Module, prefixes: list[str]) -> None:
    assert list(dict.fromkeys(k.rpartition(".")[0] for k in block.state_dict())) == prefixes


def test_convolution_helpers() -> None:
    assert conv3x3(8, 16, 2)(torch.randn(1, 8, 9, 7)).shape == (1, 16, 5, 4)
    assert conv1x1(8, 16, 2)(torch.randn(1, 8, 9, 7)).shape == (1, 16, 5, 4)
    assert conv3x3(8, 16).bias is None
    assert conv1x1(8, 16).bias is None
    assert conv3x3(8, 16, dilation=2)(torch.randn(1, 8, 9, 7)).shape == (1, 16, 9, 7)


@pytest.mark.parametrize("block", [BasicBlock(16, 16), Bottleneck(16, 4)])
def test_a_residual_block_whose_branch_is_zero_is_the_identity(block: nn.Module) -> None:
    zero_last_bn(block)
    x = torch.rand(2, 16, 5, 5)  # non-negative: the last ReLU keeps it
    torch.testing.assert_close(block(x), x, rtol=0, atol=0)


def test_a_plain_block_whose_branch_is_zero_forgets_its_input() -> None:
    block = PlainBlock(16, 16)
    zero_last_bn(block)
    assert torch.count_nonzero(block(torch.rand(2, 16, 5, 5))) == 0


def test_the_residual_gradient_contains_the_identity() -> None:
    block = BasicBlock(16, 16)
    zero_last_bn(block)
    x = torch.rand(2, 16, 5, 5).add_(0.1).requires_grad_()
    upstream = torch.randn(2, 16, 5, 5)
    (grad,) = torch.autograd.grad(block(x), x, upstream)
    torch.testing.assert_close(grad, upstream, rtol=0, atol=0)  # dL/dx = dL/dy * (1 + 0)


def test_a_residual_block_leaves_its_input_alone() -> None:
    x = torch.randn(2, 16, 5, 5)
    before = x.clone()
    for block in (BasicBlock(16, 16), Bottleneck(16, 4), InvertedResidual(16, 16, 1, 6)):
        block(x)
        assert torch.equal(x, before)


def test_the_inception_branches_lie_in_order() -> None:
    module = InceptionModule(16, 3, 4, 5, 6, 7, 8).eval()
    x = torch.randn(1, 16, 9, 7)
    parts = module(x).split([3, 5, 7, 8], dim=1)
    for part, branch in zip(
        parts, (module.branch1, module.branch2, module.branch3, module.branch4), strict=True
    ):
        assert torch.equal(part, branch(x))
    assert module.branch3[1].conv.kernel_size == (5, 5)


def test_the_1x1_reduction_saves_weights() -> None:
    direct = nn.Conv2d(256, 64, 5, padding=2, bias=False)
    assert direct.weight[0].numel() == 25 * 256
    reduced = InceptionModule(256, 1, 1, 1, 64, 64, 1).branch3
    assert conv_weights(reduced) == 256 * 64 + 25 * 64 * 64
    assert conv_weights(reduced) < 0.3 * direct.weight.numel()


def test_factorisations_keep_the_receptive_field_and_save_weights() -> None:
    assert receptive_field(factorize_5x5(4, 4)) == (5, 5)
    assert conv_weights(factorize_5x5(4, 4)) * 25 == 18 * conv_weights(nn.Conv2d(4, 4, 5))
    for n in (3, 7):
        pair = factorize_asymmetric(4, 4, n)
        assert receptive_field(pair) == (n, n)
        assert conv_weights(pair) * n == 2 * conv_weights(nn.Conv2d(4, 4, n))
        assert [m.conv.kernel_size for m in pair] == [(1, n), (n, 1)]
    with pytest.raises(ValueError, match="odd"):
        factorize_asymmetric(4, 4, 2)


@pytest.mark.parametrize(("m", "n"), [(32, 64), (512, 512)])
def test_a_separable_convolution_costs_one_nth_plus_one_ninth(m: int, n: int) -> None:
    separable = conv_weights(DepthwiseSeparableConv(m, n))
    assert separable == 9 * m + m * n
    assert separable / conv_weights(conv3x3(m, n)) == pytest.approx(1 / n + 1 / 9)


@pytest.mark.parametrize(("m", "n", "t"), [(24, 24, 6), (32, 64, 6), (16, 16, 1)])
def test_the_cost_of_an_inverted_residual(m: int, n: int, t: int) -> None:
    assert conv_weights(InvertedResidual(m, n, 1, t)) == t * m * (m + 9 + n)


def test_an_inverted_residual_is_linear_at_its_end_and_bounded_within() -> None:
    block = InvertedResidual(16, 24, 1, 6)
    assert isinstance(block.conv[-1], nn.BatchNorm2d)
    hidden: list[Tensor] = []
    block.conv[5].register_forward_hook(lambda m, args, out: hidden.append(out))
    y = block(100 * torch.randn(4, 16, 8, 8))
    assert y.min() < 0
    assert hidden[0].min() >= 0
    assert hidden[0].max() <= 6


@pytest.mark.parametrize(
    ("in_ch", "out_ch", "stride", "adds"), [(8, 8, 1, True), (8, 8, 2, False), (8, 9, 1, False)]
)
def test_an_inverted_residual_adds_its_input_only_where_shapes_agree(
    in_ch: int, out_ch: int, stride: int, adds: bool
) -> None:
    block = InvertedResidual(in_ch, out_ch, stride, 6)
    assert block.use_res_connect is adds
    zero_last_bn(block)
    x = torch.randn(2, in_ch, 6, 6)
    y = block(x)
    assert torch.equal(y, x) if adds else torch.count_nonzero(y) == 0


def test_an_inverted_residual_takes_a_fractional_expansion_and_no_stride_3() -> None:
    assert InvertedResidualBlock(10, 10, 1, 2.55).conv[0].out_channels == 25
    with pytest.raises(ValueError, match="stride"):
        InvertedResidual(8, 8, 3, 6)


def test_a_dense_layer_needs_fewer_weights_than_a_residual_one() -> None:
    assert conv_weights(conv3x3(256, 256)) == 589_824
    assert conv_weights(DenseLayer(256, 12)) == 17_472


def test_a_dense_block_grows_by_its_growth_rate_and_keeps_its_input() -> None:
    block = DenseBlock(3, 64, 12)
    assert [layer.bn1.num_features for layer in block.layers] == [64, 76, 88]
    x = torch.randn(2, 64, 5, 5)
    y = block(x)
    assert y.shape[1] == 64 + 3 * 12
    assert torch.equal(y[:, :64], x)


def test_a_dense_layer_takes_a_list_and_returns_the_new_features_only() -> None:
    layer = DenseLayer(64 + 12, 12).eval()
    features = [torch.randn(2, 64, 5, 5), torch.randn(2, 12, 5, 5)]
    y = layer(features)
    assert y.shape == (2, 12, 5, 5)
    assert torch.equal(y, layer([torch.cat(features, 1)]))


def test_a_closed_highway_gate_carries_and_an_open_one_transforms() -> None:
    x = torch.randn(2, 8, 5, 5)
    layer = HighwayConv2d(8, gate_bias=-100.0)
    nn.init.zeros_(layer.gate.weight)
    torch.testing.assert_close(layer(x), x)
    nn.init.constant_(layer.gate.bias, 100.0)
    torch.testing.assert_close(layer(x), layer.transform(x).relu())


def test_squeeze_excitation_gates_channels_by_their_mean() -> None:
    gate = SqueezeExcitation(8, 4)
    x = torch.randn(2, 8, 5, 5)
    scale = gate(x) / x
    torch.testing.assert_close(scale, scale[..., :1, :1].expand_as(scale))
    assert scale.min() >= 0
    assert scale.max() <= 1
    shuffled = x.flatten(2)[..., torch.randperm(25)].view_as(x)
    torch.testing.assert_close((gate(shuffled) / shuffled)[..., 0, 0], scale[..., 0, 0])


def test_kernel_equal_to_stride_makes_no_checkerboard() -> None:
    def overlap(kernel: int, stride: int) -> set[float]:
        up = nn.ConvTranspose2d(1, 1, kernel, stride, bias=False)
        nn.init.ones_(up.weight)
        y = up(torch.ones(1, 1, 32, 32))
        assert y.shape[-1] == (32 - 1) * stride + kernel
        return set(y[0, 0, 4:-4, 4:-4].flatten().tolist())

    assert overlap(2, 2) == {1.0}
    assert len(overlap(3, 2)) > 1
