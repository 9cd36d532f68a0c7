from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from cvfast.kernels import compiler
from cvfast.kernels import global_pool as global_kernels
from cvfast.kernels import pool as kernels
from cvfast.launch.global_pool import Problem as GlobalProblem
from cvfast.launch.global_pool import triton as global_launches
from cvfast.launch.pool import GENERAL, Problem
from cvfast.launch.pool import triton as launches
from cvfast.launch.pool.triton import Launch
from cvfast.ops import pool
from cvfast.perf import compiled, devices
from cvfast.testing import assert_close_to_float64, guarded, image, poisoned_memory

pytestmark = pytest.mark.gpu_kernels

OPS = torch.ops.cvfast
DTYPES = (torch.float32, torch.bfloat16, torch.float16)

LAUNCH = Launch(rows=2, columns=4, channels=16, num_warps=1)


@dataclass(frozen=True)
class Case:
    kind: str = "max"
    batch: int = 1
    channels: int = 11
    size: tuple[int, int] = (7, 6)
    kernel: tuple[int, int] = (3, 3)
    stride: tuple[int, int] = (2, 2)
    padding: tuple[int, int] = (1, 1)
    dilation: tuple[int, int] = (1, 1)
    ceil_mode: bool = False
    count_include_pad: bool = True
    divisor: int | None = None
    scaled: bool = False
    dtype: torch.dtype = torch.float32
    data: str = "normal"
    launch: Launch = LAUNCH

    def image(self, device: str) -> Tensor:
        size = (self.batch, self.channels, *self.size)
        return image(size, self.dtype, kind=self.data).to(device)

    def arguments(self, device: str) -> tuple[Any, ...]:
        """All but x; scale and shift are exact in every dtype."""
        vectors: tuple[Tensor | None, Tensor | None] = (None, None)
        if self.scaled:
            values = image((2, self.channels, 1, 1), torch.bfloat16, seed=1).float().to(device)
            vectors = (values[0].flatten(), values[1].flatten())
        return (
            self.kind, self.kernel, self.stride, self.padding, self.dilation, self.ceil_mode,
            self.count_include_pad, self.divisor, *vectors,
        )  # fmt: skip

    def __str__(self) -> str:
        changed = [f"{k}={v}" for k, v in vars(self).items() if v != getattr(Case, k)]
        return " ".join(changed).replace("torch.", "") or "default"


def run(case: Case, x: Tensor, out: Tensor | None = None) -> Tensor:
    """The kernel with the case's launch parameters."""
    arguments = case.arguments(str(x.device))
    problem = pool.problem(x, *arguments, out)
    if out is None:
        size = (case.batch, case.channels, problem.out_height, problem.out_width)
        out = torch.empty(
            size, dtype=x.dtype, device=x.device, memory_format=torch.channels_last
        )  # fmt: skip
    kernels.forward(x, *arguments[8:], out, problem, case.launch)
    return out


def check(case: Case, device: str) -> None:
    x = case.image(device)
    with poisoned_memory():
        y = run(case, x)
    arguments = case.arguments(device)
    if case.kind == "max":
        assert torch.equal(y, pool.reference(x, *arguments))
    else:
        assert_close_to_float64(y, lambda x: pool.reference(x, *arguments), x)


def both(**fields: Any) -> list[Case]:
    return [Case(kind=kind, **fields) for kind in pool.KINDS]


CASES = [
    *both(stride=(1, 1)),
    *both(kernel=(2, 2), padding=(0, 0), batch=2),
    *both(kernel=(1, 1), padding=(0, 0), stride=(1, 1), channels=16),
    *both(kernel=(3, 2), stride=(1, 2), padding=(1, 0), size=(5, 7)),
    *both(kernel=(5, 5), stride=(3, 3), padding=(2, 2), size=(6, 8)),  # not unrolled
    *both(size=(1, 1), stride=(1, 1)),
    # The last window: within the image, in its padding, beyond both, or dropped.
    *(case for n in (5, 6, 7, 8) for case in both(size=(n, n + 1), ceil_mode=True)),
    *both(kernel=(2, 2), stride=(3, 3), padding=(1, 1), size=(7, 6), ceil_mode=True),
    Case(dilation=(2, 3), size=(7, 8)),
    # Windows that lie between the pixels of their taps hold nothing.
    Case(kernel=(2, 2), padding=(1, 1), dilation=(2, 2), size=(1, 1), stride=(1, 1)),
    Case("avg", count_include_pad=False),
    Case("avg", count_include_pad=False, ceil_mode=True, size=(6, 8)),
    Case("avg", divisor=5, ceil_mode=True),
    Case("avg", divisor=-3),
    Case("avg", scaled=True),
    Case("avg", scaled=True, channels=32, kernel=(2, 2), padding=(0, 0)),
    Case("avg", data="offset"),
    *both(launch=Launch(1, 1, 32, 1), channels=40, size=(3, 3)),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_is_pytorchs_pooling(case: Case, device: str) -> None:
    check(case, device)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", [*both(), Case("avg", scaled=True)], ids=str)
def test_dtypes_and_numbers_that_are_none(case: Case, dtype: torch.dtype, device: str) -> None:
    check(replace(case, dtype=dtype), device)
    case = replace(case, dtype=dtype, data="nonfinite", size=(9, 9))
    x = case.image(device)
    expected = pool.reference(x.double(), *case.arguments(device)).to(dtype)
    y = run(case, x)
    assert expected.isnan().any()
    assert torch.equal(y.isnan(), expected.isnan())
    assert torch.equal(y.isinf(), expected.isinf())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels", [11, 16])
def test_slices_in_place_and_nothing_around_them(
    channels: int, dtype: torch.dtype, device: str
) -> None:
    for case in both(channels=channels, dtype=dtype, batch=2):
        x = case.image(device)
        plain = run(case, x)
        for canary in (float("nan"), 12.0):
            source, target = guarded(x, canary=canary), guarded(plain, canary=canary)
            target.tensor.fill_(float("nan"))
            run(case, source.tensor, target.tensor)
            assert torch.equal(target.tensor, plain)
            source.assert_untouched()
            target.assert_untouched()


@pytest.mark.parametrize("dtype", DTYPES)
def test_operators_choose_their_launch_and_write_where_they_are_told(
    dtype: torch.dtype, device: str
) -> None:
    case = Case(channels=5, size=(3, 3), dtype=dtype)
    x = case.image(device)
    y = OPS.pool_triton(x, *case.arguments(device))
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(y, pool.reference(x, *case.arguments(device)))
    out = torch.empty_like(y)
    OPS.pool_triton.out(x, *case.arguments(device), out=out)
    assert torch.equal(out, y)
    mean = OPS.global_pool_triton(x)
    assert_close_to_float64(mean, pool.global_reference, x)
    out = torch.empty_like(mean)
    OPS.global_pool_triton.out(x, out=out)
    assert torch.equal(out, mean)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize(("channels", "size"), [(11, (5, 7)), (32, (1, 1)), (3, (9, 1))])
def test_means_of_images(
    channels: int, size: tuple[int, int], scaled: bool, dtype: torch.dtype, device: str
) -> None:
    case = Case(
        "avg", 2, channels, size, scaled=scaled, dtype=dtype, data="offset" if scaled else "normal"
    )  # fmt: skip
    x, vectors = case.image(device), case.arguments(device)[8:]
    problem = pool.global_problem(x, *vectors)
    results = []
    for source in (x, guarded(x).tensor):
        target = guarded(x[:, :, :1, :1])
        launch = global_launches.Launch(pixels=8, channels=16, num_warps=1)
        global_kernels.forward(source, *vectors, target.tensor, problem, launch)
        target.assert_untouched()
        results.append(target.tensor)
    assert_close_to_float64(results[0], lambda x: pool.global_reference(x, *vectors), x)
    assert torch.equal(*results)


def test_no_images(device: str) -> None:
    x = Case(batch=0).image(device)
    assert OPS.pool_triton(x, *Case().arguments(device)).shape == (0, 11, 4, 3)
    assert OPS.global_pool_triton(x).shape == (0, 11, 1, 1)


def test_shapes_without_a_kernel() -> None:
    x = torch.empty(2, 8, 9, 7, device="meta").to(memory_format=torch.channels_last)
    y = OPS.pool_triton(x, *Case(ceil_mode=True).arguments("meta"))
    assert y.shape == (2, 8, 5, 4)
    assert OPS.global_pool_triton(x).shape == (2, 8, 1, 1)
    OPS.pool_triton.out(x, *Case(ceil_mode=True).arguments("meta"), out=y)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(1, 11, 7, 6)}, "x is not channels-last"),
        ({"x": torch.zeros(11, 7, 6)}, r"x has shape \[11, 7, 6\]"),
        ({"x": image((1, 11, 7, 6)).double()}, "x is torch.float64"),
        ({"kind": "min"}, "unknown kind 'min'"),
        ({"kernel_size": (0, 3)}, r"kernel_size=\[0, 3\]"),
        ({"padding": (2, 1)}, r"padding=\[2, 1\]: expected at most half"),
        ({"dilation": (2, 2), "kind": "avg"}, "kind avg takes 1"),
        ({"divisor_override": 2}, "are for kind avg"),
        ({"divisor_override": 0, "kind": "avg"}, "must not be 0"),
        ({"scale": torch.zeros(11), "kind": "avg"}, "scale and shift come together"),
        (
            {"scale": torch.zeros(3), "shift": torch.zeros(3), "kind": "avg"},
            r"scale is torch.float32 \[3\] on cpu",
        ),
        ({"kernel_size": (19, 19), "padding": (0, 0)}, "larger than the padded image 7x6"),
        ({"out": image((1, 11, 4, 4))}, r"out has shape \[1, 11, 4, 4\]"),
        ({"out": image((1, 11, 4, 3), torch.float16)}, "out is torch.float16"),
    ],
    ids=str,
)
def test_wrong_arguments_are_named(change: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {
        "x": image((1, 11, 7, 6)), "kind": "max", "kernel_size": (3, 3), "stride": (2, 2),
        "padding": (1, 1), "dilation": (1, 1), "ceil_mode": False, "count_include_pad": True,
        "divisor_override": None,
    }  # fmt: skip
    with pytest.raises(ValueError, match=message):
        pool.problem(**{**arguments, **change})


def test_an_image_without_pixels_has_no_mean() -> None:
    with pytest.raises(ValueError, match="no pixels"):
        pool.global_problem(torch.zeros(1, 1, 0, 3))


ARCHITECTURES = tuple(devices.ARCHITECTURES)


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("kind", pool.KINDS)
def test_compiles_without_spills_and_loads_16_bytes(kind: str, arch: str) -> None:
    problem = Problem(256, 192, 56, 56, kind, (3, 3), (1, 1), (1, 1))
    launch = launches.heuristic(problem, "forward", devices.by_arch(arch))
    major, minor = devices.architecture(arch).capability
    kernel = compiler.compiled(*kernels.source(problem, launch), 10 * major + minor)
    (binary,) = compiled.read(kernel.asm["cubin"])
    assert binary.local_bytes == 0
    assert "ld.global.v4.b32" in kernel.asm["ptx"]
    assert "st.global.v4.b32" in kernel.asm["ptx"]


@pytest.mark.parametrize("problem", [p for p, _ in GENERAL], ids=Problem.describe)
def test_whatever_it_is_called_with_compiles(problem: Problem) -> None:
    launch = launches.heuristic(problem, "forward", devices.by_arch("sm_90"))
    kernel = compiler.compiled(*kernels.source(problem, launch), 90)
    (binary,) = compiled.read(kernel.asm["cubin"])
    assert binary.local_bytes == 0


@pytest.mark.parametrize("prologue", [False, True])
def test_global_pooling_compiles_without_spills(prologue: bool) -> None:
    problem = GlobalProblem(256, 1280, 7, 7, prologue)
    launch = global_launches.heuristic(problem, "forward", devices.by_arch("sm_90"))
    kernel = compiler.compiled(*global_kernels.source(problem, launch), 90)
    (binary,) = compiled.read(kernel.asm["cubin"])
    assert binary.local_bytes == 0
    assert "ld.global.v4.b32" in kernel.asm["ptx"]
