from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from cvfast import tolerance
from cvfast.kernels import compiler
from cvfast.kernels import inception as kernels
from cvfast.launch.inception import GENERAL, Branch, Problem
from cvfast.launch.inception import triton as launches
from cvfast.launch.tiles import Launch
from cvfast.ops import inception
from cvfast.ops.inception import Convolution
from cvfast.perf import compiled, devices
from cvfast.testing import guarded, image, poisoned_memory

pytestmark = pytest.mark.gpu_kernels

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SMALL = Launch(16, 16, 16, num_warps=1, num_stages=1)
WIDE = Launch(32, 32, 32, num_warps=1, num_stages=1)

CASES = {
    # Tiles across the parts of one product, odd channels, and a pooling before a product.
    "first launch": (
        Branch(13, 5, 4, (5, 18, 20)),
        Branch(13, 5, 4, (11,), "max", (3, 3), (1, 1), (1, 1)),
    ),
    "second launch": (
        Branch(6, 5, 4, (9,), "conv", (3, 3), (1, 1), (1, 1)),
        Branch(17, 5, 4, (3,), "conv", (5, 5), (1, 1), (2, 2)),
    ),
    "rows and columns": (
        Branch(16, 4, 9, (8, 8), "conv", (1, 7), (1, 1), (0, 3)),
        Branch(16, 4, 9, (17,), "conv", (3, 1), (1, 1), (1, 0)),
    ),
    "strides and sizes": (
        Branch(8, 7, 6, (16,), "conv", (3, 3), (2, 2), (0, 0)),
        Branch(40, 3, 5, (16,), "conv", (1, 1), (2, 1), (0, 0)),
        Branch(8, 7, 6, (4,), "max", (3, 2), (2, 1), (1, 0)),
    ),
    "means": (
        Branch(5, 3, 4, (7,), "avg", (3, 3), (1, 1), (1, 1)),
        Branch(5, 3, 4, (7,), "avg_inside", (3, 3), (1, 1), (1, 1)),
        Branch(20, 3, 4, (7,), "avg", (2, 2), (2, 2), (0, 0)),
    ),
    "one pixel": (Branch(16, 1, 1, (16,)), Branch(3, 1, 1, (1,), "max", (3, 3), (1, 1), (1, 1))),
}  # fmt: skip


def problem(name: str, dtype: torch.dtype = torch.float32, batch: int = 2) -> Problem:
    return Problem(batch, CASES[name], dtype)


def check(case: Problem, launch: Launch, device: str, activation: str = "relu") -> None:
    one = inception.example(case, activation, device=device)
    with poisoned_memory():
        results = one.run("triton", launch)
    truth, eager = one.reference(torch.float64), one.reference(case.dtype)
    for result, expected, baseline in zip(results, truth, eager, strict=True):
        verdict = tolerance.check(result, expected, baseline)
        assert verdict, str(verdict)


@pytest.mark.parametrize("launch", [SMALL, WIDE], ids=["small", "wide"])
@pytest.mark.parametrize("name", CASES)
def test_branches_are_what_pytorch_computes_one_by_one(
    name: str, launch: Launch, device: str
) -> None:
    check(problem(name), launch, device)


@pytest.mark.parametrize("activation", inception.ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_dtypes_and_activations(dtype: torch.dtype, activation: str, device: str) -> None:
    check(problem("first launch", dtype), WIDE, device, activation)


def packed(case: Problem, device: str) -> tuple[list[Tensor], list[Tensor]]:
    """Random weights of each branch, as the kernel reads them."""
    weights, biases = [], []
    for seed, b in enumerate(case.branches):
        taps = b.kernel if b.kind == "conv" else (1, 1)
        parts = [image((c, b.channels, *taps), case.dtype, seed=seed) for c in b.parts]
        weight, bias = inception.prepack(parts, [p[:, 0, 0, 0] for p in parts], case.dtype)
        weights.append(weight.to(device))
        biases.append(bias.to(device))
    return weights, biases


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["first launch", "rows and columns"])
def test_slices_in_place_and_nothing_around_them(
    name: str, dtype: torch.dtype, device: str
) -> None:
    case = problem(name, dtype)
    weights, biases = packed(case, device)
    images = [
        image((2, b.channels, b.height, b.width), dtype, seed=9).to(device) for b in case.branches
    ]
    shapes = inception._shapes(case)
    plain: list[Tensor] = []
    for canary in (None, float("nan"), 12.0):
        outs = [torch.full(s, float("nan"), dtype=dtype, device=device) for s in shapes]
        outs = [o.contiguous(memory_format=torch.channels_last) for o in outs]
        if canary is None:
            sources, plain, around = images, outs, []
        else:
            inner = [guarded(x, canary=canary) for x in images]
            outer = [guarded(o, canary=canary) for o in outs]
            sources, outs = [g.tensor for g in inner], [g.tensor for g in outer]
            around = [*inner, *outer]
        rest = iter(outs)
        parts = [[next(rest) for _ in b.parts] for b in case.branches]
        kernels.forward(sources, weights, biases, case, SMALL, "none", parts)
        for result, expected in zip(outs, plain, strict=True):
            assert torch.equal(result, expected)
        for buffer in around:
            buffer.assert_untouched()


def test_what_is_no_number_spreads_as_in_pytorch(device: str) -> None:
    x = image((1, 20, 6, 5), kind="nonfinite").to(device)
    weight = torch.ones(16, 20, 1, 1, device=device)
    convolutions = [
        Convolution(x, [weight], [None], "max", (3, 3), (1, 1), (1, 1)),
        Convolution(x, [weight], [None]),
    ]
    case = Problem(1, tuple(c.branch() for c in convolutions), torch.float32)
    weights, biases = zip(
        *(inception.prepack(c.weights, c.biases, torch.float32) for c in convolutions), strict=True
    )
    outs = inception._empty(case, x)
    kernels.forward([x, x], weights, biases, case, WIDE, "none", [[o] for o in outs])
    for c, out in zip(convolutions, outs, strict=True):
        (expected,) = inception.reference(c, "none")
        assert expected.isnan().any()
        assert torch.equal(out.isnan(), expected.isnan())
        assert torch.equal(out.isposinf(), expected.isposinf())


def test_operators_choose_their_launch_and_write_where_they_are_told(device: str) -> None:
    x = image((1, 12, 3, 3)).to(device)
    weights = [image((k, 12, 1, 1), seed=k).to(device) for k in (5, 18)]
    c = Convolution(x, weights, [None, None])
    case = Problem(1, (c.branch(),), torch.float32)
    weight, bias = inception.prepack(c.weights, c.biases, torch.float32)
    arguments = ([x], [weight], [bias], *inception.flatten([c.branch()]), "relu")
    results = torch.ops.cvfast.inception_triton(*arguments, [5, 18])
    outs = inception._empty(case, x)
    torch.ops.cvfast.inception_triton.out(*arguments, out=outs)
    for result, out, expected in zip(results, outs, inception.reference(c, "relu"), strict=True):
        torch.testing.assert_close(result, expected)
        assert torch.equal(result, out)


def test_no_images(device: str) -> None:
    check(problem("first launch", batch=0), SMALL, device)


def test_the_public_function_is_the_reference_elsewhere() -> None:
    x = torch.randn(1, 8, 6, 5, requires_grad=True)
    weights = [torch.randn(4, 8, 1, 1), torch.randn(3, 8, 1, 1)]
    pooled = Convolution(x, weights[:1], [None], "avg", (3, 3), (1, 1), (1, 1))
    results = inception.inception([Convolution(x, weights, [None, torch.randn(3)]), pooled])
    assert [tuple(y.shape) for y in results] == [(1, 4, 6, 5), (1, 3, 6, 5), (1, 4, 6, 5)]
    results[2].sum().backward()
    assert x.grad is not None
    meta = [t.to("meta") for t in (x.detach().contiguous(memory_format=torch.channels_last),)]
    weight, bias = (t.to("meta") for t in inception.prepack(weights, [None, None], torch.float32))
    shapes = torch.ops.cvfast.inception_triton(
        meta, [weight], [bias], ["conv"], [1, 1], [2, 1], [0, 0], [2], "relu", [4, 3]
    )
    assert [tuple(y.shape) for y in shapes] == [(1, 4, 3, 5), (1, 3, 3, 5)]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": ["min"]}, "unknown kind 'min'"),
        ({"kind": ["conv", "conv"]}, "2 of kind: expected 1"),
        ({"stride": [1]}, "1 of stride: expected 2"),
        ({"stride": [0, 1]}, "expected at least 1"),
        ({"kernel_size": [3, 3]}, "larger than the padded image"),
        ({"parts": [2]}, "1 of out: expected 2"),
        ({"activation": "gelu"}, "unknown activation 'gelu'"),
        ({"weight": [torch.zeros(1, 8, 12)]}, r"weight is torch.float32 \(1, 8, 12\)"),
        ({"bias": [torch.zeros(16).half()]}, "bias is torch.float16"),
        ({"x": [torch.zeros(1, 8, 2, 3)]}, "x is not channels-last"),
        ({"out": [image((1, 4, 2, 2))]}, r"out has shape \[1, 4, 2, 2\]"),
        ({"out": [image((1, 4, 2, 3), torch.float16)]}, "out is torch.float16"),
    ],
    ids=str,
)
def test_wrong_arguments_are_named(change: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {
        "x": [image((1, 8, 2, 3))], "weight": [torch.zeros(1, 8, 16)], "bias": [torch.zeros(16)],
        "kind": ["conv"], "kernel_size": [1, 1], "stride": [1, 1], "padding": [0, 0],
        "parts": [1], "activation": "relu", "out": [image((1, 4, 2, 3))],
    }  # fmt: skip
    with pytest.raises(ValueError, match=message):
        inception.problem(**{**arguments, **change})


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"weights": [torch.zeros(4, 7, 1, 1)]}, ValueError, r"expected \['K', 8, 1, 1\]"),
        ({"weights": []}, ValueError, "0 weights and 1 biases"),
        ({"biases": [torch.zeros(3)]}, ValueError, r"bias has shape \[3\], expected \[4\]"),
        ({"weights": [torch.zeros(4, 8, 1, 1).half()]}, TypeError, "cast one of them"),
        ({"x": torch.zeros(8, 2, 3)}, ValueError, "expected"),
        ({"kind": "max", "kernel_size": (3, 3), "padding": (2, 2)}, ValueError, "at most half"),
    ],
    ids=str,
)
def test_wrong_convolutions_are_named(
    change: dict[str, Any], error: type[Exception], message: str
) -> None:
    fields = {"x": image((1, 8, 2, 3)), "weights": [torch.zeros(4, 8, 1, 1)], "biases": [None]}
    with pytest.raises(error, match=message):
        inception.inception([Convolution(**{**fields, **change})])
    with pytest.raises(ValueError, match="one convolution or more"):
        inception.inception([])


MODULE = Problem(
    64,
    (
        Branch(192, 28, 28, (64, 96, 16)),
        Branch(192, 28, 28, (32,), "max", (3, 3), (1, 1), (1, 1)),
    ),
)


@pytest.mark.parametrize("arch", devices.ARCHITECTURES)
def test_compiles_without_spills_for_matrix_units(arch: str) -> None:
    launch = launches.heuristic(MODULE, "forward", devices.by_arch(arch))
    major, minor = devices.architecture(arch).capability
    source = kernels.source(MODULE, launch, activation="relu")
    kernel = compiler.compiled(*source, 10 * major + minor)
    (binary,) = compiled.read(kernel.asm["cubin"])
    assert binary.local_bytes == 0
    assert "ld.global.v4.b32" in kernel.asm["ptx"]
    assert "st.global.v4.b32" in kernel.asm["ptx"]
    wanted = {"sm_90": "wgmma.mma_async", "sm_100": "tcgen05.mma"}.get(arch, "mma.sync")
    assert wanted in kernel.asm["ptx"]


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_whatever_it_is_called_with_compiles_without_spills(dtype: torch.dtype) -> None:
    for case, activation in GENERAL:
        case = replace(case, dtype=dtype)
        launch = launches.heuristic(case, "forward", devices.by_arch("sm_90"))
        kernel = compiler.compiled(*kernels.source(case, launch, activation=activation), 90)
        (binary,) = compiled.read(kernel.asm["cubin"])
        assert binary.local_bytes == 0
