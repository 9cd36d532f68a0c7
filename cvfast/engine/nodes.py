"""What a plan is made of: images, and the kernel calls that turn images into images.

Images are channels-last. A node's fields that are images are what it reads, but for ``out``; the
other fields are constants. ``record`` calls the out-variants of the node's kernels, which append
themselves to the plan that is being recorded.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from math import prod
from typing import Any

import torch
from torch import Tensor

from cvfast.ops import conv, depthwise, elementwise, inverted_residual, pointwise, pool

# These define the operators.
__all__ = ["conv", "depthwise", "elementwise", "inverted_residual", "pointwise", "pool"]

ops = torch.ops.cvfast


@dataclass(eq=False)
class Image:
    """A batch of images, [N, C, H, W]; a matrix [N, C] is one of single pixels.

    ``parent`` and ``channel``: the image whose channels from ``channel`` on this one is, if it has
    no memory of its own. ``external``: the number of the tensor that holds it, if the plan is
    handed it; ``strides`` are that tensor's, in elements.
    """

    shape: tuple[int, int, int, int]
    dtype: torch.dtype
    parent: Image | None = None
    channel: int = 0
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
"""The tensor that stands for an image while a plan is recorded."""


@dataclass(eq=False)
class Node(ABC):
    """A step of a plan, writing ``out``. ``name`` is for profiles."""

    out: Image
    name: str = field(default="", kw_only=True)

    def reads(self) -> list[Image]:
        values = (getattr(self, f.name) for f in fields(self) if f.name != "out")
        return [v for v in values if isinstance(v, Image)]

    def writes(self) -> list[Image]:
        return [self.out]

    def flops(self) -> int:
        return 0

    def bytes_copied(self) -> int:
        """Bytes written that were in memory already."""
        return 0

    @abstractmethod
    def record(self, tensor: Tensors) -> None:
        """Call the out-variants of the node's kernels on the tensors of its images."""


def _optional(image: Image | None, tensor: Tensors) -> Tensor | None:
    return None if image is None else tensor(image)


@dataclass(eq=False)
class Pointwise(Node):
    """``cvfast::pointwise_cpu``. A gate is an image of single pixels."""

    x: Image
    packed: Tensor
    stride: tuple[int, int] = (1, 1)
    scale: Tensor | None = None
    shift: Tensor | None = None
    gate: Image | None = None
    residual: Image | None = None
    activation: str = "none"

    def flops(self) -> int:
        return 2 * prod(self.out.shape) * self.x.channels

    def record(self, tensor: Tensors) -> None:
        gate = None if self.gate is None else tensor(self.gate)[:, :, 0, 0]
        ops.pointwise_cpu.out(
            tensor(self.x), self.packed, self.stride, self.scale, self.shift, gate,
            _optional(self.residual, tensor), self.activation, out=tensor(self.out),
        )  # fmt: skip


@dataclass(eq=False)
class Conv(Node):
    """``cvfast::conv_cpu``."""

    x: Image
    packed: Tensor
    residual: Image | None
    x2: Image | None
    kernel_size: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, ...]
    dilation: tuple[int, int]
    activation: str

    def takes_planes(self) -> bool:
        """Whether the kernel reads images whose channels lie apart, too."""
        return self.x.channels < 16

    def flops(self) -> int:
        channels = self.x.channels + (self.x2.channels if self.x2 is not None else 0)
        return 2 * prod(self.out.shape) * channels * prod(self.kernel_size)

    def record(self, tensor: Tensors) -> None:
        ops.conv_cpu.out(
            tensor(self.x), self.packed, _optional(self.residual, tensor),
            _optional(self.x2, tensor), self.kernel_size, self.stride, self.padding, self.dilation,
            self.activation, out=tensor(self.out),
        )  # fmt: skip


@dataclass(eq=False)
class Depthwise(Node):
    """``cvfast::depthwise_cpu``."""

    x: Image
    packed: Tensor
    kernel_size: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, ...]
    dilation: tuple[int, int]
    activation: str

    def flops(self) -> int:
        return 2 * prod(self.out.shape) * prod(self.kernel_size)

    def record(self, tensor: Tensors) -> None:
        ops.depthwise_cpu.out(
            tensor(self.x), self.packed, self.kernel_size, self.stride, self.padding,
            self.dilation, self.activation, out=tensor(self.out),
        )  # fmt: skip


@dataclass(eq=False)
class TransposedConv(Node):
    """A transposed convolution whose stride is its kernel: a pointwise one per tap, each of which
    writes every stride-th pixel of every stride-th row."""

    x: Image
    taps: list[Tensor]
    kernel_size: tuple[int, int]

    def flops(self) -> int:
        return 2 * prod(self.out.shape) * self.x.channels

    def record(self, tensor: Tensors) -> None:
        x, out = tensor(self.x), tensor(self.out)
        rows, columns = self.kernel_size
        for tap, packed in enumerate(self.taps):
            to = out[:, :, tap // columns :: rows, tap % columns :: columns]
            ops.pointwise_cpu.out(x, packed, (1, 1), None, None, None, None, "none", out=to)


@dataclass(eq=False)
class Pool(Node):
    """``cvfast::pool_cpu``."""

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

    def record(self, tensor: Tensors) -> None:
        ops.pool_cpu.out(
            tensor(self.x), self.kind, self.kernel_size, self.stride, self.padding, self.dilation,
            self.ceil_mode, self.count_include_pad, self.divisor_override, self.scale, self.shift,
            out=tensor(self.out),
        )  # fmt: skip


@dataclass(eq=False)
class GlobalPool(Node):
    """``cvfast::global_pool_cpu``: the mean over an image's pixels."""

    x: Image
    scale: Tensor | None = None
    shift: Tensor | None = None

    def record(self, tensor: Tensors) -> None:
        ops.global_pool_cpu.out(tensor(self.x), self.scale, self.shift, out=tensor(self.out))


@dataclass(eq=False)
class Elementwise(Node):
    """``cvfast::elementwise_cpu``; ``y`` may be a gate of single pixels."""

    x: Image
    y: Image | None = None
    op: str = "none"
    activation: str = "none"
    scale: Tensor | None = None
    shift: Tensor | None = None

    def record(self, tensor: Tensors) -> None:
        ops.elementwise_cpu.out(
            tensor(self.x), _optional(self.y, tensor), self.op, self.activation, self.scale,
            self.shift, out=tensor(self.out),
        )  # fmt: skip


@dataclass(eq=False)
class Copy(Node):
    """``cvfast::copy_layout_cpu``: the same image in other memory or another layout."""

    x: Image

    def bytes_copied(self) -> int:
        return self.out.bytes

    def record(self, tensor: Tensors) -> None:
        ops.copy_layout_cpu.out(tensor(self.x), out=tensor(self.out))


@dataclass(eq=False)
class Concat(Node):
    """Images side by side along the channels. Records nothing: :func:`memory.place` puts the parts
    where they belong, or adds copies."""

    parts: list[Image]

    def reads(self) -> list[Image]:
        return list(self.parts)

    def record(self, tensor: Tensors) -> None:
        del tensor


@dataclass(eq=False)
class InvertedResidual(Node):
    """``cvfast::inverted_residual_cpu``. Without ``project``, as in blocks with squeeze-excite, the
    kernel stops behind the depthwise convolution and writes the ``means`` of its rows as well."""

    x: Image
    expand: Tensor | None
    depthwise: Tensor
    project: Tensor | None
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

    def flops(self) -> int:
        n, c, h, w = self.x.shape
        pixels = prod(self.out.shape) // self.out.channels
        expand = n * h * w * c if self.expand is not None else 0
        project = pixels * self.out.channels if self.project is not None else 0
        return 2 * self.hidden * (expand + pixels * prod(self.kernel_size) + project)

    def record(self, tensor: Tensors) -> None:
        geometry = (self.hidden, self.kernel_size, self.stride, self.padding)
        if self.project is None:
            assert self.means is not None
            ops.inverted_residual_squeeze_cpu.out(
                tensor(self.x), self.expand, self.depthwise, *geometry, *self.activations[:2],
                out=tensor(self.out), row_means=tensor(self.means),
            )  # fmt: skip
            return
        ops.inverted_residual_cpu.out(
            tensor(self.x), self.expand, self.depthwise, self.project,
            _optional(self.residual, tensor), *geometry, *self.activations, out=tensor(self.out),
        )  # fmt: skip


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
