"""Plans: recorded once, run anywhere, by any number of threads, on memory of their own."""

from __future__ import annotations

import gc
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from math import prod

import pytest
import torch
from torch import Tensor, nn

import cvfast
from cvfast.engine import memory, nodes
from cvfast.engine import plan as plan_module
from cvfast.engine.nodes import (
    Conv,
    Elementwise,
    Graph,
    Image,
    InvertedResidual,
    Node,
    Pointwise,
)
from cvfast.engine.plan import Plan
from cvfast.models import get_model
from cvfast.ops.conv import prepack as prepack_conv
from cvfast.ops.depthwise import prepack as prepack_depthwise
from cvfast.ops.pointwise import prepack
from cvfast.optimize import profile
from cvfast.testing import image, threads

ops = torch.ops.cvfast


def chain(length: int, channels: int = 16) -> Graph:
    """x -> x + 1 -> x + 2 ..., each step a kernel call."""
    x = Image((1, channels, 5, 6), torch.float32)
    one = torch.ones(channels)
    graph = Graph([], [x], [])
    for _ in range(length):
        out = Image(x.shape, x.dtype)
        graph.nodes.append(
            Elementwise(out, graph.nodes[-1].out if graph.nodes else x, scale=one, shift=one)
        )
    graph.outputs.append(graph.nodes[-1].out)
    for number, external in enumerate((x, graph.outputs[0])):
        external.strides = external.memory_strides()
        external.external = number
    return graph


@pytest.mark.parametrize("count", [1, 2, 5])
def test_a_plan_runs_on_whatever_tensors_it_is_handed(count: int) -> None:
    plan = Plan(chain(7), count)
    for seed in range(4):
        x = image((1, 16, 5, 6), seed=seed)
        out = torch.full_like(x, float("nan"))
        plan.run([x], [out])
        torch.testing.assert_close(out, x + 7)


@pytest.mark.parametrize("rows", [1, 5, 6])
@pytest.mark.parametrize("kernel", [(2, 2), (3, 2)])
def test_the_taps_of_a_transposed_convolution_take_turns(
    rows: int, kernel: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = nn.ConvTranspose2d(16, 24, kernel, kernel).eval()
    x = image((2, 16, rows, 7))
    whole = cvfast.optimize(model, x)(x)
    monkeypatch.setattr(nodes, "_TAKEN_IN_TURN", 64)  # a row of the source at a time
    in_turns = cvfast.optimize(model, x)
    with torch.no_grad():
        torch.testing.assert_close(in_turns(x), model(x))
    torch.testing.assert_close(in_turns(x), whole, rtol=0, atol=0)
    source = Image((2, 16, rows, 7), x.dtype)
    result = Image((2, 24, rows * kernel[0], 7 * kernel[1]), x.dtype)
    node = nodes.TransposedConv(result, source, [()] * prod(kernel), kernel)
    tensors = {source: x, result: torch.empty(result.shape)}
    assert len(node.calls(tensors.__getitem__)) == rows * prod(kernel)


def test_a_transposed_convolution_of_no_rows_has_its_calls_too() -> None:
    source, result = (Image((1, 16, 0, width), torch.float32) for width in (7, 14))
    node = nodes.TransposedConv(result, source, [()] * 4, (2, 2))
    assert len(node.calls(lambda v: torch.empty(v.shape))) == 4


def test_one_place_serves_a_chain_of_any_length() -> None:
    plan = Plan(chain(9), 1)
    assert plan.arena_bytes == plan.least_arena_bytes == 1920
    x = image((1, 16, 5, 6))
    plan.run([x], [torch.empty_like(x)])
    assert plan.measured_bytes() == plan.arena_bytes


def step_with_residual(kind: str, out: Image, x: Image, residual: Image) -> Node:
    """One step that adds ``residual``, of each kind that can."""
    dtype, c = x.dtype, x.channels
    if kind == "add":
        return Elementwise(out, x, residual, "add")
    if kind == "pointwise":
        packed = (prepack(image((c, c, 1, 1), seed=1) / c, dtype=dtype),)
        return Pointwise(out, x, packed, residual=residual)
    if kind == "inverted_residual":
        weights = (image((c, c, 1, 1), seed=1) / c, image((c, 1, 3, 3), seed=2) / 9)
        point = prepack(weights[0], dtype=dtype)
        return InvertedResidual(
            out, x, (point,), prepack_depthwise(weights[1]), (point,), residual, c,
            (3, 3), (1, 1), (1, 1), ("relu", "relu6", "none"),
        )  # fmt: skip
    weight = image((c, c, 3, 3), seed=1) / (9 * c)
    packed = (prepack_conv(weight, algorithm=kind, dtype=dtype),)
    return Conv(out, x, packed, residual, None, (3, 3), (1, 1), (1, 1), (1, 1), "relu")


KINDS = ["add", "pointwise", "inverted_residual", "direct", "winograd_f2", "winograd_f4"]


def residual_graph(kind: str, dtype: torch.dtype, *, read_later: bool) -> Graph:
    """x -> a, b; a (+) b -> out. With ``read_later`` b is read once more, after."""
    shape = (2, 24, 11, 13)
    x, a, b, joined, out, more = (Image(shape, dtype) for _ in range(6))
    one = torch.ones(24)
    graph = Graph([Elementwise(a, x, scale=one, shift=one)], [x], [out])
    graph.nodes.append(Elementwise(b, x, scale=-one, shift=one))
    graph.nodes.append(step_with_residual(kind, joined, a, b))
    if read_later:
        graph.nodes.append(Elementwise(more, joined, b, "add"))
    graph.nodes.append(Elementwise(out, more if read_later else joined, activation="relu"))
    for number, external in enumerate((x, out)):
        external.strides = external.memory_strides()
        external.external = number
    return graph


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_a_residual_is_overwritten_where_it_dies(
    kind: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same, bit by bit, as with memory for both: also where Winograd's transforms overflow."""
    x = image((2, 24, 11, 13)).to(dtype).contiguous(memory_format=torch.channels_last)
    x[1, 3, 5, 6] = float("inf")
    graph = residual_graph(kind, dtype, read_later=False)
    in_place = Plan(graph, 2)
    joined = graph.nodes[2]
    assert joined.out.root() in [image.root() for image in joined.may_overwrite()]
    monkeypatch.setattr(memory, "overwrite", lambda graph: None)
    apart = Plan(residual_graph(kind, dtype, read_later=False), 2)
    results = []
    for plan in (in_place, apart):
        results.append(torch.full_like(x, float("nan")))
        plan.run([x], results[-1:])
    assert apart.arena_bytes > in_place.arena_bytes
    torch.testing.assert_close(*results, rtol=0, atol=0, equal_nan=True)


def shrinking_block(dtype: torch.dtype, channels: int) -> Graph:
    """The first block of one of ResNet's stages: x -> wide -> middle -> rest, of ``channels``, to
    which is added a product of every second pixel of every second row of ``wide``."""
    x, wide = Image((2, 24, 14, 12), dtype), Image((2, 96, 14, 12), dtype)
    middle, rest, out, last = (Image((2, c, 7, 6), dtype) for c in (48, *3 * [channels]))

    def pointwise(out: Image, x: Image, stride: int = 1, residual: Image | None = None) -> Node:
        weight = image((out.channels, x.channels, 1, 1), seed=x.channels) / x.channels
        packed = (prepack(weight, dtype=dtype),)
        return Pointwise(out, x, packed, (stride, stride), residual=residual)

    steps = [
        pointwise(wide, x), pointwise(middle, wide, 2), pointwise(rest, middle),
        pointwise(out, wide, 2, rest), Elementwise(last, out, activation="relu"),
    ]  # fmt: skip
    graph = Graph(steps, [x], [last])
    for number, external in enumerate((x, last)):
        external.strides, external.external = external.memory_strides(), number
    return graph


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_of_an_image_kept_for_its_every_fourth_pixel_these_are_kept(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = image((2, 24, 14, 12)).to(dtype).contiguous(memory_format=torch.channels_last)
    kept = Plan(shrinking_block(dtype, 192), 2)
    assert [type(node).__name__ for node in kept.graph.nodes].count("Kept") == 1
    assert kept.bytes_copied == 0
    assert kept.bytes_kept == 2 * 96 * 7 * 6 * dtype.itemsize
    monkeypatch.setattr(memory, "keep_pixels", lambda graph: None)
    whole = Plan(shrinking_block(dtype, 192), 2)
    assert memory.lower_bound(memory.lifetimes(kept.graph)) < memory.lower_bound(
        memory.lifetimes(whole.graph)
    )
    results = [torch.full((2, 192, 7, 6), float("nan"), dtype=dtype) for _ in range(2)]
    results = [r.contiguous(memory_format=torch.channels_last) for r in results]
    for plan, result in zip((kept, whole), results, strict=True):
        plan.run([x], [result])
    torch.testing.assert_close(*results, rtol=0, atol=0)


def test_pixels_are_not_kept_where_that_saves_nothing() -> None:
    graph = shrinking_block(torch.float32, 48)
    before = list(graph.nodes)
    memory.keep_pixels(graph)
    assert graph.nodes == before


@pytest.mark.parametrize("kind", KINDS)
def test_a_residual_that_is_read_later_stays(kind: str) -> None:
    graph = residual_graph(kind, torch.float32, read_later=True)
    Plan(graph, 2)
    residual, joined = graph.nodes[1].out, graph.nodes[2].out
    assert joined.root()[0] is not residual.root()[0]


@pytest.mark.parametrize("kind", KINDS[1:])
def test_an_image_that_a_kernel_also_multiplies_stays(kind: str) -> None:
    """x + f(x): other elements of the sum need what one of them would overwrite."""
    x, middle, out = (Image((1, 24, 11, 13), torch.float32) for _ in range(3))
    graph = Graph([Elementwise(middle, x, activation="relu")], [x], [out])
    joined = Image(x.shape, x.dtype)
    graph.nodes += [step_with_residual(kind, joined, middle, middle), Elementwise(out, joined)]
    for number, external in enumerate((x, out)):
        external.strides, external.external = external.memory_strides(), number
    Plan(graph, 1)
    assert joined.root()[0] is joined


def test_an_input_is_not_written_to() -> None:
    model = Doubled().eval()
    x = torch.randn(1, 16, 9, 9).contiguous(memory_format=torch.channels_last)
    before = x.clone()
    fast = cvfast.optimize(model, x)
    torch.testing.assert_close(fast(x), model(x))
    torch.testing.assert_close(x, before, rtol=0, atol=0)


class Doubled(nn.Module):
    """Adds its input, which is the caller's, and what it hands back, twice."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(16, 16, 3, padding=1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        first = self.conv(x) + x
        return first, self.conv(first) + first


def test_scratch_memory_lies_in_what_images_leave_free() -> None:
    """In the arena, beside no image that lives at its step; and the arena holds the last of it."""
    graph = residual_graph("winograd_f4", torch.float32, read_later=False)
    plan = Plan(graph, 3)
    images = {image for node in graph.nodes for image in node.writes()}
    scratch = [life for life in plan.lives if life.image not in images and life.bytes]
    assert [life.first for life in scratch] == [2]
    for life in scratch:
        begin = plan.arena.offsets[life.image]
        assert begin % 64 == 0
        assert begin + life.bytes <= plan.arena_bytes
        for other in plan.lives:
            if other is not life and other.first <= life.last and life.first <= other.last:
                at = plan.arena.offsets[other.image]
                assert begin + life.bytes <= at or at + other.bytes <= begin
    x = image((2, 24, 11, 13))
    plan.run([x], [torch.empty_like(x)])
    assert plan.measured_bytes() == plan.arena_bytes


def test_scratch_memory_is_what_images_leave_free_where_blocks_can_be_smaller(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Results stay the same, bit by bit."""
    model = get_model("resnet18").eval()
    x = image((1, 3, 96, 96))
    results, arenas = [], []
    for least in (0, 1 << 30):
        monkeypatch.setattr(plan_module, "_LEAST_SCRATCH", least)
        with threads(4):
            fast = cvfast.optimize(model, x)
            results.append(fast(x))
        arenas.append(fast.report.execution.arena_bytes)
    torch.testing.assert_close(*results, rtol=0, atol=0)
    assert arenas[0] < arenas[1]


def test_images_that_move_for_scratch_memory_are_computed_where_they_went(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    x = image((2, 24, 11, 13))
    expected, found = torch.empty_like(x), torch.empty_like(x)
    stayed = Plan(residual_graph("winograd_f4", torch.float32, read_later=False), 3)
    stayed.run([x], [expected])

    real = memory.pack

    def pack(lives: list[memory.Lifetime], alignment: int = 64, given: object = None) -> object:
        """64 bytes higher than before once scratch memory is known, and larger if none may move."""
        arena = real(lives, alignment)
        if given is not None:
            return replace(arena, bytes=arena.bytes + 4096)
        scratch = any(v.image.dtype is torch.uint8 for v in lives)
        up = 64 if scratch else 0
        offsets = {image: offset + up for image, offset in arena.offsets.items()}
        return replace(arena, bytes=arena.bytes + up, offsets=offsets)

    monkeypatch.setattr(memory, "pack", pack)
    moved = Plan(residual_graph("winograd_f4", torch.float32, read_later=False), 3)
    moved.run([x], [found])
    assert min(moved.arena.offsets.values()) == 64
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_runs_under_way_at_once_have_an_arena_each() -> None:
    plan = Plan(chain(40), 1)
    inputs = [image((1, 16, 5, 6), seed=seed) for seed in range(8)]

    def run(x: Tensor) -> Tensor:
        out = torch.empty_like(x)
        for _ in range(50):
            plan.run([x], [out])
        return out

    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(run, inputs))
    for x, out in zip(inputs, results, strict=True):
        torch.testing.assert_close(out, x + 40)
    assert plan.arena_bytes <= plan.measured_bytes() <= 8 * plan.arena_bytes


def test_profile_computes_and_times_every_step() -> None:
    plan = Plan(chain(3), 2)
    x = image((1, 16, 5, 6))
    out = torch.empty_like(x)
    rows = plan.profile([x], [out])
    torch.testing.assert_close(out, x + 3)
    assert [row["kind"] for row in rows] == ["Elementwise"] * 3
    assert all(0 <= row["waited"] <= 2 * row["seconds"] for row in rows)
    assert all(row["bytes"] >= 2 * x.nbytes for row in rows)
    assert sum(row["seconds"] for row in rows) > 0


def test_a_call_that_is_refused_ends_the_recording() -> None:
    graph = chain(2)
    x = graph.inputs[0]
    packed = (prepack(torch.zeros(8, 99, 1, 1), dtype=torch.float32),)
    graph.nodes.insert(0, Pointwise(Image((1, 8, 5, 6), x.dtype), x, packed))
    with pytest.raises(RuntimeError, match="prepack"):
        Plan(graph, 1)
    with pytest.raises(RuntimeError, match="no plan is being recorded"):
        ops.plan_barrier()
    y = image((1, 16, 5, 6))
    assert ops.elementwise_cpu(y, None, "none", "relu").min() >= 0  # runs, and at once


def test_scratch_memory_is_limited_while_a_plan_is_recorded_only() -> None:
    with pytest.raises(RuntimeError, match="plan_limit_scratch: no plan is being recorded"):
        ops.plan_limit_scratch(64)
    ops.plan_record(torch.empty(64, dtype=torch.uint8), [], 1)
    try:
        with pytest.raises(RuntimeError, match="bytes must not be negative"):
            ops.plan_limit_scratch(-1)
    finally:
        ops.plan_abandon()


def test_plans_are_freed() -> None:
    plan = Plan(chain(2), 1)
    number = plan._id
    assert len(ops.plan_memory(number)) == 2
    del plan
    gc.collect()
    with pytest.raises(RuntimeError, match=f"no plan {number}"):
        ops.plan_memory(number)


def test_a_run_with_the_wrong_number_of_tensors_is_refused() -> None:
    plan = Plan(chain(2), 1)
    with pytest.raises(RuntimeError, match="recorded with 2 tensors, got 1"):
        ops.plan_run(plan._id, [image((1, 16, 5, 6))], [])


class Branches(nn.Module):
    """Parts that a concatenation wants, one of them read elsewhere too, and a step without a
    kernel in between."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(16, 24, 3, padding=1)
        self.b = nn.Conv2d(16, 8, 1)
        self.c = nn.Conv2d(32, 16, 3, padding=1, stride=2)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        a, b = torch.relu(self.a(x)), self.b(x)
        joined = torch.cat([a, b], 1)
        return torch.nn.functional.interpolate(self.c(joined), scale_factor=2.0), b


def test_steps_without_a_kernel_run_between_plans() -> None:
    model = Branches().eval()
    x = torch.randn(2, 16, 10, 12)
    fast = cvfast.optimize(model, x)
    execution = fast.report.execution
    assert execution is not None
    assert execution.torch_calls == 1
    for got, expected in zip(fast(x), model(x), strict=True):
        torch.testing.assert_close(got, expected)
        assert got.stride() == expected.stride()


def test_a_bfloat16_network_is_one_plan() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 24, 3, padding=1, stride=2), nn.BatchNorm2d(24), nn.ReLU(),
        nn.Conv2d(24, 40, 3, padding=1), nn.ReLU6(), nn.Conv2d(40, 16, (1, 5), padding=(0, 2)),
    ).eval()  # fmt: skip
    x = torch.randn(2, 3, 21, 30)
    fast = cvfast.optimize(model, x, dtype=torch.bfloat16)
    execution = fast.report.execution
    assert execution is not None
    assert (execution.plans, execution.torch_calls) == (1, 0)
    torch.testing.assert_close(fast(x), model(x), rtol=0.02, atol=0.02)


def test_plans_follow_the_size_and_the_number_of_threads() -> None:
    model = nn.Sequential(nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 16, 1)).eval()
    fast = cvfast.optimize(model, torch.randn(1, 16, 12, 12))
    for count in (1, 2, 1):
        with threads(count):
            for size in ((1, 16, 12, 12), (3, 16, 9, 21), (1, 16, 1, 1)):
                x = torch.randn(size)
                torch.testing.assert_close(fast(x), model(x))


def test_written_weights_reach_the_plans() -> None:
    model = nn.Sequential(nn.Conv2d(16, 32, 1), nn.ReLU(), nn.Flatten(), nn.Linear(32, 4)).eval()
    x = torch.randn(2, 16, 1, 1)
    fast = cvfast.optimize(model, x)
    with torch.no_grad():
        for parameter in (*fast.parameters(), *model.parameters()):
            parameter.fill_(0.5)
    torch.testing.assert_close(fast(x), model(x))


def test_profile_names_the_modules() -> None:
    model = nn.Sequential(nn.Conv2d(16, 32, 3), nn.ReLU(), nn.Conv2d(32, 16, 1)).eval()
    x = torch.randn(1, 16, 12, 12)
    steps = profile(cvfast.optimize(model, x), x, runs=2)
    assert [step.name for step in steps if step.flops] == ["0", "2"]
    assert [step.flops for step in steps if step.flops] == [
        2 * 100 * 16 * 9 * 32,
        2 * 100 * 32 * 16,
    ]
    weights = 4 * 16 * (32 + 1)
    assert [s.bytes for s in steps if s.flops][-1] == 4 * 100 * (32 + 16) + weights


@pytest.mark.filterwarnings("error:cvfast cannot plan")
@pytest.mark.parametrize("channels", [3, 16])
def test_inputs_of_any_layout_are_planned(channels: int) -> None:
    model = nn.Sequential(nn.Conv2d(channels, 8, 3, padding=1), nn.ReLU()).eval()
    x = torch.randn(2, channels, 12, 14)
    fast = cvfast.optimize(model, x)
    wide = torch.randn(2, 2 * channels, 12, 28)
    for laid_out in (
        x,
        x.contiguous(memory_format=torch.channels_last),
        x.transpose(2, 3).contiguous().transpose(2, 3),
        wide[:, ::2, :, ::2],
        wide[:, :channels, :, :14],
        x[:1].expand(2, -1, -1, -1),
    ):
        torch.testing.assert_close(fast(laid_out), model(laid_out))
