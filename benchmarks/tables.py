"""The tables of README and docs, made from the committed JSON.

    python benchmarks/tables.py [--check] [FILE ...]

A table stands between `<!-- table: NAME -->` and `<!-- end table -->`; what is between is replaced.
`--check` writes nothing and exits with 1 if a table differs from what the JSON gives.
"""

from __future__ import annotations

import argparse
import functools
import json
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PAGES = [
    ROOT / "README.md",
    ROOT / "docs" / "benchmarking.md",
    ROOT / "docs" / "compiled_code.md",
    ROOT / "docs" / "engine.md",
    ROOT / "docs" / "kernels" / "inverted_residual_cuda.md",
]
EAGER = ("eager", "eager_channels_last")
SETTING = ("threads", "batch", "dtype")  # what a summary of the depthwise layers is over
MARKED = re.compile(r"(<!-- table: (?P<name>[\w-]+) -->\n).*?(<!-- end table -->)", re.DOTALL)


def networks(
    results: Path = RESULTS,
    *,
    dtype: str = "float32",
    threads: int = 2,
    file: str = "networks.json",
) -> str:
    """cvfast against every peer at one setting, a row per network and batch."""
    command = (
        f"cvfast bench --batch 1,8 --threads {threads} --dtype {dtype} --memory "
        f"--json benchmarks/results/cpu/{file}"
    )
    measured = _load(results / "cpu" / file) or {"rows": []}
    rows = [r for r in measured["rows"] if (r["dtype"], r["threads"]) == (dtype, threads)]
    if not rows:
        return not_measured(command)
    contenders = ["cvfast"]
    for row in rows:
        contenders += [name for name in row["variants"] if name not in contenders]
    body = []
    for row in rows:
        ours = row["variants"]["cvfast"]
        speedup = f"**{row['speedup']:.2f}x** {row['best_peer']}" if row["speedup"] else "-"
        share = ours["flops_per_second"] / row["peak_flops_per_second"]
        body.append(
            [
                row["model"],
                "x".join(map(str, row["shape"])),
                *(_median(row, name) for name in contenders),
                speedup,
                f"{share:.0%} of {row['peak_flops_per_second'] * 1e-9:.0f}" if ours["ok"] else "-",
                f"{ours['error'] / row['eager_error']:.1f}" if row.get("eager_error") else "-",
                *_memory(row),
            ]
        )
    head = ["network", "input", *(f"{name}, ms" for name in contenders), "against the best peer"]
    head += ["of peak GFLOP/s", "error / eager's", "MB", "least of the peers, MB"]
    packages = ("torch", "onnxruntime", "openvino")
    setting = f"{dtype}, {threads} thread{'s' if threads > 1 else ''}. "
    return markdown(head, body) + "\n" + setting + provenance(rows, packages)


def zoo(results: Path = RESULTS) -> str:
    """optimize() against eager PyTorch, in milliseconds, a row per network and input size."""
    measured = _load(results / "cpu" / "zoo.json")
    if measured is None:
        return not_measured("python benchmarks/bench_zoo.py")
    body = []
    for row in measured["rows"]:
        coverage = f"{row['coverage']:.0%}"
        for size in row["sizes"]:
            image = "x".join(map(str, size["shape"][2:]))
            times = (f"{1e3 * size[name]['median']:.2f}" for name in ("cvfast", *EAGER))
            speedup = f"**{size['speedup']:.2f}x**" if row["ok"] and size["ok"] else "failed"
            body.append([row["model"], image, coverage, *times, speedup])
    head = ["network", "input", "FLOPs fused", "cvfast, ms", "eager, ms", "eager channels-last, ms"]
    threads = ", ".join(str(n) for n in sorted({row["threads"] for row in measured["rows"]}))
    return (
        markdown([*head, "against the faster"], body)
        + f"\nBatch 1, float32, threads: {threads}. "
        + provenance([measured])
    )


def depthwise(results: Path = RESULTS) -> str:
    """The depthwise kernel against each baseline, over all MobileNet layers."""
    measured = _load(results / "cpu" / "depthwise.json")
    if measured is None:
        return not_measured(
            "python benchmarks/bench_depthwise.py --json benchmarks/results/cpu/depthwise.json"
        )
    body = []
    for group in measured["summary"]:
        setting = [group["dtype"], str(group["batch"]), str(group["threads"]), str(group["layers"])]
        rows = [r for r in measured["rows"] if all(r[k] == group[k] for k in SETTING)]
        passed = all(row["verified"] for row in rows)
        for name, ratio in group["speedup"].items():
            cells = [f"**{ratio['geomean']:.2f}x**", f"{ratio['min']:.2f}x"]
            body.append([*setting, name.replace("_", " "), *(cells if passed else ["failed"] * 2)])
    head = ["dtype", "batch", "threads", "layers", "against", "geometric mean", "least"]
    return markdown(head, body) + "\n" + provenance([measured])


def pointwise(results: Path = RESULTS) -> str:
    """The pointwise kernel against each baseline, over all distinct 1x1 layers."""
    measured = _load(results / "cpu" / "pointwise.json")
    if measured is None:
        return not_measured(
            "python benchmarks/bench_pointwise.py --json benchmarks/results/cpu/pointwise.json"
        )
    body = []
    for group in measured["runs"]:
        summary = group["summary"]
        setting = [group["dtype"], group["isa"], str(group["batch"]), str(group["threads"])]
        passed = all(row["verified"] for row in group["rows"])
        share = summary["share_of_peak"]["median"]
        for name, ratio in summary["speedup"].items():
            cells = [f"**{ratio['geomean']:.2f}x**", f"{ratio['min']:.2f}x", str(ratio["slower"])]
            body.append(
                [
                    *setting,
                    str(summary["layers"]),
                    f"{share:.0%} of {group['peak_gflops']:.0f}",
                    name.replace("_", " "),
                    *(cells if passed else ["failed"] * 3),
                ]
            )
    head = [
        "dtype", "level", "batch", "threads", "layers", "median layer, of peak GFLOP/s", "against",
        "geometric mean", "least", "layers slower",
    ]  # fmt: skip
    return markdown(head, body) + "\n" + provenance(measured["runs"])


def conv(results: Path = RESULTS) -> str:
    """The convolution kernels against each baseline, a row per threads, batch and algorithm."""
    measured = _load(results / "cpu" / "conv.json")
    if measured is None:
        return not_measured(
            "python benchmarks/bench_conv.py --json benchmarks/results/cpu/conv.json"
        )
    names = {"onednn": "oneDNN", "eager_nhwc": "eager NHWC"}
    body = []
    for group in measured["summary"]:
        setting = (group["threads"], group["batch"], group["algorithm"])
        passed = all(
            row["verified"]
            for row in measured["rows"]
            if (row["threads"], row["batch"], row["algorithm"]) == setting
        )
        cells = [
            text
            for name in names
            for ratio in [group["speedup"][name]]
            for text in (f"**{ratio['geomean']:.2f}x**", f"{ratio['min']:.2f}x")
        ]
        body.append(
            [
                str(group["threads"]),
                str(group["batch"]),
                group["algorithm"].replace("_", " "),
                str(group["layers"]),
                *(cells if passed else ["failed"] * len(cells)),
            ]
        )
    head = ["threads", "batch", "algorithm", "layers"]
    head += [text for name in names.values() for text in (f"over {name}", "least")]
    return markdown(head, body) + "\n" + provenance([measured])


def validation(results: Path = RESULTS) -> str:
    """Which GPU kernels are proven on hardware as their source is now."""
    from cvfast import validation as record

    if not (results / "validation.json").exists():
        return not_measured("python benchmarks/validate.py")
    root = results.parents[1]
    proofs = record.load(root)
    body = []
    for kernel in record.KERNELS:
        found = record.status(kernel, root, proofs)
        name = [f"`{kernel.op}`", f"`{kernel.backend}`", kernel.pass_.replace("_", " ")]
        if not found.proofs:
            body.append([*name, found.state, found.reason, "-", "-", "-"])
        for proof in found.proofs:
            versions = {"torch": proof.torch, "triton": proof.triton, "CUDA": proof.cuda}
            listed = ", ".join(f"{n} {version}" for n, version in versions.items() if version)
            place = f"{proof.device}, driver {proof.driver}, {listed}; {proof.date[:10]}"
            checked = f"{proof.tests} tests, {proof.cases} shapes"
            commit = f"{(proof.commit or 'no commit')[:10]}{'+' if proof.dirty else ''}"
            body.append(
                [*name, f"**{found.state}**", place, f"{proof.error_ratio:.2f}", checked, commit]
            )
    head = ["operator", "backend", "pass", "state", "where", "error / allowed", "passed", "commit"]
    return markdown(head, body)


def predictions(results: Path = RESULTS, op: str = "*") -> str:
    """Predicted times of the networks' layers on GPUs, a row per operator, device, batch and
    backend."""
    files = sorted((results / "gpu").glob(f"predicted_{op}.json"))
    if not files:
        return not_measured("python benchmarks/predictions.py")
    body, notes = [], []
    for file in files:
        name = file.stem.removeprefix("predicted_")
        predicted = json.loads(file.read_text(encoding="utf-8"))
        target = f" Target: {predicted['target']}." if predicted["target"] else ""
        notes.append(f"`{name}`: {predicted['note']}{target}")
        body += [
            [
                f"`{name}`",
                group["device"],
                str(group["batch"]),
                group["backend"],
                str(group["layers"]),
                f"{1e6 * group['seconds']:.0f}",
                f"{1e6 * group['roofline']:.0f}",
                f"{group['copy_share']['least']:.0%} to {group['copy_share']['most']:.0%}",
                ", ".join(f"{limiter} {count}" for limiter, count in group["limiters"].items()),
            ]
            for group in predicted["summary"]
        ]
    head = ["operator", "device", "batch", "backend", "calls", "predicted, µs", "roofline, µs"]
    text = markdown([*head, "of copy bandwidth", "calls limited by"], body)
    return f"{text}\n{' '.join(notes)} No kernel has been timed for this table.\n"


def plans(results: Path = RESULTS) -> str:
    """Launches, bytes and least times of networks' plans for GPUs, a row per network and batch."""
    counted = _load(results / "gpu" / "plans.json")
    if counted is None:
        return not_counted("python benchmarks/plans.py")
    gpus = list(counted["rows"][0]["cvfast"]["roof_seconds"])
    body = []
    for row in counted["rows"]:
        ours, unfused = row["cvfast"], row["unfused"]
        times = (
            f"{1e6 * ours['roof_seconds'][gpu]:.0f} / {1e6 * unfused['roof_seconds'][gpu]:.0f}"
            for gpu in gpus
        )
        body.append(
            [
                row["model"],
                "x".join(map(str, row["shape"])),
                f"{ours['launches']} / {unfused['launches']}",
                f"{ours['bytes'] / 1e6:.1f} / {unfused['bytes'] / 1e6:.1f}",
                f"{row['concat_bytes'] / 1e6:.1f}",
                f"{row['arena_bytes'] / 1e6:.1f}",
                *times,
            ]
        )
    head = ["network", "input", "launches", "MB moved", "of them concatenating", "arena, MB"]
    text = markdown([*head, *(f"µs at least, {gpu}" for gpu in gpus)], body)
    note = (
        f"The plan for an {counted['device']} in {counted['dtype']} / PyTorch operator by operator."
    )
    return f"{text}\n{note} Counted, not timed.\n"


def plan_families(results: Path = RESULTS, *, batch: int = 1) -> str:
    """What kinds of work the launches and bytes of `plans` are, at one batch size."""
    counted = _load(results / "gpu" / "plans.json")
    if counted is None:
        return not_counted("python benchmarks/plans.py")
    rows = [row for row in counted["rows"] if row["shape"][0] == batch]
    kinds = list(dict.fromkeys(k for row in rows for k in row["unfused"]["families"]))
    kinds += [k for row in rows for k in row["cvfast"]["families"] if k not in kinds]
    kinds = list(dict.fromkeys(kinds))
    body = []
    for row in rows:
        cells = []
        for kind in kinds:
            pair = [row[plan]["families"].get(kind) for plan in ("cvfast", "unfused")]
            cells.append(
                " / ".join(f"{p['launches']}: {p['bytes'] / 1e6:.1f}" if p else "-" for p in pair)
            )
        body.append([row["model"], *cells])
    return markdown(["network", *kinds], body) + "\nLaunches: MB, of the plan / of PyTorch.\n"


def limits(results: Path = RESULTS) -> str:
    """Where each network's time on the CPU goes, a row each."""
    measured = _load(results / "cpu" / "limits.json")
    if measured is None:
        return not_measured("python benchmarks/limits.py")
    body = []
    for row in measured["rows"]:
        total, peak = row["total"], row["peak_flops_per_second"]
        kinds = sorted(row["kinds"].items(), key=lambda item: -item[1]["seconds"])[:4]
        body.append(
            [
                row["model"],
                "x".join(map(str, row["shape"])),
                row["dtype"],
                str(row["threads"]),
                f"{total['steps']}",
                f"{total['flops'] / total['seconds'] / peak:.0%} of {peak * 1e-9:.0f}",
                f"{total['bytes'] / total['seconds'] * 1e-9:.0f}",
                f"{total['waiting']:.1%}",
                ", ".join(
                    f"{kind} {group['seconds'] / total['seconds']:.0%} at "
                    f"{group['flops'] / group['seconds'] / peak:.0%}"
                    for kind, group in kinds
                ),
            ]
        )
    head = ["network", "input", "dtype", "threads", "steps", "of peak GFLOP/s", "GB/s", "waiting"]
    note = "\nKinds of steps: share of the time, share of the peak. "
    return markdown([*head, "kinds of steps"], body) + note + provenance(measured["rows"])


def _load(path: Path) -> dict[str, Any] | None:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def blocks(results: Path = RESULTS) -> str:
    """MobileNet v2's blocks in one CUDA kernel and in one for each layer, a row each and batch."""
    predicted = _load(results / "gpu" / "blocks_predicted.json")
    if predicted is None:
        return not_counted("python benchmarks/predict_blocks.py")
    groups: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for row in predicted["rows"]:
        groups.setdefault((row["block"].split(",")[0], row["batch"]), []).append(row)
    header = ["block", "batch", "GFLOP", "MB", "MB separate"]
    header += ["tile, warps (H200)", "recompute", "occupancy", "bound by"]
    header += [f"µs on {row['device'].split()[-1]}" for row in next(iter(groups.values()))]
    body = []
    for (block, batch), group in groups.items():
        first, launch = group[0], group[0]["launch"]
        tile = f"{launch['images']}x{launch['rows']}x{launch['columns']}"
        warps = f"{launch['down']}x{launch['across']}"
        splits = f", {launch['splits']} splits" if launch["splits"] > 1 else ""
        body.append(
            [
                block.replace(" at 1x", " at "),
                str(batch),
                f"{1e-9 * first['flops']:.2f}",
                f"{1e-6 * first['bytes']:.2f}",
                f"{1e-6 * first['bytes_separate']:.2f}",
                f"{tile}, {warps}{splits}",
                f"{first['recompute']:.2f}",
                f"{first['occupancy']:.0%}",
                first["limiter"],
                *(
                    f"{mark}{1e6 * row['seconds']:.1f}{mark} / {1e6 * row['seconds_separate']:.1f}"
                    for row in group
                    for mark in ["**" if row["fuses"] else ""]
                ),
            ]
        )
    return markdown(header, body)


def not_counted(command: str) -> str:
    """What stands in place of a table of counts that are not there."""
    return f"Not counted yet: run `{command}`.\n"


def not_measured(command: str) -> str:
    """What stands in place of a table whose results are not there."""
    return f"Not measured yet: run `{command}`.\n"


def _median(row: dict[str, Any], name: str) -> str:
    """Milliseconds; a dash for a contender that did not run or did not pass its check."""
    variant = row["variants"].get(name)
    return f"{1e3 * variant['median']:.2f}" if variant and variant["ok"] else "-"


def _memory(row: dict[str, Any]) -> tuple[str, str]:
    """Peak memory of inference in MB: cvfast's, and that of the peer that needs least."""
    bytes_of = {
        name: v["memory_bytes"] for name, v in row["variants"].items() if "memory_bytes" in v
    }
    ours = bytes_of.pop("cvfast", None)
    least = min(bytes_of, key=bytes_of.__getitem__, default=None)
    return (
        "-" if ours is None else f"{ours * 1e-6:.1f}",
        "-" if least is None else f"{bytes_of[least] * 1e-6:.1f} {least}",
    )


def markdown(head: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *body]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def provenance(rows: Sequence[dict[str, Any]], shown: Sequence[str] = ("torch",)) -> str:
    """One line that says what the rows were measured on."""
    places = []
    for row in rows:
        environment = row["environment"]
        cpu, packages = environment["cpu"], environment["packages"]
        commit = (environment["git"]["commit"] or "no commit")[:10]
        dirty = "+" if environment["git"]["dirty"] else ""
        versions = (f"{n} {packages[n]}" for n in shown)
        place = f"{cpu['model']}, {cpu['cores']} cores, {cpu['isa']}; {', '.join(versions)}"
        places.append(f"{place}; cvfast {commit}{dirty}, {environment['date'][:10]}")
    unique = list(dict.fromkeys(places))
    return "Medians of interleaved runs, verified in the same run. " + " / ".join(unique) + ".\n"


TABLES: dict[str, Callable[[], str]] = {
    "networks-cpu": networks,
    "networks-cpu-1-thread": functools.partial(networks, threads=1),
    "networks-cpu-bfloat16": functools.partial(networks, dtype="bfloat16"),
    "networks-cpu-bfloat16-1-thread": functools.partial(networks, dtype="bfloat16", threads=1),
    **{
        f"networks-amx-{dtype}-{threads}": functools.partial(
            networks, dtype=dtype, threads=threads, file="networks_amx.json"
        )
        for dtype in ("float32", "bfloat16")
        for threads in (2, 1)
    },
    "zoo-cpu": zoo,
    "depthwise-cpu": depthwise,
    "pointwise-cpu": pointwise,
    "conv-cpu": conv,
    "limits-cpu": limits,
    "validation": validation,
    "depthwise-predicted": functools.partial(predictions, op="depthwise"),
    "predicted": predictions,
    "plans": plans,
    "blocks-predicted": blocks,
    "plan-families": plan_families,
}


def render(text: str, tables: dict[str, Callable[[], str]]) -> str:
    """`text` with every marked table made anew.

    Raises:
        KeyError: for a marker that names no table.
    """
    return MARKED.sub(lambda found: found[1] + tables[found["name"]]() + found[3], text)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if outdated")
    parser.add_argument("files", nargs="*", type=Path, default=PAGES)
    options = parser.parse_args()
    outdated = False
    for file in options.files:
        text = file.read_text(encoding="utf-8")
        updated = render(text, TABLES)
        if text == updated:
            continue
        if options.check:
            print(f"{file} is outdated: run python benchmarks/tables.py", file=sys.stderr)
            outdated = True
        else:
            file.write_text(updated, encoding="utf-8")
    return 1 if outdated else 0


if __name__ == "__main__":
    sys.exit(main())
