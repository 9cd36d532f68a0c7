from __future__ import annotations

import builtins
import copy
import importlib.util

import pytest
import torch
from torch import nn

from cvfast.perf import flops, peers, roofline

NEEDS = {"onnxruntime": ("onnxruntime", "onnxscript"), "openvino": ("openvino",)}


class Net(nn.Module):
    """Small, with a BN to fold, a residual and two outputs in a dict."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(8)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.fc = nn.Linear(8, 5)

    def forward(self, x):
        x = torch.relu(self.bn(self.conv(x)))
        y = x + self.depthwise(x)
        return {"scores": self.fc(y.mean((2, 3))), "features": y}


@pytest.fixture(scope="module")
def net():
    torch.manual_seed(0)
    model = Net().eval()
    model.bn.running_mean.normal_()
    model.bn.running_var.uniform_(0.5, 2)
    return model


@pytest.fixture(scope="module")
def x():
    return torch.randn(2, 3, 12, 16, generator=torch.Generator().manual_seed(1))


@pytest.fixture(autouse=True)
def restore_threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def skip_unless_installed(name):
    for module in NEEDS.get(name, ()):
        if importlib.util.find_spec(module) is None:
            pytest.skip(f"{module} is not installed")


@pytest.mark.parametrize("name", peers.NAMES)
def test_agrees_with_float64(name, net, x):
    skip_unless_installed(name)
    state = copy.deepcopy(net.state_dict())
    peer = peers.build(name, net, x, threads=1)
    with torch.no_grad():
        expected = peers.flatten(copy.deepcopy(net).double()(x.double()))
    outputs = peer.outputs()
    assert [o.shape for o in outputs] == [e.shape for e in expected]
    for actual, truth in zip(outputs, expected, strict=True):
        torch.testing.assert_close(actual.double(), truth, rtol=1e-5, atol=1e-5)
    assert peer.setup_seconds > 0
    for key, value in net.state_dict().items():
        assert torch.equal(value, state[key]), f"building {name} changed {key}"


@pytest.mark.parametrize("name", ["eager", "eager_channels_last", "openvino"])
def test_bfloat16_rounds_like_bfloat16(name, net, x):
    skip_unless_installed(name)
    outputs = peers.build(name, net, x, threads=1, dtype=torch.bfloat16).outputs()
    with torch.no_grad():
        expected = peers.flatten(copy.deepcopy(net).double()(x.double()))
    for actual, truth in zip(outputs, expected, strict=True):
        assert (actual.double() - truth).norm() < 0.02 * truth.norm()
    if name.startswith("eager"):
        assert outputs[0].dtype is torch.bfloat16


def test_missing_package_is_reported(net, x, monkeypatch):
    original = builtins.__import__

    def without(name, *args, **kwargs):
        if name == "openvino":
            raise ModuleNotFoundError("No module named 'openvino'", name="openvino")
        return original(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(
        peers.PeerUnavailable, match="openvino is not installed: pip install openvino"
    ):
        peers.build("openvino", net, x, threads=1)


def test_model_that_a_peer_cannot_run_is_reported(x):
    class Broken(nn.Module):
        def forward(self, x):
            raise RuntimeError("no way\nsecond line")

    with pytest.raises(peers.PeerUnavailable, match=r"eager: RuntimeError: no way$"):
        peers.build("eager", Broken(), x, threads=1)


def test_unsupported_dtype_is_reported(net, x):
    skip_unless_installed("onnxruntime")
    with pytest.raises(peers.PeerUnavailable, match=r"onnxruntime: .*bfloat16"):
        peers.build("onnxruntime", net, x, threads=1, dtype=torch.bfloat16)


def test_unknown_peer_names_the_known(net, x):
    with pytest.raises(ValueError, match="eager, eager_channels_last, inductor"):
        peers.build("tensorflow", net, x, threads=1)


def test_flops_count_multiply_and_add(net, x):
    pixels = 2 * 12 * 16
    expected = 2 * pixels * 8 * 3 * 9 + 2 * pixels * 8 * 9 + 2 * 2 * 8 * 5
    assert flops.count(net, (x,)) == expected


def test_peak_is_plausible():
    assert 1e9 < roofline.peak_flops(seconds=0.05) < 1e14


def test_cuda_peers_agree_with_float64_where_their_kernels_run_on_the_cpu(net, x, monkeypatch):
    """What is CUDA's alone (capture, max-autotune) is replaced; the rest is what runs there."""
    captured = []
    monkeypatch.setattr(peers.gpu_timing, "capture", lambda call: captured.append(call) or call)
    modes = []

    def compile_(model, *, dynamic, mode):
        modes.append((dynamic, mode))
        return model

    monkeypatch.setattr(torch, "compile", compile_)
    with torch.no_grad():
        expected = peers.flatten(copy.deepcopy(net).double()(x.double()))
    for builder in peers._CUDA_BUILDERS.values():
        run = builder(copy.deepcopy(net), x, 1, torch.float32)
        for actual, truth in zip(peers.flatten(run()), expected, strict=True):
            torch.testing.assert_close(actual.double(), truth, rtol=1e-5, atol=1e-5)
    assert len(captured) == 1
    assert modes == [(False, "max-autotune")]


def test_cuda_names_are_those_that_build():
    assert tuple(peers._BUILDERS) == peers.NAMES
    assert tuple(peers._CUDA_BUILDERS) == peers.CUDA_NAMES


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("name", peers.CUDA_NAMES)
def test_cuda_peers_agree_with_float64(name, dtype, net, x):
    outputs = peers.build(
        name, copy.deepcopy(net).cuda(), x.cuda(), threads=1, dtype=dtype
    ).outputs()
    with torch.no_grad():
        expected = peers.flatten(copy.deepcopy(net).double()(x.double()))
    limit = 1e-3 if dtype is torch.float32 else 0.02  # TF32 is on in cuDNN
    for actual, truth in zip(outputs, expected, strict=True):
        assert actual.dtype is dtype
        assert (actual.double().cpu() - truth).norm() < limit * truth.norm()


@pytest.mark.gpu
def test_cpu_peers_are_refused_on_a_cuda_device(net, x):
    with pytest.raises(ValueError, match="eager_graph, max_autotune"):
        peers.build("openvino", copy.deepcopy(net).cuda(), x.cuda(), threads=1)
