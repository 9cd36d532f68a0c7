from __future__ import annotations

import os
import re
import subprocess
import sys
import textwrap

import pytest

from cvfast.cli.output import Table


def cvfast(*args, **env):
    return subprocess.run(
        [sys.executable, "-m", "cvfast", *args],
        capture_output=True,
        text=True,
        env={**os.environ, **env},
        timeout=60,
    )


def in_terminal(*args, **env):
    """Runs a command with a pseudo-terminal as standard output; returns what it printed."""
    pty = pytest.importorskip("pty")
    master, slave = pty.openpty()
    inherited = {k: v for k, v in os.environ.items() if k not in ("NO_COLOR", "FORCE_COLOR")}
    process = subprocess.Popen(
        [sys.executable, "-m", "cvfast", *args],
        stdout=slave,
        env={**inherited, "TERM": "xterm-256color", "COLUMNS": "100", **env},
    )
    os.close(slave)
    chunks = []
    while True:
        try:
            chunk = os.read(master, 65536)
        except OSError:  # Linux: the other end is closed
            break
        if not chunk:
            break
        chunks.append(chunk)
    os.close(master)
    assert process.wait(timeout=60) == 0
    return b"".join(chunks).decode()


def test_plain_table_is_aligned():
    table = Table(("name", "count"), title="things", right=("count",))
    table.add("a", 1)
    table.add("longer", 1000)
    assert table.text() == "things\nname    count\na           1\nlonger   1000"


def test_table_refuses_a_wrong_number_of_cells():
    with pytest.raises(ValueError, match="expected 2 cells, got 1"):
        Table(("a", "b")).add("only")


def test_pipe_gets_plain_ascii():
    for command in (("--help",), ("list", "mobilenet*"), ("bench", "--help")):
        done = cvfast(*command)
        assert done.returncode == 0
        assert "\x1b" not in done.stdout
        assert done.stdout.isascii()


def test_terminal_gets_a_rich_table():
    text = in_terminal("list", "mobilenet*")
    assert "\x1b[" in text
    assert "─" in text


def test_no_color_is_honoured():
    colours = r"\x1b\[[0-9;]*3[0-9]"
    assert re.search(colours, in_terminal("doctor"))
    assert not re.search(colours, in_terminal("doctor", NO_COLOR="1"))


def test_help_imports_nothing_heavy():
    """Beyond what `import cvfast` brings."""
    code = textwrap.dedent(
        """
        import sys
        import cvfast
        heavy = {"torch", "triton", "matplotlib", "onnxruntime", "timm"} - set(sys.modules)
        from typer.testing import CliRunner
        from cvfast.cli.app import app
        assert CliRunner().invoke(app, ["--help"]).exit_code == 0
        assert "matplotlib" in heavy
        print([m for m in heavy if m in sys.modules])
        """
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("package", ["typer", "rich"])
def test_missing_package_names_the_extra(package):
    code = f"import sys; sys.modules[{package!r}] = None; from cvfast.cli import main; main()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1
    assert f"needs {package}" in done.stderr
    assert "pip install 'cvfast[cli]'" in done.stderr
    assert "Traceback" not in done.stderr
