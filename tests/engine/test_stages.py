"""Stages: a plan whose steps run for groups of images computes what it computes in one piece."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from random import Random

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import cvfast
from cvfast import extension
from cvfast.engine import memory, stages
from cvfast.engine.nodes import Elementwise, Graph, Image
from cvfast.engine.plan import Plan
from cvfast.engine.stages import Group, Stage
from cvfast.optimize import profile
from cvfast.optimize.module import OptimizedModule
from cvfast.testing import threads

pytestmark = pytest.mark.usefixtures("cpu_extension")

Choice = Callable[[Graph], list[Stage]]


def whole(graph: Graph) -> list[Stage]:
    return [Stage(0, len(graph.nodes))]


def drawn(seed: int) -> Choice:
    """Stages of drawn lengths, in drawn numbers of groups."""

    def choose(graph: Graph) -> list[Stage]:
        random = Random(seed)
        batch = graph.inputs[0].shape[0]
        found: list[Stage] = []
        begin = 0
        while begin < len(graph.nodes):
            end = min(len(graph.nodes), begin + random.randint(1, 6))
            found.append(Stage(begin, end, random.randint(1, batch)))
            begin = end
        return found

    return choose


@contextmanager
def chosen(choice: Choice) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stages, "choose", choice)
        yield


class Mixture(nn.Module):
    """A strided stem, residual blocks, a dense block, branches, a gate, two sources, a step without
    a kernel, a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 32, 3, padding=1, stride=2)
        self.block = nn.ModuleList(nn.Conv2d(32, 32, 3, padding=1) for _ in range(3))
        self.dense = nn.ModuleList(nn.Conv2d(32 + 16 * i, 16, 3, padding=1) for i in range(3))
        self.depthwise = nn.Conv2d(80, 80, 3, padding=1, groups=80)
        self.squeeze = nn.Conv2d(80, 80, 1)
        self.down = nn.Conv2d(80, 48, 1)
        self.up = nn.ConvTranspose2d(48, 32, 2, stride=2)
        self.joined = nn.Conv2d(64, 32, 3, padding=1)
        self.head = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = first = F.relu(self.stem(x))
        for conv in self.block:
            x = F.relu(conv(x) + x)
        for conv in self.dense:
            x = torch.cat([x, F.relu(conv(x))], 1)
        x = F.relu6(self.depthwise(x))
        x = x * torch.sigmoid(self.squeeze(x.mean((2, 3), keepdim=True)))
        x = F.max_pool2d(F.relu(self.down(x)), 2)
        x = F.relu(self.joined(torch.cat([self.up(x), first], 1)))
        y = F.interpolate(x, scale_factor=2.0)
        return y, self.head(F.adaptive_avg_pool2d(F.relu(y), 1).flatten(1))


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_stages_compute_what_one_piece_computes(dtype: torch.dtype | None) -> None:
    torch.manual_seed(0)
    model = Mixture().eval()
    fast = cvfast.optimize(model, torch.randn(2, 3, 40, 48), dtype=dtype, verify="off")
    for batch in (2, 5, 7):
        x = torch.randn(batch, 3, 40, 48)
        with chosen(whole):
            expected = replanned(fast)(x)
        for seed in range(4):
            with chosen(drawn(seed)):
                with threads(1):
                    got = replanned(fast)(x)
                with threads(2):
                    again = fast(x)
            for a, b, c in zip(got, again, expected, strict=True):
                torch.testing.assert_close(a, b, rtol=0, atol=0)
                torch.testing.assert_close(a, c)  # some kernels round by the batch's size


def replanned(fast: OptimizedModule) -> OptimizedModule:
    for program in fast.__dict__["_runner"].programs:
        program._schedules.clear()
    return fast


def test_runs_in_many_threads_have_memory_of_their_own() -> None:
    torch.manual_seed(0)
    model, x = Mixture().eval(), torch.randn(5, 3, 24, 24)
    with chosen(drawn(1)):
        fast = cvfast.optimize(model, x, verify="off")
        inputs = [torch.randn_like(x) for _ in range(6)]
        with threads(1):
            expected = [fast(given)[1] for given in inputs]
            with ThreadPoolExecutor(6) as pool:
                got = list(pool.map(lambda given: fast(given)[1], inputs * 10))
    for a, b in zip(got, expected * 10, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def chain(length: int, batch: int, channels: int = 16, size: int = 5) -> Graph:
    """x -> x + 1 -> x + 2 ..."""
    x = Image((batch, channels, size, size), torch.float32)
    graph = Graph([], [x], [])
    for _ in range(length):
        before = graph.nodes[-1].out if graph.nodes else x
        one = torch.ones(channels)
        graph.nodes.append(Elementwise(Image(x.shape, x.dtype), before, scale=one, shift=one))
    graph.outputs.append(graph.nodes[-1].out)
    for number, image in enumerate((x, graph.outputs[0])):
        image.strides, image.external = image.memory_strides(), number
    return graph


@pytest.mark.parametrize(("batch", "groups"), [(8, 3), (7, 7), (5, 2), (4, 1)])
def test_groups_hold_every_image_once(batch: int, groups: int) -> None:
    sizes = [Group(index, groups).images(batch) for index in range(groups)]
    assert [image for images in sizes for image in images] == list(range(batch))
    assert max(map(len, sizes)) - min(map(len, sizes)) <= 1


def test_steps_run_group_after_group() -> None:
    found = [(step, g.index) for step, g in stages.order([Stage(0, 2, 2), Stage(2, 3)])]
    assert found == [(0, 0), (1, 0), (0, 1), (1, 1), (2, 0)]


def test_an_image_within_a_stage_takes_the_memory_of_the_largest_group() -> None:
    graph = chain(6, batch=5)
    lives = memory.lifetimes(graph)
    of_image = lives[0].bytes // 5
    found = stages.lifetimes(lives, [Stage(0, 3, 2), Stage(3, 6)])
    assert [life.bytes // of_image for life in found] == [3, 3, 5, 5, 5]
    # The third goes to the second stage: it is written from the first step on.
    assert [(life.first, life.last) for life in found] == [(0, 1), (1, 2), (0, 3), (3, 4), (4, 5)]


def test_large_images_run_by_few_and_small_ones_together(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(extension, "cpu_l3_bytes", lambda: 4 << 20)
    large, small = chain(6, batch=8, size=128), chain(6, batch=8, size=2)
    assert [stage.groups for stage in stages.choose(large)] == [8]
    assert stages.choose(small) == [Stage(0, 6)]
    assert stages.choose(chain(6, batch=1, size=128)) == [Stage(0, 6)]


def test_batches_of_different_sizes_are_not_divided() -> None:
    graph = chain(3, batch=8, size=256)
    other = chain(3, batch=4, size=256)
    graph.nodes += other.nodes
    assert stages.choose(graph) == [Stage(0, 6)]


def test_the_plan_and_its_profile_know_their_stages() -> None:
    with chosen(lambda graph: [Stage(0, 4, 3), Stage(4, 6)]):
        plan = Plan(chain(6, batch=3), 2)
        x = torch.randn(3, 16, 5, 5).contiguous(memory_format=torch.channels_last)
        out = torch.empty_like(x)
        rows = plan.profile([x], [out])
    torch.testing.assert_close(out, x + 6)
    assert len(rows) == 6
    assert all(row["seconds"] > 0 for row in rows)
    assert plan.stages == [Stage(0, 4, 3), Stage(4, 6)]


def test_the_report_tells_the_groups() -> None:
    model = nn.Sequential(nn.Conv2d(16, 32, 3), nn.ReLU(), nn.Conv2d(32, 16, 1)).eval()
    x = torch.randn(4, 16, 12, 12)
    with chosen(lambda graph: [Stage(0, len(graph.nodes), 2)]):
        fast = cvfast.optimize(model, x)
        steps = profile(fast, x, runs=2)
    execution = fast.report.execution
    assert execution is not None
    assert execution.stages == ((len(steps), 2),)
    assert f"({len(steps)} in 2 groups of images)" in str(execution)
    assert [step.flops for step in steps if step.flops] == [8 * 100 * 16 * 9 * 32, 8 * 100 * 512]
