"""Where images lie: no two that live at once share memory, and concatenations cost no copy."""

from __future__ import annotations

import itertools

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cvfast.engine import memory
from cvfast.engine.memory import Lifetime
from cvfast.engine.nodes import Concat, Copy, Elementwise, Graph, Image


def image(channels: int, size: int = 4) -> Image:
    return Image((1, channels, size, size), torch.float32)


def life(of: Image, first: int, last: int) -> Lifetime:
    return Lifetime(of, first, last, of.bytes)


def given_image(channels: int, number: int) -> Image:
    x = image(channels)
    x.strides = x.memory_strides()
    x.external = number
    return x


@given(st.lists(st.tuples(st.integers(1, 200), st.integers(0, 20), st.integers(0, 8)), max_size=40))
@settings(max_examples=200, deadline=None, derandomize=True)
def test_no_two_images_that_live_at_once_overlap(drawn: list[tuple[int, int, int]]) -> None:
    lives = [life(image(c, 3), first, first + length) for c, first, length in drawn]
    arena = memory.pack(lives)
    for i, a in enumerate(lives):
        begin = arena.offsets[a.image]
        assert begin % memory.ALIGNMENT == 0
        assert begin + a.image.bytes <= arena.bytes
        for b in lives[:i]:
            other = arena.offsets[b.image]
            apart = begin + a.image.bytes <= other or other + b.image.bytes <= begin
            assert apart or a.last < b.first or b.last < a.first
    assert arena.bytes >= memory.lower_bound(lives)
    there = [v for v in lives if v.first <= 4 <= v.last]
    gap = memory.largest_gap(lives, arena, 4)

    def fits(size: int) -> bool:
        return any(
            all(
                begin + size <= arena.offsets[v.image] or arena.offsets[v.image] + v.bytes <= begin
                for v in there
            )
            for begin in range(0, arena.bytes - size + 1, memory.ALIGNMENT)
        )

    assert fits(gap) and not fits(gap + memory.ALIGNMENT)
    scratch = memory.scratch_lifetime(4, gap)
    stay = memory.pack([*lives, scratch], given=arena.offsets)
    assert stay.bytes == arena.bytes
    assert {v.image: stay.offsets[v.image] for v in lives} == arena.offsets


def test_images_move_for_what_ends_highest() -> None:
    """The largest first would leave a gap of 3 below the last of the large ones, and put the 4 at
    16."""
    sizes = [(8, 0, 1), (8, 1, 2), (8, 2, 3), (8, 3, 4), (5, 4, 4), (4, 4, 5), (3, 2, 2)]
    lives = [life(image(64 * channels, 1), first, last) for channels, first, last in sizes]
    assert memory.pack(lives).bytes == memory.lower_bound(lives) == 19 * 256


def test_a_chain_needs_two_places() -> None:
    images = [given_image(16, 0), *(image(16) for _ in range(6))]
    nodes = [Elementwise(out, x) for x, out in itertools.pairwise(images)]
    lives = memory.lifetimes(Graph(nodes, images[:1], []))
    assert memory.pack(lives).bytes == 2 * images[1].bytes == memory.lower_bound(lives)


def dense_block(layers: int) -> tuple[Graph, list[Image]]:
    """Layers that each read all features so far, joined anew each time, and add 8 channels."""
    source = given_image(16, 0)
    features = [image(16)]
    graph = Graph([Elementwise(features[0], source)], [source], [])
    for _ in range(layers):
        joined = image(sum(f.channels for f in features))
        features.append(image(8))
        graph.nodes.append(Concat(joined, features[:-1]))
        graph.nodes.append(Elementwise(features[-1], joined))
    last = image(sum(f.channels for f in features))
    out = image(last.channels)
    graph.nodes += [Concat(last, list(features)), Elementwise(out, last)]
    graph.outputs.append(out)
    return graph, features


def test_concatenations_of_a_dense_block_are_slices_of_one_image() -> None:
    graph, features = dense_block(5)
    memory.place(graph)
    assert not any(isinstance(node, (Concat, Copy)) for node in graph.nodes)
    slab = features[0].root()[0]
    channel = 0
    for feature in features:
        assert feature.root() == (slab, channel)
        channel += feature.channels
    assert slab.channels == channel


def test_a_part_that_two_concatenations_want_elsewhere_is_copied_once() -> None:
    source = given_image(8, 0)
    a, b, c = image(8), image(8), image(8)
    ab, ca = image(16), image(16)
    graph = Graph(
        [
            *(Elementwise(part, source) for part in (a, b, c)),
            Concat(ab, [a, b]),
            Elementwise(image(16), ab),
            Concat(ca, [c, a]),
            Elementwise(image(16), ca),
        ],
        [source],
        [],
    )
    memory.place(graph)
    copies = [node for node in graph.nodes if isinstance(node, Copy)]
    assert sum(copy.bytes_copied() for copy in copies) == a.bytes
    assert a.root() == (ca, 8)
    assert b.root() == (ab, 8)


def test_nested_concatenations_lie_in_the_outermost() -> None:
    source = given_image(4, 0)
    a, b, c = image(4), image(4), image(4)
    inner, outer = image(8), image(12)
    graph = Graph(
        [
            *(Elementwise(part, source) for part in (a, b, c)),
            Concat(inner, [a, b]),
            Concat(outer, [c, inner]),
            Elementwise(image(12), outer),
        ],
        [source],
        [],
    )
    memory.place(graph)
    assert not any(isinstance(node, Copy) for node in graph.nodes)
    assert (a.root(), b.root(), c.root()) == ((outer, 4), (outer, 8), (outer, 0))


def test_an_input_twice_in_a_concatenation_is_copied_twice() -> None:
    source = given_image(4, 0)
    joined = image(8)
    graph = Graph([Concat(joined, [source, source]), Elementwise(image(8), joined)], [source], [])
    memory.place(graph)
    copies = [node for node in graph.nodes if isinstance(node, Copy)]
    assert [copy.out.root() for copy in copies] == [(joined, 0), (joined, 4)]
