"""What networks do to images element by element, in one pass.

`cvfast::elementwise_cpu` and `cvfast::elementwise_triton` compute activation((scale · x + shift) op
y) on channels-last images: a residual (op "add"), a squeeze-excite gate (op "mul"), a batch norm
that no convolution took up (scale, shift), an activation, or each of these. The overloads `.out`
write into a given image, for example a channel slice of a wider one; that may be x or y itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from cvfast.launch import table
from cvfast.launch.elementwise import Problem
from cvfast.ops import _example, _gradient
from cvfast.ops.activation import Activation
from cvfast.perf import devices

OPS = ("none", "add", "mul")
KERNEL_BACKENDS = ("cpu", "triton")
KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ACTIVATIONS = ("none", "relu", "relu6", "hardswish", "hardsigmoid", "sigmoid", "silu")

_TAGS = [torch.Tag.needs_fixed_stride_order, torch.Tag.pt2_compliant_tag]
_ARGUMENTS = "Tensor x, Tensor? y, str op, str activation, Tensor? scale=None, Tensor? shift=None"

_library = torch.library.Library("cvfast", "FRAGMENT")
for _backend in KERNEL_BACKENDS:
    _name = f"elementwise_{_backend}"
    _library.define(f"{_name}({_ARGUMENTS}) -> Tensor", tags=_TAGS)
    _library.define(f"{_name}.out({_ARGUMENTS}, *, Tensor(a!) out) -> ()", tags=_TAGS)


def reference(
    x: Tensor,
    y: Tensor | None,
    op: str,
    activation: str = "none",
    scale: Tensor | None = None,
    shift: Tensor | None = None,
) -> Tensor:
    """What `cvfast::elementwise_*` compute, in plain PyTorch: any device, dtype and layout.

    Args:
        x: [N, C, H, W]; the kernel takes float32, bfloat16 and float16, channels-last (adjacent
            channels; images, rows and pixels may lie apart).
        y: of x's dtype and shape, or with 1 for N, or for H and W, or for all three; None for op
            "none".
        op: "none", "add" or "mul".
        activation: one of `ACTIVATIONS`.
        scale, shift: [C] each, float32 for the kernel, or both None.

    Returns:
        [N, C, H, W] in the dtype of x.

    Raises:
        ValueError: for an unknown op or activation.
    """
    if op not in OPS:
        raise ValueError(f"elementwise: unknown op {op!r}; expected {', '.join(OPS)}")
    if activation not in ACTIVATIONS:
        raise ValueError(
            f"elementwise: unknown activation {activation!r}; expected {', '.join(ACTIVATIONS)}"
        )
    if scale is not None and shift is not None:
        x = x * scale.to(x.dtype)[:, None, None] + shift.to(x.dtype)[:, None, None]
    if y is not None:
        x = x + y if op == "add" else x * y
    return Activation(activation)(x)


def bytes_moved(
    shape: Sequence[int], y_shape: Sequence[int] = (), dtype: torch.dtype = torch.float32
) -> int:
    """Least traffic: x and y (no y: ()) read once, the result written once."""
    y_size = torch.Size(y_shape).numel() if y_shape else 0
    return (2 * torch.Size(shape).numel() + y_size) * dtype.itemsize


def problem(
    x: Tensor,
    y: Tensor | None,
    op: str,
    activation: str,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    *,
    out: Tensor | None = None,
) -> Problem:
    """What `cvfast::elementwise_triton` chooses its launch parameters by; arguments are its.

    Raises:
        ValueError: for arguments that do not fit together, naming them.
    """
    if op not in OPS or (op == "none") != (y is None):
        raise ValueError(
            f"cvfast::elementwise_triton: op={op!r} with {'no ' if y is None else ''}y: expected "
            f"none without y, add or mul with it"
        )
    if activation not in ACTIVATIONS:
        raise ValueError(
            f"cvfast::elementwise_triton: unknown activation {activation!r}; expected "
            f"{', '.join(ACTIVATIONS)}"
        )
    if x.dim() != 4 or x.dtype not in KERNEL_DTYPES:
        raise ValueError(
            f"cvfast::elementwise_triton: x is {x.dtype} {list(x.shape)}; expected float32, "
            "bfloat16 or float16 [N, C, H, W]"
        )
    n, c, h, w = x.shape
    shapes = {"x": {x.shape}, "out": {x.shape}}
    shapes["y"] = {torch.Size((a, c, *size)) for a in (n, 1) for size in ((h, w), (1, 1))}
    for name, image in (("x", x), ("y", y), ("out", out)):
        if image is None:
            continue
        if image.shape not in shapes[name] or image.dtype != x.dtype or image.device != x.device:
            raise ValueError(
                f"cvfast::elementwise_triton: {name} is {image.dtype} {list(image.shape)} on "
                f"{image.device}, x {x.dtype} {list(x.shape)} on {x.device}"
            )
        if c != 1 and image.stride(1) != 1:
            raise ValueError(
                f"cvfast::elementwise_triton: {name} is not channels-last; convert it with "
                f"{name}.contiguous(memory_format=torch.channels_last)"
            )
    if (scale is None) != (shift is None):
        raise ValueError("cvfast::elementwise_triton: scale and shift come together")
    for name, vector in (("scale", scale), ("shift", shift)):
        if vector is not None and (
            vector.shape != (c,)
            or vector.dtype != torch.float32
            or vector.device != x.device
            or not vector.is_contiguous()
        ):
            raise ValueError(
                f"cvfast::elementwise_triton: {name} is {vector.dtype} {list(vector.shape)} on "
                f"{vector.device}, expected contiguous float32 [{c}] on {x.device}"
            )
    gate = y is not None and y.shape[2:] == (1, 1) != (h, w)
    return Problem(n, c, h, w, op, gate, scale is not None, x.dtype)


def _run(
    x: Tensor,
    y: Tensor | None,
    op: str,
    activation: str,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    *,
    out: Tensor,
    launch: Any = None,
) -> None:
    from cvfast.kernels import elementwise as kernels

    call = problem(x, y, op, activation, scale, shift, out=out)
    if launch is None:
        launch = table.choose("elementwise", "triton", call, "forward", devices.for_tensor(x))
    kernels.forward(x, y, scale, shift, out, call, launch, activation)


@torch.library.impl(_library, "elementwise_triton", "CompositeExplicitAutograd")
def _elementwise_triton(x: Tensor, *rest: Any, **more: Any) -> Tensor:
    problem(x, *rest, **more)
    out = _elementwise_fake(x)
    _run(x, *rest, **more, out=out)
    return out


@torch.library.impl(_library, "elementwise_triton.out", "CompositeExplicitAutograd")
def _elementwise_triton_out(*arguments: Any, out: Tensor, **more: Any) -> None:
    _run(*arguments, out=out, **more)


def example(
    problem: Problem, activation: str, *, device: str | torch.device, seed: int = 0
) -> _example.Example:
    """Random inputs of `problem`; see :class:`cvfast.ops._example.Example`."""
    n, c, h, w = problem.batch, problem.channels, problem.height, problem.width
    shapes = {
        "x": (n, c, h, w),
        "y": None if problem.op == "none" else (n, c, 1, 1) if problem.gate else (n, c, h, w),
        "scale": (c,) if problem.affine else None,
        "shift": (c,) if problem.affine else None,
    }
    x, y, scale, shift = (
        None
        if shape is None
        else _example.normal(shape, problem.dtype, device=device, seed=seed + number)
        for number, shape in enumerate(shapes.values())
    )
    assert x is not None
    vectors = [None if v is None else v.to(torch.float32) for v in (scale, shift)]

    def kernel(backend: str, launch: Any) -> Tensor:
        del backend
        out = _elementwise_fake(x)
        _run(x, y, problem.op, activation, *vectors, out=out, launch=launch)
        return out

    def definition(*inputs: Tensor | None) -> Tensor:
        first, second, *rest = inputs
        assert first is not None
        return reference(first, second, problem.op, activation, *rest)

    return _example.Example((x, y, scale, shift), definition, kernel)


def _elementwise_fake(x: Tensor, *rest: Any, **more: Any) -> Tensor:
    del rest, more
    return torch.empty(x.shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


def _elementwise_out_fake(*arguments: Any, out: Tensor, **more: Any) -> None:
    del arguments, out, more


for _backend in KERNEL_BACKENDS:
    torch.library.register_fake(f"cvfast::elementwise_{_backend}", _elementwise_fake)
    torch.library.register_fake(f"cvfast::elementwise_{_backend}.out", _elementwise_out_fake)
    for _overload in ("default", "out"):
        _op = getattr(getattr(torch.ops.cvfast, f"elementwise_{_backend}"), _overload)
        _refusal = _gradient.refusal(_op, "compute it with torch's operators")
        _library.impl(_op, _refusal, "Autograd", with_keyset=True)
