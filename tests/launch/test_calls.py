"""What ships is what the networks call."""

from __future__ import annotations

import importlib.util
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from cvfast.launch import calls, networks

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
EVERY = pytest.mark.parametrize("op", calls.OPS)


def shapes_of_the_papers() -> set[tuple[int, int, int, int, str]]:
    """The layers of benchmarks/shapes.py, which come from the papers' tables."""
    spec = importlib.util.spec_from_file_location("shapes", BENCHMARKS / "shapes.py")
    assert spec is not None and spec.loader is not None
    shapes = importlib.util.module_from_spec(spec)
    sys.modules["shapes"] = shapes
    spec.loader.exec_module(shapes)
    return {
        (layer.channels, layer.size, layer.kernel, layer.stride, layer.activation)
        for layer in shapes.mobilenet_depthwise_layers()
    }


def test_the_depthwise_layers_are_those_of_the_papers() -> None:
    found = {
        (p.channels, p.height, p.kernel[0], p.stride[0], activation)
        for name in calls.column("depthwise").networks
        if name.startswith("mobilenet")
        for p, activation in calls.column("depthwise").problems(name)
    }
    assert found == shapes_of_the_papers()


def kinds(name: str, *fields: str) -> Counter[tuple[object, ...]]:
    return Counter(tuple(getattr(one, f) for f in fields) for one in networks.layers(name))


def test_every_layer_of_a_residual_network_is_found() -> None:
    # He et al., 2016, table 1: 16 blocks, each of which ends in a sum and a ReLU.
    found = kinds("resnet50", "kind", "residual", "activation")
    assert found == {
        ("conv", False, "relu"): 33,
        ("conv", True, "relu"): 16,
        ("conv", False, "none"): 4,  # the shortcuts that change the size
        ("max", False, "none"): 1,
        ("mean", False, "none"): 1,
        ("linear", False, "none"): 1,
    }


def test_what_comes_before_a_convolution_is_found() -> None:
    # Each of 58 dense layers and 3 transitions begins with a batch norm and a ReLU of its own.
    assert kinds("densenet121", "pointwise", "prologue")[True, True] == 61
    assert kinds("unet", "two_sources")[True,] == 4
    # Howard et al., 2019, table 1: eight blocks with squeeze-excite.
    assert kinds("mobilenet_v3_large", "gate")[True,] == 8


def test_a_linear_layer_is_one_pixel() -> None:
    last = networks.layers("resnet50")[-1]
    assert (last.kind, last.channels, last.out_channels) == ("linear", 2048, 1000)
    assert last.pointwise and (last.height, last.width) == (1, 1)


def test_poolings_have_their_geometry() -> None:
    first = next(one for one in networks.layers("googlenet") if one.kind == "max")
    assert (first.kernel, first.stride, first.padding) == ((3, 3), (2, 2), (0, 0))
    assert first.ceil_mode
    average = next(one for one in networks.layers("densenet121") if one.kind == "average")
    assert (average.kernel, average.stride, average.ceil_mode) == ((2, 2), (2, 2), False)


def test_padding_of_its_own_is_the_layers() -> None:
    layers = networks.layers("efficientnet_lite0")
    assert (layers[0].height, layers[0].padding) == (224, (0, 0, 1, 1))
    assert {one.padding for one in layers if one.kind == "depthwise"} >= {(1, 1), (0, 0, 1, 1)}


def test_the_blocks_of_the_mobilenets_are_found() -> None:
    v2 = networks.blocks("mobilenet_v2")
    assert len(v2) == 17
    assert [block.expand is None for block in v2] == [True] + [False] * 16
    assert all(block.project is not None for block in v2)
    assert sum(block.project.residual for block in v2 if block.project is not None) == 10
    v1 = networks.blocks("mobilenet_v1")
    assert len(v1) == 13
    # A separable block's expansion would be the projection of the block before.
    assert all(block.project is not None and block.project.activation == "relu" for block in v1)
    v3 = networks.blocks("mobilenet_v3_large")
    assert sum(block.project is None for block in v3) == 8


def test_an_inception_module_is_two_launches() -> None:
    # Szegedy et al., 2015, table 1: nine modules; inception (3a) first.
    found = [problem for problem, _ in calls.column("inception").problems("googlenet")]
    assert len(found) == 2 * 9
    reduce, convolve = found[:2]
    shared, pooled = reduce.branches
    assert (shared.channels, shared.parts, shared.kind) == (192, (64, 96, 16), "conv")
    assert (pooled.parts, pooled.kind, pooled.kernel) == ((32,), "max", (3, 3))
    assert [(b.channels, b.parts, b.kernel) for b in convolve.branches] == [
        (96, (128,), (3, 3)), (16, (32,), (3, 3)),
    ]  # fmt: skip


def test_branches_that_fork_are_found() -> None:
    # Szegedy et al., 2016, figure 7: both branches of 3x3 end in a 1x3 and a 3x1 each.
    *_, second, third = networks.modules("inception_v3")[-1]
    kernels = [[layer.kernel for layer in branch] for branch in (*second, *third)]
    assert kernels == [[(1, 3)], [(3, 1)], [(3, 3)], [(1, 3)], [(3, 1)]]


@EVERY
def test_every_problem_ships_at_every_batch_dtype_and_pass(op: str) -> None:
    shipped = calls.network_calls([op])
    assert len(shipped) == len(set(shipped)) > 0
    assert {call.op for call in shipped} == {op}
    groups = {
        (pass_, dtype): Counter(
            replace(call.problem, dtype=torch.float16)
            for call in shipped
            if (call.pass_, call.problem.dtype) == (pass_, dtype)
        )
        for pass_ in calls.column(op).passes
        for dtype in (torch.float16, torch.bfloat16)
    }
    assert all(set(group) == set(next(iter(groups.values()))) for group in groups.values())
    few, many = (calls.network_calls([op], [batch]) for batch in calls.BATCHES)
    assert len(few) == len(many) == len(shipped) / 2
    assert {call.problem.batch for call in few} == {1}


@EVERY
def test_general_calls_come_in_every_dtype(op: str) -> None:
    shipped = calls.general_calls([op])
    assert {call.problem.dtype for call in shipped} == set(calls.DTYPES)
    assert {call.pass_ for call in shipped} == set(calls.column(op).passes)


@EVERY
def test_problems_count_their_work_and_describe_themselves(op: str) -> None:
    for call in calls.sample_calls([op]) + calls.general_calls([op]):
        assert call.problem.bytes() > 0
        assert call.problem.flops() >= 0
        assert "float" in call.describe() or "tf32" in call.describe()
        assert "\n" not in call.describe()
        assert {*call.problem.SIZES} <= set(vars(call.problem))


def test_backward_kernels_are_asked_only_for_activations_that_they_undo() -> None:
    shipped = (*calls.network_calls(["depthwise"]), *calls.general_calls(["depthwise"]))
    assert {call.activation for call in shipped if call.pass_ == "forward"} == {
        "none", "relu", "relu6", "hardswish",
    }  # fmt: skip
    assert {call.activation for call in shipped if call.pass_ != "forward"} == {
        "none", "relu", "relu6",
    }  # fmt: skip


@EVERY
def test_the_sample_is_a_small_part(op: str) -> None:
    every = calls.network_calls([op]) + calls.general_calls([op])
    sample = calls.sample_calls([op])
    assert set(sample) <= set(every)
    assert len(set(sample)) == len(sample)
    assert len(sample) <= (calls.SAMPLE_KINDS + 2) * len(calls.column(op).passes)


def test_the_sample_of_depthwise_holds_every_kind() -> None:
    sample = calls.sample_calls(["depthwise"])
    for pass_ in calls.column("depthwise").passes:
        kinds = {(c.problem.kernel, c.problem.stride) for c in sample if c.pass_ == pass_}
        assert {((3, 3), (1, 1)), ((3, 3), (2, 2)), ((5, 5), (1, 1))} <= kinds
        assert any(c.problem.channels % 2 for c in sample if c.pass_ == pass_)


def test_unknown_operators_are_refused() -> None:
    with pytest.raises(ValueError, match="unknown operator 'softmax'; choose from depthwise"):
        calls.column("softmax")
