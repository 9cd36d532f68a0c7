"""Fusion on graphs: steps that a neighbour's kernel does on its way."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from cvfast.ops.inverted_residual import fuses, fuses_on_gpu, problem, squeeze_problem
from cvfast.perf.devices import Device

from .grouping import group_branches
from .nodes import (
    Concat,
    Conv,
    Copy,
    Depthwise,
    Elementwise,
    GlobalPool,
    Graph,
    Image,
    InvertedResidual,
    Node,
    Pointwise,
    Pool,
)
from .target import Target


def fuse(graph: Graph, target: Target) -> None:
    """Rewrite ``graph``, which computes the same thing after, for ``target``.

    The passes are those of the CPU and of GPUs alike; where their kernels differ in what they take,
    the nodes say so.
    """
    join_activations(graph)
    pool_before_pointwise(graph)
    fuse_prologues(graph)
    fuse_gates(graph)
    fuse_inverted_residuals(graph, partial(_block_backend, target=target))
    read_two_sources(graph)
    read_contiguous_inputs(graph)
    if target.gpu is not None:
        group_branches(graph)
        if not target.in_place:
            copy_results_once(graph)


def _remove(graph: Graph, *gone: Node) -> None:
    graph.nodes = [node for node in graph.nodes if node not in gone]


def _is_affine(node: Node | None) -> bool:
    return isinstance(node, Elementwise) and node.scale is not None and node.y is None


def join_activations(graph: Graph) -> None:
    """An activation joins the elementwise step before it: a batch norm, a sum, a product."""
    writers, readers = graph.writers(), graph.readers()
    for node in list(graph.nodes):
        if not (isinstance(node, Elementwise) and node.op == "none" and node.scale is None):
            continue
        before = writers.get(node.x)
        if (
            isinstance(before, Elementwise)
            and before.activation == "none"
            and graph.sole_reader(before.out, readers) is node
        ):
            before.activation, before.out = node.activation, node.out
            writers[node.out] = before
            _remove(graph, node)


def pool_before_pointwise(graph: Graph) -> None:
    """A 1x1 convolution followed by an average over disjoint windows is the average followed by
    the convolution, on as many times fewer pixels: the transitions of DenseNet."""
    writers, readers = graph.writers(), graph.readers()
    for pool in list(graph.nodes):
        if not (isinstance(pool, Pool) and pool.kind == "avg"):
            continue
        conv = writers.get(pool.x)
        whole_windows = (
            pool.kernel_size == pool.stride
            and pool.padding == (0, 0)
            and not pool.ceil_mode
            and pool.divisor_override is None
        )
        if (
            whole_windows
            and isinstance(conv, Pointwise)
            and conv.stride == (1, 1)
            and conv.activation == "none"
            and conv.residual is None
            and conv.gate is None
            and graph.sole_reader(conv.out, readers) is pool
        ):
            pooled = Image((*conv.x.shape[:2], *pool.out.shape[2:]), pool.out.dtype)
            out = pool.out
            pool.x, pool.out = conv.x, pooled
            conv.x, conv.out = pooled, out
            at, then = graph.nodes.index(conv), graph.nodes.index(pool)
            graph.nodes[at], graph.nodes[then] = pool, conv


def fuse_prologues(graph: Graph) -> None:
    """A batch norm and ReLU join the kernel that alone reads them: DenseNet's pre-activation."""
    readers = graph.readers()
    for node in list(graph.nodes):
        if not (isinstance(node, Elementwise) and _is_affine(node) and node.activation == "relu"):
            continue
        reader = graph.sole_reader(node.out, readers)
        takes = (
            isinstance(reader, GlobalPool)
            or (isinstance(reader, Pool) and reader.kind == "avg")
            or (isinstance(reader, Pointwise) and reader.gate is None)
        )
        if takes and reader.x is node.out and reader.scale is None:  # type: ignore[union-attr]
            if isinstance(reader, Pointwise) and reader.residual is node.out:
                continue
            reader.x = node.x  # type: ignore[union-attr]
            reader.scale, reader.shift = node.scale, node.shift  # type: ignore[union-attr]
            _remove(graph, node)


def fuse_gates(graph: Graph) -> None:
    """Squeeze-excite: the product with the gate joins the 1x1 convolution that alone reads it."""
    readers = graph.readers()
    for node in list(graph.nodes):
        if not (
            isinstance(node, Elementwise)
            and node.op == "mul"
            and node.activation == "none"
            and node.scale is None
            and node.y is not None
            and node.y.shape == (*node.x.shape[:2], 1, 1)
        ):
            continue
        reader = graph.sole_reader(node.out, readers)
        if (
            isinstance(reader, Pointwise)
            and reader.x is node.out
            and reader.residual is not node.out
            and reader.gate is None
            and reader.scale is None
        ):
            reader.x, reader.gate = node.x, node.y
            _remove(graph, node)


def _plain_pointwise(node: Node | None) -> bool:
    """A 1x1 convolution that a block can take over: of all pixels, with nothing before it."""
    return (
        isinstance(node, Pointwise)
        and node.stride == (1, 1)
        and node.scale is None
        and node.gate is None
    )


def fuse_inverted_residuals(graph: Graph, choose: Callable[[InvertedResidual], str | None]) -> None:
    """Expansion, depthwise convolution and projection become one call where that wins: where
    ``choose`` names the backend whose kernel is to compute the block."""
    writers, readers = graph.writers(), graph.readers()
    for middle in list(graph.nodes):
        if not isinstance(middle, Depthwise) or middle.out.channels != middle.x.channels:
            continue
        if middle.dilation != (1, 1):
            continue
        expand = writers.get(middle.x)
        if (
            not isinstance(expand, Pointwise)
            or not _plain_pointwise(expand)
            or expand.residual is not None
            or graph.sole_reader(expand.out, readers) is not middle
        ):
            expand = None
        after = readers.get(middle.out, [])
        x = middle.x if expand is None else expand.x
        block = InvertedResidual(
            middle.out, x, None if expand is None else expand.packed, middle.packed, None, None,
            middle.x.channels, middle.kernel_size, middle.stride, middle.padding,
            ("none" if expand is None else expand.activation, middle.activation, "none"),
            name=middle.name, backend=middle.backend,
        )  # fmt: skip
        project = graph.sole_reader(middle.out, readers)
        if (
            isinstance(project, Pointwise)
            and _plain_pointwise(project)
            and project.residual is not middle.out
        ):
            block.out, block.project, block.residual = (
                project.out, project.packed, project.residual
            )  # fmt: skip
            block.activations = (*block.activations[:2], project.activation)
            if (backend := choose(block)) is not None:
                block.backend = backend
                graph.nodes[graph.nodes.index(project)] = writers[block.out] = block
                _remove(graph, middle, *([expand] if expand else []))
            continue
        pools = [node for node in after if isinstance(node, GlobalPool) and node.scale is None]
        if expand is not None and len(pools) == 1 and middle.out not in graph.outputs:
            n, c, h, _ = middle.out.shape
            block.means = Image((n, c, h, 1), middle.out.dtype)
            if (backend := choose(block)) is not None:
                block.backend = backend
                pools[0].x = block.means
                graph.nodes[graph.nodes.index(middle)] = block
                _remove(graph, expand)


def _block_backend(block: InvertedResidual, target: Target) -> str | None:
    """The backend that computes a block in one kernel faster than in two or three, if any."""
    if target.gpu is not None:
        # Where the depthwise layer is left to Triton, CUDA's kernels are not there.
        candidates = ("cuda", "triton") if block.backend == "cuda" else ("triton",)
        return next((b for b in candidates if _pays_on_gpu(block, b, target.gpu)), None)
    pays = fuses(
        block.x.shape, block.hidden, block.out.channels if block.project is not None else None,
        kernel_size=block.kernel_size, stride=block.stride, expands=block.expand is not None,
        dtype=block.x.dtype, threads=target.threads,
    )  # fmt: skip
    return "cpu" if pays else None


def _pays_on_gpu(block: InvertedResidual, backend: str, gpu: Device) -> bool:
    (call,) = replace(block, backend=backend).calls(_shape_only)
    make = problem if block.project is not None else squeeze_problem
    return fuses_on_gpu(make(*call.arguments, **call.outputs), gpu, backend)


def _shape_only(image: Image) -> Tensor:
    strides = image.memory_strides()
    return torch.empty_strided(image.shape, strides, dtype=image.dtype, device="meta")


def read_two_sources(graph: Graph) -> None:
    """A concatenation of two images that one convolution reads never happens: U-Net's decoder."""
    readers = graph.readers()
    for node in list(graph.nodes):
        if not (isinstance(node, Concat) and len(node.parts) == 2):
            continue
        reader = graph.sole_reader(node.out, readers)
        first, second = node.parts
        if (
            isinstance(reader, Conv)
            and reader.x is node.out
            and reader.x2 is None
            and reader.residual is not node.out
            and first.channels % 16 == 0
        ):
            reader.x, reader.x2 = first, second
            _remove(graph, node)


def read_contiguous_inputs(graph: Graph) -> None:
    """A convolution of few channels reads an image plane by plane itself: a network's first."""
    writers, readers = graph.writers(), graph.readers()
    for node in list(graph.nodes):
        if not (isinstance(node, Conv) and node.x2 is None and node.takes_planes()):
            continue
        copy = writers.get(node.x)
        if (
            isinstance(copy, Copy)
            and copy.x.is_contiguous()
            and graph.sole_reader(copy.out, readers) is node
        ):
            node.x = copy.x
            _remove(graph, copy)


def copy_results_once(graph: Graph) -> None:
    """A result that is copied at the end of a plan for a GPU, to change its layout or because it is
    a part of an image, is copied out of the arena anyway."""
    writers, readers = graph.writers(), graph.readers()
    for number, image in enumerate(graph.outputs):
        copy = writers.get(image)
        if isinstance(copy, Copy) and image not in readers and graph.outputs.count(image) == 1:
            graph.outputs[number] = copy.x
            _remove(graph, copy)
