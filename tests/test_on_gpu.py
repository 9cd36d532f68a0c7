"""The plan of `benchmarks/on_gpu.sh` refers to what exists, and its stages are run and reported."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "benchmarks" / "on_gpu.sh"
H200 = (9, 0)


@pytest.fixture
def on_gpu(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    spec = importlib.util.spec_from_file_location("on_gpu", ROOT / "benchmarks" / "on_gpu.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def shell(*arguments: str, **environ: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["sh", str(SCRIPT), *arguments],
        env={**os.environ, "PYTHON": sys.executable, **environ},
        capture_output=True,
        text=True,
        check=False,
    )


def test_everything_the_plan_refers_to_exists() -> None:
    result = shell("--plan")
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    for stage in (
        "env", "build", "test", "validate", "sanitize", "kernels", "tune", "bench-ops", "profile",
        "bench-networks",
    ):  # fmt: skip
        assert f"\n{stage}: " in f"\n{result.stdout}"


def test_commands_of_cvfast_take_their_options(on_gpu: ModuleType) -> None:
    typer = pytest.importorskip("typer")
    from cvfast.cli.app import app

    group = typer.main.get_command(app)
    lines = [command.line.split() for stage in on_gpu.STAGES for command in stage.commands]
    used = [words[words.index("cvfast") + 1 :] for words in lines if "cvfast" in words]
    assert used
    for name, *words in used:
        command = group.get_command(typer.Context(group), name)
        assert command is not None, name
        options = {option for parameter in command.params for option in parameter.opts}
        assert {word for word in words if word.startswith("--")} <= options


def test_plan_needs_neither_torch_nor_anything_else() -> None:
    result = subprocess.run(
        [sys.executable, "-I", "-S", str(ROOT / "benchmarks" / "on_gpu.py"), "--plan"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr


def test_script_is_executable_and_clean() -> None:
    assert os.access(SCRIPT, os.X_OK)
    assert subprocess.run(["sh", "-n", str(SCRIPT)], check=False).returncode == 0
    if shutil.which("shellcheck"):
        subprocess.run(["shellcheck", str(SCRIPT)], check=True)


def test_no_setting_of_the_gpu_is_changed(on_gpu: ModuleType) -> None:
    options = {"-q", "-d"}
    for stage in on_gpu.STAGES:
        for command in stage.commands:
            words = command.line.split()
            if words[0] == "nvidia-smi":
                assert {word for word in words if word.startswith("-")} <= options
    source = (ROOT / "benchmarks" / "profile_kernels.py").read_text()
    assert '"--clock-control", "none"' in source


def stage(on_gpu: ModuleType, line: str, **changes: Any) -> Any:
    command = on_gpu.Command(line, **changes.pop("command", {}))
    arguments = {"name": "one", "purpose": "a test", "limit": None, "commands": (command,)}
    return on_gpu.Stage(**{**arguments, **changes})


@pytest.mark.parametrize(
    ("line", "fault"),
    [
        ("{python} benchmarks/bench_nothing.py", "there is no benchmarks/bench_nothing.py"),
        ("{python} benchmarks/tables.py --chek", "benchmarks/tables.py has no option --chek"),
        ("{python} -m cvfast fly", "there is no command cvfast fly"),
        ("{python} -m pytest tests -m 'slow and tpu'", "no test carries the mark tpu"),
    ],
)
def test_what_does_not_exist_is_a_fault(on_gpu: ModuleType, line: str, fault: str) -> None:
    assert on_gpu.faults([stage(on_gpu, line)]) == [f"one: {fault}"]


def test_faults_of_the_plan_fail_it(
    on_gpu: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(on_gpu, "STAGES", (stage(on_gpu, "{python} benchmarks/nothing.py"),))
    assert on_gpu.main(["--plan"]) == 1
    assert "there is no benchmarks/nothing.py" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("capability", "expected"),
    [((8, 0), "8.0"), ((8, 9), "8.9"), ((9, 0), "9.0a"), ((10, 0), "10.0a"), ((12, 0), "12.0")],
)
def test_architecture_of_the_build(
    on_gpu: ModuleType, tmp_path: Path, capability: tuple[int, int], expected: str
) -> None:
    values = on_gpu.placeholders(tmp_path, 60, capability)
    assert values["arch_list"] == expected
    assert values["arch"] == f"sm_{capability[0]}{capability[1]}"


def test_a_budget_leaves_a_margin_before_the_limit(on_gpu: ModuleType, tmp_path: Path) -> None:
    command = on_gpu.Command(
        "{python} x.py --budget {seconds} --half {half} {junit} --out {out}/a b"
    )
    words, _ = on_gpu.expand(command, on_gpu.placeholders(tmp_path, 70, H200))
    assert words == [
        sys.executable, "x.py", "--budget", "60", "--half", "30", "--out", f"{tmp_path}/a", "b",
    ]  # fmt: skip
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "tests.xml").touch()
    words, _ = on_gpu.expand(command, on_gpu.placeholders(tmp_path, 5, H200))
    assert words[3] == "0"
    assert words[6:8] == ["--junit", str(tmp_path / "logs" / "tests.xml")]


def run(on_gpu: ModuleType, out: Path, *stages: Any, budget: float = 60.0) -> dict[str, Any]:
    environment = {"gpus": [{"name": "NVIDIA H200", "capability": "9.0"}]}
    on_gpu.run(stages, out, budget, environment)
    summary = json.loads((out / "summary.json").read_text())
    assert summary["environment"] == environment
    return {result["stage"]: result for result in summary["stages"]}


def test_every_stage_runs_and_is_reported(on_gpu: ModuleType, tmp_path: Path) -> None:
    write = "import pathlib; pathlib.Path('{out}/result.json').write_text('1'); print('done')"
    results = run(
        on_gpu,
        tmp_path,
        stage(on_gpu, "{python} -c \"raise SystemExit('broken: 3')\"", name="fails"),
        stage(on_gpu, f'{{python}} -c "{write}"', name="writes"),
        stage(on_gpu, "{python} -c \"print('skipped: no ncu'); exit(77)\"", name="cannot"),
    )
    assert {name: result["status"] for name, result in results.items()} == {
        "fails": "failed", "writes": "passed", "cannot": "skipped",
    }  # fmt: skip
    assert results["fails"]["reason"] == "exit status 1: broken: 3"
    assert results["cannot"]["reason"] == "no ncu"
    assert results["writes"]["commands"][0]["status"] == 0
    assert {file.name for file in tmp_path.iterdir()} == {
        "summary.json", "result.json", "logs.tar.gz",
    }  # fmt: skip
    with tarfile.open(tmp_path / "logs.tar.gz") as archive:
        log = archive.extractfile("logs/writes.log")
        assert log is not None
        assert b"done" in log.read()


def test_commands_of_a_stage_all_run_and_the_first_failure_counts(
    on_gpu: ModuleType, tmp_path: Path
) -> None:
    commands = tuple(
        on_gpu.Command(f'{{python}} -c "print({code}); exit({code})"') for code in (0, 77, 5, 6, 0)
    )
    results = run(on_gpu, tmp_path, stage(on_gpu, "", commands=commands))
    assert [command["status"] for command in results["one"]["commands"]] == [0, 77, 5, 6, 0]
    assert results["one"]["status"] == "failed"
    assert results["one"]["reason"] == "exit status 5: 5"


def test_a_stage_that_takes_too_long_ends_with_all_that_it_started(
    on_gpu: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(on_gpu, "MARGIN", 0.0)
    monkeypatch.setattr(on_gpu, "GRACE", 0.2)
    code = (
        "import subprocess, sys, time, signal\n"
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
        f"open({str(tmp_path / 'pid')!r}, 'w').write(str(child.pid))\n"
        "time.sleep(60)\n"
    )
    script = tmp_path / "sleeps.py"
    script.write_text(code)
    start = time.monotonic()
    results = run(
        on_gpu,
        tmp_path / "out",
        stage(on_gpu, f"{{python}} {script}", name="sleeps", limit=2.0),
        stage(on_gpu, '{python} -c "1"', name="next"),
    )
    assert time.monotonic() - start < 30
    assert results["sleeps"]["status"] == "timeout"
    assert results["next"]["status"] == "passed"
    status = Path(f"/proc/{(tmp_path / 'pid').read_text()}/stat")
    assert not status.exists() or status.read_text().split()[2] == "Z"


def test_no_stage_starts_when_the_budget_is_spent(on_gpu: ModuleType, tmp_path: Path) -> None:
    results = run(on_gpu, tmp_path, stage(on_gpu, '{python} -c "1"'), budget=on_gpu.MARGIN / 2)
    assert results["one"]["status"] == "skipped"
    assert results["one"]["reason"] == "the budget is spent"


def test_a_slow_stage_leaves_its_share_to_a_later_one(
    on_gpu: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(on_gpu, "MARGIN", 0.0)
    monkeypatch.setattr(on_gpu, "GRACE", 0.2)
    slow = stage(on_gpu, '{python} -c "import time; time.sleep(60)"', name="slow")
    later = stage(on_gpu, '{python} -c "1"', name="later", share=0.8)
    results = run(on_gpu, tmp_path, slow, later, budget=5.0)
    assert results["slow"]["status"] == "timeout"
    assert results["slow"]["seconds"] < 3
    assert results["later"]["status"] == "passed"


def test_shares_leave_most_of_the_budget_to_the_build_and_the_tests(on_gpu: ModuleType) -> None:
    limits = {one.name: one.limit for one in on_gpu.STAGES}
    kept = on_gpu.BUDGET * sum(one.share for one in on_gpu.STAGES)
    assert on_gpu.BUDGET - kept >= limits["env"] + limits["build"] + limits["test"]


def test_ended_from_outside_it_leaves_no_folder_of_logs(
    on_gpu: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def end(*args: Any) -> None:
        raise SystemExit(143)

    monkeypatch.setattr(on_gpu, "run_stage", end)
    with pytest.raises(SystemExit):
        run(on_gpu, tmp_path, stage(on_gpu, "x"))
    assert [file.name for file in tmp_path.iterdir()] == ["logs.tar.gz"]


def test_stand_ins_for_a_gpu_are_not_passed_on(
    on_gpu: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    code = "import os; exit('TRITON_INTERPRET' in os.environ or os.environ['A'] != '9')"
    line = f'{{python}} -c "{code}"'
    given = {"command": {"environ": {"A": "9"}, "stdout": "logs/printed"}}
    assert run(on_gpu, tmp_path, stage(on_gpu, line, **given))["one"]["status"] == "passed"


def test_what_a_stage_writes_into_the_checkout_is_copied(
    on_gpu: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkout, out = tmp_path / "checkout", tmp_path / "out"
    (checkout / "tuned").mkdir(parents=True)
    (checkout / "tuned" / "old.json").write_text("old")
    os.utime(checkout / "tuned" / "old.json", (1, 1))
    monkeypatch.setattr(on_gpu, "ROOT", checkout)
    line = "{python} -c \"open('tuned/new.json', 'w').write('new')\""
    (checkout / "one.json").write_text("one")
    results = {"tuned/*.json": "tuned", "one.json": "."}
    run(on_gpu, out, stage(on_gpu, line, results=results))
    with tarfile.open(out / "tuned.tar.gz") as archive:
        assert archive.getnames() == ["tuned/new.json"]
    assert (out / "one.json").read_text() == "one"


def test_results_are_collected_from_where_they_are_written(on_gpu: ModuleType) -> None:
    from cvfast import validation
    from cvfast.launch import table

    collected = {ROOT / pattern for one in on_gpu.STAGES for pattern in one.results}
    assert collected == {ROOT / validation.RECORD, table.folder() / "*.json"}


def test_missing_tool_is_left_out(on_gpu: ModuleType, tmp_path: Path) -> None:
    given = {"command": {"tool": "no-such-tool"}}
    results = run(on_gpu, tmp_path, stage(on_gpu, "no-such-tool", **given))
    assert results["one"]["status"] == "passed"
    assert results["one"]["commands"] == []


def test_what_validation_takes_for_granted_is_tested(on_gpu: ModuleType) -> None:
    (line,) = (c.line for one in on_gpu.STAGES if one.name == "test" for c in one.commands)
    marks = line.partition("-m '")[2].partition("'")[0]
    assert f'MARKS = "{marks}"' in (ROOT / "benchmarks" / "validate.py").read_text()


def test_missing_packages_are_a_reason_to_skip(on_gpu: ModuleType, tmp_path: Path) -> None:
    given = {"command": {"modules": ("json", "no_such_package")}}
    results = run(on_gpu, tmp_path, stage(on_gpu, '{python} -c "1"', **given))
    assert results["one"]["status"] == "skipped"
    assert results["one"]["reason"] == "not installed: no_such_package"
    assert results["one"]["commands"] == []


def test_all_results_come_in_eight_files(on_gpu: ModuleType) -> None:
    """summary.json, logs.tar.gz, one per stage that makes any, and one of all tuned tables."""
    texts = " ".join(command.line for stage in on_gpu.STAGES for command in stage.commands)
    written = {word for word in texts.split() if word.startswith("{out}/") and "logs" not in word}
    collected = [pattern for one in on_gpu.STAGES for pattern in one.results]
    assert len(written) + len(collected) + 2 <= 8
    assert all(word.count("/") <= 2 for word in written)


def test_without_a_gpu_it_says_so_and_names_the_plan() -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    result = shell("--out", "nowhere")
    assert result.returncode != 0
    assert "no NVIDIA GPU; --plan" in result.stderr
    assert not Path("nowhere").exists()


def test_without_torch_it_names_the_variable_to_set(
    on_gpu: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(on_gpu, "LOOK", "import sys; sys.path = []; import torch")
    with pytest.raises(SystemExit, match="has no PyTorch: set PYTHON"):
        on_gpu.look()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [((), "--out is missing"), (("--stages", "env,fly", "--out", "x"), "unknown stage fly")],
)
def test_bad_arguments_say_what_is_wrong(arguments: tuple[str, ...], message: str) -> None:
    result = shell(*arguments)
    assert result.returncode == 2
    assert message in result.stderr
