from __future__ import annotations

import itertools
from dataclasses import dataclass, replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from cvfast import tolerance
from cvfast.kernels import compiler
from cvfast.kernels import inverted_residual as kernels
from cvfast.launch.inverted_residual import Problem
from cvfast.launch.inverted_residual.triton import Launch, heuristic
from cvfast.ops.depthwise import prepack
from cvfast.ops.inverted_residual import ACTIVATIONS, reference, squeeze_reference
from cvfast.ops.pointwise import prepack_gpu
from cvfast.perf import compiled, devices
from cvfast.testing import guarded, image, poisoned_memory

pytestmark = pytest.mark.gpu_kernels

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Case:
    """One call; `rows` 0 stands for the heuristic's launch."""

    batch: int = 1
    channels: int = 8
    hidden: int = 24
    out: int = 12  # 0: no projection
    size: tuple[int, int] = (5, 6)
    kernel: tuple[int, int] = (3, 3)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, ...] = (1, 1)
    expands: bool = True
    residual: bool = False
    activations: tuple[str, str, str] = ("relu6", "relu6", "none")
    dtype: torch.dtype = torch.float32
    rows: int = 2
    chunk: int = 16
    positions: int = 16
    products: int = 16
    outputs: int = 16

    @property
    def problem(self) -> Problem:
        channels = self.channels if self.expands else self.hidden
        return Problem(
            self.batch, channels, self.hidden, self.out, *self.size, self.kernel, self.stride,
            self.padding, self.expands, self.residual, self.dtype,
        )  # fmt: skip

    @property
    def launch(self) -> Launch:
        if not self.rows:
            return heuristic(self.problem, "forward", devices.by_arch("sm_89"))
        return Launch(self.rows, self.positions, self.chunk, self.products, self.outputs, 1)

    @property
    def out_shape(self) -> tuple[int, int, int, int]:
        problem = self.problem
        channels = self.out or self.hidden
        return self.batch, channels, problem.out_height, problem.out_width

    def tensors(self, device: str) -> tuple[Tensor | None, ...]:
        """x, expand, its bias, depthwise, its bias, project, its bias, residual."""

        def layer(seed: int, *shape: int) -> tuple[Tensor, Tensor]:
            fan_in = image(shape).stride(0)
            weight = image(shape, self.dtype, seed=seed).contiguous() / fan_in**0.5
            bias = image((1, shape[0], 1, 1), self.dtype, seed=seed + 1).reshape(-1)
            return weight.to(device), bias.to(device)

        problem = self.problem
        x = image((self.batch, problem.channels, *self.size), self.dtype).to(device)
        none = (None, None)
        return (
            x,
            *(layer(1, self.hidden, self.channels, 1, 1) if self.expands else none),
            *layer(3, self.hidden, 1, *self.kernel),
            *(layer(5, self.out, self.hidden, 1, 1) if self.out else none),
            image(self.out_shape, self.dtype, seed=7).to(device) if self.residual else None,
        )

    def reference(
        self,
        x: Tensor,
        expand: Tensor | None,
        expand_bias: Tensor | None,
        depthwise: Tensor,
        depthwise_bias: Tensor,
        project: Tensor | None,
        project_bias: Tensor | None,
        residual: Tensor | None,
    ) -> tuple[Tensor, ...]:
        """The output, or without a projection the depthwise convolution's and its means."""
        first, second, last = self.activations
        one, plain = torch.ones_like(depthwise[:, :, :1, :1]), ((1, 1), (0, 0))
        if expand is not None:
            x, _ = squeeze_reference(
                x, expand, expand_bias, one[:, :1], None, *plain, first, "none"
            )
        top, left, bottom, right = (*self.padding, *self.padding)[:4]
        x = F.pad(x, (left, right, top, bottom))
        half = (x, None, None, depthwise, depthwise_bias)
        geometry = (self.stride, (0, 0), "none", second)
        if project is None:
            return squeeze_reference(*half, *geometry)
        return (reference(*half, project, project_bias, residual, *geometry, last),)

    def run(
        self, tensors: tuple[Tensor | None, ...], out: Tensor, means: Tensor | None = None
    ) -> None:
        x, expand, expand_bias, depthwise, depthwise_bias, project, project_bias, residual = tensors
        assert x is not None
        assert depthwise is not None
        matrix = (None, None) if expand is None else prepack_gpu(expand, expand_bias, x.dtype)
        packed = prepack(depthwise, depthwise_bias)
        if means is not None:
            kernels.squeeze(
                x, *matrix, packed, self.problem, self.launch, self.activations[:2], out, means
            )
            return
        assert project is not None
        kernels.forward(
            x, *matrix, packed, *prepack_gpu(project, project_bias, x.dtype), residual,
            self.problem, self.launch, self.activations, out,
        )  # fmt: skip

    def results(self, tensors: tuple[Tensor | None, ...]) -> list[Tensor]:
        """What the kernel writes into fresh memory."""
        x = tensors[0]
        assert x is not None
        batch, channels, height, width = self.out_shape
        sizes = [(height, width)] if self.out else [(height, width), (height, 1)]
        with poisoned_memory():
            results = [
                torch.empty(
                    (batch, channels, *size), dtype=self.dtype, device=x.device,
                    memory_format=torch.channels_last,
                )
                for size in sizes
            ]  # fmt: skip
        self.run(tensors, *results)
        return results

    def __str__(self) -> str:
        changed = [f"{k}={v}" for k, v in vars(self).items() if v != getattr(Case, k)]
        return " ".join(changed).replace("torch.", "") or "default"


def check(case: Case, device: str) -> None:
    tensors = case.tensors(device)
    wide = [None if t is None else t.double() for t in tensors]
    compared = zip(
        case.results(tensors),
        case.reference(*tensors),
        case.reference(*wide),
        strict=True,  # type: ignore[arg-type]
    )
    for result, baseline, expected in compared:
        verdict = tolerance.check(result, expected, baseline)
        assert verdict, str(verdict)


CASES = [
    Case(),
    # Strips of rows that divide the image, that leave a rest, and that are higher than it.
    *(Case(rows=rows, size=(7, 4), batch=2) for rows in (1, 2, 3, 4, 8)),
    *(Case(rows=rows, size=(7, 5), stride=(2, 2)) for rows in (1, 3, 4)),
    # Positions of one program in several rows and images; images of fewer and of more.
    Case(size=(3, 3), batch=5, rows=1),
    Case(size=(2, 19), positions=32),
    Case(size=(1, 1), batch=3),
    Case(size=(1, 7)),
    Case(size=(7, 1), rows=4),
    # Hidden channels around chunks, panels of 16, and none of these.
    *(Case(hidden=h, chunk=c) for h, c in ((1, 16), (16, 16), (17, 16), (40, 32), (64, 32))),
    # Channels around products of 16 and 32; output channels around blocks of programs.
    *(Case(channels=c, products=p) for c, p in ((1, 16), (16, 16), (19, 16), (32, 16))),
    *(Case(channels=c, products=p, dtype=torch.float16) for c, p in ((33, 32), (40, 16))),
    *(Case(out=o, outputs=b) for o, b in ((1, 16), (16, 16), (17, 16), (24, 32), (40, 16))),
    # Windows, strides, padding: each side by itself, none, wider than the window.
    Case(kernel=(5, 5), padding=(2, 2), size=(6, 7)),
    Case(kernel=(5, 5), padding=(2, 2), stride=(2, 2), size=(9, 7)),
    Case(kernel=(1, 1), padding=(0, 0)),
    Case(kernel=(2, 4), padding=(0, 1), stride=(1, 3), size=(4, 9)),
    Case(kernel=(7, 3), padding=(3, 1), rows=3),
    Case(padding=(0, 0)),
    Case(padding=(0, 0, 1, 1), stride=(2, 2), size=(6, 4)),
    Case(padding=(3, 1, 4, 0), size=(2, 3)),
    # Without an expansion: separable.
    *(Case(expands=False, hidden=h, stride=(s, s)) for h, s in ((16, 1), (21, 2), (40, 1), (3, 1))),
    Case(expands=False, kernel=(5, 5), padding=(2, 2), rows=4, size=(9, 5)),
    # Without a projection: the means over rows narrower and wider than a program's positions.
    *(Case(out=0, size=(5, w), hidden=h) for w, h in ((3, 16), (16, 20), (19, 33))),
    Case(out=0, stride=(2, 2), kernel=(5, 5), padding=(2, 2), size=(7, 9), batch=2, rows=3),
    Case(out=0, expands=False, size=(4, 5), rows=1),
    Case(residual=True, batch=2),
    *(
        Case(activations=a, residual=True, size=(3, 4))
        for a in itertools.zip_longest(
            ACTIVATIONS, ACTIVATIONS[1:], ACTIVATIONS[2:], fillvalue="none"
        )
    ),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_matches_float64(case: Case, device: str) -> None:
    check(case, device)


# The kinds of blocks of MobileNet v1, v2, v3 and EfficientNet-Lite, a few channels of them each.
NETWORKS = {
    "v1": Case(expands=False, hidden=16, out=32, activations=("none", "relu", "relu")),
    "v1 stride 2": Case(expands=False, hidden=32, out=32, stride=(2, 2), size=(6, 6)),
    "v2 first": Case(expands=False, hidden=32, out=16),
    "v2 stride 2": Case(channels=16, hidden=48, stride=(2, 2), size=(6, 8)),
    "v2 residual": Case(channels=12, hidden=48, out=12, residual=True),
    "v3 hard-swish": Case(channels=8, hidden=40, activations=("hardswish", "hardswish", "none")),
    "v3 squeeze": Case(
        channels=8, hidden=40, out=0, kernel=(5, 5), padding=(2, 2),
        activations=("relu", "relu", "none"),
    ),
    "lite 5x5 stride 2": Case(
        channels=8, hidden=48, kernel=(5, 5), padding=(2, 2), stride=(2, 2), size=(7, 6)
    ),
}  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", NETWORKS)
def test_blocks_of_networks_with_the_heuristics_launch(
    name: str, dtype: torch.dtype, device: str
) -> None:
    check(replace(NETWORKS[name], dtype=dtype, rows=0), device)


@settings(
    max_examples=12,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.filter_too_much, HealthCheck.function_scoped_fixture],
)
@given(
    case=st.builds(
        Case,
        batch=st.integers(1, 3),
        channels=st.integers(1, 20),
        hidden=st.integers(1, 40),
        out=st.integers(0, 20),
        size=st.tuples(st.integers(1, 7), st.integers(1, 7)),
        kernel=st.tuples(st.integers(1, 4), st.integers(1, 4)),
        stride=st.tuples(st.integers(1, 3), st.integers(1, 3)),
        padding=st.tuples(*[st.integers(0, 3)] * 4),
        expands=st.booleans(),
        dtype=st.sampled_from((torch.float32, torch.float16)),
        rows=st.integers(1, 4),
        chunk=st.sampled_from((16, 32)),
    ).filter(lambda case: min(case.out_shape) > 0)
)
def test_matches_float64_at_random_shapes(device: str, case: Case) -> None:
    check(case, device)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("out", [0, 9])
def test_reads_slices_and_writes_nothing_around_its_own(
    out: int, dtype: torch.dtype, device: str
) -> None:
    case = Case(batch=2, channels=11, hidden=19, out=out, residual=out > 0, dtype=dtype)
    tensors = case.tensors(device)
    plain = case.results(tensors)
    for canary in (float("nan"), 12.0):
        sources = {i: guarded(tensors[i], canary=canary) for i in (0, 7) if tensors[i] is not None}  # type: ignore[arg-type]
        targets = [guarded(torch.zeros_like(t), canary=canary) for t in plain]
        sliced = tuple(sources[i].tensor if i in sources else t for i, t in enumerate(tensors))
        case.run(sliced, *(target.tensor for target in targets))
        for target, expected in zip(targets, plain, strict=True):
            target.assert_untouched()
            assert torch.equal(target.tensor, expected)


@pytest.mark.parametrize("expands", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_nan_and_infinity_go_where_pytorch_puts_them(
    activation: str, expands: bool, device: str
) -> None:
    case = Case(
        channels=5, hidden=18, size=(7, 8), expands=expands, residual=True,
        activations=(activation, activation, activation),
    )  # fmt: skip
    tensors = case.tensors(device)
    x, residual = tensors[0], tensors[7]
    assert x is not None
    assert residual is not None
    x[0, 1, 3, 2] = float("nan")
    x[0, 2, 0, 7] = float("nan")
    residual[0, 1, 6, 2:5] = torch.tensor([float("nan"), float("inf"), -float("inf")])
    (y,) = case.results(tensors)
    (expected,) = case.reference(*(None if t is None else t.double() for t in tensors))  # type: ignore[arg-type]
    expected = expected.to(y.dtype)
    assert expected.isnan().any()
    assert not expected.isnan().all()
    assert torch.equal(y.isnan(), expected.isnan())
    assert torch.equal(y.isposinf(), expected.isposinf())
    assert torch.equal(y.isneginf(), expected.isneginf())


def test_means_are_the_same_at_every_run_and_in_every_batch(device: str) -> None:
    case = Case(batch=3, out=0, size=(5, 21), hidden=20)
    tensors = case.tensors(device)
    first, second = case.results(tensors), case.results(tensors)
    assert all(map(torch.equal, first, second))
    x = tensors[0]
    assert x is not None
    alone = replace(case, batch=1).results((x[1:2], *tensors[1:]))
    assert torch.equal(alone[1], first[1][1:2])


@pytest.mark.parametrize("out", [0, 12])
def test_batch_zero(out: int, device: str) -> None:
    case = Case(batch=0, out=out)
    results = case.results(case.tensors(device))
    assert results[0].shape == (0, out or 24, 5, 6)


@pytest.mark.slow
def test_offsets_beyond_two_to_the_31(device: str) -> None:
    # Two images 2^31 + 64 elements apart; on the CPU, only the pages touched take memory.
    distance = 2**31 + 64
    case = Case(batch=2, size=(4, 4), dtype=torch.float16)
    tensors = case.tensors(device)
    values = tensors[0]
    assert values is not None
    buffer = torch.empty(distance + 8 * 4 * 4, dtype=torch.float16, device=device)
    x = buffer.as_strided((2, 8, 4, 4), (distance, 1, 32, 8))
    x.copy_(values)
    assert torch.equal(case.results((x, *tensors[1:]))[0], case.results(tensors)[0])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(1, 8, 5, 5)}, r"x is torch.float32 \(1, 8, 5, 5\)"),
        ({"x": torch.zeros(1, 8, 5, 6)}, "x is not channels-last"),
        ({"expand": None}, "problem.expands=True says otherwise of expand"),
        ({"expand": torch.zeros(8, 24)}, r"expand is torch.float32 \(8, 24\).*prepack_gpu"),
        ({"expand_bias": torch.zeros(24)}, r"expand_bias must be float32 \(32,\)"),
        ({"depthwise": torch.zeros(1, 2, 9, 16)}, "cvfast.ops.depthwise.prepack"),
        ({"project": torch.zeros(24, 16).half()}, "project is torch.float16"),
        ({"project_bias": None}, "project_bias must be float32"),
        ({"residual": image((1, 12, 5, 6))}, "problem.residual=False says otherwise"),
        ({"activations": ("relu", "gelu", "none")}, "unknown activation 'gelu'"),
        ({"launch": Launch(2, 16, 24, 16, 16, 1)}, "hidden=24: expected a power of two"),
        ({"out": image((1, 12, 5, 5))}, r"out is torch.float32 \(1, 12, 5, 5\)"),
        ({"out": torch.zeros(1, 12, 5, 6)}, "out is not channels-last"),
        (
            {"project_bias": torch.zeros(16, device="meta")},
            "inverted_residual: the tensors are on different devices",
        ),
    ],
    ids=str,
)
def test_wrong_arguments_are_named(change: dict[str, object], message: str) -> None:
    case = Case()
    arguments: dict[str, object] = {
        "x": image((1, 8, 5, 6)),
        "expand": torch.zeros(8, 32),
        "expand_bias": torch.zeros(32),
        "depthwise": torch.zeros(1, 2, 10, 16),
        "project": torch.zeros(24, 16),
        "project_bias": torch.zeros(16),
        "residual": None,
        "problem": case.problem,
        "launch": case.launch,
        "activations": ("relu6", "relu6", "none"),
        "out": image((1, 12, 5, 6)),
        **change,
    }
    with pytest.raises(ValueError, match=message):
        kernels.forward(*arguments.values())


BLOCKS = {
    "expand": Problem(256, 24, 144, 24, 56, 56, (3, 3), (1, 1), (1, 1), residual=True),
    "stride 2": Problem(256, 16, 96, 24, 112, 112, (3, 3), (2, 2), (1, 1)),
    "5x5": Problem(1, 40, 240, 40, 28, 28, (5, 5), (1, 1), (2, 2)),
    "separable": Problem(256, 32, 32, 16, 112, 112, (3, 3), (1, 1), (1, 1), expands=False),
    "squeeze": Problem(1, 40, 120, 0, 28, 28, (5, 5), (1, 1), (2, 2)),
}


@pytest.mark.parametrize("arch", devices.ARCHITECTURES)
@pytest.mark.parametrize("name", BLOCKS)
def test_compiles_without_spills(name: str, arch: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")  # which compiled code must not heed
    architecture = devices.architecture(arch)
    problem = BLOCKS[name]
    launch = heuristic(problem, "forward", devices.by_arch(arch))
    major, minor = architecture.capability
    kernel = compiler.compiled(*kernels.source(problem, launch), 10 * major + minor)
    (binary,) = compiled.read(kernel.asm["cubin"])
    assert binary.local_bytes == 0
    shared = kernel.metadata.shared
    held = devices.occupancy(architecture, 32 * launch.num_warps, binary.registers, shared)
    assert held.warps_per_sm >= 8
    assert any("MMA" in opcode for opcode in binary.census())
    assert "ld.global.v4.b32" in kernel.asm["ptx"]  # 16 bytes of a pixel's channels at a time
