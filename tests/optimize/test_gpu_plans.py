"""Whole networks on GPU kernels: what they launch on GPUs that are not there, and what scaled-down
instances compute, interpreted."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager

import pytest
import torch
from torch import Tensor, nn

import cvfast
from cvfast.engine import passes
from cvfast.engine.nodes import InvertedResidual
from cvfast.launch import table
from cvfast.models import default_input_size, get_model
from cvfast.models.densenet import DenseNet
from cvfast.models.googlenet import BasicConv2d, InceptionModule
from cvfast.models.inception import InceptionA, InceptionB, InceptionC, InceptionE
from cvfast.models.unet import UNet
from cvfast.optimize import Plan, plan

from .conftest import check_equal, randomize

slow = pytest.mark.slow


@functools.cache
def planned(name: str) -> Plan:
    x = torch.randn(1, *default_input_size(name))
    return plan(get_model(name).eval(), x, device="H200", dtype=torch.float16)


def kernels(found: Plan) -> Counter[str]:
    return Counter(launch.kernel for launch in found.launches)


def of_cvfast(found: Plan) -> list[str]:
    """Launches of cvfast's kernels, by operator."""
    return [launch.kernel.partition("/")[0] for launch in found.launches if launch.grid is not None]


NETWORKS = {
    # network: launches at most, of which PyTorch's, copies of inputs and results included
    "resnet50": (58, 0),
    "densenet121": (128, 0),
    "googlenet": (29, 0),
    "inception_v3": (55, 0),
    "mobilenet_v1": (27, 0),
    "mobilenet_v2": (23, 0),
    "mobilenet_v3_large": (55, 0),
    "efficientnet_lite0": (22, 0),
    "unet": (29, 0),
    "fcn_resnet50": (60, 2),
}


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name in ("googlenet", "mobilenet_v2", "unet") else slow)
        for name in NETWORKS
    ],
)
def test_networks_are_one_plan_without_concatenations(name: str) -> None:
    most, of_torch = NETWORKS[name]
    found = planned(name)
    execution = found.report.execution
    assert execution is not None
    assert execution.plans == 1
    assert found.concat_bytes == 0
    assert len(found.launches) <= most
    counts = kernels(found)
    assert counts["copy in"] == counts["copy out"] == 1
    assert len(found.launches) - len(of_cvfast(found)) - 2 == of_torch
    assert all(row.status == "fused" for row in found.report.rows if row.pattern != "bn"
               and row.pattern != "conv_transpose2d")  # fmt: skip
    fused, unfused = found.comparison()
    assert fused["bytes"] < unfused["bytes"]
    assert fused["launches"] < 0.65 * unfused["launches"]
    for gpu, seconds in fused["roof_seconds"].items():
        assert seconds < unfused["roof_seconds"][gpu]


def test_a_module_of_googlenet_is_three_launches_at_most() -> None:
    launches = planned("googlenet").launches
    modules = Counter(
        launch.module.partition(".")[0]
        for launch in launches
        if launch.module.startswith("inception")
    )
    assert len(modules) == 9
    assert max(modules.values()) <= 3


def narrow(model: nn.Module, divisor: int) -> nn.Module:
    """``model`` with a ``divisor``-th of its channels, for widths that it divides."""

    def fewer(channels: int) -> int:
        return channels // divisor if channels % divisor == 0 else channels

    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, (nn.Conv2d, nn.ConvTranspose2d)):
                depthwise = 1 < child.groups == child.in_channels
                changed: nn.Module = type(child)(
                    fewer(child.in_channels), fewer(child.out_channels), child.kernel_size,
                    child.stride, child.padding, dilation=child.dilation,
                    groups=fewer(child.groups) if depthwise else child.groups,
                    bias=child.bias is not None,
                )  # fmt: skip
            elif isinstance(child, nn.BatchNorm2d):
                changed = nn.BatchNorm2d(fewer(child.num_features), eps=child.eps)
            elif isinstance(child, nn.Linear):
                changed = nn.Linear(fewer(child.in_features), 5)
            else:
                continue
            setattr(module, name, changed)
    return model


def first_blocks(name: str, count: int) -> nn.Module:
    """The first blocks of a network that keeps them in ``features``, and a classifier."""
    features = narrow(get_model(name), 8).features[:count]
    channels = features(torch.randn(1, 3, 32, 32)).shape[1]
    return nn.Sequential(features, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 5))


def shallow(model: nn.Module) -> nn.Module:
    """A ResNet with one block per stage."""
    for name, stage in list(model.named_children()):
        if isinstance(stage, nn.Sequential) and name.startswith("layer"):
            setattr(model, name, stage[:1])
    return model


def fcn() -> nn.Module:
    model = narrow(get_model("fcn_resnet50"), 32)
    backbone = model.backbone
    for name in ("layer1", "layer2", "layer3", "layer4"):
        backbone[name] = backbone[name][:1]
    return model


def efficientnet() -> nn.Module:
    model = narrow(get_model("efficientnet_lite0"), 8)
    model._blocks = model._blocks[:3]
    width = model._blocks[-1]._project_conv.out_channels
    model._conv_head = nn.Conv2d(width, 160, 1, bias=False)
    return model


def googlenet() -> nn.Module:
    return nn.Sequential(
        BasicConv2d(3, 16, kernel_size=7, stride=2, padding=3),
        nn.MaxPool2d(3, stride=2, ceil_mode=True),
        InceptionModule(16, 8, 6, 12, 2, 5, 7),
        InceptionModule(32, 12, 8, 16, 4, 8, 8),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(44, 5),
    )


def inception() -> nn.Module:
    blocks = (InceptionA(192, 32), InceptionB(256), InceptionC(736, 128), InceptionE(768))
    return nn.Sequential(
        BasicConv2d(3, 12, kernel_size=3), narrow(nn.Sequential(*blocks), 16),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, 5),
    )  # fmt: skip


FAMILIES: dict[str, tuple[Callable[[], nn.Module], tuple[int, int]]] = {
    "resnet": (lambda: shallow(narrow(get_model("resnet50"), 16)), (17, 20)),
    "densenet": (lambda: DenseNet(8, (2, 2), 16, 2, num_classes=5), (21, 18)),
    "googlenet": (googlenet, (19, 16)),
    "inception": (inception, (11, 10)),
    "mobilenet_v1": (lambda: first_blocks("mobilenet_v1", 4), (13, 10)),
    "mobilenet_v2": (lambda: first_blocks("mobilenet_v2", 4), (13, 10)),
    "mobilenet_v3": (lambda: first_blocks("mobilenet_v3_large", 5), (14, 11)),
    "efficientnet": (efficientnet, (13, 10)),
    "unet": (lambda: narrow(UNet(), 16), (16, 16)),
    "fcn": (fcn, (16, 18)),
}


@pytest.fixture(scope="module")
def device(gpu_kernels: Callable[[str], AbstractContextManager[str]]) -> Iterator[str]:
    with gpu_kernels("triton") as name:
        yield name


@pytest.mark.gpu_kernels
@pytest.mark.parametrize("family", FAMILIES)
def test_triton_networks_compute_what_pytorch_does(family: str, device: str) -> None:
    make, size = FAMILIES[family]
    torch.manual_seed(0)
    model = randomize(make()).to(device)
    x = torch.randn(2, 3, *size, device=device)
    fast = cvfast.optimize(model, x, backend="triton")
    report = fast.report
    assert report.verification is not None and report.verification.ok, str(report)
    assert report.execution is not None and report.execution.plans == 1
    assert report.execution.torch_calls == (1 if family == "fcn" else 0)
    assert {row.backend for row in report.fused} == {"triton"}
    longer = size[0] + (16 if family == "unet" else 2)
    fresh = torch.randn(1, 3, longer, size[1], device=device)
    check_equal(fast, model, fresh)


@pytest.mark.gpu_kernels
@pytest.mark.parametrize("family", ["mobilenet_v1", "mobilenet_v2", "mobilenet_v3"])
def test_triton_blocks_in_one_kernel_compute_what_pytorch_does(
    family: str, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    parameters = table.parameters("inverted_residual", "triton")
    monkeypatch.setattr(
        passes, "fuses_on_gpu", lambda problem, gpu, backend: not parameters.unsupported(problem)
    )
    make, size = FAMILIES[family]
    torch.manual_seed(0)
    model = randomize(make()).to(device)
    x = torch.randn(2, 3, *size, device=device)
    fast = cvfast.optimize(model, x, backend="triton")
    assert fast.report.verification is not None and fast.report.verification.ok, str(fast.report)
    (program,) = fast.__dict__["_runner"].programs
    schedule = program.schedule([x])
    blocks = [n for n in schedule.plans[0].graph.nodes if isinstance(n, InvertedResidual)]
    assert len(blocks) >= 3
    assert any(block.means is not None for block in blocks) == (family == "mobilenet_v3")
    check_equal(fast, model, torch.randn(1, 3, size[0] + 2, size[1], device=device))


class Mixed(nn.Module):
    """A grouped convolution, an unusual activation and a resize between kernels; two results."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.grouped = nn.Conv2d(16, 16, 3, padding=1, groups=4)
        self.head = nn.Conv2d(16, 8, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = torch.nn.functional.elu(self.grouped(self.stem(x).relu()))
        y = torch.nn.functional.interpolate(y, scale_factor=2.0)
        z = self.head(y)
        return z, torch.cat([z.sigmoid(), y], 1)


@pytest.mark.gpu_kernels
@pytest.mark.parametrize("outputs", ["copy", "alias"])
def test_triton_plans_hold_operators_without_a_kernel(outputs: str, device: str) -> None:
    torch.manual_seed(0)
    model = Mixed().eval().to(device)
    x = torch.randn(2, 3, 6, 5, device=device)
    fast = cvfast.optimize(model, x, backend="triton", outputs=outputs)
    execution = fast.report.execution
    assert execution is not None
    assert execution.plans == 1
    assert execution.torch_calls == 3
    reasons = {row.module: row.reason for row in fast.report.rows if row.status != "fused"}
    assert reasons == {"grouped": "no_backend"}
    check_equal(fast, model, x)
    before = [y.data_ptr() for y in fast(x)]
    kept = fast(x)
    after = [y.data_ptr() for y in fast(x + 1)]
    assert (before == after) == (outputs == "alias")
    expected = model(x + 1 if outputs == "alias" else x)
    torch.testing.assert_close(kept, expected, rtol=1e-2, atol=1e-3)


@pytest.mark.gpu_kernels
def test_triton_plans_are_shared_by_threads(device: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(16, 16, 1), nn.ReLU(), nn.Conv2d(16, 16, 1)).eval().to(device)
    inputs = [torch.randn(1, 16, 4, 4, device=device) for _ in range(4)]
    fast = cvfast.optimize(model, inputs[0], backend="triton")
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda x: [fast(x) for _ in range(3)], inputs))
    for x, found in zip(inputs, results, strict=True):
        for y in found:
            torch.testing.assert_close(y, model(x), rtol=1e-2, atol=1e-3)


@pytest.mark.gpu_kernels
def test_triton_plans_follow_sizes_and_written_weights(device: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(8, 16, 3, bias=False), nn.BatchNorm2d(16), nn.ReLU())
    model = randomize(model).to(device)
    fast = cvfast.optimize(model, torch.randn(1, 8, 6, 6, device=device), backend="triton")
    for size in ((1, 8, 6, 6), (2, 8, 3, 5), (1, 8, 6, 6)):
        check_equal(fast, model, torch.randn(size, device=device))
    with torch.no_grad():
        for network in (fast, model):
            network[0].weight.mul_(2)
    check_equal(fast, model, torch.randn(1, 8, 6, 6, device=device))


def test_where_results_go_is_checked() -> None:
    with pytest.raises(ValueError, match="outputs must be one of 'copy', 'alias'; got 'view'"):
        cvfast.optimize(nn.Identity(), outputs="view")


def test_unfused_counts_what_pytorch_runs() -> None:
    class Small(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)
            self.up = nn.ConvTranspose2d(4, 2, 2, stride=2)
            self.fc = nn.Linear(2, 5)

        def forward(self, x: Tensor) -> Tensor:
            y = self.up(nn.functional.dropout(self.conv(x).relu(), 0.5, self.training))
            return self.fc(torch.cat([y, y], 2).mean((2, 3)).flatten(1))

    found = plan(Small().eval(), torch.randn(1, 3, 6, 6), device="H200")
    assert [launch.kernel for launch in found.unfused] == [
        "cudnn::conv", "aten::add_ (bias)", "aten::relu", "aten::conv_transpose2d", "aten::cat",
        "aten::mean", "aten::linear",
    ]  # fmt: skip
    flops = [launch.flops for launch in found.unfused]
    assert flops == [2 * 16 * 4 * 27, 0, 0, 2 * 16 * 4 * 2 * 4, 0, 0, 2 * 2 * 5]
    assert found.unfused[4].bytes == 4 * 4 * 2 * 8 * 8


def test_roofs_are_of_memory_or_of_products() -> None:
    model = nn.Conv2d(512, 512, 3, padding=1).eval()
    for batch, side, by_memory in ((1, 4, True), (64, 56, False)):
        found = plan(
            model, torch.randn(1, 512, side, side).expand(batch, -1, -1, -1), device="RTX 4090",
            dtype=torch.float16,
        )  # fmt: skip
        conv = next(launch for launch in found.launches if launch.kernel == "conv/triton")
        memory, products = conv.bytes / 1.008e12, conv.flops / 165.2e12
        assert conv.roof(found.device) == pytest.approx(max(memory, products))
        assert (memory > products) == by_memory
