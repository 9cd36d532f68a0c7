from __future__ import annotations

import json

import pytest
import torch

from cvfast.cli import specs
from cvfast.models import list_models


def test_list_names_every_model(run):
    result = run("list")
    assert result.exit_code == 0
    header, *lines = result.stdout.splitlines()
    assert header.split() == ["model", "input"]
    assert [line.split()[0] for line in lines] == list_models()


def test_list_pattern_parameters_and_json(run):
    result = run("list", "mobilenet_v[12]", "--parameters", "--json")
    rows = {row["name"]: row for row in json.loads(result.stdout)}
    assert set(rows) == {"mobilenet_v1", "mobilenet_v2"}
    assert rows["mobilenet_v2"]["parameters"] == 3_504_872  # torchvision's published number
    assert rows["mobilenet_v2"]["input"] == [3, 224, 224]
    assert "3,504,872" in run("list", "mobilenet_v2", "-p").stdout


def test_list_without_a_match_fails(run):
    result = run("list", "no-such-*")
    assert result.exit_code == 2
    assert "no model matches 'no-such-*'" in result.stderr


def test_inspect_shows_sites_and_writes_html(run, tiny, tmp_path):
    page = tmp_path / "report.html"
    result = run("inspect", tiny, "--size", 16, "--batch", 2, "--html", page)
    assert result.exit_code == 0
    assert result.stdout.splitlines()[0].split()[:4] == ["module", "pattern", "backend", "status"]
    assert "coverage" in result.stdout
    assert page.read_text().startswith("<!doctype html>")


def test_inspect_json(run, tiny):
    report = json.loads(run("inspect", tiny, "--size", 16, "--json").stdout)
    assert {"coverage", "rows"} <= set(report)
    assert any("conv" in row["pattern"] or "depthwise" in row["pattern"] for row in report["rows"])


def test_inspect_plans_for_a_gpu_that_is_not_there(run, tiny, tmp_path):
    page = tmp_path / "report.html"
    gpu = ("inspect", tiny, "--size", 16, "--device", "cuda")
    result = run(*gpu, "--gpu", "RTX 4090", "--launches", "--html", page)
    assert result.exit_code == 0, result.stderr
    assert result.stdout.splitlines()[0].split()[:2] == ["module", "kernel"]
    assert "conv/triton" in result.stdout
    assert "unfused" in result.stdout
    assert "NVIDIA GeForce RTX 4090" in result.stdout
    assert page.read_text().startswith("<!doctype html>")
    assert "coverage" in run(*gpu).stdout
    assert json.loads(run(*gpu, "--dtype", "bfloat16", "--json").stdout)["launches"]
    unknown = run(*gpu, "--arch", "sm_75")
    assert unknown.exit_code == 2
    assert "choose from" in unknown.stderr


@pytest.mark.parametrize("option", [("--gpu", "sm_90"), ("--dtype", "float16"), ("--launches",)])
def test_options_of_a_plan_are_refused_without_it(run, tiny, option):
    result = run("inspect", tiny, *option)
    assert result.exit_code == 2
    assert "need --device cuda" in result.stderr


def test_verify_passes_at_two_sizes(run, tiny):
    result = run("verify", tiny, "--json")
    assert result.exit_code == 0
    outcome = json.loads(result.stdout)
    assert outcome["ok"]
    assert [row["size"] for row in outcome["sizes"]] == [224, 256]
    for row in outcome["sizes"]:
        assert 0 < row["error"] <= row["limit"]
        assert row["baseline_error"] > 0


def test_verify_a_registered_network(run):
    result = run("verify", "mobilenet_v3_small", "--size", 64, "--size", 96)
    assert result.exit_code == 0
    assert result.stdout.count("passed") == 2


def test_verify_bfloat16(run, tiny):
    result = run("verify", tiny, "--size", 32, "--dtype", "bfloat16", "--json")
    assert result.exit_code == 0
    assert json.loads(result.stdout)["sizes"][0]["error"] > 1e-4


@pytest.mark.usefixtures("broken_optimize")
def test_verify_fails_on_a_wrong_network(run, tiny):
    result = run("verify", tiny, "--size", 32)
    assert result.exit_code == 1
    assert "FAILED" in result.stdout
    assert not json.loads(run("verify", tiny, "--size", 32, "--json").stdout)["ok"]


@pytest.mark.parametrize("command", ["inspect", "verify", "bench"])
@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("mobilenet_v4", "unknown model 'mobilenet_v4'"),
        ("nowhere:net", "unknown source 'nowhere'"),
        ("missing.py:build", "missing.py"),
    ],
)
def test_unknown_model_says_so(run, command, spec, message):
    result = run(command, spec)
    assert result.exit_code == 2
    assert message in result.stderr
    assert "Traceback" not in result.stderr


def test_unknown_dtype_names_the_known(run, tiny):
    result = run("verify", tiny, "--dtype", "int8")
    assert result.exit_code == 2
    assert "float32, bfloat16, float16" in result.stderr


def test_input_shape_comes_from_the_best_source(tiny):
    assert specs.input_shape(tiny, specs.load(tiny)) == (1, 224, 224)
    assert specs.input_shape(tiny, specs.load(tiny), 64) == (1, 64, 64)
    cifar = "cifar_resnet20"
    assert specs.input_shape(cifar, specs.load(cifar)) == (3, 32, 32)
    configured = torch.nn.Module()
    configured.pretrained_cfg = {"input_size": (3, 288, 288)}
    assert specs.input_shape("timm:x", configured) == (3, 288, 288)
    assert specs.input_shape("torchvision:inception_v3", torch.nn.Module()) == (3, 299, 299)


def test_truth_rejects_a_missing_output():
    model = torch.nn.Conv2d(3, 4, 1)
    truth = specs.Truth(model, torch.randn(1, 3, 4, 4), torch.float32)
    verdict = truth.check([])
    assert not verdict.ok
    assert "0 output tensors, expected 1" in verdict.message
