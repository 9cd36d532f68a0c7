"""Plans for GPUs that are not there: which kernels a network would launch."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from cvfast.models import get_model
from cvfast.optimize import plan
from cvfast.perf import devices


def count(launches: list, kernel: str) -> int:
    return sum(launch.kernel == kernel for launch in launches)


def test_mobilenet() -> None:
    model = get_model("mobilenet_v2").eval()
    planned = plan(model, torch.randn(1, 3, 224, 224), device="H200", dtype=torch.float16)
    assert count(planned.launches, "inverted_residual/cuda") == 17
    assert count(planned.launches, "pointwise/triton") == 2  # the last layer and the classifier
    assert count(planned.launches, "conv/triton") == 1
    assert count(planned.launches, "global_pool/triton") == 1
    assert len(planned.launches) == 17 + 2 + 1 + 1 + 2  # and the copies of input and result
    block = next(launch for launch in planned.launches if launch.kernel.startswith("inverted"))
    # x, y and the projection in float16, each once; the depthwise weights and biases in float32.
    assert block.bytes == 2 * (48 * 112 * 112 + 32 * 16) + 4 * (32 * 10 + 16)
    assert block.flops == 2 * 112 * 112 * 32 * (9 + 16)
    assert {row.backend for row in planned.report.rows} == {"cuda", "triton"}
    assert planned.summary().startswith("MobileNetV2 on NVIDIA H200: ")


class Separable(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(24, 24, 5, stride=2, padding=2, groups=24, bias=False)
        self.norm = nn.BatchNorm2d(24)
        self.pointwise = nn.Conv2d(24, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.pointwise(nn.functional.hardswish(self.norm(self.depthwise(x))))


@pytest.mark.parametrize("backend", ["triton", "cuda"])
@pytest.mark.parametrize("device", ["sm_80", "sm_86", "RTX 4090", "H200", "sm_100", "RTX 5090"])
def test_every_architecture_has_launch_parameters(device: str, backend: str) -> None:
    x = torch.randn(2, 24, 40, 56)
    planned = plan(Separable().eval(), x, device=device, dtype=torch.bfloat16, backend=backend)
    assert planned.device == devices.find(device)
    # Asked for alone, a backend serves only what it has a kernel for.
    pointwise = {"triton": "", "cuda": "no_backend"}[backend]
    assert [row.reason for row in planned.report.rows] == ["", pointwise]
    launch = planned.launches[1]
    assert launch.kernel == f"depthwise/{backend}"
    assert launch.config
    assert min(launch.grid) > 0


def test_no_kernel_of_the_cpu_is_planned_for_a_gpu() -> None:
    planned = plan(Separable().eval(), torch.randn(2, 24, 40, 56), device="H200", backend="cpu")
    assert [row.reason for row in planned.report.rows] == ["no_backend", "no_backend"]


def test_geometries_without_a_tile_kernel_go_to_triton() -> None:
    model = Separable().eval()
    model.depthwise.dilation, model.depthwise.padding = (2, 2), (4, 4)
    planned = plan(model, torch.randn(2, 24, 40, 56), device="H200")
    assert planned.report.rows[0].backend == "triton"


def test_sums_over_launches() -> None:
    planned = plan(Separable().eval(), torch.randn(2, 24, 40, 56), device="H200")
    as_dict = planned.to_dict()
    assert as_dict["bytes"] == sum(launch["bytes"] for launch in as_dict["launches"])
    assert as_dict["roof_seconds"] == pytest.approx(planned.bytes / 4.8e12)  # too few products
    assert planned.flops == 2 * 2 * 20 * 28 * 24 * (25 + 8)


class Mixed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, bias=False)
        self.norm = nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.conv(x)).relu()
        return torch.cat([y, y.transpose(2, 3).flip(2)], 1).flatten(1)


def test_views_are_free_and_what_is_no_site_counts() -> None:
    planned = plan(Mixed().eval(), torch.randn(2, 3, 9, 9), device="sm_90")
    kernels = [launch.kernel for launch in planned.launches]
    # What a view, an operator and a change of order yield is copied to its place in the arena; the
    # concatenation's other part is written there.
    copied = ["aten::copy_", "aten::flip", "aten::copy_", "aten::copy_"]
    assert kernels == ["copy in", "conv/triton", *copied, "copy out"]
    size = 2 * 8 * 7 * 7 * 4
    assert [launch.bytes / size for launch in planned.launches[2:]] == [2, 2, 2, 4, 4]
    assert planned.concat_bytes == 0


def test_unknown_devices_and_networks_that_cannot_be_captured_are_named() -> None:
    with pytest.raises(ValueError, match="GTX 480"):
        plan(Mixed().eval(), torch.randn(1, 3, 8, 8), device="GTX 480")

    class Branching(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x if x.sum() > 0 else -x

    with pytest.raises(ValueError, match="Branching cannot be planned as a whole"):
        plan(Branching().eval(), torch.randn(1, 3, 8, 8), device="sm_90")


def test_planning_leaves_the_model_alone() -> None:
    model = Mixed().eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    plan(model, torch.randn(1, 3, 8, 8), device="sm_90", dtype=torch.float16)
    after = model.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert after["conv.weight"].dtype == torch.float32
