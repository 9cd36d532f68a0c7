from __future__ import annotations

import textwrap

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

import cvfast
from cvfast.optimize import Report


@pytest.fixture
def run():
    """Runs the command line in this process: ``run("list", "--json")``."""
    from cvfast.cli.app import app

    runner = CliRunner()

    def invoke(*args):
        result = runner.invoke(app, [str(arg) for arg in args], prog_name="cvfast")
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        return result

    return invoke


@pytest.fixture(autouse=True)
def one_thread():
    """Tests run side by side: a pool of threads that spin would starve the other processes."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def tiny(tmp_path):
    """A spec of a small network with a depthwise convolution, in a file."""
    path = tmp_path / "tiny.py"
    path.write_text(
        textwrap.dedent(
            """
            from torch import nn

            def build():
                return nn.Sequential(
                    nn.Conv2d(1, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU(),
                    nn.Conv2d(16, 16, 3, padding=1, groups=16, bias=False), nn.BatchNorm2d(16),
                    nn.ReLU6(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10),
                )
            """
        )
    )
    return f"{path}:build"


class Wrong(nn.Module):
    """An "optimised" network that is off by one part in a thousand, and does not know it."""

    def __init__(self, model):
        super().__init__()
        self.model = model
        self.report = Report("Wrong")

    def forward(self, x):
        return 1.001 * self.model(x)


@pytest.fixture
def broken_optimize(monkeypatch):
    monkeypatch.setattr(cvfast, "optimize", lambda model, *args, **kwargs: Wrong(model))
