"""Which convolutions of a module end in one launch."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from cvfast.engine.grouping import Grouped, group_branches
from cvfast.engine.nodes import Concat, Conv, Graph, Image, Pointwise, Pool
from cvfast.models.googlenet import InceptionModule
from cvfast.models.inception import InceptionA, InceptionB, InceptionC, InceptionD, InceptionE
from cvfast.optimize import plan

MODULES: dict[str, tuple[Callable[[], nn.Module], tuple[int, int, int], list[str]]] = {
    # module: input, and the operators that it launches
    "googlenet": (lambda: InceptionModule(32, 16, 16, 24, 8, 8, 8), (32, 9, 8), ["inception"] * 2),
    "A": (lambda: InceptionA(32, 16), (32, 9, 8), ["inception"] * 2 + ["conv"]),
    "B": (lambda: InceptionB(32), (32, 9, 8), ["inception", "conv", "conv", "pool"]),
    "C": (lambda: InceptionC(32, 16), (32, 9, 8), ["inception"] * 3 + ["conv"] * 2),
    "D": (lambda: InceptionD(32), (32, 9, 8), ["inception"] * 2 + ["conv"] * 2 + ["pool"]),
    "E": (lambda: InceptionE(32), (32, 9, 8), ["inception"] * 3),
}


@pytest.mark.parametrize("name", MODULES)
def test_a_module_takes_as_many_launches_as_its_longest_branch(name: str) -> None:
    make, size, expected = MODULES[name]
    found = plan(make().eval(), torch.randn(1, *size), device="H200", dtype=torch.float16)
    kernels = [launch.kernel.partition("/")[0] for launch in found.launches if launch.grid]
    assert sorted(kernels) == sorted(expected)
    assert found.concat_bytes == 0


def conv(x: Image, channels: int, activation: str = "relu", kernel: int = 3) -> Conv:
    packed = (torch.zeros(kernel * kernel, x.channels, -(-channels // 16) * 16), torch.zeros(16))
    out = Image((x.shape[0], channels, *x.shape[2:]), x.dtype)
    return Conv(
        out, x, packed, None, None, (kernel, kernel), (1, 1), (kernel // 2,) * 2, (1, 1),
        activation, backend="triton",
    )  # fmt: skip


def pointwise(x: Image, channels: int) -> Pointwise:
    packed = (torch.zeros(x.channels, -(-channels // 16) * 16), torch.zeros(16))
    out = Image((x.shape[0], channels, *x.shape[2:]), x.dtype)
    return Pointwise(out, x, packed, activation="relu", backend="triton")


def start() -> Image:
    return Image((1, 16, 5, 6), torch.float32)


def joined(*parts: Image) -> Concat:
    channels = sum(part.channels for part in parts)
    out = Image((1, channels, *parts[0].shape[2:]), parts[0].dtype)
    return Concat(out, list(parts), backend="triton")


def grouped(*nodes: Conv | Pointwise | Pool | Concat) -> list[str]:
    graph = Graph(list(nodes), [nodes[0].reads()[0]], [nodes[-1].out])
    group_branches(graph)
    return [type(node).__name__ for node in graph.nodes]


def test_products_of_one_image_are_one() -> None:
    x = start()
    first, second, third = pointwise(x, 8), pointwise(x, 20), conv(x, 8)
    concat = joined(first.out, second.out, third.out)
    graph = Graph([first, second, third, concat], [x], [concat.out])
    group_branches(graph)
    group = graph.nodes[0]
    assert isinstance(group, Grouped)
    assert [member.outs for member in group.members] == [(first.out, second.out), (third.out,)]
    assert group.members[0].packed[0].shape == (1, 16, 48)
    assert group.flops() == first.flops() + second.flops() + third.flops()
    assert group.reads() == [x]
    assert group.writes() == [first.out, second.out, third.out]


def test_convolutions_that_wait_for_each_other_stay_apart() -> None:
    x = start()
    first = conv(x, 16)
    second = conv(first.out, 16)
    assert grouped(first, second, joined(first.out, second.out)) == ["Conv", "Conv", "Concat"]
    # By way of what is no convolution, too.
    pool = Pool(Image(x.shape, x.dtype), first.out, "max", (3, 3), (1, 1), (1, 1), ceil_mode=True,
                backend="triton")  # fmt: skip
    third = conv(pool.out, 16)
    names = grouped(first, pool, third, joined(first.out, third.out))
    assert names == ["Conv", "Pool", "Conv", "Concat"]


def test_other_activations_and_backends_and_residuals_stay_apart() -> None:
    x = start()
    one, other = conv(x, 8), conv(x, 8, "none")
    assert grouped(one, other, joined(one.out, other.out)) == ["Conv", "Conv", "Concat"]
    other = conv(x, 8)
    other.backend = "cuda"
    assert grouped(one, other, joined(one.out, other.out)) == ["Conv", "Conv", "Concat"]
    other = conv(x, 16)
    other.residual = x
    assert grouped(one, other, joined(one.out, other.out)) == ["Conv", "Conv", "Concat"]


@pytest.mark.parametrize(
    ("window", "kind"),
    [
        (("max", (3, 3), (1, 1), (1, 1)), "max"),
        (("avg", (3, 3), (1, 1), (1, 1)), "avg"),
        (("avg", (3, 3), (1, 1), (1, 1), (1, 1), False, False), "avg_inside"),
        (("avg", (3, 3), (1, 1), (1, 1), (1, 1), False, True, 5), None),
        (("max", (3, 3), (1, 1), (1, 1), (1, 1), True), None),
        (("avg", (5, 5), (1, 1), (2, 2)), None),
    ],
    ids=str,
)
def test_a_pooling_joins_its_only_reader(window: tuple, kind: str | None) -> None:  # type: ignore[type-arg]
    x = start()
    pool = Pool(Image(x.shape, x.dtype), x, *window, backend="triton")
    projection, other = pointwise(pool.out, 8), conv(x, 8)
    concat = joined(projection.out, other.out)
    graph = Graph([pool, projection, other, concat], [x], [concat.out])
    group_branches(graph)
    group = next(node for node in graph.nodes if isinstance(node, Grouped))
    assert (pool in graph.nodes) == (kind is None)
    assert {member.kind for member in group.members} == {"conv", kind or "conv"}
    # Read by another, it stays.
    graph = Graph([pool, projection, other, concat], [x], [concat.out, pool.out])
    group_branches(graph)
    assert pool in graph.nodes


def test_nodes_run_in_an_order_in_which_they_may() -> None:
    x = start()
    first = conv(x, 16)
    second = conv(first.out, 8)
    third = conv(x, 16)
    fourth = conv(third.out, 8, kernel=1)
    concat = joined(second.out, fourth.out)
    graph = Graph([first, second, third, fourth, concat], [x], [concat.out])
    group_branches(graph)
    assert [type(node) for node in graph.nodes] == [Grouped, Grouped, Concat]
    assert graph.nodes[0].writes() == [first.out, third.out]
