"""``inception``: convolutions of a module that do not wait for each other, in one launch.

A module of GoogLeNet is two launches: its 1x1 branch, both reductions and the pooled projection,
all of which read the module's input; then its 3x3 and its 5x5 convolution. Each writes its slice of
the module's result. Implementations: ``reference`` (plain PyTorch; any dtype, device and layout)
and ``triton``. Szegedy et al., "Going Deeper with Convolutions", arXiv:1409.4842, Figure 2(b).
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cvfast import backends
from cvfast.backends import Reason
from cvfast.launch import table
from cvfast.launch.inception import KINDS, Branch, Problem
from cvfast.ops import _packing
from cvfast.perf import devices

from . import _example, _gradient, conv
from ._example import Example
from .depthwise import apply_activation

ACTIVATIONS = ("none", "relu", "relu6", "hardswish")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)

_TAGS = [torch.Tag.needs_fixed_stride_order, torch.Tag.pt2_compliant_tag]
_OPERANDS = (
    "Tensor[] x, Tensor[] weight, Tensor[] bias, str[] kind, int[] kernel_size, int[] stride, "
    "int[] padding, int[] parts, str activation"
)

_library = torch.library.Library("cvfast", "FRAGMENT")
_library.define(f"inception_triton({_OPERANDS}, int[] out_channels) -> Tensor[]", tags=_TAGS)
_library.define(f"inception_triton.out({_OPERANDS}, *, Tensor(a!)[] out) -> ()", tags=_TAGS)


@dataclass(frozen=True)
class Convolution:
    """One branch of a call.

    Attributes:
        x: [N, C, H, W].
        weights: [K, C, R, S] each, dtype of ``x``: convolutions of ``x`` with one kernel size,
            computed as one. 1x1 behind windows.
        biases: [K] each, or None.
        kind: "conv"; or 1x1 convolutions of the largest ("max") or the mean of each window of
            ``x``, which counts the padding's zeros ("avg") or pixels only ("avg_inside").
        kernel_size: (vertical, horizontal), of the convolution or the windows.
        stride, padding: of these, too.
    """

    x: Tensor
    weights: Sequence[Tensor]
    biases: Sequence[Tensor | None]
    kind: str = "conv"
    kernel_size: tuple[int, int] = (1, 1)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)

    def branch(self) -> Branch:
        """Its geometry."""
        _, channels, height, width = self.x.shape
        parts = tuple(weight.shape[0] for weight in self.weights)
        return Branch(
            channels, height, width, parts, self.kind, self.kernel_size, self.stride, self.padding
        )


def inception(
    convolutions: Sequence[Convolution], activation: str = "relu", *, backend: str = "auto"
) -> list[Tensor]:
    """Convolutions, biases and an activation in one launch; packs the weights on each call.

    Sums of the kernel are float32 in every dtype; float32 products are rounded to TF32 where
    ``torch.backends.cudnn.allow_tf32`` says so. Only the reference has a gradient, which ``"auto"``
    therefore takes where one is asked for.

    Args:
        convolutions: of images of one batch, dtype and device. The kernel takes float32, bfloat16
            and float16, channels-last (adjacent channels; images, rows and pixels may lie apart).
        activation: "none", "relu", "relu6" or "hardswish"; of all.
        backend: ``"auto"``, ``"reference"`` or ``"triton"``.

    Returns:
        [N, K, H', W'] for each weight, in the order given.

    Raises:
        ValueError: for arguments that do not fit together, or an unknown activation or backend.
        TypeError: for dtypes that differ.
        cvfast.backends.Unsupported: if the ``backend`` that was asked for cannot serve the call.
    """
    _validate(convolutions, activation)
    first = convolutions[0].x
    images = [c.x for c in convolutions]
    tensors = itertools.chain(images, *(c.weights for c in convolutions))
    if backend == "auto" and torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        backend = "reference"
    if backends.select("inception", backend, first.device, images) == "reference":
        return [y for c in convolutions for y in reference(c, activation)]
    packed = [prepack(c.weights, c.biases, first.dtype) for c in convolutions]
    flat = flatten([c.branch() for c in convolutions])
    channels = [weight.shape[0] for c in convolutions for weight in c.weights]
    weights, biases = (list(tensors) for tensors in zip(*packed, strict=True))
    fresh: list[Tensor] = torch.ops.cvfast.inception_triton(
        images, weights, biases, *flat, activation, channels
    )
    return fresh


def reference(convolution: Convolution, activation: str) -> list[Tensor]:
    """The definition of one branch in plain PyTorch: any device, dtype and layout."""
    c = convolution
    if c.kind == "conv":
        geometry: tuple[Any, ...] = (c.stride, c.padding)
        x = c.x
    else:
        geometry = ()
        x = _pooled(c.x, c.kind, c.kernel_size, c.stride, c.padding)
    return [
        apply_activation(F.conv2d(x, weight, bias, *geometry), activation)
        for weight, bias in zip(c.weights, c.biases, strict=True)
    ]


def _pooled(
    x: Tensor,
    kind: str,
    kernel_size: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int],
) -> Tensor:
    if kind == "max":
        return F.max_pool2d(x, kernel_size, stride, padding)
    return F.avg_pool2d(x, kernel_size, stride, padding, count_include_pad=kind == "avg")


@backends.register("inception", "triton")
def _check(images: Sequence[Tensor]) -> Reason | None:
    for x in images:
        if (reason := backends.wrong_device("triton", x.device)) is not None:
            return reason
        if x.dtype not in DTYPES:
            return Reason("dtype", f"x is {x.dtype}; the kernel takes float32, bfloat16, float16")
        if (reason := backends.wrong_layout(x)) is not None:
            return reason
    return None


def prepack(
    weights: Sequence[Tensor], biases: Sequence[Tensor | None], dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Weights of one branch in the layout that ``cvfast::inception_triton`` reads; carry no
    gradient.

    Args:
        weights: [K, C, R, S] each, of one kernel size, any floating dtype.
        biases: [K] each, or None, which counts as zeros.
        dtype: of the images.

    Returns:
        weight [R*S, C, N] in ``dtype`` and bias [N] in float32: side by side, each padded with
        zeros to a multiple of 16 output channels.
    """
    packed = [
        conv.prepack_gpu(weight, bias, dtype) for weight, bias in zip(weights, biases, strict=True)
    ]
    return join(packed)


def join(packed: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Weights that were packed one by one, by `conv.prepack_gpu`, side by side."""
    weights, biases = zip(*packed, strict=True)
    return torch.cat(weights, 2).contiguous(), torch.cat(biases)


def flatten(
    branches: Sequence[Branch],
) -> tuple[list[str], list[int], list[int], list[int], list[int]]:
    """Kinds, kernel sizes, strides, paddings and counts of parts, as the operator takes them."""
    pairs = (
        [n for b in branches for n in getattr(b, name)] for name in ("kernel", "stride", "padding")
    )
    kernels, strides, paddings = pairs
    return [b.kind for b in branches], kernels, strides, paddings, [len(b.parts) for b in branches]


def _validate(convolutions: Sequence[Convolution], activation: str) -> None:
    if activation not in ACTIVATIONS:
        raise ValueError(
            f"inception: unknown activation {activation!r}; expected {', '.join(ACTIVATIONS)}"
        )
    if not convolutions:
        raise ValueError("inception: expected one convolution or more")
    first = convolutions[0].x
    for c in convolutions:
        if c.x.dim() != 4 or c.x.shape[0] != first.shape[0]:
            raise ValueError(
                f"inception: x has shape {list(c.x.shape)}, expected [{first.shape[0]}, C, H, W]"
            )
        if not c.weights or len(c.weights) != len(c.biases):
            raise ValueError(
                f"inception: {len(c.weights)} weights and {len(c.biases)} biases: expected as many "
                "of one as of the other, and one at least"
            )
        taps = c.kernel_size if c.kind == "conv" else (1, 1)
        for weight, bias in zip(c.weights, c.biases, strict=True):
            if weight.dim() != 4 or weight.shape[1:] != (c.x.shape[1], *taps):
                raise ValueError(
                    f"inception: weight has shape {list(weight.shape)}, expected "
                    f"{['K', c.x.shape[1], *taps]}"
                )
            if bias is not None and bias.shape != weight.shape[:1]:
                raise ValueError(
                    f"inception: bias has shape {list(bias.shape)}, expected [{weight.shape[0]}]"
                )
            for tensor in (c.x, weight, bias):
                if tensor is not None and tensor.dtype != first.dtype:
                    raise TypeError(
                        f"inception: one tensor is {tensor.dtype}, another {first.dtype}; cast one "
                        "of them"
                    )
        _check_branch(c.branch())


def _check_branch(branch: Branch) -> None:
    kernel, stride, padding = branch.kernel, branch.stride, branch.padding
    if branch.kind not in KINDS:
        raise ValueError(f"inception: unknown kind {branch.kind!r}; expected {', '.join(KINDS)}")
    if min(*kernel, *stride) < 1 or min(padding) < 0:
        raise ValueError(
            f"inception: kernel_size={kernel}, stride={stride}, padding={padding}: expected at "
            "least 1, 1 and 0"
        )
    if branch.kind != "conv" and any(padding[i] > kernel[i] // 2 for i in (0, 1)):
        raise ValueError(f"inception: padding={padding}: expected at most half of {kernel}")
    if min(branch.out_height, branch.out_width) < 1:
        raise ValueError(
            f"inception: a kernel of {kernel} is larger than the padded image "
            f"{branch.height}x{branch.width}"
        )


def problem(
    x: Sequence[Tensor],
    weight: Sequence[Tensor],
    bias: Sequence[Tensor],
    kind: Sequence[str],
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    parts: Sequence[int],
    activation: str,
    *,
    out: Sequence[Tensor],
) -> Problem:
    """What ``cvfast::inception_triton.out`` chooses its launch parameters by; arguments are its.

    Raises:
        ValueError: for arguments that do not fit together.
    """
    found = _problem(
        x, weight, bias, kind, kernel_size, stride, padding, parts, activation,
        [image.shape[1] for image in out],
    )  # fmt: skip
    for image, shape in zip(out, _shapes(found), strict=True):
        _check_image("out", image, x[0], shape)
    return found


def _problem(
    x: Sequence[Tensor],
    weight: Sequence[Tensor],
    bias: Sequence[Tensor],
    kind: Sequence[str],
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    parts: Sequence[int],
    activation: str,
    out_channels: Sequence[int],
) -> Problem:
    count = len(x)
    lists = {"weight": weight, "bias": bias, "kind": kind, "parts": parts}
    pairs = {"kernel_size": kernel_size, "stride": stride, "padding": padding}
    for name, expected, given in (
        *((name, count, len(values)) for name, values in lists.items()),
        *((name, 2 * count, len(values)) for name, values in pairs.items()),
        ("out", sum(parts), len(out_channels)),
    ):
        if given != expected or not count:
            raise ValueError(
                f"cvfast::inception_triton: {given} of {name}: expected {expected} for {count} "
                "branches, and one branch or more"
            )
    if activation not in ACTIVATIONS:
        raise ValueError(f"cvfast::inception_triton: unknown activation {activation!r}")
    branches, taken = [], 0
    for i in range(count):
        _check_image("x", x[i], x[0], (x[0].shape[0], *x[i].shape[1:]))
        own = tuple(out_channels[taken : taken + parts[i]])
        taken += parts[i]
        kernel, step, pad = (
            (values[2 * i], values[2 * i + 1]) for values in (kernel_size, stride, padding)
        )
        _, channels, height, width = x[i].shape
        branch = Branch(channels, height, width, own, kind[i], kernel, step, pad)
        _check_branch(branch)
        shape = (branch.taps, branch.channels, branch.columns)
        _packing.check("inception.prepack", weight[i], bias[i], shape, x[0].dtype)
        branches.append(branch)
    tf32 = _packing.rounds_to_tf32(x[0].dtype)
    return Problem(x[0].shape[0], tuple(branches), x[0].dtype, tf32)


def _check_image(name: str, image: Tensor, x: Tensor, shape: Sequence[int]) -> None:
    if image.dim() != 4 or list(image.shape) != list(shape):
        raise ValueError(
            f"cvfast::inception_triton: {name} has shape {list(image.shape)}, expected "
            f"{list(shape)}"
        )
    if image.dtype != x.dtype or image.dtype not in DTYPES or image.device != x.device:
        raise ValueError(
            f"cvfast::inception_triton: {name} is {image.dtype} on {image.device}, expected one of "
            f"{', '.join(map(str, DTYPES))}, the same and on the same device for all"
        )
    if image.shape[1] != 1 and image.stride(1) != 1:
        raise ValueError(
            f"cvfast::inception_triton: {name} is not channels-last (stride 1 along C)"
        )


def _shapes(problem: Problem) -> list[tuple[int, int, int, int]]:
    """Of all that is written."""
    return [
        (problem.batch, channels, branch.out_height, branch.out_width)
        for branch in problem.branches
        for channels in branch.parts
    ]


def _empty(problem: Problem, x: Tensor) -> list[Tensor]:
    return [
        torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
        for shape in _shapes(problem)
    ]


def _run(
    x: Sequence[Tensor], weight: Sequence[Tensor], bias: Sequence[Tensor], problem: Problem,
    activation: str, out: Sequence[Tensor], launch: Any = None,
) -> None:  # fmt: skip
    from cvfast.kernels import inception as kernels

    if launch is None:
        device = devices.for_tensor(x[0])
        launch = table.choose("inception", "triton", problem, "forward", device)
    rest = iter(out)
    images = [list(itertools.islice(rest, len(branch.parts))) for branch in problem.branches]
    kernels.forward(x, weight, bias, problem, launch, activation, images)


@torch.library.impl(_library, "inception_triton.out", "CompositeExplicitAutograd")
def _triton_out(*arguments: Any, out: Sequence[Tensor]) -> None:
    call = problem(*arguments, out=out)
    x, weight, bias = arguments[:3]
    _run(x, weight, bias, call, arguments[8], out)


@torch.library.impl(_library, "inception_triton", "CompositeExplicitAutograd")
def _triton(*arguments: Any) -> list[Tensor]:
    call = _problem(*arguments)
    out = _empty(call, arguments[0][0])
    x, weight, bias = arguments[:3]
    _run(x, weight, bias, call, arguments[8], out)
    return out


@torch.library.register_fake("cvfast::inception_triton")
def _fake(*arguments: Any) -> list[Tensor]:
    return _empty(_problem(*arguments), arguments[0][0])


@torch.library.register_fake("cvfast::inception_triton.out")
def _out_fake(*arguments: Any, out: Sequence[Tensor]) -> None:
    del arguments, out


for _overload in (torch.ops.cvfast.inception_triton.default, torch.ops.cvfast.inception_triton.out):
    _refusal = _gradient.refusal(_overload, 'call cvfast.ops.inception with backend="reference"')
    _library.impl(_overload, _refusal, "Autograd", with_keyset=True)


def example(
    problem: Problem, activation: str = "none", *, device: str | torch.device, seed: int = 0
) -> Example:
    """Random inputs of a problem for the GPU kernels; see :mod:`cvfast.ops._example`. Branches that
    read images of one shape read the same one."""
    numbers = itertools.count(seed)

    def draw(*shape: int) -> Tensor:
        return _example.normal(shape, problem.dtype, device=device, seed=next(numbers))

    sizes = {(b.channels, b.height, b.width) for b in problem.branches}
    images = {size: draw(problem.batch, *size) for size in sorted(sizes)}
    inputs: list[Tensor] = []
    for b in problem.branches:
        taps = b.kernel if b.kind == "conv" else (1, 1)
        inputs.append(images[b.channels, b.height, b.width])
        inputs += [draw(channels, b.channels, *taps) for channels in b.parts]
        inputs += [draw(channels) for channels in b.parts]

    def convolutions(*tensors: Tensor) -> list[Convolution]:
        rest = iter(tensors)
        return [
            Convolution(
                next(rest), list(itertools.islice(rest, len(b.parts))),
                list(itertools.islice(rest, len(b.parts))), b.kind, b.kernel, b.stride, b.padding,
            )
            for b in problem.branches
        ]  # fmt: skip

    def definition(*tensors: Tensor) -> list[Tensor]:
        return [y for c in convolutions(*tensors) for y in reference(c, activation)]

    own = convolutions(*inputs)
    packed = [prepack(c.weights, c.biases, problem.dtype) for c in own]

    def kernel(backend: str, launch: Any) -> list[Tensor]:
        del backend
        weights, biases = zip(*packed, strict=True)
        out = _empty(problem, inputs[0])
        _run([c.x for c in own], weights, biases, problem, activation, out, launch)
        return out

    return Example(inputs, definition, kernel)
