"""What a plan is made of: images, and the kernel calls that turn images into images.

Images are channels-last. A node's fields that are images are what it reads, but for ``out``; the
other fields are constants. ``calls`` names the out-variants of the node's kernels and their
arguments: those of its ``backend``, so that one node class serves the CPU and both kinds of GPU
kernels, and one plan may mix them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from itertools import pairwise
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from cvfast.ops import conv, depthwise, elementwise, inverted_residual, layout, pointwise, pool

# These define the operators.
__all__ = [
    "conv",
    "depthwise",
    "elementwise",
    "inverted_residual",
    "layout",
    "pointwise",
    "pool",
]

ops = torch.ops.cvfast


@dataclass(eq=False)
class Image:
    """A batch of images, [N, C, H, W]; a matrix [N, C] is one of single pixels.

    ``parent``, ``channel`` and ``row``: the image whose channels and rows from these on this one
    is, if it has no memory of its own. ``external``: the number of the tensor that holds it, if the
    plan is handed it. ``strides``, in elements: that tensor's, or those that the image must have.
    """

    shape: tuple[int, int, int, int]
    dtype: torch.dtype
    parent: Image | None = None
    channel: int = 0
    row: int = 0
    external: int | None = None
    strides: tuple[int, int, int, int] | None = None

    @property
    def channels(self) -> int:
        return self.shape[1]

    @property
    def bytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize

    def root(self) -> tuple[Image, int]:
        """The image whose memory this one lies in, and its first channel there."""
        image, channel = self, 0
        while image.parent is not None:
            channel += image.channel
            image = image.parent
        return image, channel

    def offset(self) -> int:
        """Elements from the first of the image whose memory this one lies in to its own first."""
        _, channel, row, _ = self.memory_strides()
        image, elements = self, 0
        while image.parent is not None:
            elements += image.channel * channel + image.row * row
            image = image.parent
        return elements

    def rows(self, begin: int, end: int) -> Image:
        """Rows [``begin``, ``end``) of this image."""
        shape = (*self.shape[:2], end - begin, self.shape[3])
        return Image(shape, self.dtype, parent=self, row=begin)

    def memory_strides(self) -> tuple[int, int, int, int]:
        """Elements between images, channels, rows and pixels, where the image lies."""
        root = self.root()[0]
        if root.strides is not None:
            return root.strides
        _, c, h, w = root.shape
        return (h * w * c, 1, w * c, c)

    def is_contiguous(self) -> bool:
        """Whether it lies plane by plane without gaps, as PyTorch lays out a fresh tensor."""
        _, c, h, w = self.shape
        return self.parent is None and self.memory_strides() == (c * h * w, h * w, w, 1)

    def channels_adjacent(self) -> bool:
        return self.channels == 1 or self.memory_strides()[1] == 1


Tensors = Callable[[Image], Tensor]
"""The tensor that stands for an image in a plan."""

Packed = tuple[Tensor, ...]
"""Weights as a backend's kernels read them: one tensor for the CPU, weight and bias for a GPU."""


class Call(NamedTuple):
    """An operator that writes to tensors it is given, and what it is given."""

    operator: Callable[..., Any]
    arguments: tuple[Any, ...]
    outputs: dict[str, Any]

    def __call__(self) -> None:
        self.operator(*self.arguments, **self.outputs)


@dataclass(eq=False)
class Node(ABC):
    """A step of a plan, writing ``out``, by kernels of ``backend``. ``name`` is for profiles."""

    out: Image
    name: str = field(default="", kw_only=True)
    backend: str = field(default="cpu", kw_only=True)

    def reads(self) -> list[Image]:
        values = (getattr(self, f.name) for f in fields(self) if f.name != "out")
        return [v for v in values if isinstance(v, Image)]

    def writes(self) -> list[Image]:
        return [self.out]

    def may_overwrite(self) -> list[Image]:
        """Images in whose place ``out`` may be written: the kernel reads each element of theirs
        before it writes the element of ``out`` at that index, in the same task."""
        return []

    def flops(self) -> int:
        return 0

    def bytes(self) -> int:
        """Least traffic: every image read or written, and every constant, once."""
        images = {*self.reads(), *self.writes()}
        return self.constant_bytes() + sum(image.bytes for image in images)

    def constant_bytes(self) -> int:
        """Of weights and the like."""
        values = pytree.tree_leaves([getattr(self, f.name) for f in fields(self)])
        return sum(v.nbytes for v in values if isinstance(v, Tensor))

    def bytes_copied(self) -> int:
        """Bytes written that were in memory already, for want of a better place."""
        return 0

    def bytes_kept(self) -> int:
        """Bytes moved to where less memory is needed until they are read again."""
        return 0

    @abstractmethod
    def calls(self, tensor: Tensors) -> list[Call]:
        """The out-variants of the node's kernels, on the tensors of its images."""

    def _call(self, op: str, *arguments: Any, **outputs: Tensor) -> Call:
        return Call(getattr(ops, f"{op}_{self.backend}").out, arguments, outputs)

    def _on_cpu(self, *images: Image | None) -> list[Image]:
        """Those that there are, of a node for the CPU. On a GPU a sum may be taken in shares by
        several blocks, and a kernel may fetch what is added long before it is."""
        return [image for image in images if image is not None and self.backend == "cpu"]


def _optional(image: Image | None, tensor: Tensors) -> Tensor | None:
    return None if image is None else tensor(image)


@dataclass(eq=False)
class Pointwise(Node):
    """``cvfast::pointwise_*``. A gate is an image of single pixels."""

    x: Image
    packed: Packed
    stride: tuple[int, int] = (1, 1)
    scale: Tensor | None = None
    shift: Tensor | None = None
    gate: Image | None = None
    residual: Image | None = None
    activation: str = "none"

    def may_overwrite(self) -> list[Image]:
        return self._on_cpu(self.residual)

    def flops(self) -> int:
        return 2 * prod(self.out.shape) * self.x.channels

    def calls(self, tensor: Tensors) -> list[Call]:
        gate = None if self.gate is None else tensor(self.gate)[:, :, 0, 0]
        return [
            self._call(
                "pointwise", tensor(self.x), *self.packed, self.stride, self.scale, self.shift,
                gate, _optional(self.residual, tensor), self.activation, out=tensor(self.out),
            )
        ]  # fmt: skip


@dataclass(eq=False)
class Conv(Node):
    """``cvfast::conv_*``."""

    x: Image
    packed: Packed
    residual: Image | None
    x2: Image | None
    kernel_size: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, ...]
    dilation: tuple[int, int]
    activation: str

    def takes_planes(self) -> bool:
        """Whether the kernel reads images whose channels lie apart, too."""
        return self.backend == "cpu" and self.x.channels < 16

    def may_overwrite(self) -> list[Image]:
        return self._on_cpu(self.residual)

    def flops(self) -> int:
        channels = self.x.channels + (self.x2.channels if self.x2 is not None else 0)
        return 2 * prod(self.out.shape) * channels * prod(self.kernel_size)

    def calls(self, tensor: Tensors) -> list[Call]:
        return [
            self._call(
                "conv", tensor(self.x), *self.packed, _optional(self.residual, tensor),
                _optional(self.x2, tensor), self.kernel_size, self.stride, self.padding,
                self.dilation, self.activation, out=tensor(self.out),
            )
        ]  # fmt: skip


@dataclass(eq=False)
class Depthwise(Node):
    """``cvfast::depthwise_*``; the same packed weights for every backend."""

    x: Image
    packed: Tensor
    kernel_size: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, ...]
    dilation: tuple[int, int]
    activation: str

    def flops(self) -> int:
        return 2 * prod(self.out.shape) * prod(self.kernel_size)

    def calls(self, tensor: Tensors) -> list[Call]:
        return [
            self._call(
                "depthwise", tensor(self.x), self.packed, self.kernel_size, self.stride,
                self.padding, self.dilation, self.activation, out=tensor(self.out),
            )
        ]  # fmt: skip


_TAKEN_IN_TURN = 2 << 20
"""Bytes of a transposed convolution's result, about, that its taps take turns on: with these, and
what they are computed from, still in L2, U-Net's last one takes 0.7 of the time on two threads."""


@dataclass(eq=False)
class TransposedConv(Node):
    """A transposed convolution whose stride is its kernel: ``cvfast::upconv_*``; on the CPU a
    pointwise one per tap, each of which writes every stride-th pixel of every stride-th row, a band
    of rows at a time. ``packed`` is of each tap, or of all together for a GPU."""

    x: Image
    packed: list[Packed]
    kernel_size: tuple[int, int]

    def flops(self) -> int:
        return 2 * prod(self.out.shape) * self.x.channels

    def calls(self, tensor: Tensors) -> list[Call]:
        x, out = tensor(self.x), tensor(self.out)
        if self.backend != "cpu":
            return [self._call("upconv", x, *self.packed[0], self.kernel_size, out=out)]
        rows, columns = self.kernel_size
        surroundings = ((1, 1), None, None, None, None, "none")
        height = x.shape[2]
        bands = max(1, min(height, self.out.bytes // max(1, len(x)) // _TAKEN_IN_TURN))
        bounds = [band * height // bands for band in range(bands + 1)]
        calls = []
        for begin, end in pairwise(bounds):
            source, result = x[:, :, begin:end], out[:, :, begin * rows : end * rows]
            for tap, packed in enumerate(self.packed):
                to = result[:, :, tap // columns :: rows, tap % columns :: columns]
                calls.append(self._call("pointwise", source, *packed, *surroundings, out=to))
        return calls


@dataclass(eq=False)
class Pool(Node):
    """``cvfast::pool_*``."""

    x: Image
    kind: str
    kernel_size: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int] = (1, 1)
    ceil_mode: bool = False
    count_include_pad: bool = True
    divisor_override: int | None = None
    scale: Tensor | None = None
    shift: Tensor | None = None

    def calls(self, tensor: Tensors) -> list[Call]:
        return [
            self._call(
                "pool", tensor(self.x), self.kind, self.kernel_size, self.stride, self.padding,
                self.dilation, self.ceil_mode, self.count_include_pad, self.divisor_override,
                self.scale, self.shift, out=tensor(self.out),
            )
        ]  # fmt: skip


@dataclass(eq=False)
class GlobalPool(Node):
    """``cvfast::global_pool_*``: the mean over an image's pixels."""

    x: Image
    scale: Tensor | None = None
    shift: Tensor | None = None

    def calls(self, tensor: Tensors) -> list[Call]:
        source = (tensor(self.x), self.scale, self.shift)
        return [self._call("global_pool", *source, out=tensor(self.out))]


@dataclass(eq=False)
class Elementwise(Node):
    """``cvfast::elementwise_*``; ``y`` may be a gate of single pixels."""

    x: Image
    y: Image | None = None
    op: str = "none"
    activation: str = "none"
    scale: Tensor | None = None
    shift: Tensor | None = None

    def may_overwrite(self) -> list[Image]:
        return self._on_cpu(self.x, self.y)

    def calls(self, tensor: Tensors) -> list[Call]:
        return [
            self._call(
                "elementwise", tensor(self.x), _optional(self.y, tensor), self.op, self.activation,
                self.scale, self.shift, out=tensor(self.out),
            )
        ]  # fmt: skip


@dataclass(eq=False)
class Copy(Node):
    """``cvfast::copy_layout_*``: the same image in other memory or another layout. ``is_part``: it
    is a part of a concatenation that could not be written in its place."""

    x: Image
    is_part: bool = False

    def bytes_copied(self) -> int:
        return self.out.bytes

    def calls(self, tensor: Tensors) -> list[Call]:
        return [self._call("copy_layout", tensor(self.x), out=tensor(self.out))]


@dataclass(eq=False)
class Kept(Copy):
    """What is read again later, moved out of memory that is used for something else by then: rows
    that two bands read, from the end of one to the front of the next; or every ``stride``-th pixel
    of an image."""

    stride: tuple[int, int] = (1, 1)

    def bytes_copied(self) -> int:
        return 0

    def bytes_kept(self) -> int:
        return self.out.bytes

    def calls(self, tensor: Tensors) -> list[Call]:
        down, right = self.stride
        return [
            self._call("copy_layout", tensor(self.x)[:, :, ::down, ::right], out=tensor(self.out))
        ]


@dataclass(eq=False)
class Concat(Node):
    """Images side by side along the channels. Calls nothing: :func:`memory.place` puts the parts
    where they belong, or adds copies."""

    parts: list[Image]

    def reads(self) -> list[Image]:
        return list(self.parts)

    def calls(self, tensor: Tensors) -> list[Call]:
        del tensor
        return []


@dataclass(eq=False)
class InvertedResidual(Node):
    """``cvfast::inverted_residual_*``. Without ``project``, as in blocks with squeeze-excite, the
    kernel stops behind the depthwise convolution and writes the ``means`` of its rows as well."""

    x: Image
    expand: Packed | None
    depthwise: Tensor
    project: Packed | None
    residual: Image | None
    hidden: int
    kernel_size: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, ...]
    activations: tuple[str, str, str]
    means: Image | None = None

    def reads(self) -> list[Image]:
        return [self.x, *([self.residual] if self.residual is not None else [])]

    def writes(self) -> list[Image]:
        return [self.out, *([self.means] if self.means is not None else [])]

    def may_overwrite(self) -> list[Image]:
        return self._on_cpu(self.residual)

    def flops(self) -> int:
        n, c, h, w = self.x.shape
        pixels = prod(self.out.shape) // self.out.channels
        expand = n * h * w * c if self.expand is not None else 0
        project = pixels * self.out.channels if self.project is not None else 0
        return 2 * self.hidden * (expand + pixels * prod(self.kernel_size) + project)

    def calls(self, tensor: Tensors) -> list[Call]:
        geometry = (self.hidden, self.kernel_size, self.stride, self.padding)
        nothing = (None,) if self.backend == "cpu" else (None, None)
        weights = (*(self.expand or nothing), self.depthwise)
        x, out = tensor(self.x), tensor(self.out)
        if self.project is None:
            assert self.means is not None
            return [
                self._call(
                    "inverted_residual_squeeze", x, *weights, *geometry, *self.activations[:2],
                    out=out, row_means=tensor(self.means),
                )
            ]  # fmt: skip
        return [
            self._call(
                "inverted_residual", x, *weights, *self.project, _optional(self.residual, tensor),
                *geometry, *self.activations, out=out,
            )
        ]  # fmt: skip


class View(NamedTuple):
    """An image as PyTorch's operators see it: [N, C, H, W], or [N, C] of single pixels."""

    image: Image
    shape: tuple[int, ...]


@dataclass(eq=False)
class TorchOp(Node):
    """An operator that cvfast has no kernel for, whose result is copied to ``out``: part of a plan
    for a GPU, so that one CUDA graph holds the whole network."""

    operator: Callable[..., Tensor]
    arguments: tuple[Any, ...]
    keywords: dict[str, Any]

    def reads(self) -> list[Image]:
        leaves = pytree.tree_leaves((self.arguments, self.keywords), is_leaf=_is_view)
        return [leaf.image for leaf in leaves if isinstance(leaf, View)]

    def bytes_copied(self) -> int:
        return self.out.bytes

    def calls(self, tensor: Tensors) -> list[Call]:
        def value(leaf: Any) -> Any:
            return tensor(leaf.image).view(leaf.shape) if isinstance(leaf, View) else leaf

        given = (self.arguments, self.keywords)
        arguments, keywords = pytree.tree_map(value, given, is_leaf=_is_view)
        return [Call(_run_torch, (self.operator, arguments, keywords), {"out": tensor(self.out)})]


def _is_view(value: Any) -> bool:
    return isinstance(value, View)


def _run_torch(
    operator: Callable[..., Tensor],
    arguments: tuple[Any, ...],
    keywords: dict[str, Any],
    *,
    out: Tensor,
) -> None:
    out.copy_(operator(*arguments, **keywords).reshape(out.shape))


@dataclass
class Graph:
    """Nodes in an order in which they may run; ``outputs`` are images that the plan hands back."""

    nodes: list[Node]
    inputs: list[Image]
    outputs: list[Image]

    def readers(self) -> dict[Image, list[Node]]:
        found: dict[Image, list[Node]] = {}
        for node in self.nodes:
            for image in node.reads():
                found.setdefault(image, []).append(node)
        return found

    def writers(self) -> dict[Image, Node]:
        return {image: node for node in self.nodes for image in node.writes()}

    def sole_reader(self, image: Image, readers: dict[Image, list[Node]]) -> Node | None:
        """The one node that reads ``image``, if it is no output either."""
        found = readers.get(image, [])
        return found[0] if len(found) == 1 and image not in self.outputs else None


def describe(node: Node) -> dict[str, Any]:
    """A node in words, for profiles and tests."""
    shapes = " ".join("x".join(map(str, image.shape)) for image in node.reads())
    out = "x".join(map(str, node.out.shape))
    return {"name": node.name, "kind": type(node).__name__, "reads": shapes, "out": out}
