"""Plans for GPUs: calls over one arena that holds inputs and outputs too, in a CUDA graph."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager

import pytest
import torch
from torch import Tensor

from cvfast.engine import memory
from cvfast.engine.gpu import GpuPlan
from cvfast.engine.nodes import Concat, Copy, Depthwise, Graph, Image, TorchOp, View
from cvfast.ops.depthwise import prepack
from cvfast.testing import image

pytestmark = pytest.mark.gpu_kernels

SHAPE = (1, 16, 5, 6)


@pytest.fixture(scope="module")
def device(gpu_kernels: Callable[[str], AbstractContextManager[str]]) -> Iterator[torch.device]:
    with gpu_kernels("triton") as name:
        yield torch.device(name)


def plus_one(x: Image, operator: Callable[..., Tensor] = torch.add) -> TorchOp:
    return TorchOp(Image(x.shape, x.dtype), operator, (View(x, x.shape), 1.0), {})


def chain(length: int, operator: Callable[..., Tensor] = torch.add) -> Graph:
    """x -> x + 1 -> x + 2 ..., each step an operator of PyTorch's."""
    x = Image(SHAPE, torch.float32)
    graph = Graph([], [x], [])
    for _ in range(length):
        graph.nodes.append(plus_one(graph.nodes[-1].out if graph.nodes else x, operator))
    graph.outputs.append(graph.nodes[-1].out)
    return graph


def doubling(device: torch.device) -> Graph:
    """x -> 2 x + 1 by a depthwise kernel, joined with x + 1."""
    x = Image(SHAPE, torch.float32)
    weights = prepack(torch.full((16, 1, 1, 1), 2.0), torch.ones(16)).to(device)
    doubled = Depthwise(
        Image(SHAPE, x.dtype), x, weights, (1, 1), (1, 1), (0, 0), (1, 1), "none", backend="triton"
    )
    added = plus_one(x)
    joined = Concat(Image((1, 32, 5, 6), x.dtype), [doubled.out, added.out], backend="triton")
    whole = View(joined.out, joined.out.shape)
    out = TorchOp(Image(whole.shape, x.dtype), torch.neg, (whole,), {})
    return Graph([doubled, added, joined, out], [x], [out.out])


def run(plan: GpuPlan, x: Tensor) -> Tensor:
    out = torch.full(plan.graph.outputs[0].shape, float("nan"), device=x.device)
    plan.run([x], [out])
    return out


def test_a_plan_mixes_kernels_and_operators_of_pytorch(device: torch.device) -> None:
    plan = GpuPlan(doubling(device), device)
    assert not any(isinstance(node, Concat) for node in plan.graph.nodes)
    for seed in range(3):
        x = image(SHAPE, seed=seed).to(device)
        torch.testing.assert_close(run(plan, x), -torch.cat([2 * x + 1, x + 1], 1))


def test_memory_is_reused_and_holds_inputs_and_outputs(device: torch.device) -> None:
    plan = GpuPlan(chain(9), device)
    place = -(-16 * 5 * 6 * 4 // memory.GPU_ALIGNMENT) * memory.GPU_ALIGNMENT
    assert plan.arena_bytes == 2 * place
    x = image(SHAPE).to(device)
    before = x.clone()
    torch.testing.assert_close(run(plan, x), x + 9)
    assert torch.equal(x, before)


def test_an_input_that_is_read_late_keeps_its_memory(device: torch.device) -> None:
    graph = chain(4)
    x, last = graph.inputs[0], graph.nodes[-1].out
    total = TorchOp(Image(SHAPE, x.dtype), torch.add, (View(last, SHAPE), View(x, SHAPE)), {})
    graph.nodes.append(total)
    graph.outputs[:] = [total.out, graph.nodes[0].out]
    plan = GpuPlan(graph, device)
    x = image(SHAPE).to(device)
    outputs = [torch.empty_like(x) for _ in range(2)]
    plan.run([x], outputs)
    torch.testing.assert_close(outputs, [2 * x + 4, x + 1])


def test_inputs_of_any_layout_are_taken(device: torch.device) -> None:
    plan = GpuPlan(chain(2), device)
    wide = torch.randn(2, 32, 10, 12, device=device)
    for x in (
        wide[:1, :16, :5, :6],
        wide[:1, ::2, ::2, ::2],
        wide[:1, :16, :5, :6].contiguous(),
        wide[:1, :16, :5, :6].contiguous(memory_format=torch.channels_last),
        wide[:1, :1, :5, :6].expand(SHAPE),
    ):
        torch.testing.assert_close(run(plan, x), x + 2)


def test_results_may_be_handed_out_in_place(device: torch.device) -> None:
    plan = GpuPlan(chain(3), device)
    x = image(SHAPE).to(device)
    (first,) = plan.run_in_place([x])
    torch.testing.assert_close(first, x + 3)
    (second,) = plan.run_in_place([x + 1])
    assert first.data_ptr() == second.data_ptr()
    torch.testing.assert_close(first, x + 4)


def test_an_output_that_is_a_part_of_a_concatenation(device: torch.device) -> None:
    graph = doubling(device)
    part = graph.nodes[0].out
    graph.outputs.append(part)
    plan = GpuPlan(graph, device)
    assert part.parent is not None  # and copied out from there
    x = image(SHAPE).to(device)
    outputs = [torch.empty_like(torch.cat([x, x], 1)), torch.empty_like(x)]
    plan.run([x], outputs)
    torch.testing.assert_close(outputs[1], 2 * x + 1)

    graph = doubling(device)
    pinned = graph.nodes[0].out
    pinned.strides = pinned.memory_strides()
    graph.outputs.append(pinned)
    plan = GpuPlan(graph, device)
    (copy,) = (node for node in plan.graph.nodes if isinstance(node, Copy))
    assert copy.is_part
    assert copy.x is pinned
    torch.testing.assert_close(plan.run_in_place([x])[1], 2 * x + 1)
    assert plan.run_in_place([x])[1].stride() == (480, 1, 96, 16)


def test_threads_that_share_a_plan_take_turns(device: torch.device) -> None:
    plan = GpuPlan(chain(30), device)
    inputs = [image(SHAPE, seed=seed).to(device) for seed in range(8)]

    def work(x: Tensor) -> list[Tensor]:
        return [run(plan, x) for _ in range(20)]

    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(work, inputs))
    for x, found in zip(inputs, results, strict=True):
        for out in found:
            torch.testing.assert_close(out, x + 30)


def test_a_step_that_fails_says_why_and_leaves_the_plan_usable(device: torch.device) -> None:
    broken = True

    def add(x: Tensor, y: float) -> Tensor:
        if broken:
            raise RuntimeError("no such luck")
        return x + y

    plan = GpuPlan(chain(2, add), device)
    x = image(SHAPE).to(device)
    with pytest.raises(RuntimeError, match="no such luck"):
        run(plan, x)
    broken = False
    torch.testing.assert_close(run(plan, x), x + 2)


def test_profile_computes_and_times_every_step(device: torch.device) -> None:
    plan = GpuPlan(chain(3), device)
    x = image(SHAPE).to(device)
    out = torch.empty_like(x)
    rows = plan.profile([x], [out])
    torch.testing.assert_close(out, x + 3)
    assert [row["kind"] for row in rows] == ["TorchOp"] * 3
    assert all(row["seconds"] > 0 for row in rows)


def test_on_meta_a_plan_is_looked_at_and_takes_no_memory() -> None:
    meta = torch.device("meta")
    plan = GpuPlan(doubling(meta), meta)
    operators = [call.operator for _, call in plan.calls()]
    assert operators[0] is torch.ops.cvfast.depthwise_triton.out
    assert all(tensor.is_meta for _, call in plan.calls() for tensor in call.outputs.values())


class _Streams:
    """Runs on streams of their own, which overlap unless the plan prevents it."""

    def __init__(self, plan: GpuPlan, count: int) -> None:
        self.plan = plan
        self.streams = [torch.cuda.Stream() for _ in range(count)]

    def __call__(self, inputs: list[Tensor]) -> list[Tensor]:
        outputs = []
        for stream, x in zip(self.streams, inputs, strict=True):
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                outputs.append(run(self.plan, x))
        torch.cuda.synchronize()
        return outputs


@pytest.mark.gpu
def test_cuda_graph_replays_on_any_stream() -> None:
    cuda = torch.device("cuda")
    plan = GpuPlan(doubling(cuda), cuda)
    inputs = [image(SHAPE, seed=seed).cuda() for seed in range(6)]
    for _ in range(10):
        for x, out in zip(inputs, _Streams(plan, 6)(inputs), strict=True):
            torch.testing.assert_close(out, -torch.cat([2 * x + 1, x + 1], 1))
    assert plan._graph is not None


@pytest.mark.gpu
def test_cuda_graph_becomes_part_of_the_callers() -> None:
    plan = GpuPlan(chain(3), torch.device("cuda"))
    x = image(SHAPE).cuda()
    run(plan, x)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run(plan, x)
    x.add_(1)
    graph.replay()
    torch.testing.assert_close(out, x + 3)


@pytest.mark.gpu
def test_cuda_graph_that_cannot_be_captured_is_run_call_by_call() -> None:
    def synchronizing(x: Tensor, y: float) -> Tensor:
        return x + y * float(x.new_ones(1))  # a copy to the host, which no graph may hold

    plan = GpuPlan(chain(2, synchronizing), torch.device("cuda"))
    x = image(SHAPE).cuda()
    with pytest.warns(RuntimeWarning, match="cannot be captured in a CUDA graph"):
        torch.testing.assert_close(run(plan, x), x + 2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        torch.testing.assert_close(run(plan, x), x + 2)
    # The caller's stream is current again, and nothing is left capturing.
    assert torch.cuda.current_stream() == torch.cuda.default_stream()
    assert not torch.cuda.is_current_stream_capturing()
