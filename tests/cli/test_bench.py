from __future__ import annotations

import json

import pytest

from cvfast.perf import peers

QUICK = ("--size", "24", "--min-time", "0.01")


def test_table_has_every_contender_and_its_check(run, tiny):
    result = run("bench", tiny, *QUICK, "--threads", 1, "--peers", "eager,eager_channels_last")
    assert result.exit_code == 0
    rows = {line.split()[0]: line for line in result.stdout.splitlines() if "passed" in line}
    assert set(rows) == {"cvfast", "eager", "eager_channels_last"}
    assert rows["eager"].rstrip().endswith("x")
    assert "of the best peer" in result.stdout or "as the best peer" in result.stdout


def test_json_file_has_rows_for_every_setting(run, tiny, tmp_path):
    path = tmp_path / "result.json"
    result = run(
        "bench", tiny, *QUICK, "--batch", "1,2", "--threads", "1,2", "--peers", "eager",
        "--json", path,
    )  # fmt: skip
    assert result.exit_code == 0
    saved = json.loads(path.read_text())
    assert saved["environment"]["packages"]["torch"]
    settings = [(row["threads"], row["shape"]) for row in saved["rows"]]
    assert settings == [(t, [n, 1, 24, 24]) for t in (1, 2) for n in (1, 2)]
    for row in saved["rows"]:
        assert row["ok"]
        assert row["best_peer"] == "eager"
        assert row["speedup"] == row["variants"]["eager"]["speedup"] > 0
        for variant in row["variants"].values():
            assert variant["min"] <= variant["p20"] <= variant["median"] <= variant["p80"]
            assert variant["flops_per_second"] == pytest.approx(row["flops"] / variant["median"])


def test_json_to_standard_output_is_nothing_but_json(run, tiny):
    result = run("bench", tiny, *QUICK, "--peers", "", "--json", "-")
    (row,) = json.loads(result.stdout)["rows"]
    assert set(row["variants"]) == {"cvfast"}
    assert row["best_peer"] is None
    assert row["speedup"] is None


@pytest.mark.usefixtures("broken_optimize")
def test_no_speedup_without_a_passed_check(run, tiny):
    result = run("bench", tiny, *QUICK, "--peers", "eager")
    assert result.exit_code == 1
    assert "no speedup: cvfast failed its check" in result.stdout
    result = run("bench", tiny, *QUICK, "--peers", "eager", "--json", "-")
    assert result.exit_code == 1
    (row,) = json.loads(result.stdout)["rows"]
    assert row["speedup"] is None
    assert row["variants"]["eager"]["speedup"] is None


def test_wrong_peer_is_not_compared_with(run, tiny, monkeypatch):
    build = peers.build

    def wrong(name, *args, **kwargs):
        peer = build(name, *args, **kwargs)
        if name == "eager":
            return peers.Peer(name, lambda: peer.run() + 1, peer.setup_seconds)
        return peer

    monkeypatch.setattr(peers, "build", wrong)
    names = "eager,eager_channels_last"
    (row,) = json.loads(run("bench", tiny, *QUICK, "--peers", names, "--json", "-").stdout)["rows"]
    assert not row["variants"]["eager"]["ok"]
    assert row["variants"]["eager"]["speedup"] is None
    assert row["best_peer"] == "eager_channels_last"


def test_missing_peer_is_reported(run, tiny, monkeypatch):
    build = peers.build

    def without(name, *args, **kwargs):
        if name == "openvino":
            raise peers.PeerUnavailable("openvino: openvino is not installed: pip install openvino")
        return build(name, *args, **kwargs)

    monkeypatch.setattr(peers, "build", without)
    args = ("bench", tiny, *QUICK, "--peers", "eager,openvino")
    assert "not compared: openvino: openvino is not installed" in run(*args).stdout
    (row,) = json.loads(run(*args, "--json", "-").stdout)["rows"]
    assert list(row["unavailable"]) == ["openvino"]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--peers", "tensorflow"), "unknown peer 'tensorflow'"),
        (("--batch", "0"), "--batch takes positive integers"),
        (("--threads", "two"), "--threads takes positive integers"),
        (("--device", "cuda"), "only cpu"),
        (("--dtype", "int8"), "unknown dtype 'int8'"),
    ],
)
def test_bad_options_say_what_is_wrong(run, tiny, args, message):
    result = run("bench", tiny, *args)
    assert result.exit_code == 2
    assert message in result.stderr
