"""Stages: the parts of a plan, each of which runs for a few images of the batch at a time.

A step reads what an earlier one wrote. What was touched in between, the more the more images a step
runs for, has pushed a part of it out of the cache. So early steps, whose images are large, run for
one small group of images after the other, and late ones, whose weights are, for the whole batch.
:func:`choose` weighs, for every stage that there could be,

- the bytes that are read again after ``d`` bytes of others: of a cache of ``c`` bytes, a share of
  ``min(1, d / c)`` comes from memory, and was written to it, if a step wrote it;
- the weights, which come from memory once more for each further group;
- the barriers, one more of each step for each further group.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from cvfast import extension

from .memory import Lifetime
from .nodes import Graph, Image

# Fitted to the steps of ten networks of batch 8 in groups of 1, 2, 4 and 8 images, on two cores of
# Zen 5 with 32 MB of L3.
_BYTES_PER_SECOND = 80e9
_BARRIER_SECONDS = 2e-6

_MOST_CACHE = 32 << 20
"""Of a larger L3, other cores have their share. On two cores of Granite Rapids, which report 480
MB, between runs of other programs, MobileNet v1 of batch 8 in bfloat16 takes 0.92 of the time with
this limit, and four other networks 0.97 to 1.01."""

_STAGE_SECONDS = 50e-6
"""What a further stage must spare: less is within the error of the estimate."""


@dataclass(frozen=True)
class Stage:
    """Steps from ``begin`` to before ``end``, which run for one of ``groups`` groups of images
    after the other."""

    begin: int
    end: int
    groups: int = 1

    def holds(self, life: Lifetime) -> bool:
        """Whether an image lives within the stage."""
        return self.begin <= life.first and life.last < self.end


@dataclass(frozen=True)
class Group:
    """Of ``count`` groups of images, whose sizes differ by one at most, the one of this index."""

    index: int
    count: int

    def images(self, batch: int) -> range:
        return range(batch * self.index // self.count, batch * (self.index + 1) // self.count)


def order(stages: Sequence[Stage]) -> Iterator[tuple[int, Group]]:
    """The steps as they run, with the images that each runs for."""
    for stage in stages:
        for index in range(stage.groups):
            for step in range(stage.begin, stage.end):
                yield step, Group(index, stage.groups)


def lifetimes(lives: Sequence[Lifetime], stages: Sequence[Stage]) -> list[Lifetime]:
    """The lives of images when steps run in stages.

    What lives within a stage takes the memory of its largest group. What lives beyond holds all
    images: from the first group's first step on, until the last group's last.
    """
    return [_lifetime(life, stages) for life in lives]


def _lifetime(life: Lifetime, stages: Sequence[Stage]) -> Lifetime:
    batch = life.image.shape[0]
    first, last = life.first, life.last
    for stage in stages:
        if stage.groups == 1:
            continue
        if stage.holds(life):
            return replace(life, bytes=life.bytes // batch * -(-batch // stage.groups))
        if stage.begin <= first < stage.end:
            first = stage.begin
        if stage.begin <= last < stage.end:
            last = stage.end - 1
    return replace(life, first=first, last=last)


def choose(graph: Graph) -> list[Stage]:
    """The stages of the least estimated time for ``graph``, whose images have their places. They do
    not depend on the number of threads, for some kernels round by the size of the batch."""
    steps = len(graph.nodes)
    batch = _batch(graph)
    rereads = _rereads(graph)
    weights = [node.constant_bytes() for node in graph.nodes]
    counts = sorted({-(-batch // size) for size in _powers_of_two(batch)})
    cache = min(extension.cpu_l3_bytes(), _MOST_CACHE)
    least = [0.0] + [float("inf")] * steps
    last: list[Stage] = [Stage(0, 0)] * (steps + 1)  # of the best stages for so many steps
    for begin in range(steps):
        for groups in counts:
            seconds = least[begin] + _STAGE_SECONDS
            for step in range(begin, steps):
                moved = (groups - 1) * weights[step] + sum(
                    reread.missed(cache, groups if reread.since >= begin else 1)
                    for reread in rereads[step]
                )
                seconds += moved / _BYTES_PER_SECOND + (groups - 1) * _BARRIER_SECONDS
                if seconds < least[step + 1]:
                    least[step + 1], last[step + 1] = seconds, Stage(begin, step + 1, groups)
    stages: list[Stage] = []
    while steps:
        stages.append(last[steps])
        steps = last[steps].begin
    return stages[::-1]


def _powers_of_two(most: int) -> list[int]:
    """Those up to ``most``, and ``most`` itself."""
    return [*(1 << bit for bit in range(most.bit_length())), most]


def _batch(graph: Graph) -> int:
    """Images of the batch; 1, which cannot be divided, where steps do not have as many each."""
    images = (image for node in graph.nodes for image in (*node.reads(), *node.writes()))
    sizes = {image.shape[0] for image in images}
    return sizes.pop() if len(sizes) == 1 else 1


@dataclass(frozen=True)
class _Reread:
    """What a step reads that steps from ``since`` on have touched: ``moved`` bytes if none of it is
    left in the cache, after ``images`` bytes of images and ``weights`` bytes of weights."""

    since: int
    moved: int
    images: int
    weights: int

    def missed(self, cache: int, groups: int) -> float:
        return self.moved * min(1.0, (self.images / groups + self.weights) / cache)


def _rereads(graph: Graph) -> list[list[_Reread]]:
    """Of each step, what it reads that was touched before."""
    weights = [node.constant_bytes() for node in graph.nodes]
    read = [_memory(node.reads()) for node in graph.nodes]
    written = [_memory(node.writes()) for node in graph.nodes]
    found: list[list[_Reread]] = []
    for step in range(len(graph.nodes)):
        rereads = (_reread(image, step, read, written, weights) for image in read[step])
        found.append([reread for reread in rereads if reread is not None])
    return found


def _memory(images: Sequence[Image]) -> dict[Image, int]:
    """Bytes that are touched of the images whose memory these lie in."""
    touched: dict[Image, int] = {}
    for image in images:
        root = image.root()[0]
        touched[root] = max(image.bytes, touched.get(root, 0))
    return touched


def _reread(
    image: Image,
    step: int,
    read: list[dict[Image, int]],
    written: list[dict[Image, int]],
    weights: list[int],
) -> _Reread | None:
    """Back from ``step``, until steps have touched all that it reads of ``image``."""
    missing, moved = read[step][image], 0
    between = {**read[step], **written[step]}
    for since in range(step - 1, -1, -1):
        for touched in (read[since], written[since]):
            for root, size in touched.items():
                between[root] = max(size, between.get(root, 0))
        was_written = image in written[since]
        touched_here = (written if was_written else read)[since].get(image, 0)
        # To write is to fetch the line and to send it back; then it is fetched again.
        moved += min(missing, touched_here) * (3 if was_written else 1)
        missing -= min(missing, touched_here)
        if not missing:
            return _Reread(since, moved, sum(between.values()), sum(weights[since : step + 1]))
    return None
