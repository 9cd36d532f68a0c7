from __future__ import annotations

import json
import sys
from concurrent.futures.process import BrokenProcessPool

import pytest
import torch

from cvfast.models import list_models
from cvfast.perf import isolated, peers

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
        "bench", tiny, *QUICK, "--batch", "1,2", "--threads", "1", "--peers", "eager",
        "--json", path,
    )  # fmt: skip
    assert result.exit_code == 0
    assert "against the best peer" in result.stdout
    saved = json.loads(path.read_text())
    assert [row["shape"] for row in saved["rows"]] == [[n, 1, 24, 24] for n in (1, 2)]
    for row in saved["rows"]:
        assert row["environment"]["packages"]["torch"]
        assert row["ok"]
        assert row["best_peer"] == "eager"
        assert row["speedup"] == row["variants"]["eager"]["speedup"] > 0
        for variant in row["variants"].values():
            assert variant["min"] <= variant["p20"] <= variant["median"] <= variant["p80"]
            assert variant["flops_per_second"] == pytest.approx(row["flops"] / variant["median"])


def test_json_file_keeps_the_rows_of_other_settings(run, tiny, tmp_path):
    path = tmp_path / "result.json"
    args = ("bench", tiny, *QUICK, "--peers", "", "--json", path)
    for batch in (2, 1, 1):
        assert run(*args, "--batch", batch).exit_code == 0
    assert [row["shape"][0] for row in json.loads(path.read_text())["rows"]] == [1, 2]
    path.write_text("{}")
    result = run(*args)
    assert result.exit_code == 2
    assert "holds no results of cvfast bench" in result.stderr
    assert path.read_text() == "{}"


@pytest.mark.usefixtures("dying_processes")
def test_a_setting_that_kills_its_process_fails_and_the_others_go_on(run, tiny):
    result = run("bench", tiny, *QUICK, "--peers", "eager", "--batch", "1,2")
    assert result.exit_code == 1
    assert "batch 1, 1 threads" in result.stderr
    assert "passed" in result.stdout


@pytest.fixture
def dying_processes(monkeypatch):
    """The first call in a process of its own dies; the others run in this one."""
    calls = []

    def call(function, *args, **kwargs):
        calls.append(function)
        if len(calls) == 1:
            raise BrokenProcessPool("terminated abruptly")
        return function(*args)

    monkeypatch.setattr(isolated, "call", call)


def test_without_a_model_the_whole_list_is_measured(run, monkeypatch):
    measured = []

    def call(measure):
        measured.append((measure.args, measure.keywords["names"], measure.keywords["dtype"]))
        raise RuntimeError("enough")

    monkeypatch.setattr(isolated, "call", call)
    assert run("bench", "--dtype", "float32,bfloat16").exit_code == 1
    assert measured == [
        ((name,), list(peers.NAMES), dtype)
        for name in list_models()
        for dtype in (torch.float32, torch.bfloat16)
    ]


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_stands_beside_the_times(run, tiny):
    args = ("bench", tiny, *QUICK, "--peers", "eager", "--memory", "--json", "-")
    (row,) = json.loads(run(*args).stdout)["rows"]
    for variant in row["variants"].values():
        assert 16 * 24 * 24 * 4 < variant["memory_bytes"] < 50e6


def test_eager_nhwc_is_eager_channels_last(run, tiny):
    args = ("bench", tiny, *QUICK, "--peers", "eager-nhwc", "--json", "-")
    (row,) = json.loads(run(*args).stdout)["rows"]
    assert set(row["variants"]) == {"cvfast", "eager_channels_last"}


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
