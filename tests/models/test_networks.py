"""The networks as wholes: sizes, modes, gradients, initialisation, auxiliary heads."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from cvfast.models import (
    BasicBlock,
    GoogLeNetOutputs,
    InceptionOutputs,
    MobileNetV1,
    MobileNetV2,
    MobileNetV3,
    ResNet,
    UNet,
    auxiliary_loss,
    default_input_size,
    get_model,
    list_models,
)
from cvfast.models.resnet import cifar_resnet

DENSE_OUTPUT = {"unet": 1, "fcn_resnet50": 21}
TRAINING_SIZE = {"inception_v3": 299}
# The deepest networks are built of the same blocks as their smaller kin.
DEEPEST = {f"resnet{d}" for d in (101, 152)} | {f"densenet{d}" for d in (161, 169, 201)}
EVERY_FAMILY = [n for n in list_models() if n not in DEEPEST | {"cifar_resnet110"}]


def logits(output: Tensor | tuple[Tensor, ...] | dict[str, Tensor]) -> Tensor:
    if isinstance(output, Tensor):
        return output
    return output["out"] if isinstance(output, dict) else output[0]


@pytest.mark.parametrize("name", EVERY_FAMILY)
def test_output_shape_at_two_sizes_and_batches(name: str) -> None:
    model = get_model(name).eval()
    classes = 10 if default_input_size(name)[1] == 32 else 1000
    for batch, height, width in ((1, 80, 96), (2, 96, 80)):
        with torch.inference_mode():
            y = logits(model(torch.randn(batch, 3, height, width)))
        if name in DENSE_OUTPUT:
            assert y.shape == (batch, DENSE_OUTPUT[name], height, width)
        else:
            assert y.shape == (batch, classes)
        assert torch.isfinite(y).all()


@pytest.mark.parametrize("name", [n for n in EVERY_FAMILY if n != "unet"])
def test_odd_input_sizes(name: str) -> None:
    model = get_model(name).eval()
    with torch.inference_mode():
        y = logits(model(torch.randn(2, 3, 75, 81)))
    assert y.shape[0] == 2
    assert torch.isfinite(y).all()


@pytest.mark.parametrize("name", EVERY_FAMILY)
def test_every_parameter_gets_a_gradient(name: str) -> None:
    model = get_model(name, **({"aux_loss": True} if name == "fcn_resnet50" else {})).train()
    size = TRAINING_SIZE.get(name, 32)
    output = model(torch.randn(2, 3, size, size))
    outputs = output.values() if isinstance(output, dict) else output
    sum(y.square().mean() for y in outputs).backward()
    for key, p in model.named_parameters():
        assert p.grad is not None, key
        assert torch.isfinite(p.grad).all(), key


@pytest.mark.parametrize("name", EVERY_FAMILY)
def test_evaluation_is_deterministic_and_training_moves_the_statistics(name: str) -> None:
    model = get_model(name)
    assert model.training
    size = TRAINING_SIZE.get(name, 32)
    x = torch.randn(2, 3, size, size)
    bns = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    with torch.no_grad():
        first = logits(model.eval()(x))
        assert all(m.num_batches_tracked == 0 for m in bns)
        assert torch.equal(first, logits(model(x)))
        model.train()(x)
        assert all(m.num_batches_tracked == 1 for m in bns)
        if bns:
            assert not torch.equal(first, logits(model.eval()(x)))


@pytest.mark.parametrize("name", [n for n in EVERY_FAMILY if n != "unet"])
def test_num_classes(name: str) -> None:
    with torch.device("meta"):
        y = get_model(name, num_classes=7).eval()(torch.empty(1, 3, 96, 96))
    assert logits(y).shape[1] == 7


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2", "densenet121", "unet"])
def test_channels_last_and_half_precision_run(name: str) -> None:
    model = get_model(name).eval()
    x = torch.randn(2, 3, 64, 64)
    with torch.inference_mode():
        expected = model(x)
        scale = expected.abs().max()
        actual = model.to(memory_format=torch.channels_last)(
            x.contiguous(memory_format=torch.channels_last)
        )
        assert (actual - expected).abs().max() <= 1e-4 * scale
        assert model.bfloat16()(x.bfloat16()).dtype == torch.bfloat16


# Initialisation


def assert_std(weight: Tensor, std: float) -> None:
    # The standard deviation of n normal samples is known to about 1 / sqrt(2 n).
    assert weight.std().item() == pytest.approx(std, rel=5 / math.sqrt(2 * weight.numel()))
    assert abs(weight.mean().item()) < 5 * std / math.sqrt(weight.numel())


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "plain18", "cifar_resnet20"])
def test_resnets_start_as_he_normal_over_the_fan_out(name: str) -> None:
    torch.manual_seed(0)
    for m in get_model(name).modules():
        if isinstance(m, nn.Conv2d):
            std = math.sqrt(2 / (m.out_channels * math.prod(m.kernel_size)))
            assert_std(m.weight, std)


def test_the_unet_starts_as_he_normal_over_the_fan_in() -> None:
    torch.manual_seed(0)
    for m in get_model("unet").modules():
        if isinstance(m, (nn.Conv2d, nn.ConvTranspose2d)):
            taps = m.kernel_size[0] ** 2 if isinstance(m, nn.Conv2d) else 1
            std = math.sqrt(2 / (m.in_channels * taps))
            assert_std(m.weight, std)


def test_efficientnet_lite_starts_over_the_fan_out_of_a_filter() -> None:
    torch.manual_seed(0)
    for m in get_model("efficientnet_lite0").modules():
        if isinstance(m, nn.Conv2d):
            std = math.sqrt(2 / (math.prod(m.kernel_size) * m.out_channels / m.groups))
            assert_std(m.weight, std)


@pytest.mark.parametrize(("name", "std"), [("googlenet", 0.01), ("inception_v3", 0.1)])
def test_inceptions_start_as_truncated_normal(name: str, std: float) -> None:
    torch.manual_seed(0)
    model = get_model(name)
    for m in model.modules():
        if isinstance(m, nn.Conv2d):
            assert_std(m.weight, std)
            assert m.weight.abs().max() <= 2
    if name == "inception_v3":
        assert_std(model.AuxLogits.fc.weight, 0.001)
    untouched = get_model(name, init_weights=False)
    assert_std(untouched.fc.weight, 1 / math.sqrt(3 * untouched.fc.in_features))


def test_highway_gates_start_by_carrying() -> None:
    gates = [m for n, m in get_model("highway19").named_modules() if n.endswith("gate")]
    assert gates
    assert all((g.bias == -2).all() for g in gates)
    gates = [m for n, m in get_model("highway19", gate_bias=-3.0).named_modules() if "gate" in n]
    assert all((g.bias == -3).all() for g in gates)


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_zero_init_residual_makes_every_block_its_shortcut(name: str) -> None:
    model = get_model(name, zero_init_residual=True)
    block = model.layer2[1]
    x = torch.rand(2, block.conv1.in_channels, 6, 6)
    assert torch.equal(block(x), x)


@pytest.mark.parametrize(("name", "reaches"), [("cifar_resnet56", True), ("cifar_plain56", False)])
def test_only_shortcuts_carry_gradient_past_branches_of_zero(name: str, reaches: bool) -> None:
    model = get_model(name)
    for key, m in model.named_modules():
        if key.endswith(".bn2"):
            nn.init.zeros_(m.weight)
    model(torch.randn(2, 3, 32, 32)).square().mean().backward()
    assert bool(model.conv1.weight.grad.abs().sum() > 0) is reaches


# Auxiliary heads


@pytest.mark.parametrize("name", ["googlenet", "googlenet_5x5"])
def test_googlenet_heads_run_in_training_only(name: str) -> None:
    model = get_model(name)
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        out = model.train()(x)
        assert isinstance(out, GoogLeNetOutputs)
        assert [y.shape for y in out] == [(2, 1000)] * 3
        y = model.eval()(x)
        calls: list[nn.Module] = []
        for head in (model.aux1, model.aux2):
            head.register_forward_hook(lambda m, args, out: calls.append(m))
        assert torch.equal(model(x), y)
        assert not calls
        model.drop_aux_heads()
        assert torch.equal(model(x), y)
        assert isinstance(model.train()(x), Tensor)
    assert not any("aux" in key for key in model.state_dict())


def test_inception_head_runs_in_training_only() -> None:
    model = get_model("inception_v3")
    x = torch.randn(2, 3, 299, 299)
    with torch.no_grad():
        out = model.train()(x)
        assert isinstance(out, InceptionOutputs)
        assert [y.shape for y in out] == [(2, 1000)] * 2
        y = model.eval()(x)
        assert torch.equal(model.drop_aux_heads()(x), y)
    assert not any("Aux" in key for key in model.state_dict())


def test_the_auxiliary_loss_weighs_the_heads_with_three_tenths() -> None:
    final, aux2, aux1 = torch.randn(3, 4, 10)
    target = torch.tensor([0, 3, 9, 1])
    expected = F.cross_entropy(final, target) + 0.3 * (
        F.cross_entropy(aux1, target) + F.cross_entropy(aux2, target)
    )
    torch.testing.assert_close(
        auxiliary_loss(GoogLeNetOutputs(final, aux2, aux1), target), expected
    )
    torch.testing.assert_close(auxiliary_loss(final, target), F.cross_entropy(final, target))
    one = auxiliary_loss(InceptionOutputs(final, aux1), target, weight=0.4)
    torch.testing.assert_close(
        one, F.cross_entropy(final, target) + 0.4 * F.cross_entropy(aux1, target)
    )


def test_the_heads_feed_the_middle_layers_with_gradient() -> None:
    model = get_model("googlenet", num_classes=10)
    nn.init.zeros_(model.fc.weight)  # cuts the trunk's own gradient
    auxiliary_loss(model(torch.randn(2, 3, 64, 64)), torch.tensor([1, 2])).backward()
    assert model.inception4a.branch1.conv.weight.grad.abs().sum() > 0
    assert model.inception4d.branch1.conv.weight.grad.abs().sum() > 0
    assert model.inception5b.branch1.conv.weight.grad.abs().sum() == 0


def test_the_third_branch_is_5x5_in_the_papers_form_and_3x3_in_torchvisions() -> None:
    kernels = [
        get_model(name).inception4b.branch3[1].conv.kernel_size[0]
        for name in ("googlenet", "googlenet_5x5")
    ]
    assert kernels == [3, 5]


# U-Net and FCN


def test_the_unet_walks_down_and_up() -> None:
    model = UNet().eval()
    sizes: dict[str, tuple[int, ...]] = {}
    for name, m in model.named_children():
        m.register_forward_hook(lambda m, a, out, n=name: sizes.update({n: tuple(out.shape[1:])}))
    with torch.inference_mode():
        model(torch.randn(1, 3, 64, 64))
    down = [(64 << i, 64 >> i, 64 >> i) for i in range(5)]
    assert [sizes[n] for n in ("inc", "down1", "down2", "down3", "down4")] == down
    for i in range(1, 5):
        assert sizes[f"up{i}_trans"] == sizes[f"up{i}_conv"] == down[4 - i]
    assert sizes["outc"] == (1, 64, 64)


def test_the_unet_names_a_size_that_it_cannot_take() -> None:
    with pytest.raises(ValueError, match="multiples of 16, got 64x72"):
        get_model("unet")(torch.randn(1, 3, 64, 72))


def test_the_unet_takes_other_channels_and_classes() -> None:
    with torch.device("meta"):
        assert UNet(1, 5)(torch.empty(2, 1, 32, 48)).shape == (2, 5, 32, 48)


def test_the_unet_skips_carry_the_resolution() -> None:
    """A single pixel shows at its place in the mask although the bottleneck sees 4x4."""
    torch.manual_seed(0)
    model = UNet().eval()
    x = torch.zeros(1, 3, 64, 64)
    with torch.inference_mode():
        blank = model(x)
        x[0, :, 21, 42] = 1
        change = (model(x) - blank).abs()[0, 0]
    row, column = divmod(int(change.argmax()), 64)
    assert abs(row - 21) <= 4
    assert abs(column - 42) <= 4


def test_the_fcn_backbone_keeps_an_eighth_by_dilation() -> None:
    model = get_model("fcn_resnet50").eval()
    with torch.inference_mode():
        features = model.backbone(torch.randn(1, 3, 64, 64))
    assert features["out"].shape == (1, 2048, 8, 8)
    assert features["aux"].shape == (1, 1024, 8, 8)
    assert [b.conv2.dilation[0] for b in model.backbone["layer3"]] == [1, 2, 2, 2, 2, 2]
    assert [b.conv2.dilation[0] for b in model.backbone["layer4"]] == [2, 4, 4]


@pytest.mark.parametrize(("aux_loss", "keys"), [(False, ["out"]), (True, ["out", "aux"])])
def test_the_fcn_returns_a_dict(aux_loss: bool, keys: list[str]) -> None:
    with torch.device("meta"):
        out = get_model("fcn_resnet50", aux_loss=aux_loss).eval()(torch.empty(1, 3, 65, 70))
    assert list(out) == keys
    assert all(y.shape == (1, 21, 65, 70) for y in out.values())


# Bad arguments


@pytest.mark.parametrize("network", [MobileNetV1, MobileNetV2])
def test_a_width_multiplier_must_be_positive(network: type[nn.Module]) -> None:
    with pytest.raises(ValueError, match="width_mult"):
        network(width_mult=0)
    with pytest.raises(ValueError, match="width_mult"):
        MobileNetV3((), 1024, width_mult=-1)


def test_a_resnet_names_wrong_stages() -> None:
    with pytest.raises(ValueError, match="4 stages"):
        ResNet(BasicBlock, (2, 2, 2))


@pytest.mark.parametrize("depth", [2, 21])
def test_a_cifar_depth_is_6n_plus_2(depth: int) -> None:
    with pytest.raises(ValueError, match="6n"):
        cifar_resnet(depth)
