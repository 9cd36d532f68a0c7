"""What `cvfast.optimize` promises, apart from speed."""

from __future__ import annotations

import contextlib
import copy
import io
import json
import pickle
import subprocess
import sys
import threading
import warnings

import pytest
import torch
from torch import Tensor, nn

import cvfast
from cvfast.ops.conv import prepack
from cvfast.optimize import OptimizedModule, VerificationError
from cvfast.testing import isa, isa_levels

from .conftest import ConvNet, check_equal, conv_bn, patterns, randomize, reasons

X = torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def optimized(net: nn.Module) -> OptimizedModule:
    return cvfast.optimize(net, X)


def test_every_site_is_fused_and_verified(optimized: OptimizedModule) -> None:
    report = optimized.report
    assert patterns(optimized) == [
        "conv+bn+relu",
        "depthwise+bn+relu6",
        "conv+bn+relu",
        "conv+add+relu",
    ]
    assert report.coverage == 1.0 and report.verification.ok and report.layout_copies == 1
    assert report.verification.error <= report.verification.limit
    assert [row.flops for row in report.rows] == [
        2 * 64 * 16 * 27,
        2 * 64 * 16 * 9,
        2 * 64 * 16 * 32,
        2 * 64 * 32 * 16,
    ]


def test_state_dict_is_the_originals(net: nn.Module, optimized: OptimizedModule) -> None:
    ours, theirs = optimized.state_dict(), net.state_dict()
    assert list(ours) == list(theirs)
    for name, value in ours.items():
        assert torch.equal(value, theirs[name]) and value.dtype == theirs[name].dtype
    assert [n for n, _ in optimized.named_parameters()] == [n for n, _ in net.named_parameters()]
    assert [n for n, _ in optimized.named_buffers()] == [n for n, _ in net.named_buffers()]
    assert [n for n, _ in optimized.named_modules()] == [n for n, _ in net.named_modules()]


def test_load_state_dict_repacks(net: nn.Module, optimized: OptimizedModule) -> None:
    other = randomize(ConvNet(), seed=5)
    optimized.load_state_dict(other.state_dict())
    check_equal(optimized, other, X)
    with pytest.raises(RuntimeError, match=r"Missing key|Unexpected key"):
        optimized.load_state_dict({})


def test_writing_to_a_parameter_repacks(net: nn.Module, optimized: OptimizedModule) -> None:
    for network in (net, optimized):
        with torch.no_grad():
            network.stem[0].weight.mul_(-2)
            network.depthwise[1].running_var.add_(1)
    check_equal(optimized, net, X)


def test_replacing_a_module_or_parameter_is_noticed(
    net: nn.Module, optimized: OptimizedModule
) -> None:
    torch.manual_seed(3)
    head, kernel = nn.Linear(16, 2), nn.Parameter(torch.randn(16, 3, 3, 3))
    for network in (net, optimized):
        network.head = head
        network.stem[0].weight = kernel
    check_equal(optimized, net, X)


def test_moving_to_another_dtype_repacks(net: nn.Module, optimized: OptimizedModule) -> None:
    with torch.no_grad():
        torch.testing.assert_close(optimized.double()(X.double()), net.double()(X.double()))


def test_train_gives_back_the_original_path_with_one_warning(
    net: nn.Module, optimized: OptimizedModule
) -> None:
    with pytest.warns(UserWarning, match="training mode the original network runs"):
        optimized.train()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimized.eval().train()
    net.train()
    x = torch.randn(4, 3, 16, 16)
    ours, theirs = optimized(x), net(x)
    torch.testing.assert_close(ours, theirs)
    for network, out in ((optimized, ours), (net, theirs)):
        optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
        out.square().sum().backward()
        optimizer.step()
    check_equal(optimized.eval(), net.eval(), X)


def test_a_model_in_training_mode_is_optimised_once_it_is_not() -> None:
    model = ConvNet()
    optimized = cvfast.optimize(model, X)
    assert not optimized.report.fused and "training mode" in optimized.report.notes[0]
    optimized.eval()
    check_equal(optimized, model.eval(), X)
    assert optimized.report.coverage == 1.0


def test_gradients_of_the_input_are_right(net: nn.Module, optimized: OptimizedModule) -> None:
    grads = []
    for network in (net, optimized):
        x = X.clone().requires_grad_()
        network(x).square().sum().backward()
        grads.append(x.grad)
    torch.testing.assert_close(grads[1], grads[0])


def test_gradients_of_parameters_raise_instead_of_staying_away(optimized: OptimizedModule) -> None:
    out = optimized(X)
    assert out.requires_grad
    with pytest.raises(RuntimeError, match=r"\.train\(\)"):
        out.sum().backward()
    with torch.no_grad():
        assert not optimized(X).requires_grad
    optimized.requires_grad_(False)
    assert not optimized(X).requires_grad


def test_deepcopy_is_independent(net: nn.Module, optimized: OptimizedModule) -> None:
    twin = copy.deepcopy(optimized)
    optimized.load_state_dict(randomize(ConvNet(), seed=5).state_dict())
    check_equal(twin, net, X)
    assert twin.report.summary() and twin is not optimized


def test_pickle_and_torch_save(net: nn.Module, optimized: OptimizedModule) -> None:
    check_equal(pickle.loads(pickle.dumps(optimized)), net, X)
    buffer = io.BytesIO()
    torch.save(optimized.state_dict(), buffer)
    buffer.seek(0)
    fresh = cvfast.optimize(randomize(ConvNet(), seed=9), X)
    fresh.load_state_dict(torch.load(buffer, weights_only=True))
    check_equal(fresh, net, X)


def test_threads_share_one_network(net: nn.Module) -> None:
    optimized = cvfast.optimize(net)
    inputs = [torch.randn(1 + i % 3, 3, 16 + 2 * (i % 4), 16) for i in range(12)]
    with torch.no_grad():
        expected = [net(x) for x in inputs]
    failures: list[BaseException] = []

    def work(offset: int) -> None:
        try:
            for i in range(24):
                j = (i + offset) % len(inputs)
                with torch.no_grad():
                    torch.testing.assert_close(optimized(inputs[j]), expected[j])
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(5 * k,)) for k in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures, failures[0]


def test_several_instances_do_not_share_state(net: nn.Module) -> None:
    other = randomize(ConvNet(), seed=4)
    a, b = cvfast.optimize(net, X), cvfast.optimize(other, X)
    check_equal(a, net, X)
    check_equal(b, other, X)


def test_autocast_runs_the_original(net: nn.Module, optimized: OptimizedModule) -> None:
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        with pytest.warns(UserWarning, match="under autocast"):
            actual = optimized(X)
        expected = net(X)
    assert actual.dtype == expected.dtype == torch.bfloat16
    assert torch.equal(actual, expected)


def test_dtype_computes_in_it_and_returns_the_inputs(net: nn.Module) -> None:
    optimized = cvfast.optimize(net, X, dtype=torch.bfloat16)
    assert optimized.report.verification.ok
    with torch.no_grad():
        out = optimized(X)
        assert out.dtype == torch.float32
        torch.testing.assert_close(out, net(X), rtol=0.05, atol=0.05)
        assert not torch.equal(out, net(X))
    assert {v.dtype for v in optimized.state_dict().values()} == {torch.float32, torch.int64}
    other = randomize(ConvNet(), seed=5)
    optimized.load_state_dict(other.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(optimized(X), other(X), rtol=0.05, atol=0.05)


@pytest.mark.skipif("avx512_bf16" not in isa_levels(), reason="needs AVX512_BF16")
def test_bfloat16_products_of_winograd_are_used_beside_a_batch_norm_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """There PyTorch rounds twice, which leaves room for their error."""
    from cvfast.optimize import lower

    chosen = []

    def spy(*args: Tensor, algorithm: str, **kwargs: torch.dtype) -> Tensor:
        chosen.append(algorithm)
        return prepack(*args, algorithm=algorithm, **kwargs)

    monkeypatch.setattr(lower, "prepack_conv", spy)
    x = torch.randn(1, 64, 28, 28, generator=torch.Generator().manual_seed(0))
    conv = nn.Conv2d(64, 64, 3, padding=1)
    for net in (randomize(nn.Sequential(conv, nn.BatchNorm2d(64))), nn.Sequential(conv)):
        with isa("avx512_bf16"):
            optimized = cvfast.optimize(net.eval(), x, dtype=torch.bfloat16)
        assert optimized.report.verification.ok
    assert set(chosen[: len(chosen) // 2]) == {"winograd_f2_bf16"}
    assert set(chosen[len(chosen) // 2 :]) == {"winograd_f2x4"}


def test_filter_fn_sees_every_convolution_and_is_obeyed(net: nn.Module) -> None:
    seen: dict[str, type] = {}

    def keep(module: nn.Module, name: str) -> bool:
        seen[name] = type(module)
        return name != "depthwise.0"

    optimized = cvfast.optimize(net, X, filter_fn=keep)
    assert seen == dict.fromkeys(["stem.0", "depthwise.0", "expand.0.0", "expand.1"], nn.Conv2d)
    assert reasons(optimized)["depthwise.0"] == "user_filter"
    check_equal(optimized, net, X)


def test_on_unsupported_raise_names_the_first_site() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ConvTranspose2d(4, 4, 2, stride=2)).eval()
    with pytest.raises(RuntimeError, match=r"1 .*no_kernel.*conv_transpose2d"):
        cvfast.optimize(model, X, on_unsupported="raise")
    assert cvfast.optimize(model, X).report.coverage < 1


def test_dry_run_reports_and_changes_nothing(net: nn.Module) -> None:
    optimized = cvfast.optimize(net, X, dry_run=True)
    assert len(optimized.report.fused) == 4
    with torch.no_grad():
        assert torch.equal(optimized(X), net(X))


@pytest.mark.parametrize("backend", ["reference", "onednn", "cpu"])
def test_backend_is_obeyed(net: nn.Module, backend: str) -> None:
    optimized = cvfast.optimize(net, X, backend=backend)
    check_equal(optimized, net, X)
    assert {row.backend for row in optimized.report.fused} == {backend}
    assert len(optimized.report.fused) == 4


class ResidualPair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(24, 24, 3, padding=1)
        self.second = nn.Conv2d(24, 24, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(24)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.norm(self.second(torch.tanh(self.first(x)))) + x)


def test_3x3_convolutions_run_on_the_own_kernel_with_residual_and_activation_fused() -> None:
    model = ResidualPair().eval()
    x = torch.randn(1, 24, 40, 37)
    optimized = cvfast.optimize(model, x)
    check_equal(optimized, model, x)
    assert [(row.pattern, row.backend) for row in optimized.report.rows] == [
        ("conv+tanh", "cpu"),
        ("conv+bn+add+relu", "cpu"),
    ]
    # Smaller images than the algorithm was chosen for, and several.
    check_equal(optimized, model, torch.randn(3, 24, 5, 2))


def test_weights_that_are_not_finite_spread_no_further_than_in_eager() -> None:
    model = nn.Sequential(nn.Conv2d(24, 8, 3), nn.ReLU()).eval()
    with torch.no_grad():
        model[0].weight[0, 0, 0, 0] = float("inf")
    x = torch.randn(1, 24, 40, 37)
    optimized = cvfast.optimize(model, x)
    assert [row.backend for row in optimized.report.fused] == ["cpu"]
    with torch.no_grad():
        assert torch.equal(optimized(x).isfinite(), model(x).isfinite())


class Pointwise(nn.Module):
    """1x1 convolutions in every surrounding that lowering knows."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            [
                conv_bn(3, 24, 1, activation=nn.Hardswish),
                conv_bn(24, 40, 1, stride=2, activation=nn.ReLU6),
                conv_bn(40, 40, 1, activation=nn.Identity),
                conv_bn(40, 17, 1, activation=nn.SiLU),
                nn.Conv2d(17, 17, 1),
                nn.Conv2d(17, 8, 1, padding=1),
                nn.Conv2d(8, 8, 1, groups=2),
            ]
        )

    def forward(self, x: Tensor) -> Tensor:
        first, second, residual, silu, added, padded, grouped = self.layers
        x = second(first(x))
        x = silu(x + residual(x))
        x = torch.relu(x + added(x))
        return grouped(padded(x)).mean((2, 3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_pointwise_convolutions_run_on_the_kernel_with_what_surrounds_them(
    dtype: torch.dtype,
) -> None:
    model = randomize(Pointwise()).to(dtype)
    x = X.to(dtype)
    optimized = cvfast.optimize(model, x)
    check_equal(optimized, model, x)
    rows = {row.pattern: row.backend for row in optimized.report.rows[:5]}
    assert rows == {
        "conv+bn+hardswish": "cpu",
        "conv+bn+relu6": "cpu",
        "conv+bn+add": "cpu",
        "conv+bn+silu": "cpu",
        "conv+add+relu": "cpu",
    }
    assert all(row.backend != "cpu" for row in optimized.report.rows[5:])
    wider = torch.randn(3, 3, 9, 14, generator=torch.Generator().manual_seed(2)).to(dtype)
    check_equal(optimized, model, wider)


def test_contiguous_memory_format_skips_what_needs_channels_last(net: nn.Module) -> None:
    optimized = cvfast.optimize(net, X, memory_format=torch.contiguous_format, backend="cpu")
    assert reasons(optimized)["depthwise.0"] == "layout"
    both = cvfast.optimize(net, X, memory_format="contiguous")
    check_equal(both, net, X)
    assert both.report.layout_copies == 0
    assert {row.backend for row in both.report.fused} == {"reference"}


def test_measured_selection_keeps_only_what_is_faster(net: nn.Module) -> None:
    optimized = cvfast.optimize(net, X, select="measure")
    check_equal(optimized, net, X)
    for row in optimized.report.rows:
        assert (row.status == "fused" and row.gain > 1) or row.reason == "slower"


def test_kernels_on_a_gpu_are_measured_by_its_own_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    from cvfast.optimize import measure
    from cvfast.perf.timing import Timing

    seconds = {"unfused": 3e-6, "cuda": 2e-6, "triton": 4e-6}
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(
        measure,
        "interleave_cuda",
        lambda variants, **_: {name: Timing.from_rounds([[seconds[name]]]) for name in variants},
    )
    candidates = {"cuda": lambda: None, "triton": lambda: None}
    best, gain = measure.choose(candidates, lambda: None, torch.device("cuda", 1))
    assert (best, gain) == ("cuda", pytest.approx(1.5))


def test_verification_failure_names_the_layer(
    monkeypatch: pytest.MonkeyPatch, net: nn.Module
) -> None:
    from cvfast.optimize import lower

    right = lower.fold_batch_norm

    def wrong(weight: Tensor, *args: object, **kwargs: object) -> tuple[Tensor, Tensor]:
        folded, bias = right(weight, *args, **kwargs)
        return (folded * 1.001, bias) if weight.shape[1] == 1 else (folded, bias)

    monkeypatch.setattr(lower, "fold_batch_norm", wrong)
    with pytest.warns(RuntimeWarning, match=r"first disagreement at depthwise\.0"):
        optimized = cvfast.optimize(net, X)
    with torch.no_grad():
        assert torch.equal(optimized(X), net(X))
    assert not optimized.report.verification.ok
    assert {row.reason for row in optimized.report.rows} == {"verification_failed"}
    with pytest.raises(VerificationError, match=r"first disagreement at depthwise\.0"):
        cvfast.optimize(net, X, on_unsupported="raise")


def test_verify_layers_fills_the_errors(net: nn.Module) -> None:
    report = cvfast.optimize(net, X, verify="layers").report
    assert all(row.max_error is not None and row.max_error < 1e-5 for row in report.rows)
    assert all(row.max_error is None for row in cvfast.optimize(net, X).report.rows)


def test_report_formats(optimized: OptimizedModule) -> None:
    report = optimized.report
    text, data, page = str(report), json.loads(report.to_json()), report.to_html()
    for row in report.rows:
        assert row.module in text and row.module in page
    assert data["rows"][0]["pattern"] == "conv+bn+relu" and data["verification"]["ok"] is True
    assert "100.0% coverage" in text and page.startswith("<!doctype html>") and "http" not in page
    assert "4 of 4 sites" in repr(optimized)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"backend": "gpu"}, ValueError, "backend must be one of 'auto'"),
        ({"select": "fast"}, ValueError, "select must be one of"),
        ({"verify": "maybe"}, ValueError, "verify must be one of"),
        ({"on_unsupported": "warn"}, ValueError, "on_unsupported must be one of"),
        ({"memory_format": torch.channels_last_3d}, ValueError, "memory_format must be one of"),
        ({"dtype": torch.int8}, TypeError, "floating-point"),
        ({"example_inputs": "photo.png"}, TypeError, "example_inputs must be a tensor"),
    ],
)
def test_bad_arguments_are_named(
    net: nn.Module, arguments: dict[str, object], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        cvfast.optimize(net, **{"example_inputs": X, **arguments})


def test_a_model_that_is_no_module_is_named() -> None:
    with pytest.raises(TypeError, match=r"torch\.nn\.Module; got str"):
        cvfast.optimize("resnet18")  # type: ignore[arg-type]


def test_methods_and_attributes_of_the_original_stay_reachable(net: nn.Module) -> None:
    net.answer = 42
    optimized = cvfast.optimize(net, X)
    assert optimized.answer == 42 and isinstance(optimized.stem, nn.Sequential)
    with pytest.raises(AttributeError, match="nothing_such"):
        optimized.nothing_such  # noqa: B018


def test_compiles_and_exports_as_the_original(net: nn.Module, optimized: OptimizedModule) -> None:
    with torch.no_grad():
        compiled = torch.compile(optimized, backend="eager", fullgraph=True)
        torch.testing.assert_close(compiled(X), net(X))
        torch.testing.assert_close(torch.export.export(optimized, (X,)).module()(X), net(X))
        torch.testing.assert_close(torch.vmap(optimized)(X[None])[0], net(X))


def test_without_the_extension_it_runs_on_what_is_left_and_says_so_once(net: nn.Module) -> None:
    code = """
import warnings
import torch
from torch import nn
import cvfast
model = nn.Sequential(nn.Conv2d(8, 8, 3, groups=8), nn.BatchNorm2d(8), nn.ReLU()).eval()
x = torch.randn(1, 8, 9, 9)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for _ in range(2):
        optimized = cvfast.optimize(model, x)
mine = [w for w in caught if "cvfast" in str(w.message)]
assert len(mine) == 1, [str(w.message) for w in caught]
assert optimized.report.rows[0].backend == "onednn"
assert torch.allclose(optimized(x), model(x), atol=1e-6)
"""
    import os

    subprocess.run(
        [sys.executable, "-c", code],
        check=True,
        env={**os.environ, "CVFAST_DISABLE_EXTENSION": "1"},
    )


def test_programs_are_bounded() -> None:
    from cvfast.optimize.runner import MAX_PROGRAMS

    class Pinned(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = conv_bn(3, 4, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            return self.body(x) * x.shape[2] if x.shape[2] % 7 == int(x.shape[2]) % 7 else x

    model = randomize(Pinned())
    optimized = cvfast.optimize(model, X)
    for size in range(8, 8 + 2 * MAX_PROGRAMS):
        check_equal(optimized, model, torch.randn(1, 3, size, 9))
    assert 1 <= len(optimized._runner.programs) <= MAX_PROGRAMS
