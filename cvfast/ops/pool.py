"""Pooling: the largest or the mean of each window, and the mean of a whole image.

`cvfast::pool_cpu` and `cvfast::pool_triton` are `max_pool2d` or `avg_pool2d` of
`torch.nn.functional`, `cvfast::global_pool_cpu` and `cvfast::global_pool_triton` are
`adaptive_avg_pool2d(x, 1)`, on channels-last images. Means take a batch norm and ReLU before them
(scale, shift): DenseNet's. The overloads `.out` write into a given image, for example a channel
slice of a wider one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cvfast import extension
from cvfast.launch import table
from cvfast.launch.global_pool import Problem as GlobalProblem
from cvfast.launch.pool import Problem
from cvfast.launch.pool import output_size as output_size
from cvfast.ops import _example, _gradient
from cvfast.ops._example import Example
from cvfast.perf import devices

KINDS = ("max", "avg")
KERNEL_BACKENDS = ("cpu", "triton")
KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

_TAGS = [torch.Tag.needs_fixed_stride_order, torch.Tag.pt2_compliant_tag]
_POOL = (
    "Tensor x, str kind, int[2] kernel_size, int[2] stride, int[2] padding, int[2] dilation, "
    "bool ceil_mode, bool count_include_pad, int? divisor_override, Tensor? scale=None, "
    "Tensor? shift=None"
)
_GLOBAL_POOL = "Tensor x, Tensor? scale=None, Tensor? shift=None"

_library = torch.library.Library("cvfast", "FRAGMENT")
for _backend in KERNEL_BACKENDS:
    for _name, _arguments in (("pool", _POOL), ("global_pool", _GLOBAL_POOL)):
        _name = f"{_name}_{_backend}"
        _library.define(f"{_name}({_arguments}) -> Tensor", tags=_TAGS)
        _library.define(f"{_name}.out({_arguments}, *, Tensor(a!) out) -> ()", tags=_TAGS)


def reference(
    x: Tensor,
    kind: str,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int] = (0, 0),
    dilation: Sequence[int] = (1, 1),
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
) -> Tensor:
    """What the operators `pool_*` compute, in plain PyTorch: any device, dtype and layout.

    Args:
        x: [N, C, H, W]; the kernel takes float32, bfloat16 and float16, channels-last (adjacent
            channels; images, rows and pixels may lie apart).
        kind: "max" or "avg".
        kernel_size, stride, padding, dilation: (vertical, horizontal) each; dilation is for "max".
        ceil_mode: the last window may reach beyond the padded image.
        count_include_pad, divisor_override: for "avg", as in PyTorch.
        scale, shift: [C] each, float32 for the kernel, or both None; for "avg": x becomes
            relu(scale · x + shift).

    Returns:
        [N, C, H', W'] in the dtype of x.
    """
    if kind == "max":
        return F.max_pool2d(
            x, tuple(kernel_size), tuple(stride), tuple(padding), tuple(dilation), ceil_mode
        )
    return F.avg_pool2d(
        scaled(x, scale, shift),
        tuple(kernel_size),
        tuple(stride),
        tuple(padding),
        ceil_mode,
        count_include_pad,
        divisor_override,
    )


def global_reference(x: Tensor, scale: Tensor | None = None, shift: Tensor | None = None) -> Tensor:
    """What the operators `global_pool_*` compute: the mean over H and W, [N, C, 1, 1]."""
    return scaled(x, scale, shift).mean((2, 3), keepdim=True)


def scaled(x: Tensor, scale: Tensor | None, shift: Tensor | None) -> Tensor:
    """relu(scale · x + shift), or x itself where there are none."""
    if scale is None or shift is None:
        return x
    return F.relu(x * scale.to(x.dtype)[:, None, None] + shift.to(x.dtype)[:, None, None])


def bytes_moved(
    x_shape: Sequence[int], out_shape: Sequence[int], dtype: torch.dtype = torch.float32
) -> int:
    """Least traffic: the image read once, the pooled one written once."""
    return (torch.Size(x_shape).numel() + torch.Size(out_shape).numel()) * dtype.itemsize


def _empty(x: Tensor, height: int, width: int) -> Tensor:
    return torch.empty(
        (x.shape[0], x.shape[1], height, width),
        dtype=x.dtype,
        device=x.device,
        memory_format=torch.channels_last,
    )


def _pool_fake(
    x: Tensor,
    kind: str,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    ceil_mode: bool,
    *rest: Any,
    **more: Any,
) -> Tensor:
    del kind, rest, more
    return _empty(x, *output_size(x.shape[2:], kernel_size, stride, padding, dilation, ceil_mode))


def _global_pool_fake(
    x: Tensor, scale: Tensor | None = None, shift: Tensor | None = None
) -> Tensor:
    del scale, shift
    return _empty(x, 1, 1)


def _out_fake(*arguments: Any, out: Tensor, **more: Any) -> None:
    del arguments, out, more


for _backend in KERNEL_BACKENDS:
    for _name, _fake, _advice in (
        ("pool", _pool_fake, "call torch.nn.functional.max_pool2d or avg_pool2d"),
        ("global_pool", _global_pool_fake, "call torch.nn.functional.adaptive_avg_pool2d"),
    ):
        _name = f"{_name}_{_backend}"
        torch.library.register_fake(f"cvfast::{_name}", _fake)
        torch.library.register_fake(f"cvfast::{_name}.out", _out_fake)
        for _overload in ("default", "out"):
            _op = getattr(getattr(torch.ops.cvfast, _name), _overload)
            _library.impl(_op, _gradient.refusal(_op, _advice), "Autograd", with_keyset=True)


def problem(
    x: Tensor,
    kind: str,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    ceil_mode: bool,
    count_include_pad: bool,
    divisor_override: int | None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    out: Tensor | None = None,
) -> Problem:
    """What `cvfast::pool_triton` chooses its launch parameters by; arguments are its.

    Raises:
        ValueError: for arguments that do not fit together, naming them.
    """
    _check_image("pool_triton", "x", x, x, x.shape)
    pairs = {
        "kernel_size": kernel_size, "stride": stride, "padding": padding, "dilation": dilation
    }  # fmt: skip
    for name, pair in pairs.items():
        if len(pair) != 2 or min(pair) < (name != "padding"):
            raise ValueError(
                f"cvfast::pool_triton: {name}={list(pair)}: expected two numbers, at least "
                f"{int(name != 'padding')}"
            )
    if any(padding[i] > kernel_size[i] // 2 for i in (0, 1)):
        raise ValueError(
            f"cvfast::pool_triton: padding={list(padding)}: expected at most half the kernel size "
            f"{list(kernel_size)}"
        )
    if kind not in KINDS:
        raise ValueError(f"cvfast::pool_triton: unknown kind {kind!r}; expected max or avg")
    if kind == "max" and (divisor_override is not None or scale is not None):
        raise ValueError("cvfast::pool_triton: divisor_override, scale and shift are for kind avg")
    if kind == "avg" and tuple(dilation) != (1, 1):
        raise ValueError(f"cvfast::pool_triton: dilation={list(dilation)}: kind avg takes 1")
    if divisor_override == 0:
        raise ValueError("cvfast::pool_triton: divisor_override must not be 0")
    _check_scale("pool_triton", x, scale, shift)
    batch, channels, height, width = x.shape
    found = Problem(
        batch,
        channels,
        height,
        width,
        kind,
        kernel=(kernel_size[0], kernel_size[1]),
        stride=(stride[0], stride[1]),
        padding=(padding[0], padding[1]),
        dilation=(dilation[0], dilation[1]),
        ceil_mode=ceil_mode,
        count_include_pad=count_include_pad,
        divisor=divisor_override or 0,
        prologue=scale is not None,
        dtype=x.dtype,
    )
    if min(height, width, found.out_height, found.out_width) < 1:
        raise ValueError(
            f"cvfast::pool_triton: the kernel {list(kernel_size)} is larger than the padded image "
            f"{height}x{width}"
        )
    if out is not None:
        size = (batch, channels, found.out_height, found.out_width)
        _check_image("pool_triton", "out", out, x, size)
    return found


def global_problem(
    x: Tensor,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    out: Tensor | None = None,
) -> GlobalProblem:
    """What `cvfast::global_pool_triton` chooses its launch parameters by; arguments are its.

    Raises:
        ValueError: for arguments that do not fit together, naming them.
    """
    _check_image("global_pool_triton", "x", x, x, x.shape)
    if not x.shape[2] * x.shape[3]:
        raise ValueError("cvfast::global_pool_triton: x has no pixels to average")
    _check_scale("global_pool_triton", x, scale, shift)
    if out is not None:
        _check_image("global_pool_triton", "out", out, x, (*x.shape[:2], 1, 1))
    batch, channels, height, width = x.shape
    return GlobalProblem(batch, channels, height, width, scale is not None, x.dtype)


def _check_image(op: str, name: str, image: Tensor, x: Tensor, size: Sequence[int]) -> None:
    if image.dim() != 4 or image.shape != torch.Size(size):
        raise ValueError(
            f"cvfast::{op}: {name} has shape {list(image.shape)}, expected "
            f"{list(size) if len(size) == 4 else '[N, C, H, W]'}"
        )
    if image.dtype not in KERNEL_DTYPES or image.dtype != x.dtype:
        raise ValueError(
            f"cvfast::{op}: {name} is {image.dtype}; expected float32, bfloat16 or float16, the "
            "same for x and out"
        )
    if image.device != x.device:
        raise ValueError(f"cvfast::{op}: {name} is on {image.device}, but x on {x.device}")
    if image.shape[1] != 1 and image.stride(1) != 1:
        raise ValueError(
            f"cvfast::{op}: {name} is not channels-last; convert it with "
            f"{name}.contiguous(memory_format=torch.channels_last)"
        )


def _check_scale(op: str, x: Tensor, scale: Tensor | None, shift: Tensor | None) -> None:
    if (scale is None) != (shift is None):
        raise ValueError(f"cvfast::{op}: scale and shift come together")
    for name, vector in (("scale", scale), ("shift", shift)):
        if vector is not None and (
            vector.shape != x.shape[1:2]
            or vector.dtype != torch.float32
            or vector.device != x.device
            or not vector.is_contiguous()
        ):
            raise ValueError(
                f"cvfast::{op}: {name} is {vector.dtype} {list(vector.shape)} on {vector.device}, "
                f"expected contiguous float32 [{x.shape[1]}] on {x.device}"
            )


def _run(
    op: str, call: Any, x: Tensor, scale: Tensor | None, shift: Tensor | None, out: Tensor,
    launch: Any = None,
) -> None:  # fmt: skip
    """Runs the Triton kernel of `op`, by default with the launch parameters chosen for `call`."""
    from cvfast.kernels import global_pool, pool

    kernels = {"pool": pool, "global_pool": global_pool}[op]
    if launch is None:
        launch = table.choose(op, "triton", call, "forward", devices.for_tensor(x))
    kernels.forward(x, scale, shift, out, call, launch)


@torch.library.impl(_library, "pool_triton", "CompositeExplicitAutograd")
def _pool_triton(
    x: Tensor,
    kind: str,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    ceil_mode: bool,
    count_include_pad: bool,
    divisor_override: int | None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    *,
    out: Tensor | None = None,
) -> Tensor:
    call = problem(
        x, kind, kernel_size, stride, padding, dilation, ceil_mode, count_include_pad,
        divisor_override, scale, shift, out,
    )  # fmt: skip
    result = _empty(x, call.out_height, call.out_width) if out is None else out
    _run("pool", call, x, scale, shift, result)
    return result


@torch.library.impl(_library, "global_pool_triton", "CompositeExplicitAutograd")
def _global_pool_triton(
    x: Tensor,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    *,
    out: Tensor | None = None,
) -> Tensor:
    call = global_problem(x, scale, shift, out)
    result = _empty(x, 1, 1) if out is None else out
    _run("global_pool", call, x, scale, shift, result)
    return result


@torch.library.impl(_library, "pool_triton.out", "CompositeExplicitAutograd")
def _pool_triton_out(*arguments: Any, out: Tensor, **more: Any) -> None:
    _pool_triton(*arguments, out=out, **more)


@torch.library.impl(_library, "global_pool_triton.out", "CompositeExplicitAutograd")
def _global_pool_triton_out(*arguments: Any, out: Tensor, **more: Any) -> None:
    _global_pool_triton(*arguments, out=out, **more)


def example(
    problem: Problem, activation: str = "none", *, device: str | torch.device, seed: int = 0
) -> Example:
    """Random inputs of a problem for the pooling kernels; see `cvfast.ops._example`.

    Raises:
        ValueError: for an activation, which pooling has none of.
    """
    _no_activation("pool", activation)
    size = (problem.batch, problem.channels, problem.height, problem.width)
    inputs = _example_inputs(size, problem.prologue, problem.dtype, device, seed)
    x, (scale, shift) = inputs[0], (None if v is None else v.float() for v in inputs[1:])

    def definition(x: Tensor, scale: Tensor | None, shift: Tensor | None) -> Tensor:
        return reference(
            x, problem.kind, problem.kernel, problem.stride, problem.padding, problem.dilation,
            problem.ceil_mode, problem.count_include_pad, problem.divisor or None, scale, shift,
        )  # fmt: skip

    def kernel(backend: str, launch: Any) -> Tensor:
        extension.load(backend)
        out = _empty(x, problem.out_height, problem.out_width)
        _run("pool", problem, x, scale, shift, out, launch)
        return out

    return Example(inputs, definition, kernel)


def global_pool_example(
    problem: GlobalProblem, activation: str = "none", *, device: str | torch.device, seed: int = 0
) -> Example:
    """As `example`, for global pooling."""
    _no_activation("global_pool", activation)
    size = (problem.batch, problem.channels, problem.height, problem.width)
    inputs = _example_inputs(size, problem.prologue, problem.dtype, device, seed)
    x, (scale, shift) = inputs[0], (None if v is None else v.float() for v in inputs[1:])

    def kernel(backend: str, launch: Any) -> Tensor:
        extension.load(backend)
        out = _empty(x, 1, 1)
        _run("global_pool", problem, x, scale, shift, out, launch)
        return out

    return Example(inputs, global_reference, kernel)


def _no_activation(op: str, activation: str) -> None:
    if activation != "none":
        raise ValueError(f"{op}: activation={activation!r}: expected none, pooling has no other")


def _example_inputs(
    size: Sequence[int],
    prologue: bool,
    dtype: torch.dtype,
    device: str | torch.device,
    seed: int,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """x, scale and shift, all in `dtype`."""
    x = _example.normal(size, dtype, device=device, seed=seed)
    if not prologue:
        return x, None, None
    scale, shift = (
        _example.normal((size[1],), dtype, device=device, seed=seed + i) for i in (1, 2)
    )
    return x, scale, shift
