"""What a user may do to a network, or write in its forward, and find again in the optimised one."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import cvfast

from .conftest import check_equal, conv_bn, patterns, randomize, reasons


def image(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class Net(nn.Module):
    """A convolution and whatever `then` makes of it, the input and the module."""

    def __init__(self, then: Callable[..., Any], channels: int = 4, **kwargs: Any) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, 4, 3, padding=1, **kwargs)
        self.then = then
        self.eval()

    def forward(self, x: Tensor) -> Any:
        return self.then(self, x)


@pytest.fixture(autouse=True)
def _no_warnings() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        yield


X = image(2, 4, 6, 8)


@pytest.mark.parametrize("kind", ["pre", "post"])
@pytest.mark.parametrize("when", ["before", "after"])
def test_hooks_of_the_root_run_once(net: nn.Module, kind: str, when: str) -> None:
    def add(module: nn.Module) -> None:
        if kind == "pre":
            module.register_forward_pre_hook(lambda m, args: (args[0] * 2 + 1,))
        else:
            module.register_forward_hook(lambda m, args, out: out * 2)

    x = image(1, 3, 16, 16)
    if when == "before":
        add(net)
        optimized = cvfast.optimize(net, x)
    else:
        optimized = cvfast.optimize(net, x)
        add(net)
        add(optimized)
    with torch.no_grad():
        torch.testing.assert_close(optimized(x), net(x))


def test_a_hook_sees_the_module_itself(net: nn.Module) -> None:
    net.depthwise.register_forward_hook(lambda m, args, out: setattr(m, "saved", out))
    optimized = cvfast.optimize(net, image(1, 3, 16, 16))
    x = image(1, 3, 16, 16, seed=1)
    with torch.no_grad():
        optimized(x)
        net(x)
    torch.testing.assert_close(optimized.depthwise.saved, net.depthwise.saved)


def test_one_tensor_for_two_inputs() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(4, 4, 3)

        def forward(self, a: Tensor, b: Tensor) -> Tensor:
            return self.conv(a) - 2 * self.conv(b)

    model = Two().eval()
    optimized = cvfast.optimize(model, (X, X))
    check_equal(optimized, model, X, X)
    check_equal(optimized, model, X, image(2, 4, 6, 8, seed=1))


def test_a_network_that_writes_to_its_input_does_so_once() -> None:
    model = Net(lambda m, x: m.conv(x.sub_(0.5)))
    ours, theirs = X.clone(), X.clone()
    with torch.no_grad():
        torch.testing.assert_close(cvfast.optimize(model)(ours), model(theirs))
    assert torch.equal(ours, theirs)
    cvfast.optimize(model, ours)
    assert torch.equal(ours, theirs)


CHANGES: dict[str, Callable[[nn.Module], Any]] = {
    "assign a module": lambda m: setattr(m, "stem", conv_bn(3, 16, 1).eval()),
    "assign a parameter": lambda m: setattr(m, "scale", nn.Parameter(torch.full((), 3.0))),
    "assign an attribute": lambda m: setattr(m, "factor", 3.0),
    "delete a module": lambda m: delattr(m, "extra"),
    "append": lambda m: m.stem.append(nn.Tanh()),
    "fill a slot": lambda m: setattr(m, "optional", nn.Conv2d(16, 16, 1)),
    "write to own parameters": lambda m: [p.data_ptr() and p.mul_(2) for p in m.parameters(False)],
    "index": lambda m: m.stem[0].weight.mul_(2),
    "eval after .data": lambda m: (m.get_parameter("stem.0.weight").data.mul_(2), m.eval()),
}


@pytest.mark.parametrize("change", CHANGES)
def test_changes_are_followed(change: str) -> None:
    class Changing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = conv_bn(3, 16, 3)
            self.extra = nn.Sigmoid()
            self.optional: nn.Module | None = None
            self.scale = nn.Parameter(torch.full((), 2.0))
            self.factor = 1.0

        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x) * self.scale * self.factor
            x = self.extra(x) if hasattr(self, "extra") else x
            return x if self.optional is None else self.optional(x)

    model = randomize(Changing())
    x = image(1, 3, 9, 9)
    optimized = cvfast.optimize(model, x)
    with torch.no_grad():
        for network in (model, optimized):
            torch.manual_seed(5)
            CHANGES[change](network)
    check_equal(optimized, model, x)


def test_what_is_computed_from_weights_alone_is_the_callers() -> None:
    model = Net(lambda m, x: (m.conv(x), m.conv.weight.exp()))
    optimized = cvfast.optimize(model, X)
    with torch.no_grad():
        optimized(X)[1].mul_(5)
    check_equal(optimized, model, X)


def _count(m: nn.Module, x: Tensor) -> Tensor:
    m.calls = getattr(m, "calls", 0) + 1
    return m.conv(x) * m.calls


def _remember(m: nn.Module, x: Tensor) -> Tensor:
    m.features = m.conv(x)
    return m.features * 2


def _replace_buffer(m: nn.Module, x: Tensor) -> Tensor:
    m.seen = m.seen + 1
    return m.conv(x) * m.seen


@pytest.mark.parametrize("forward", [_count, _remember, _replace_buffer])
@pytest.mark.parametrize("verify", ["auto", "off"])
@pytest.mark.parametrize("nested", [False, True])
def test_state_of_forward(forward: Callable[..., Tensor], verify: str, nested: bool) -> None:
    inner = Net(forward)
    inner.register_buffer("seen", torch.zeros(()))
    model = nn.Sequential(inner, conv_bn(4, 4, 3)).eval() if nested else inner
    optimized = cvfast.optimize(model, X, verify=verify)
    with torch.no_grad():
        for seed in range(3):
            x = image(2, 4, 6, 8, seed=seed)
            torch.testing.assert_close(optimized(x), model(x))
    ours = optimized.get_submodule("0") if nested else optimized
    for name in ("calls", "features", "seen"):
        if hasattr(inner, name):
            torch.testing.assert_close(getattr(ours, name), getattr(inner, name))
    assert patterns(optimized) == (["conv+bn+relu"] if nested else [])
    assert "stateful" in reasons(optimized).values()


def test_a_number_is_no_truth_value() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(4, 4, 3)

        def forward(self, x: Tensor, flag: Any) -> Tensor:
            return self.conv(x) + (100 if flag is True else 0)

    model = Net().eval()
    optimized = cvfast.optimize(model, (X, 1))
    for flag in (1, True, 1.0):
        check_equal(optimized, model, X, flag)


def test_a_forward_with_threads_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    from cvfast.optimize.gate import GATE

    monkeypatch.setattr(GATE, "_patience", 0.2)

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = conv_bn(4, 4, 3), conv_bn(4, 4, 3)

        def forward(self, x: Tensor) -> Tensor:
            with ThreadPoolExecutor(2) as pool:
                return torch.cat(list(pool.map(lambda m: m(x).detach(), (self.a, self.b))))

    model = randomize(Net())
    optimized = cvfast.optimize(model, X)
    with torch.no_grad():
        torch.testing.assert_close(optimized(X), model(X))


@dataclass
class Output:
    logits: Tensor
    count: int


@pytest.mark.parametrize(
    "then",
    [
        lambda m, x: m.conv(x.float()),
        lambda m, x: Output(m.conv(x), 3).logits,
        lambda m, x: m.conv(x).flatten(2),
        lambda m, x: m.conv(x).unflatten(1, (2, 2)),
        lambda m, x: m.conv(x)[0],
        lambda m, x: m.conv(x)[:, :2],
        lambda m, x: F.conv2d(F.pad(m.conv(x), (1, 1, 1, 1), "circular"), m.conv.weight),
        lambda m, x: torch.sigmoid((m.conv(x) > 0).int() + 1),
        lambda m, x: (x, m.conv(x)),
        lambda m, x: torch.view_as_complex(m.conv(x).unflatten(3, (-1, 2)).contiguous()).real,
    ],
)
def test_forwards(then: Callable[..., Any]) -> None:
    model = Net(then)
    optimized = cvfast.optimize(model, X)
    assert not optimized._disabled
    with torch.no_grad():
        for x in (X, image(1, 4, 8, 8)):
            actual, expected = optimized(x), model(x)
            torch.testing.assert_close(actual, expected)
            for a, e in zip(tree_leaves(actual), tree_leaves(expected), strict=True):
                assert a.is_contiguous() or not e.is_contiguous()


@pytest.mark.parametrize(
    "then", [lambda m, x: Output(m.conv(x), 3), lambda m, x: m.conv(x).detach().numpy()]
)
def test_outputs_that_are_no_tensors(then: Callable[..., Any]) -> None:
    model = Net(then)
    optimized = cvfast.optimize(model, X)
    with torch.no_grad():
        actual, expected = optimized(X), model(X)
    assert type(actual) is type(expected)
    if isinstance(actual, Output):
        torch.testing.assert_close(actual.logits, expected.logits)
    else:
        torch.testing.assert_close(torch.as_tensor(actual), torch.as_tensor(expected))


@pytest.mark.parametrize("operation", [torch.add, torch.mul])
def test_a_position_embedding_before_a_depthwise_layer(operation: Callable[..., Tensor]) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(4, 8, 3, padding=1)
            self.position = nn.Parameter(image(1, 8, 6, 8))
            self.depthwise = nn.Conv2d(8, 8, 3, groups=8)

        def forward(self, x: Tensor) -> Tensor:
            return self.depthwise(operation(self.position, self.conv(x)))

    model = Net().eval()
    optimized = cvfast.optimize(model, image(1, 4, 6, 8))
    for batch in (1, 2, 5):
        check_equal(optimized, model, image(batch, 4, 6, 8))


def test_results_may_be_written_to_and_read_with_gradients_enabled() -> None:
    model = Net(lambda m, x: (m.conv(x), m.conv(x).detach()))
    optimized = cvfast.optimize(model, X)
    tracked, detached = optimized(X)
    assert tracked.requires_grad
    detached.numpy()
    tracked += 1
    torch.testing.assert_close(tracked, model(X)[0] + 1)


def test_a_sequential_can_be_indexed(net: nn.Module) -> None:
    optimized = cvfast.optimize(nn.Sequential(net, nn.Softmax(-1)).eval())
    assert isinstance(optimized[1], nn.Softmax)
    assert len(optimized) == len(list(optimized)) == 2
    assert cvfast.optimize(net)


def test_measuring_a_site_that_adds_its_own_source() -> None:
    model = Net(lambda m, x: x + m.conv(x))
    check_equal(cvfast.optimize(model, X, select="measure"), model, X)


def test_example_in_channels_last_then_contiguous() -> None:
    model = Net(lambda m, x: m.conv(x))
    optimized = cvfast.optimize(model, X.contiguous(memory_format=torch.channels_last))
    check_equal(optimized, model, X)
    check_equal(optimized, model, X.contiguous(memory_format=torch.channels_last))


def test_results_of_integer_input_are_cast_back() -> None:
    model = Net(lambda m, x: m.conv(x.to(m.conv.weight.dtype) / 255))
    optimized = cvfast.optimize(model, dtype=torch.bfloat16)
    pixels = torch.randint(0, 255, (1, 4, 6, 6), dtype=torch.uint8)
    with torch.no_grad():
        assert optimized(pixels).dtype == torch.float32
        torch.testing.assert_close(optimized(pixels), model(pixels), rtol=0.05, atol=0.05)


def test_monte_carlo_dropout_is_no_disagreement() -> None:
    model = nn.Sequential(conv_bn(4, 4, 3), nn.Dropout(0.5), conv_bn(4, 4, 3)).eval()
    model[1].train()
    optimized = cvfast.optimize(model, X)
    assert patterns(optimized) == ["conv+bn+relu"] * 2
    torch.manual_seed(1)
    with torch.no_grad():
        ours = optimized(X)
        torch.manual_seed(1)
        torch.testing.assert_close(ours, model(X))


def test_variable_arguments() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(4, 4, 3)

        def forward(self, *images: Tensor) -> Tensor:
            return sum(self.conv(x) for x in images)

    model = Net().eval()
    optimized = cvfast.optimize(model, (X, X))
    assert len(optimized._runner.programs) == 1
    check_equal(optimized, model, X, X)
    check_equal(optimized, model, X)


def test_an_assertion_on_the_data_still_holds() -> None:
    def then(m: nn.Module, x: Tensor) -> Tensor:
        torch._assert_async((x.sum() > -1e6).all())
        return m.conv(x)

    optimized = cvfast.optimize(Net(then), X)
    with pytest.raises(RuntimeError):
        optimized(X - 1e6)


def test_json_has_no_infinity(monkeypatch: pytest.MonkeyPatch) -> None:
    report = cvfast.optimize(Net(lambda m, x: m.conv(x)), X, verify="layers").report
    report.rows[0].max_error = math.inf
    assert json.loads(report.to_json())["rows"][0]["max_error"] is None


def test_a_rejected_network_stays_rejected(monkeypatch: pytest.MonkeyPatch, net: nn.Module) -> None:
    from cvfast.optimize import lower
    from cvfast.optimize.verify import VerificationError

    right = lower.fold_batch_norm
    monkeypatch.setattr(
        lower, "fold_batch_norm", lambda *a, **k: tuple(2 * t for t in right(*a, **k))
    )
    optimized = cvfast.optimize(net, on_unsupported="raise")
    x = image(1, 3, 16, 16)
    with pytest.raises(VerificationError), torch.no_grad():
        optimized(x)
    with torch.no_grad():
        assert torch.equal(optimized(x), net(x))


def test_optimising_under_inference_mode(net: nn.Module) -> None:
    with torch.inference_mode():
        optimized = cvfast.optimize(net, image(1, 3, 16, 16))
    optimized.load_state_dict({k: v * 2 for k, v in net.state_dict().items()})
    net.load_state_dict({k: v * 2 for k, v in net.state_dict().items()})
    check_equal(optimized, net, image(1, 3, 16, 16))


def test_a_scripted_part_runs_as_it_is() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        scripted = torch.jit.script(nn.Conv2d(4, 4, 1)).eval()
    model = nn.Sequential(conv_bn(4, 4, 3), scripted).eval()
    optimized = cvfast.optimize(model, X)
    with torch.no_grad():
        torch.testing.assert_close(optimized(X), model(X))


def test_a_changed_network_is_checked_anew(net: nn.Module) -> None:
    optimized = cvfast.optimize(net, image(1, 3, 16, 16))
    stateful = Net(_count, channels=3)
    optimized.stem = nn.Sequential(stateful, nn.Conv2d(4, 16, 1)).eval()
    with torch.no_grad():
        first, second = (optimized(image(1, 3, 16, 16)) for _ in range(2))
    assert not torch.equal(first, second)
    assert "stateful" in reasons(optimized).values()
