"""``conv``: k x k convolution + bias + optional residual + activation, any groups.

Implementations: ``reference`` (plain PyTorch; any dtype, device and layout), ``onednn`` (oneDNN
through PyTorch on the CPU: weights reordered into the library's blocked layout, bias, residual and
those activations fused that treat NaN as PyTorch does) ``cpu`` (cvfast's own kernels for one group:
direct, or Winograd's minimal filtering for 3 x 3 kernels at stride and dilation 1) and ``triton``
(implicit matrix product on GPUs, for one group).
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cvfast import backends, extension
from cvfast.backends import Reason
from cvfast.launch import table
from cvfast.launch.conv import FEW_CHANNELS, Problem
from cvfast.ops import _packing
from cvfast.perf import devices

from . import _example, _flops, _gradient
from ._example import Example
from .activation import NONE, Activation, activate_

ONEDNN_DTYPES = (torch.float32, torch.bfloat16)

# oneDNN's relu, clip and hard-sigmoid turn NaN into a number and its erf-gelu turns Inf into NaN
# (observed with the oneDNN of torch 2.13); those run as a pass of their own over the result, which
# is still in cache.
_ONEDNN_ATTRIBUTE = {
    "hardswish": "hardswish",
    "silu": "swish",
    "sigmoid": "sigmoid",
    "tanh": "tanh",
}


def conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    stride: Sequence[int] = (1, 1),
    padding: Sequence[int] = (0, 0),
    dilation: Sequence[int] = (1, 1),
    groups: int = 1,
    residual: Tensor | None = None,
    activation: Activation = NONE,
) -> Tensor:
    """The reference: ``activation(conv2d(x, weight) + bias + residual)``.

    ``x`` [N, C, H, W], ``weight`` [K, C / groups, R, S], ``bias`` [K], ``residual`` [N, K, P, Q];
    one dtype, any layout. Errors are those of :func:`torch.nn.functional.conv2d`.
    """
    out = F.conv2d(x, weight, bias, tuple(stride), tuple(padding), tuple(dilation), groups)
    if residual is not None:
        out = out + residual
    return activation(out)


def onednn_unsupported(dtype: torch.dtype, device: torch.device) -> str | None:
    """Why oneDNN cannot serve this dtype on this device, or None where it can."""
    if device.type != "cpu":
        return f"oneDNN runs on the CPU, the input is on {device.type}"
    if not torch.backends.mkldnn.is_available():
        return "this PyTorch was built without oneDNN"
    if dtype not in ONEDNN_DTYPES:
        return f"oneDNN is used for float32 and bfloat16, not {str(dtype).removeprefix('torch.')}"
    if dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return "this CPU lacks the instructions that oneDNN's bfloat16 kernels need"
    return None


def fuses_activation(activation: str, residual: bool) -> bool:
    """Whether :func:`conv_onednn` applies ``activation`` without a pass of its own."""
    return activation == "none" or (not residual and activation in _ONEDNN_ATTRIBUTE)


class OneDnnWeight:
    """A convolution's weight in the opaque layouts that oneDNN prefers, one for each input shape.

    The preferred layout depends on the input's shape, and with another one a convolution may fall
    to a reference kernel: 960 -> 320 channels at 6 x 5 took 67 us with its own layout and 5,528 us
    with that of 7 x 7. Shapes that prefer the same layout share one copy. Safe to use from several
    threads.

    Args:
        weight: [K, C / groups, R, S], float32 or bfloat16; not kept.
        input_shape: (N, C, H, W) to pack for at once.
    """

    MAX_SHAPES = 64
    """Shapes remembered; beyond, all but the layout of the last are forgotten."""

    def __init__(
        self,
        weight: Tensor,
        input_shape: Sequence[int],
        *,
        stride: Sequence[int],
        padding: Sequence[int],
        dilation: Sequence[int],
        groups: int,
    ) -> None:
        self.stride, self.padding = list(stride), list(padding)
        self.dilation, self.groups = list(dilation), groups
        packed = self._reorder(weight.detach().to_mkldnn(), input_shape)
        self._layouts: dict[bytes, Tensor] = {_layout(packed): packed}
        self._packed: dict[Sequence[int], Tensor] = {torch.Size(input_shape): packed}

    def output_shape(self, shape: Sequence[int]) -> tuple[int, int, int, int]:
        """Of the convolution of an input of ``shape``."""
        k, _, *kernel = next(iter(self._layouts.values())).shape
        return _output_shape(shape, k, kernel, self.stride, self.padding, self.dilation)

    def packed_for(self, shape: torch.Size) -> Tensor:
        """The weight in the layout for inputs of ``shape``."""
        packed = self._packed.get(shape)
        return self._pack(shape) if packed is None else packed

    def _pack(self, shape: torch.Size) -> Tensor:
        known = next(iter(self._layouts.values()))
        try:
            packed = self._reorder(known, shape)
        except RuntimeError:
            # torch 2.11 cannot reorder some packed weights; it then does so on each call.
            packed = known
        layout = _layout(packed)
        if len(self._packed) >= self.MAX_SHAPES:
            self._packed, self._layouts = {}, {layout: packed}
        packed = self._layouts.setdefault(layout, packed)
        self._packed[shape] = packed
        return packed

    def _reorder(self, weight: Tensor, shape: Sequence[int]) -> Tensor:
        packed: Tensor = torch._C._nn.mkldnn_reorder_conv2d_weight(  # type: ignore[call-arg]
            weight, self.padding, self.stride, self.dilation, self.groups, list(shape)
        )
        return packed


def _layout(packed: Tensor) -> bytes:
    """What tells oneDNN's layouts apart."""
    return bytes(torch.ops.mkldnn._get_mkldnn_serialized_md(packed).tolist())


def conv_onednn(
    x: Tensor,
    weight: OneDnnWeight,
    bias: Tensor | None,
    residual: Tensor | None,
    activation: str,
    parameters: tuple[float | str, ...] = (),
) -> Tensor:
    """:func:`conv` on a prepared weight; inference only (no gradient is recorded).

    The result is channels-last; a ``x`` that is not is converted inside on each call. ``residual``
    must have the result's shape.
    """
    ops = torch.ops.mkldnn
    packed = weight.packed_for(x.shape)
    geometry = (weight.padding, weight.stride, weight.dilation, weight.groups)
    # For a single pixel the strides do not tell the layout, and torch 2.11 fails to fuse the sum.
    if residual is not None and residual.shape[2:].numel() > 1:
        out: Tensor = ops._convolution_pointwise.binary(
            x, residual, packed, bias, *geometry, "add", 1.0, None, [], None
        )
    elif residual is not None:
        out = ops._convolution_pointwise.default(x, packed, bias, *geometry, "none", [], "")
        out.add_(residual)
    else:
        attribute = _ONEDNN_ATTRIBUTE.get(activation)
        if attribute is not None:
            activation = "none"
        out = ops._convolution_pointwise.default(
            x, packed, bias, *geometry, attribute or "none", [], ""
        )
    return activate_(out, activation, parameters)


def conv_torch(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    activation: str,
    parameters: tuple[float | str, ...] = (),
) -> Tensor:
    """:func:`conv` through ``torch.nn.functional.conv2d``, then in place; inference only."""
    out: Tensor = torch.ops.aten.conv2d.default(x, weight, bias, stride, padding, dilation, groups)
    if residual is not None:
        out.add_(residual)
    return activate_(out, activation, parameters)


def flops(x_shape: Sequence[int], weight_shape: Sequence[int], out_shape: Sequence[int]) -> int:
    """Operations of the convolution, a multiply-add counted as two, as by ``FlopCounterMode``."""
    n, k, p, q = out_shape
    _, c, r, s = weight_shape
    return 2 * n * k * p * q * c * r * s


def bytes_moved(
    x_shape: Sequence[int],
    weight_shape: Sequence[int],
    out_shape: Sequence[int],
    itemsize: int,
    passes: int = 0,
) -> int:
    """Bytes read and written when source, weights and result cross memory once.

    ``passes`` counts elementwise passes over the result that are not fused (batch norm, activation,
    addition); each reads and writes it once more.
    """
    return itemsize * (prod(x_shape) + prod(weight_shape) + prod(out_shape) * (1 + 2 * passes))


CPU_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
CPU_ACTIVATIONS = ("none", "relu", "relu6", "hardswish", "hardsigmoid")
ALGORITHMS = (
    "direct",
    "winograd_f2",
    "winograd_f2x4",
    "winograd_f4",
    "winograd_1d",
    "winograd_f2_bf16",
)

_PANEL = 16  # kConvPanel of csrc/cpu/conv.h

# The transforms G of a kernel's taps, u = G g; the rest of each is in csrc/cpu/winograd_kernel.h.
# Winograd, 1980; Lavin and Gray, 2016.
_HALF = Fraction(1, 2)
_F2 = ((1, 0, 0), (_HALF, _HALF, _HALF), (_HALF, -_HALF, _HALF), (0, 0, 1))


_A, _B = Fraction(5, 8), Fraction(3, 2)
_POINTS = (Fraction(0), _A, -_A, _B, -_B)  # and infinity


def _toom_cook(taps: int) -> tuple[tuple[Fraction | int, ...], ...]:
    """G of so many taps for `_POINTS` and infinity."""
    rows: list[tuple[Fraction | int, ...]] = []
    for i, p in enumerate(_POINTS):
        scale = prod((p - q for j, q in enumerate(_POINTS) if j != i), start=Fraction(1))
        rows.append(tuple(p**power / scale for power in range(taps)))
    return (*rows, (*(0,) * (taps - 1), 1))


_F4 = _toom_cook(3)
# Along a kernel's columns and along its rows.
_KERNEL_TRANSFORMS = {
    "winograd_f2": (_F2, _F2),
    "winograd_f2x4": (_F2, _F4),
    "winograd_f4": (_F4, _F4),
    "winograd_f2_bf16": (_F2, _F2),
}

# Outputs of a tile of winograd_1d, by the taps of the kernel: six points give as many outputs and
# taps as make seven. Seven taps are two groups, three apart; see csrc/cpu/winograd_1d_kernel.h.
_LINE_OUTPUTS = {3: 4, 5: 2, 7: 3}

_library = torch.library.Library("cvfast", "FRAGMENT")
_library.define(
    "conv_cpu(Tensor x, Tensor packed, Tensor? residual, Tensor? x2, int[2] kernel_size, "
    "int out_channels, int[2] stride, int[2] padding, int[2] dilation, str activation) -> Tensor",
    tags=[torch.Tag.needs_fixed_stride_order, torch.Tag.pt2_compliant_tag],
)
_library.define(
    "conv_cpu.out(Tensor x, Tensor packed, Tensor? residual, Tensor? x2, int[2] kernel_size, "
    "int[2] stride, int[2] padding, int[2] dilation, str activation, *, Tensor(a!) out) -> ()",
    tags=[torch.Tag.needs_fixed_stride_order, torch.Tag.pt2_compliant_tag],
)


def conv_cpu(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    stride: Sequence[int] = (1, 1),
    padding: Sequence[int] = (0, 0),
    dilation: Sequence[int] = (1, 1),
    residual: Tensor | None = None,
    x2: Tensor | None = None,
    activation: str = "none",
    algorithm: str = "auto",
    out: Tensor | None = None,
) -> Tensor:
    """:func:`conv` of one group by cvfast's CPU kernels; packs the weight on each call.

    To pack once, call :func:`prepack` and ``torch.ops.cvfast.conv_cpu``, which tells the algorithm
    by the shape of what was packed. Sums are float32 in every
    dtype, and results do not depend on the number of threads.

    Args:
        x: [N, C, H, W], channels-last (adjacent channels; images, rows and pixels may lie apart, as
            in a channel slice); float32, bfloat16 or float16. With fewer than 16 channels, the
            direct algorithm also takes adjacent pixels: a contiguous image.
        weight: [K, C, R, S], or [K, C + C2, R, S] with ``x2``; dtype of ``x``.
        bias: [K].
        padding: zeros (vertical, horizontal), or (top, left, bottom, right).
        residual: [N, K, P, Q], channels-last; added before the activation.
        x2: [N, C2, H, W], channels-last: the channels after those of ``x``, as if the two were
            concatenated. C must then be a multiple of 16.
        activation: one of ``CPU_ACTIVATIONS``.
        algorithm: ``"auto"`` (see :func:`choose_algorithm`) or one of ``ALGORITHMS``.
        out: [N, K, P, Q], channels-last, to write to, e.g. a channel slice of a wider buffer; may
            be ``residual``, and must not overlap what is read otherwise. Default: a fresh tensor.

    Raises:
        ValueError: for arguments that do not fit together, or an unknown activation or algorithm.
        TypeError: for dtypes that differ.
        cvfast.backends.Unsupported: for a dtype, device or layout that the kernels do not take.
    """
    stride, padding, dilation = tuple(stride), tuple(padding), tuple(dilation)
    _validate(x, weight, bias, stride, padding, dilation, residual, x2, activation, out)
    backends.select("conv", "cpu", x.device, x)
    if algorithm == "auto":
        shape = (x.shape[0], weight.shape[1], *x.shape[2:])
        algorithm = choose_algorithm(
            shape, weight.shape, stride=stride, padding=padding, dilation=dilation, dtype=x.dtype
        )
        if not weight.isfinite().all():
            algorithm = "direct"
    _check_algorithm(algorithm, weight.shape[2:], stride, dilation, x.dtype)
    packed = prepack(weight, bias, algorithm=algorithm, dtype=x.dtype)
    operands = (x, packed, residual, x2, weight.shape[2:])
    geometry = (stride, padding, dilation, activation)
    ops = torch.ops.cvfast
    if out is None:
        fresh: Tensor = ops.conv_cpu(*operands, weight.shape[0], *geometry)
        return fresh
    ops.conv_cpu.out(*operands, *geometry, out=out)
    return out


@backends.register("conv", "cpu")
def _cpu_check(x: Tensor) -> Reason | None:
    if x.device.type != "cpu":
        return Reason("device", f"x is on {x.device}, the kernel runs on the CPU")
    if x.dtype not in CPU_DTYPES:
        return Reason("dtype", f"x is {x.dtype}; the kernel takes float32, bfloat16, float16")
    planes = x.shape[1] < _PANEL and (x.stride(3) == 1 or x.shape[3] == 1)
    return None if planes else backends.wrong_layout(x)


def serves(
    algorithm: str,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    dilation: Sequence[int],
    dtype: torch.dtype,
) -> bool:
    """Whether one of ``ALGORITHMS`` takes this convolution of images of ``dtype``.

    Those of Winograd want stride and dilation 1, and 3 x 3 kernels; ``winograd_1d`` those of 3, 5
    or 7 taps in one row or column. ``winograd_f2_bf16`` takes bfloat16 images.
    """
    if algorithm == "direct":
        return True
    if algorithm == "winograd_f2_bf16" and dtype != torch.bfloat16:
        return False
    if algorithm == "winograd_1d":
        fits = min(kernel_size) == 1 and max(kernel_size) in _LINE_OUTPUTS
    else:
        fits = tuple(kernel_size) == (3, 3)
    return fits and tuple(stride) == tuple(dilation) == (1, 1)


def prepack(
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    algorithm: str = "direct",
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Weights in the layout that ``cvfast::conv_cpu`` reads; carries no gradient.

    Args:
        weight: [K, C, R, S], any floating dtype.
        bias: [K] or None, which counts as zeros.
        algorithm: one of ``ALGORITHMS``. Those of Winograd transform the kernels, in float64.
        dtype: of the images. For bfloat16 ones the weights of the direct algorithm and of
            ``winograd_f2_bf16`` are rounded to bfloat16; others are kept in float32.

    Returns:
        float32 [ceil(K / 16), T*C + 1, 16]: panels of 16 output channels, rows by tap and input
        channel, the bias last, zeros beyond the last channel. T is R*S, 16 (F2), 24 (F2x4), 36
        (F4) or, along a line of 3, 5 or 7 taps, 6, 6 or 12. Rounded to bfloat16: int32
        [ceil(K / 16), T*ceil(C / 2) + 1, 16], each word two channels' weights, the bias as float32;
        T of ``winograd_f2_bf16`` is 25, the nine taps of the kernel itself behind the transformed.

    Raises:
        ValueError: for an unknown algorithm, a shape that it does not take, weights that are not
            finite under an algorithm of Winograd's, whose transform would spread them, or a dtype
            that the kernels do not take.
    """
    if weight.dim() != 4:
        raise ValueError(
            f"conv.prepack: weight has shape {tuple(weight.shape)}, expected [K, C, R, S]"
        )
    if dtype not in CPU_DTYPES:
        raise ValueError(f"conv.prepack: the kernels do not take images of {dtype}")
    _check_algorithm(algorithm, weight.shape[2:], (1, 1), (1, 1), dtype)
    weight = weight.detach()
    kernel = weight.flatten(2).to(torch.float32)
    pairs = dtype == torch.bfloat16 and algorithm in ("direct", "winograd_f2_bf16")
    if algorithm == "direct":
        taps = kernel
    else:
        if not weight.isfinite().all():
            raise ValueError(
                f"conv.prepack: weight holds NaN or infinity, which {algorithm} would spread over "
                "its taps; use algorithm='direct'"
            )
        if algorithm == "winograd_1d":
            taps = _transform_line(weight.double().flatten(2)).flatten(2)
        else:
            down, across = (_matrix(g, weight.device) for g in _KERNEL_TRANSFORMS[algorithm])
            taps = (down @ weight.double() @ across.T).flatten(2)
        taps = taps.to(torch.float32)
        if pairs:  # rounded, the transform does not give the kernel back
            taps = torch.cat([taps, kernel], dim=2)
    k = weight.shape[0]
    words = taps.mT
    last = taps.new_zeros(k) if bias is None else bias.detach().to(torch.float32)
    if pairs:
        words = F.pad(words.to(torch.bfloat16), (0, words.shape[2] % 2)).reshape(k, -1)
        # A copy, for the strides of an axis of size 1 mean nothing and may be odd.
        words = words.clone(memory_format=torch.contiguous_format).view(torch.int32)
        last = last.contiguous().view(torch.int32)
    matrix = torch.cat([words.reshape(k, -1), last.unsqueeze(1)], dim=1)
    matrix = F.pad(matrix, (0, 0, 0, -k % _PANEL))
    return matrix.reshape(-1, _PANEL, matrix.shape[1]).transpose(1, 2).contiguous()


def _matrix(rows: Sequence[Sequence[Fraction | int]], device: torch.device) -> Tensor:
    values = [[float(v) for v in row] for row in rows]
    return torch.tensor(values, dtype=torch.float64, device=device)


def _transform_line(taps: Tensor) -> Tensor:
    """[..., taps] in float64 to [..., 6, groups]; groups before the last have a tap less."""
    outputs = _LINE_OUTPUTS[taps.shape[-1]]
    length = 7 - outputs
    *before, last = range(0, taps.shape[-1] - length + 1, outputs)
    groups = [F.pad(taps[..., i : i + outputs], (0, length - outputs)) for i in before]
    grouped = torch.stack([*groups, taps[..., last:]], dim=-1)
    return _matrix(_toom_cook(length), taps.device) @ grouped


# In multiply-adds, what it costs to carry one element through a transform, and to read one word of
# weights from memory; fitted to layers of ResNet-18 and ResNet-50 on Zen 5. A word costs 7 where
# one thread reads and 12 where two share the memory: the choice must not depend on threads, for
# results must not. Granite Rapids multiplies as fast, and reads at less than half the rate.
_TRANSFORM_COST = 6.0
_WEIGHT_COST = 12.0
_WEIGHT_COST_OF_LEVEL = {"avx512_amx": 30.0}


_AMX_RATE = 6.0
"""Direct convolution of bfloat16 by AMX, against multiply-adds of float32: at least what 3x3 layers
of 64 to 256 channels reach on Granite Rapids."""


def choose_algorithm(
    x_shape: Sequence[int],
    weight_shape: Sequence[int],
    *,
    stride: Sequence[int] = (1, 1),
    padding: Sequence[int] = (0, 0),
    dilation: Sequence[int] = (1, 1),
    allow_f4: bool = False,
    allow_bf16: bool = False,
    dtype: torch.dtype = torch.float32,
) -> str:
    """The fastest of ``ALGORITHMS``: the one of the least estimated time.

    Counted are the multiply-adds of the products, and the elements that the transforms read and
    write, and the weights; a tile that reaches beyond the image costs as much as one within.
    ``winograd_f4`` and ``winograd_f2_bf16``, whose errors are larger, are considered only where
    allowed. The latter's is up to 1.9 times that of weights rounded to bfloat16, and 2.6 times
    that of such as are bfloat16 to begin with. ``dtype`` is the images': bfloat16 weights are read
    in pairs, and multiplied so where the processor has the dot product.
    """
    kernel = tuple(weight_shape[2:])
    if weight_shape[1] < _PANEL:  # a block of transformed channels would be half empty
        return "direct"
    n, c = x_shape[:2]
    k = weight_shape[0]
    _, _, p, q = _output_shape(x_shape, k, kernel, stride, padding, dilation)
    level = extension.cpu_isa()
    dots = level == "avx512_bf16"  # which take two products at once
    words = float(prod(kernel) * c * k)
    products = n * p * q * words
    if dtype == torch.bfloat16:
        words /= 2
        products /= {"avx512_bf16": 2.0, "avx512_amx": _AMX_RATE}.get(level, 1.0)
    weight_cost = _WEIGHT_COST_OF_LEVEL.get(level, _WEIGHT_COST)
    costs = {"direct": products + weight_cost * words}

    def transformed(
        taps: int, tiles: int, entries: int, multiplied: int, per_word: int = 1
    ) -> float:
        """Of ``tiles`` with ``taps`` transformed inputs, and as many weights as ``entries``."""
        carried = taps * _TRANSFORM_COST * (c + k)
        words = c * k / per_word
        return tiles * (multiplied * words + carried) + weight_cost * entries * words

    allowed = {"winograd_f4": allow_f4, "winograd_f2_bf16": allow_bf16 and dots}
    for algorithm, transforms in _KERNEL_TRANSFORMS.items():
        if allowed.get(algorithm, True) and serves(algorithm, kernel, stride, dilation, dtype):
            down, across = (len(transform) for transform in transforms)
            taps = down * across
            tiles = n * -(-p // (down - 2)) * -(-q // (across - 2))
            per_word = 2 if algorithm == "winograd_f2_bf16" else 1
            costs[algorithm] = transformed(taps, tiles, taps, taps, per_word)
    if serves("winograd_1d", kernel, stride, dilation, dtype):
        outputs = _LINE_OUTPUTS[max(kernel)]
        groups = (max(kernel) - 7 + outputs) // outputs + 1
        tiles = n * (q * -(-p // outputs) if kernel[0] > 1 else p * -(-q // outputs))
        costs["winograd_1d"] = transformed(6, tiles, 6 * groups, 5 * groups + 1)
    return min(costs, key=costs.__getitem__)


def _check_algorithm(
    algorithm: str,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    dilation: Sequence[int],
    dtype: torch.dtype,
) -> None:
    if algorithm not in ALGORITHMS:
        raise ValueError(f"conv: unknown algorithm {algorithm!r}; expected {', '.join(ALGORITHMS)}")
    if algorithm == "winograd_f2_bf16" and dtype != torch.bfloat16:
        raise ValueError(
            f"conv: {algorithm} takes bfloat16 images, not {dtype}; use algorithm='winograd_f2'"
        )
    if not serves(algorithm, kernel_size, stride, dilation, dtype):
        line = algorithm == "winograd_1d"
        taken = "kernels of 3, 5 or 7 taps in one row or column" if line else "3x3 kernels"
        raise ValueError(
            f"conv: {algorithm} takes {taken} of stride and dilation 1, not "
            f"{kernel_size[0]}x{kernel_size[1]} with stride {tuple(stride)} and dilation "
            f"{tuple(dilation)}; use algorithm='direct'"
        )


def _validate(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: tuple[int, ...],
    padding: tuple[int, ...],
    dilation: tuple[int, ...],
    residual: Tensor | None,
    x2: Tensor | None,
    activation: str,
    out: Tensor | None,
) -> None:
    if activation not in CPU_ACTIVATIONS:
        raise ValueError(
            f"conv: unknown activation {activation!r}; expected {', '.join(CPU_ACTIVATIONS)}"
        )
    for name, values, least in (
        ("stride", stride, 1),
        ("padding", padding, 0),
        ("dilation", dilation, 1),
    ):
        if len(values) != 2 and not (name == "padding" and len(values) == 4):
            expected = "two or four numbers" if name == "padding" else "two numbers"
            raise ValueError(f"conv: {name}={values}: expected {expected}")
        if min(values) < least:
            raise ValueError(f"conv: {name}={values}: expected at least {least}")
    if x.dim() != 4:
        raise ValueError(f"conv: x has shape {tuple(x.shape)}, expected [N, C, H, W]")
    channels = x.shape[1]
    if x2 is not None:
        if x2.dim() != 4 or (x2.shape[0], *x2.shape[2:]) != (x.shape[0], *x.shape[2:]):
            raise ValueError(
                f"conv: x2 has shape {tuple(x2.shape)}, expected that of x, {tuple(x.shape)}, but "
                "for the channels"
            )
        if channels % _PANEL:
            raise ValueError(
                f"conv: with x2, the channels of x must be a multiple of {_PANEL}, got {channels}"
            )
        channels += x2.shape[1]
    if weight.dim() != 4 or weight.shape[1] != channels or 0 in weight.shape:
        raise ValueError(
            f"conv: weight has shape {tuple(weight.shape)}, expected [K, {channels}, R, S]"
        )
    if bias is not None and bias.shape != (weight.shape[0],):
        raise ValueError(f"conv: bias has shape {tuple(bias.shape)}, expected ({weight.shape[0]},)")
    shape = _output_shape(x.shape, weight.shape[0], weight.shape[2:], stride, padding, dilation)
    if min(shape[2:]) < 1:
        raise ValueError(
            f"conv: a {weight.shape[2]}x{weight.shape[3]} kernel with dilation {dilation} is "
            f"larger than the image {x.shape[2]}x{x.shape[3]} with padding {padding}"
        )
    for name, tensor in (("residual", residual), ("out", out)):
        if tensor is not None and tuple(tensor.shape) != shape:
            raise ValueError(f"conv: {name} has shape {tuple(tensor.shape)}, expected {shape}")
    for name, tensor in (
        ("weight", weight), ("bias", bias), ("residual", residual), ("x2", x2), ("out", out)
    ):  # fmt: skip
        if tensor is not None and tensor.dtype != x.dtype:
            raise TypeError(f"conv: {name} is {tensor.dtype} but x is {x.dtype}; cast one of them")
        if tensor is not None and tensor.device != x.device:
            raise ValueError(
                f"conv: {name} is on {tensor.device} but x is on {x.device}; move one of them"
            )
    for name, tensor in (("residual", residual), ("x2", x2), ("out", out)):
        if tensor is not None and tensor.shape[1] != 1 and tensor.stride(1) != 1:
            raise ValueError(f"conv: {name} is not channels-last (stride 1 along C)")


def _output_shape(
    x_shape: Sequence[int],
    out_channels: int,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> tuple[int, int, int, int]:
    p, q = (
        (x_shape[2 + i] + before + after - dilation[i] * (kernel_size[i] - 1) - 1) // stride[i] + 1
        for i, (before, after) in enumerate(zip(padding[:2], padding[-2:], strict=True))
    )
    return x_shape[0], out_channels, p, q


@torch.library.register_fake("cvfast::conv_cpu")
def _conv_cpu_fake(
    x: Tensor,
    packed: Tensor,
    residual: Tensor | None,
    x2: Tensor | None,
    kernel_size: Sequence[int],
    out_channels: int,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    activation: str,
) -> Tensor:
    del packed, residual, x2, activation
    shape = _output_shape(x.shape, out_channels, kernel_size, stride, padding, dilation)
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


@torch.library.register_fake("cvfast::conv_cpu.out")
def _conv_cpu_out_fake(*arguments: Any, out: Tensor) -> None:
    del arguments, out


for _overload in (torch.ops.cvfast.conv_cpu.default, torch.ops.cvfast.conv_cpu.out):
    _refusal = _gradient.refusal(_overload, "call cvfast.ops.conv.conv")
    _library.impl(_overload, _refusal, "Autograd", with_keyset=True)


def _conv_cpu_flops(
    x_shape: Sequence[int],
    packed_shape: Sequence[int],
    residual_shape: Sequence[int] | None,
    x2_shape: Sequence[int] | None,
    kernel_size: Sequence[int],
    *args: Any,
    out_shape: Sequence[int],
    **kwargs: Any,
) -> int:
    channels = x_shape[1] + (x2_shape[1] if x2_shape is not None else 0)
    return flops(x_shape, (out_shape[1], channels, *kernel_size), out_shape)


_flops.register(torch.ops.cvfast.conv_cpu, _conv_cpu_flops)


GPU_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

_GPU_OPERANDS = (
    "Tensor x, Tensor weight, Tensor? bias, Tensor? residual, Tensor? x2, int[2] kernel_size"
)
_GPU_GEOMETRY = "int[2] stride, int[] padding, int[2] dilation, str activation"
_GPU_TAGS = [torch.Tag.needs_fixed_stride_order, torch.Tag.pt2_compliant_tag]
_library.define(
    f"conv_triton({_GPU_OPERANDS}, int out_channels, {_GPU_GEOMETRY}) -> Tensor", tags=_GPU_TAGS
)
_library.define(
    f"conv_triton.out({_GPU_OPERANDS}, {_GPU_GEOMETRY}, *, Tensor(a!) out) -> ()", tags=_GPU_TAGS
)


def conv_triton(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    stride: Sequence[int] = (1, 1),
    padding: Sequence[int] = (0, 0),
    dilation: Sequence[int] = (1, 1),
    residual: Tensor | None = None,
    x2: Tensor | None = None,
    activation: str = "none",
    out: Tensor | None = None,
) -> Tensor:
    """:func:`conv` of one group by cvfast's Triton kernel; packs the weight on each call.

    To pack once, call :func:`prepack_gpu` and ``torch.ops.cvfast.conv_triton``. Sums are float32 in
    every dtype; float32 products are rounded to TF32 where ``torch.backends.cudnn.allow_tf32``
    says so, as those of PyTorch's convolutions are. The same call gives the same bits.

    Args:
        x: [N, C, H, W], channels-last (adjacent channels; images, rows and pixels may lie apart, as
            in a channel slice), on a GPU; float32, bfloat16 or float16. With fewer than 16 channels
            and no ``x2``, any strides.
        weight, bias, padding, residual, activation, out: as for :func:`conv_cpu`.
        x2: [N, C2, H, W], channels-last: the channels after those of ``x``, as if the two were
            concatenated. C must then be a multiple of 16.

    Raises:
        ValueError: for arguments that do not fit together, or an unknown activation.
        TypeError: for dtypes that differ.
        cvfast.backends.Unsupported: for a dtype, device or layout that the kernel does not take.
    """
    stride, padding, dilation = tuple(stride), tuple(padding), tuple(dilation)
    _validate(x, weight, bias, stride, padding, dilation, residual, x2, activation, out)
    backends.select("conv", "triton", x.device, x, x2)
    operands = (x, *prepack_gpu(weight, bias, x.dtype), residual, x2, weight.shape[2:])
    geometry = (stride, padding, dilation, activation)
    ops = torch.ops.cvfast
    if out is None:
        fresh: Tensor = ops.conv_triton(*operands, weight.shape[0], *geometry)
        return fresh
    ops.conv_triton.out(*operands, *geometry, out=out)
    return out


@backends.register("conv", "triton")
def _triton_check(x: Tensor, x2: Tensor | None = None) -> Reason | None:
    if (reason := backends.wrong_device("triton", x.device)) is not None:
        return reason
    if x.dtype not in GPU_DTYPES:
        return Reason("dtype", f"x is {x.dtype}; the kernel takes float32, bfloat16, float16")
    few = x.shape[1] < FEW_CHANNELS and x2 is None
    return None if few else backends.wrong_layout(x)


def prepack_gpu(weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Weights in the layout that ``cvfast::conv_triton`` reads; carry no gradient.

    Args:
        weight: [K, C, R, S], any floating dtype.
        bias: [K] or None, which counts as zeros.
        dtype: of the images.

    Returns:
        weight [R*S, C, N] in ``dtype`` and bias [N] in float32, N being K rounded up to a multiple
        of 16; zeros beyond the last channel.

    Raises:
        ValueError: for a weight of another shape, or a dtype that the kernel does not take.
    """
    if weight.dim() != 4:
        raise ValueError(
            f"conv.prepack_gpu: weight has shape {tuple(weight.shape)}, expected [K, C, R, S]"
        )
    if dtype not in GPU_DTYPES:
        raise ValueError(f"conv.prepack_gpu: the kernel does not take images of {dtype}")
    return _packing.columns(weight.permute(2, 3, 1, 0).flatten(0, 1), bias, dtype)


def problem(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    x2: Tensor | None,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    activation: str,
    *,
    out: Tensor,
) -> Problem:
    """The launch parameters' view of a call of ``cvfast::conv_triton.out``.

    Raises:
        ValueError: if shapes or layouts do not fit together.
        TypeError: for dtypes that differ.
    """
    if activation not in CPU_ACTIVATIONS:
        raise ValueError(
            f"conv: unknown activation {activation!r}; expected {', '.join(CPU_ACTIVATIONS)}"
        )
    _check_images(x, residual, x2, out)
    out_shape = _output_shape(x.shape, out.shape[1], kernel_size, stride, padding, dilation)
    for name, image in (("residual", residual), ("out", out)):
        if image is not None and tuple(image.shape) != out_shape:
            raise ValueError(f"conv: {name} has shape {tuple(image.shape)}, expected {out_shape}")
    before, after = tuple(padding[:2]), tuple(padding[-2:])
    call = Problem(
        batch=x.shape[0],
        channels=x.shape[1],
        height=x.shape[2],
        width=x.shape[3],
        out_channels=out.shape[1],
        kernel=(kernel_size[0], kernel_size[1]),
        stride=(stride[0], stride[1]),
        padding=before if before == after else (*before, *after),
        dilation=(dilation[0], dilation[1]),
        channels2=0 if x2 is None else x2.shape[1],
        residual=residual is not None,
        dtype=x.dtype,
        tf32=_packing.rounds_to_tf32(x.dtype),
    )
    if not call.flat and x.shape[1] != 1 and x.stride(1) != 1:
        raise ValueError("conv: x is not channels-last (stride 1 along C)")
    shape = (call.taps, call.channels + call.channels2, call.columns)
    _packing.check("conv.prepack_gpu", weight, bias, shape, x.dtype)
    return call


def _check_images(x: Tensor, residual: Tensor | None, x2: Tensor | None, out: Tensor) -> None:
    for name, image in (("residual", residual), ("x2", x2), ("out", out)):
        if image is None:
            continue
        if image.dtype != x.dtype:
            raise TypeError(f"conv: {name} is {image.dtype} but x is {x.dtype}; cast one of them")
        if image.device != x.device:
            raise ValueError(
                f"conv: {name} is on {image.device} but x is on {x.device}; move one of them"
            )
        if image.shape[1] != 1 and image.stride(1) != 1:
            raise ValueError(f"conv: {name} is not channels-last (stride 1 along C)")
    if x2 is not None and (x2.shape[0], *x2.shape[2:]) != (x.shape[0], *x.shape[2:]):
        raise ValueError(
            f"conv: x2 has shape {tuple(x2.shape)}, expected that of x, {tuple(x.shape)}, but "
            "for the channels"
        )


@torch.library.impl(_library, "conv_triton.out", "CompositeExplicitAutograd")
def _conv_triton_out(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    x2: Tensor | None,
    *geometry: Any,
    out: Tensor,
) -> None:
    from cvfast.kernels import conv as kernels

    call = problem(x, weight, bias, residual, x2, *geometry, out=out)
    launch = table.choose("conv", "triton", call, "forward", devices.for_tensor(x))
    if bias is None:
        bias = weight.new_zeros(weight.shape[2], dtype=torch.float32)
    kernels.forward(x, weight, bias, residual, x2, call, launch, geometry[-1], out)


def _conv_triton_result(
    x: Tensor,
    kernel_size: Sequence[int],
    out_channels: int,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> Tensor:
    shape = _output_shape(x.shape, out_channels, kernel_size, stride, padding, dilation)
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


@torch.library.impl(_library, "conv_triton", "CompositeExplicitAutograd")
def _conv_triton(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    x2: Tensor | None,
    kernel_size: Sequence[int],
    out_channels: int,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    activation: str,
) -> Tensor:
    geometry = (stride, padding, dilation)
    out = _conv_triton_result(x, kernel_size, out_channels, *geometry)
    _conv_triton_out(x, weight, bias, residual, x2, kernel_size, *geometry, activation, out=out)
    return out


@torch.library.register_fake("cvfast::conv_triton")
def _conv_triton_fake(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    x2: Tensor | None,
    kernel_size: Sequence[int],
    out_channels: int,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    activation: str,
) -> Tensor:
    del weight, bias, residual, x2, activation
    return _conv_triton_result(x, kernel_size, out_channels, stride, padding, dilation)


torch.library.register_fake("cvfast::conv_triton.out", _conv_cpu_out_fake)
for _overload in (torch.ops.cvfast.conv_triton.default, torch.ops.cvfast.conv_triton.out):
    _refusal = _gradient.refusal(_overload, "call cvfast.ops.conv.conv")
    _library.impl(_overload, _refusal, "Autograd", with_keyset=True)


def _conv_triton_flops(
    x_shape: Sequence[int],
    weight_shape: Sequence[int],
    *args: Any,
    out_shape: Sequence[int],
    **kwargs: Any,
) -> int:
    return 2 * prod(out_shape) * weight_shape[0] * weight_shape[1]


_flops.register(torch.ops.cvfast.conv_triton, _conv_triton_flops)


def example(
    problem: Problem, activation: str = "none", *, device: str | torch.device, seed: int = 0
) -> Example:
    """Random inputs of a problem for the GPU kernels; see :mod:`cvfast.ops._example`."""
    n, h, w = problem.batch, problem.height, problem.width
    c, c2, k = problem.channels, problem.channels2, problem.out_channels
    result = (n, k, problem.out_height, problem.out_width)
    x, weight, bias, residual, x2 = (
        None
        if shape is None
        else _example.normal(shape, problem.dtype, device=device, seed=seed + i)
        for i, shape in enumerate(
            (
                (n, c, h, w),
                (k, c + c2, *problem.kernel),
                (k,),
                result if problem.residual else None,
                (n, c2, h, w) if c2 else None,
            )
        )
    )
    assert x is not None and weight is not None
    geometry = (problem.stride, problem.padding, problem.dilation)
    packed = prepack_gpu(weight, bias, problem.dtype)

    def definition(
        x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None, x2: Tensor | None
    ) -> Tensor:
        whole = x if x2 is None else torch.cat([x, x2], 1)
        top, left, bottom, right = (*problem.padding, *problem.padding)[:4]
        return conv(
            F.pad(whole, (left, right, top, bottom)),
            weight,
            bias,
            stride=problem.stride,
            dilation=problem.dilation,
            residual=residual,
            activation=Activation(activation),
        )

    def kernel(backend: str, launch: Any) -> Tensor:
        from cvfast.kernels import conv as kernels

        if launch is None:
            launch = table.choose("conv", backend, problem, "forward", devices.for_tensor(x))
        out = _conv_triton_result(x, problem.kernel, k, *geometry)
        kernels.forward(x, *packed, residual, x2, problem, launch, activation, out)
        return out

    return Example((x, weight, bias, residual, x2), definition, kernel)
