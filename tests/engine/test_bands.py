"""Bands of rows: what two steps compute in turns is what they compute one after the other."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from cvfast.engine import bands
from cvfast.engine.nodes import (
    Concat,
    Conv,
    Depthwise,
    Elementwise,
    Graph,
    Image,
    InvertedResidual,
    Node,
    Pointwise,
    Pool,
)
from cvfast.engine.plan import Plan
from cvfast.ops.conv import prepack as prepack_conv
from cvfast.ops.depthwise import prepack as prepack_depthwise
from cvfast.ops.pointwise import prepack
from cvfast.testing import image

CHANNELS = 16
F32 = torch.float32


@pytest.fixture(autouse=True)
def _bands_of_small_images(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bands, "LEAST_BYTES", 4096)
    monkeypatch.setattr(bands, "BAND_BYTES", 4096)


def weight(*shape: int, seed: int) -> Tensor:
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return values / max(1, values[0].numel()) ** 0.5


def make(kind: str, out: Image, x: Image, stride: int = 1, residual: Image | None = None) -> Node:
    """A step of ``kind``, whose kernel is 3x3 and padded by 1, or of a single pixel."""
    c, k, window = x.channels, out.channels, ((3, 3), (stride, stride), (1, 1))
    if kind == "pointwise":
        packed = (prepack(weight(k, c, 1, 1, seed=1), dtype=F32),)
        return Pointwise(out, x, packed, (stride, stride), residual=residual)
    if kind == "depthwise":
        packed_taps = prepack_depthwise(weight(c, 1, 3, 3, seed=2))
        return Depthwise(out, x, packed_taps, *window, (1, 1), "relu")
    if kind == "separable":
        return InvertedResidual(
            out, x, None, prepack_depthwise(weight(c, 1, 3, 3, seed=2)),
            (prepack(weight(k, c, 1, 1, seed=1), dtype=F32),), residual, c, *window,
            ("none", "relu", "none"),
        )  # fmt: skip
    packed = (prepack_conv(weight(k, c, 3, 3, seed=3), algorithm=kind, dtype=F32),)
    return Conv(out, x, packed, residual, None, *window, (1, 1), "relu")


def shrink(kind: str, out_of: Image) -> Node:
    """A step that reads an image and keeps a quarter of its pixels."""
    n, c, h, w = out_of.shape
    kernel, padding, ceil = {
        "pool": (3, 0, False), "pool_ceil": (3, 0, True), "pool_padded": (3, 1, False),
        "pool_2x2": (2, 0, False), "pool_5x5": (5, 1, False),
    }.get(kind, (1 if kind == "pointwise" else 3, int(kind != "pointwise"), False))  # fmt: skip

    def size(pixels: int) -> int:
        return (pixels + 2 * padding - kernel + ceil) // 2 + 1

    out = Image((n, c, size(h), size(w)), F32)
    if not kind.startswith("pool"):
        return make(kind, out, out_of, stride=2)
    return Pool(out, out_of, "max", (kernel,) * 2, (2, 2), (padding,) * 2, ceil_mode=ceil)


def pair(first: str, second: str, h: int, w: int, *, residual: bool = False) -> Graph:
    x, middle = (Image((2, CHANNELS, h, w), F32) for _ in range(2))
    added = Image(x.shape, F32) if residual else None
    reader = shrink(second, middle)
    graph = Graph([make(first, middle, x, residual=added), reader], [x], [reader.out])
    if added is not None:
        graph.nodes.insert(0, Elementwise(added, x, activation="hardswish"))
    return hand_out(graph)


def hand_out(graph: Graph) -> Graph:
    for number, external in enumerate((*graph.inputs, *graph.outputs)):
        external.strides, external.external = external.memory_strides(), number
    return graph


def run(graph: Graph, threads: int) -> tuple[Tensor, Plan]:
    plan = Plan(graph, threads)
    x = image(graph.inputs[0].shape)
    out = torch.full(graph.outputs[0].shape, float("nan"))
    out = out.contiguous(memory_format=torch.channels_last)
    plan.run([x], [out])
    return out, plan


def without_bands(graph: Graph) -> tuple[Tensor, Plan]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bands, "cut", lambda graph: None)
        return run(graph, 2)


@pytest.mark.parametrize("size", [(33, 9), (32, 12), (24, 11)])
@pytest.mark.parametrize(
    "second",
    ["pool", "pool_ceil", "pool_padded", "pool_2x2", "pool_5x5", "pointwise", "depthwise",
     "separable", "direct"],
)  # fmt: skip
@pytest.mark.parametrize("first", ["pointwise", "depthwise", "separable", "direct"])
def test_bands_compute_the_same_bit_by_bit(first: str, second: str, size: tuple[int, int]) -> None:
    got, plan = run(pair(first, second, *size), 2)
    expected, whole = without_bands(pair(first, second, *size))
    torch.testing.assert_close(got, expected, rtol=0, atol=0)
    if second in ("pool_padded", "pool_5x5") and size[0] % 2:  # its last window hangs over the edge
        assert len(plan.graph.nodes) == 2
        return
    assert len(plan.graph.nodes) > 4
    assert plan.least_arena_bytes < whole.least_arena_bytes


@pytest.mark.parametrize("algorithm", ["winograd_f2", "winograd_f4"])
def test_bands_of_winograd_differ_by_its_tiles_alone(algorithm: str) -> None:
    got, plan = run(pair(algorithm, "pool_padded", 34, 13), 3)
    expected, _ = without_bands(pair(algorithm, "pool_padded", 34, 13))
    assert len(plan.graph.nodes) > 4
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("first", ["pointwise", "separable", "direct"])
def test_a_residual_is_cut_as_well(first: str) -> None:
    got, plan = run(pair(first, "pool_padded", 32, 10, residual=True), 2)
    expected, _ = without_bands(pair(first, "pool_padded", 32, 10, residual=True))
    assert len(plan.graph.nodes) > 5
    torch.testing.assert_close(got, expected, rtol=0, atol=0)


def test_two_sources_and_a_gate_are_cut_as_well() -> None:
    def graph() -> Graph:
        x, more, middle, wide = (Image((2, CHANNELS, 32, 10), F32) for _ in range(4))
        gate = Image((2, CHANNELS, 1, 1), F32)
        packed = (prepack_conv(weight(CHANNELS, 2 * CHANNELS, 3, 3, seed=5), dtype=F32),)
        both = Conv(middle, x, packed, None, more, (3, 3), (1, 1), (1, 1), (1, 1), "relu")
        first_pool, last_pool = shrink("pool_2x2", middle), shrink("pool", wide)
        gated = make("pointwise", wide, more)
        assert isinstance(gated, Pointwise)
        gated.gate = gate
        small = Image((2, CHANNELS, 1, 1), F32)
        mean = Pool(small, first_pool.out, "avg", (16, 5), (16, 5), (0, 0))
        nodes = [Elementwise(more, x, activation="relu"), both, first_pool, mean]
        nodes += [Elementwise(gate, small, activation="sigmoid"), gated, last_pool]
        return hand_out(Graph(nodes, [x], [last_pool.out]))

    got, plan = run(graph(), 2)
    expected, _ = without_bands(graph())
    assert len(plan.graph.nodes) > 12
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


def test_the_result_of_bands_may_be_a_part_of_a_concatenation() -> None:
    def graph() -> Graph:
        graph = pair("direct", "pool_padded", 32, 10)
        pooled = graph.outputs[0]
        pooled.external = pooled.strides = None
        other, joined = Image(pooled.shape, F32), Image((2, 2 * CHANNELS, *pooled.shape[2:]), F32)
        graph.nodes += [
            make("depthwise", other, pooled),
            Concat(joined, [pooled, other]),
            Elementwise(out := Image(joined.shape, F32), joined, activation="relu"),
        ]
        return hand_out(Graph(graph.nodes, graph.inputs, [out]))

    got, plan = run(graph(), 2)
    expected, _ = without_bands(graph())
    assert len(plan.graph.nodes) > 6
    torch.testing.assert_close(got, expected, rtol=0, atol=0)


def test_an_image_that_is_needed_whole_is_not_cut() -> None:
    graph = pair("direct", "pool", 32, 10)
    middle = graph.nodes[0].out
    again = Elementwise(Image(middle.shape, F32), middle)
    graph.nodes.append(again)
    assert len(Plan(hand_out(graph), 1).graph.nodes) == 3  # read by another step too
    graph = pair("direct", "pool", 32, 10)
    graph.outputs.append(graph.nodes[0].out)
    assert len(Plan(hand_out(graph), 1).graph.nodes) == 2  # handed out


def test_bands_have_two_rows_at_least() -> None:
    got, plan = run(pair("direct", "pool_2x2", 16, 80), 2)  # four pairs of rows, of 10 KB each
    expected, _ = without_bands(pair("direct", "pool_2x2", 16, 80))
    pools = [node for node in plan.graph.nodes if isinstance(node, Pool)]
    assert [pool.out.shape[2] for pool in pools] == [2, 2, 2, 2]
    torch.testing.assert_close(got, expected, rtol=0, atol=0)


def test_the_memory_between_is_that_of_a_band() -> None:
    graph = pair("direct", "pool_2x2", 256, 16)
    middle = graph.nodes[0].out
    _, plan = run(graph, 1)
    _, whole = without_bands(pair("direct", "pool_2x2", 256, 16))
    assert whole.arena_bytes >= middle.bytes
    assert plan.arena_bytes < middle.bytes // 8
    assert plan.measured_bytes() == plan.arena_bytes
