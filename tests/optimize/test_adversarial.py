"""Networks made to trip an optimiser: each comes out right, or is left alone with its reason."""

from __future__ import annotations

import warnings
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import cvfast
from cvfast.optimize import OptimizedModule

from .conftest import ConvNet, check_equal, conv_bn, patterns, randomize, reasons

Check = Callable[..., OptimizedModule]


def image(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_convolution_used_twice_with_and_without_batch_norm(optimize_and_check: Check) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(4, 4, 3, padding=1)
            self.bn = nn.BatchNorm2d(4)

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(x) + self.bn(self.conv(x * 2))

    optimized = optimize_and_check(randomize(Net()), image(2, 4, 9, 9), image(1, 4, 12, 7))
    assert patterns(optimized) == ["conv+add", "conv+bn"]


def test_one_batch_norm_behind_two_convolutions(optimize_and_check: Check) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Conv2d(3, 6, 3)
            self.b = nn.Conv2d(3, 6, 3, bias=False)
            self.bn = nn.BatchNorm2d(6)

        def forward(self, x: Tensor) -> Tensor:
            return torch.cat([self.bn(self.a(x)), self.bn(self.b(x))], 1)

    optimized = optimize_and_check(randomize(Net()), image(1, 3, 8, 8), image(3, 3, 11, 9))
    assert patterns(optimized) == ["conv+bn", "conv+bn"]


def test_one_batch_norm_on_the_sum_of_two_convolutions(optimize_and_check: Check) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Conv2d(3, 6, 3)
            self.b = nn.Conv2d(3, 6, 3)
            self.bn = nn.BatchNorm2d(6)

        def forward(self, x: Tensor) -> Tensor:
            return self.bn(self.a(x) + self.b(x))

    optimized = optimize_and_check(randomize(Net()), image(1, 3, 8, 8))
    assert reasons(optimized)["bn"] == "bn_standalone"


def test_batch_norm_in_training_mode_is_left_alone_and_still_learns() -> None:
    model = randomize(nn.Sequential(conv_bn(3, 8, 3), conv_bn(8, 8, 3)))
    model[1][1].train()
    torch.manual_seed(0)
    optimized = cvfast.optimize(model, verify="off")
    x = image(4, 3, 10, 10)
    with torch.no_grad():
        expected, actual = model(x), optimized(x)
    torch.testing.assert_close(actual, expected)
    ours = optimized.get_submodule("1.1")
    torch.testing.assert_close(ours.running_mean, model[1][1].running_mean)
    assert int(ours.num_batches_tracked) == 1
    assert reasons(optimized)["1.1"] == "bn_training"
    assert "conv+bn+relu" in patterns(optimized)


def test_batch_norm_without_running_statistics(optimize_and_check: Check) -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8, track_running_stats=False), nn.ReLU()
    ).eval()
    optimized = optimize_and_check(model, image(4, 3, 10, 10))
    assert reasons(optimized)["1"] == "bn_no_running_stats"
    assert patterns(optimized) == ["conv"]


def test_batch_norm_without_affine_parameters(optimize_and_check: Check) -> None:
    model = randomize(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8, affine=False)))
    assert patterns(optimize_and_check(model, image(2, 3, 7, 7))) == ["conv+bn"]


@pytest.mark.parametrize("where", ["stem", "stem.1", "depthwise.0", ""])
def test_forward_hooks_keep_firing(net: nn.Module, where: str) -> None:
    seen: list[torch.Size] = []
    net.get_submodule(where).register_forward_hook(lambda module, args, out: seen.append(out.shape))
    optimized = cvfast.optimize(net, image(1, 3, 16, 16))
    seen.clear()
    x = image(2, 3, 20, 16)
    with torch.no_grad():
        actual = optimized(x)
        assert len(seen) == 1
        torch.testing.assert_close(actual, net(x))
    assert len(optimized.report.fused) >= 3
    if where == "depthwise.0":
        assert reasons(optimized)[where] == "hook_present"


def test_a_hook_added_after_optimisation_fires(net: nn.Module) -> None:
    optimized = cvfast.optimize(net, image(1, 3, 16, 16))
    seen: list[int] = []
    handle = optimized.stem[0].register_forward_hook(lambda *_: seen.append(1))
    optimized(image(1, 3, 16, 16))
    assert seen == [1]
    handle.remove()
    optimized(image(1, 3, 16, 16))
    assert seen == [1]
    check_equal(optimized, net, image(2, 3, 16, 16))


def test_a_hook_that_changes_the_result_is_obeyed(net: nn.Module) -> None:
    net.depthwise[1].register_forward_hook(lambda module, args, out: out * 3)
    optimized = cvfast.optimize(net, image(1, 3, 16, 16))
    check_equal(optimized, net, image(1, 3, 16, 16))


def test_functional_batch_norm(optimize_and_check: Check) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)
            self.register_buffer("mean", torch.tensor([0.1, -0.2, 0.3, 0.0]))
            self.register_buffer("var", torch.tensor([0.5, 2.0, 1.0, 0.1]))

        def forward(self, x: Tensor) -> Tensor:
            return F.batch_norm(self.conv(x), self.mean, self.var, None, None, False, 0.1, 1e-3)

    assert patterns(optimize_and_check(Net().eval(), image(2, 3, 6, 9))) == ["conv+bn"]


@pytest.mark.parametrize("depthwise", [False, True])
def test_parametrized_weights(optimize_and_check: Check, depthwise: bool) -> None:
    groups = 4 if depthwise else 1
    conv = nn.utils.parametrizations.weight_norm(nn.Conv2d(4, 4, 3, groups=groups))
    model = randomize(nn.Sequential(conv, nn.BatchNorm2d(4), nn.ReLU()))
    optimized = optimize_and_check(model, image(1, 4, 8, 8), image(2, 4, 9, 9))
    assert len(patterns(optimized)) == 1
    with torch.no_grad():
        for network in (model, optimized):
            network.get_parameter("0.parametrizations.weight.original0").mul_(2)
    check_equal(optimized, model, image(1, 4, 8, 8))


def test_hook_based_weight_norm_is_left_alone() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = nn.Sequential(
            nn.utils.weight_norm(nn.Conv2d(3, 4, 3)), nn.ReLU(), nn.Conv2d(4, 4, 3)
        ).eval()
    x = image(1, 3, 9, 9)
    with torch.no_grad():
        model(x)
        model[0].weight = model[0].weight.detach()
        optimized = cvfast.optimize(model, x)
        torch.testing.assert_close(optimized(x), model(x))
    assert reasons(optimized)["0"] == "hook_present"


def test_convolution_output_read_twice(optimize_and_check: Check) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 5, 3)
            self.bn = nn.BatchNorm2d(5)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            y = self.conv(x)
            return self.bn(y).relu(), y

    optimized = optimize_and_check(randomize(Net()), image(1, 3, 8, 8))
    assert patterns(optimized) == ["conv"] and reasons(optimized)["bn"] == "output_read_twice"


def test_in_place_activation_changes_what_an_earlier_name_refers_to(
    optimize_and_check: Check,
) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 5, 3)
            self.next = nn.Conv2d(5, 5, 1)

        def forward(self, x: Tensor) -> Tensor:
            y = self.conv(x)
            z = self.next(y)
            F.relu_(y)
            return y + z

    optimize_and_check(Net().eval(), image(2, 3, 8, 8))


def test_in_place_write_through_a_view(optimize_and_check: Check) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 6, 3, padding=1)
            self.next = nn.Conv2d(6, 4, 3)

        def forward(self, x: Tensor) -> Tensor:
            y = self.conv(x)
            y[:, :2].relu_()
            return self.next(y)

    optimize_and_check(Net().eval(), image(1, 3, 8, 8))


def test_a_module_that_writes_to_its_input() -> None:
    model = nn.Sequential(nn.ReLU(inplace=True), nn.Conv2d(3, 4, 3)).eval()
    optimized = cvfast.optimize(model, image(1, 3, 8, 8))
    a, b = image(1, 3, 8, 8), image(1, 3, 8, 8)
    with torch.no_grad():
        torch.testing.assert_close(optimized(a), model(b))
    torch.testing.assert_close(a, b)


class Named(NamedTuple):
    logits: Tensor
    features: Tensor


@pytest.mark.parametrize("kind", ["dict", "ordered", "tuple", "namedtuple", "nested"])
def test_structured_outputs(optimize_and_check: Check, kind: str) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = conv_bn(3, 8, 3)
            self.head = nn.Conv2d(8, 2, 1)

        def forward(self, x: Tensor) -> Any:
            features = self.body(x)
            logits = self.head(features)
            return {
                "dict": {"logits": logits, "features": features},
                "ordered": OrderedDict(out=logits, aux=features),
                "tuple": (logits, features),
                "namedtuple": Named(logits, features),
                "nested": {"all": [logits, (features, 3)]},
            }[kind]

    optimize_and_check(randomize(Net()), image(1, 3, 8, 8), image(2, 3, 9, 12))


def test_keyword_and_several_inputs(optimize_and_check: Check) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3, padding=1)

        def forward(self, x: Tensor, mask: Tensor, scale: float = 1.0) -> Tensor:
            return self.conv(x) * mask * scale

    model = Net().eval()
    mask = torch.ones(1, 1, 8, 8)
    optimized = cvfast.optimize(model, {"x": image(1, 3, 8, 8), "mask": mask, "scale": 2.0})
    check_equal(optimized, model, x=image(1, 3, 8, 8), mask=mask, scale=2.0)
    check_equal(optimized, model, x=image(1, 3, 8, 8), mask=mask, scale=3.0)
    check_equal(optimized, model, image(1, 3, 8, 8), mask)


@pytest.mark.parametrize("groups", [2, 4])
def test_grouped_but_not_depthwise(optimize_and_check: Check, groups: int) -> None:
    model = randomize(conv_bn(8, 16, 3, padding=1, groups=groups))
    optimized = optimize_and_check(model, image(1, 8, 9, 9), image(3, 8, 7, 10))
    assert patterns(optimized) == ["conv+bn+relu"]


@pytest.mark.parametrize("channels", [3, 16, 17])
def test_depth_multiplier_two(optimize_and_check: Check, channels: int) -> None:
    model = randomize(conv_bn(channels, 2 * channels, 3, padding=1, groups=channels))
    optimized = optimize_and_check(model, image(1, channels, 9, 9), image(2, channels, 6, 11))
    assert patterns(optimized) == ["depthwise+bn+relu"]


@pytest.mark.parametrize("mode", ["reflect", "replicate", "circular"])
@pytest.mark.parametrize("groups", [1, 4])
def test_padding_modes(optimize_and_check: Check, mode: str, groups: int) -> None:
    model = nn.Sequential(
        nn.Conv2d(4, 4, 3, padding=1, padding_mode=mode, groups=groups), nn.ReLU()
    ).eval()
    optimize_and_check(model, image(1, 4, 9, 8), image(2, 4, 7, 7))


@pytest.mark.parametrize("size", [2, 3, (1, 4)])
def test_same_padding(optimize_and_check: Check, size: Any) -> None:
    model = nn.Sequential(nn.Conv2d(4, 6, size, padding="same"), nn.ReLU()).eval()
    optimize_and_check(model, image(1, 4, 9, 8), image(2, 4, 7, 7))


def test_float64_model(net: nn.Module) -> None:
    model = net.double()
    x = image(2, 3, 16, 16).double()
    optimized = cvfast.optimize(model, x)
    with torch.no_grad():
        torch.testing.assert_close(optimized(x), model(x), rtol=1e-12, atol=1e-12)
    assert optimized(x).dtype == torch.float64
    assert {row.backend for row in optimized.report.fused} == {"reference"}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_model(net: nn.Module, dtype: torch.dtype) -> None:
    model = net.to(dtype)
    x = image(2, 3, 16, 16).to(dtype)
    optimized = cvfast.optimize(model, x)
    assert optimized.report.verification.ok and optimized(x).dtype == dtype
    check_equal(optimized, model, x)


def test_batch_zero(net: nn.Module) -> None:
    optimized = cvfast.optimize(net, image(1, 3, 16, 16))
    assert optimized(image(0, 3, 16, 16)).shape == (0, 5)
    first = cvfast.optimize(net)
    assert first(image(0, 3, 16, 16)).shape == (0, 5)


def test_layouts_of_the_input(net: nn.Module) -> None:
    optimized = cvfast.optimize(net, image(1, 3, 16, 16))
    base = image(2, 3, 16, 20)
    for x in (
        base.contiguous(memory_format=torch.channels_last),
        base.transpose(2, 3),
        base[:, :, ::2, 1:],
        base.flip(1),
        base.expand(2, 3, 16, 20),
        base[:1].expand(4, 3, 16, 20),
    ):
        check_equal(optimized, net, x)


def test_a_segmentation_output_keeps_the_layout_of_the_input(optimize_and_check: Check) -> None:
    model = randomize(nn.Sequential(conv_bn(3, 8, 3, padding=1), nn.Conv2d(8, 4, 1)))
    x = image(2, 3, 8, 10)
    optimize_and_check(model, x, x.contiguous(memory_format=torch.channels_last))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize(
    "activation", [nn.ReLU, nn.ReLU6, nn.Hardswish, nn.SiLU, nn.Hardsigmoid, nn.LeakyReLU]
)
def test_nan_and_infinity_pass_as_in_eager(value: float, activation: Any) -> None:
    model = randomize(
        nn.Sequential(
            conv_bn(3, 8, 1, activation=activation),
            conv_bn(8, 8, 3, padding=1, groups=8, activation=activation),
            conv_bn(8, 4, 1, activation=activation),
        )
    )
    optimized = cvfast.optimize(model, image(1, 3, 8, 8))
    x = image(1, 3, 8, 8)
    x[0, 1, 2, 3] = value
    with torch.no_grad():
        expected, actual = model(x), optimized(x)
    assert torch.equal(actual.isnan(), expected.isnan())
    torch.testing.assert_close(actual, expected, equal_nan=True, rtol=1e-4, atol=1e-5)
    if value != value:
        assert bool(actual.isnan().any())


def test_nan_in_the_weights_is_not_hidden() -> None:
    model = randomize(nn.Sequential(conv_bn(3, 8, 1), conv_bn(8, 4, 1)))
    model[0][0].weight.data[0, 0] = float("nan")
    optimized = cvfast.optimize(model, image(1, 3, 8, 8))
    with torch.no_grad():
        assert optimized(image(1, 3, 8, 8)).isnan().all()


def test_data_dependent_control_flow_runs_by_parts() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = conv_bn(3, 8, 3)
            self.b = conv_bn(8, 8, 3)
            self.c = conv_bn(8, 8, 3)

        def forward(self, x: Tensor) -> Tensor:
            x = self.a(x)
            return self.b(x) if x.sum() > 0 else self.c(x)

    model = randomize(Net())
    x = image(1, 3, 12, 12)
    optimized = cvfast.optimize(model, x)
    for scale in (1.0, -3.0, 0.1):
        check_equal(optimized, model, x * scale)
    assert patterns(optimized)[0] == "conv+bn+relu"
    assert any("by its parts" in note for note in optimized.report.notes)
    assert "not_reached" in reasons(optimized).values()


def test_a_model_that_cannot_be_captured_at_all_runs_as_it_is() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(4, 3, 3, 3))

        def forward(self, x: Tensor) -> Tensor:
            y = F.conv2d(x, self.weight)
            return y * float(y.abs().max().item() > 1)

    model = Net().eval()
    x = image(1, 3, 8, 8)
    optimized = cvfast.optimize(model, x)
    check_equal(optimized, model, x)
    assert not optimized.report.fused
    with pytest.raises(RuntimeError, match="cannot be"):
        cvfast.optimize(model, x, on_unsupported="raise")


def test_random_behaviour_is_left_alone() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return F.dropout(self.conv(x), 0.5, training=True)

    optimized = cvfast.optimize(Net().eval(), verify="off")
    x = image(1, 3, 8, 8)
    torch.manual_seed(3)
    first = optimized(x)
    torch.manual_seed(3)
    assert torch.equal(first, optimized(x))
    assert not torch.equal(first, optimized(x))


@pytest.mark.parametrize(
    "bad",
    [
        image(1, 4, 16, 16),
        image(3, 16),
        image(1, 3, 16, 16).double(),
        torch.zeros(1, 3, 16, 16, dtype=torch.uint8),
    ],
    ids=["channels", "rank", "float64", "uint8"],
)
def test_wrong_input_raises_as_eager_does_and_says_what_was_expected(
    net: nn.Module, bad: Tensor
) -> None:
    optimized = cvfast.optimize(net, image(1, 3, 16, 16))
    with pytest.raises(RuntimeError) as eager:
        net(bad)
    with pytest.raises(type(eager.value)) as ours:
        optimized(bad)
    assert str(eager.value).splitlines()[0] in str(ours.value)
    assert any("float32[any, 3, any, any]" in note for note in ours.value.__notes__)
    check_equal(optimized, net, image(1, 3, 16, 16))


def test_wrong_example_input_raises_as_eager_does(net: nn.Module) -> None:
    with pytest.raises(RuntimeError, match="channels"):
        cvfast.optimize(net, image(1, 4, 16, 16))


def test_a_single_image_without_a_batch(optimize_and_check: Check) -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=8)).eval()
    optimized = optimize_and_check(model, image(3, 9, 11), image(1, 3, 9, 11))
    assert reasons(optimized) == {"0": "no_kernel", "2": "no_kernel"}


def test_a_failure_of_ours_is_reported_and_the_module_runs(
    net: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    from cvfast.optimize import runner

    def fail(*args: object) -> None:
        raise KeyError("a bug")

    monkeypatch.setattr(runner, "lower", fail)
    with pytest.warns(RuntimeWarning, match=r"please report this: KeyError: 'a bug'"):
        optimized = cvfast.optimize(net, image(1, 3, 16, 16))
    check_equal(optimized, net, image(1, 3, 16, 16))
    assert not optimized.report.fused
    assert reasons(optimized)["stem.0"] == "internal_error"


def test_non_image_network_is_served_as_it_is() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)).eval()
    optimized = cvfast.optimize(model, image(3, 4))
    check_equal(optimized, model, image(3, 4))
    check_equal(optimized, model, image(5, 4))


def test_tied_weights_and_nested_sharing(optimize_and_check: Check) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Conv2d(4, 4, 3, padding=1, bias=False)
            self.b = nn.Conv2d(4, 4, 3, padding=1, bias=False)
            self.b.weight = self.a.weight
            self.bn = nn.BatchNorm2d(4)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.bn(self.a(x)))

    optimize_and_check(randomize(Net()), image(1, 4, 8, 8))


def test_an_optimised_network_inside_a_larger_one(net: nn.Module) -> None:
    outer = nn.Sequential(
        nn.Identity(), cvfast.optimize(net, image(1, 3, 16, 16)), nn.Softmax(-1)
    ).eval()
    plain = nn.Sequential(nn.Identity(), net, nn.Softmax(-1)).eval()
    assert list(outer.state_dict()) == list(plain.state_dict())
    changed = {k: v * 1.5 if v.is_floating_point() else v for k, v in plain.state_dict().items()}
    outer.load_state_dict(changed)
    plain.load_state_dict(changed)
    x = image(2, 3, 16, 16)
    with torch.no_grad():
        torch.testing.assert_close(outer(x), plain(x))


def test_optimising_twice_changes_nothing(net: nn.Module) -> None:
    once = cvfast.optimize(net, image(1, 3, 16, 16))
    twice = cvfast.optimize(once, image(1, 3, 16, 16))
    assert patterns(once) == patterns(twice)
    check_equal(twice, net, image(1, 3, 16, 16))


def test_a_network_called_with_another_image_size_pins_nothing(net: nn.Module) -> None:
    optimized = cvfast.optimize(net, image(1, 3, 16, 16))
    for shape in ((1, 3, 32, 16), (7, 3, 5, 9), (1, 3, 1, 1), (2, 3, 224, 64)):
        check_equal(optimized, net, image(*shape))
    assert len(optimized._runner.programs) == 1


def test_the_argument_is_left_untouched(net: nn.Module) -> None:
    before = {k: v.clone() for k, v in net.state_dict().items()}
    attributes = set(vars(net))
    cvfast.optimize(net, image(1, 3, 16, 16))
    assert set(vars(net)) == attributes and isinstance(net, ConvNet)
    for name, value in net.state_dict().items():
        assert torch.equal(value, before[name])
