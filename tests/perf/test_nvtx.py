from __future__ import annotations

import importlib
from contextlib import contextmanager

import pytest
import torch

from cvfast.perf import nvtx


@pytest.fixture(autouse=True)
def off_again():
    yield
    nvtx.disable()


def test_off_by_default_and_nothing_is_made():
    assert nvtx.range("a") is nvtx.range("b")
    with nvtx.range("a"), nvtx.range("b"):
        pass


def test_ranges_nest():
    events = []

    @contextmanager
    def emit(name):
        events.append(f"+{name}")
        yield
        events.append(f"-{name}")

    assert nvtx.enable(emit)
    with nvtx.range("outer"), nvtx.range(nvtx.name("net", "features.0", "conv+bn")):
        pass
    nvtx.disable()
    with nvtx.range("off"):
        pass
    assert events == [
        "+outer",
        "+cvfast/net/features.0/conv+bn",
        "-cvfast/net/features.0/conv+bn",
        "-outer",
    ]


@pytest.mark.parametrize("cuda", [True, False])
def test_without_the_package_pytorch_emits_where_there_is_cuda(monkeypatch, cuda):
    def missing(name):
        raise ModuleNotFoundError(name)

    monkeypatch.setattr(importlib, "import_module", missing)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    assert nvtx.enable() is cuda
    assert nvtx._emitter is (torch.cuda.nvtx.range if cuda else None)


def test_the_package_takes_our_names():
    pytest.importorskip("nvtx")
    assert nvtx.enable()
    with nvtx.range("cvfast/net/features.0/conv"):
        pass
