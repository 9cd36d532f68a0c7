"""The benchmarks for GPUs, on the CPU: its kernels, and a clock of the host's, stand in."""

from __future__ import annotations

import argparse
import csv
import importlib.util
import io
import itertools
import json
import sys
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from cvfast import extension
from cvfast.launch import calls
from cvfast.launch.depthwise import Problem
from cvfast.ops._example import Example
from cvfast.optimize import Report
from cvfast.perf import timing

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def script(name):
    spec = importlib.util.spec_from_file_location(f"benchmarks_{name}", BENCHMARKS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


results_file = script("results_file")


@pytest.fixture
def on_cpu(monkeypatch):
    module = script("depthwise_on_cuda")
    monkeypatch.setattr(module, "DEVICE", "cpu")
    monkeypatch.setattr(module, "BACKENDS", ("cpu",))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)

    def interleave(variants, *, cold_l2, log, **kwargs):
        return timing.interleave(variants, min_rounds=1, min_time=0.0, burst=1, settle=0)

    monkeypatch.setattr(module.gpu_timing, "interleave_cuda", interleave)
    monkeypatch.setattr(module.gpu_timing, "copy_bandwidth", lambda: 1e10)
    return module


def layer(module, **changes):
    shape = {"channels": 6, "size": 9, "kernel": 3, "stride": 2, "activation": "relu6"} | changes
    return module.DepthwiseLayer("net", 0, **shape)


class TestResults:
    def test_rows_are_on_disk_at_once_and_found_again(self, tmp_path):
        path = tmp_path / "sub" / "rows.json"
        results = results_file.Results(path, key=lambda row: row["k"])
        results.head = {"environment": "e"}
        results.add({"k": 1, "v": "a"})
        results.add({"k": 2, "v": "b"})
        assert json.loads(path.read_text())["rows"] == results.rows
        again = results_file.Results(path, key=lambda row: row["k"])
        assert again.head == {"environment": "e"}
        assert 1 in again
        assert 3 not in again
        again.add({"k": 1, "v": "c"})
        assert [row["v"] for row in json.loads(path.read_text())["rows"]] == ["c", "b"]
        assert [file.name for file in path.parent.iterdir()] == ["rows.json"]

    def test_budget_ends_the_items_but_not_the_one_that_has_begun(self):
        now = 0.0
        budget = results_file.Budget(10, clock=lambda: now)
        done = []
        for item in budget.while_it_lasts(range(10)):
            now += 4
            done.append(item)
        assert done == [0, 1, 2]
        assert budget.left == 0

    def test_no_budget_is_no_end(self):
        assert list(results_file.Budget(None).while_it_lasts("abc")) == ["a", "b", "c"]


@pytest.mark.usefixtures("cpu_extension")
class TestDepthwise:
    @pytest.mark.parametrize("activation", ["none", "relu", "relu6", "hardswish"])
    @pytest.mark.parametrize("which", ["forward", "backward"])
    def test_row(self, on_cpu, which, activation):
        row = on_cpu.measure(
            layer(on_cpu, activation=activation), which, 17, torch.float32,
            bandwidth=1e10, inductor=False, min_time=0.0,
        )  # fmt: skip
        json.dumps(row)
        assert row["verified"], row["checks"]
        assert row["best"] == "cvfast_cpu"
        contenders = {"cvfast_cpu", "eager_nhwc", "eager_nchw", "copy"}
        assert set(row["seconds"]["cold"]) == set(row["seconds"]["warm"]) == contenders
        assert set(row["speedup"]) == contenders - {"cvfast_cpu"}
        median = row["seconds"]["cold"]["copy"]["median"]
        assert row["bytes_per_second"]["copy"] == pytest.approx(row["bytes"] / median)
        assert row["share_of_copy_bandwidth"]["copy"] == row["bytes_per_second"]["copy"] / 1e10
        assert "cvfast_cpu" in on_cpu.describe(row)

    @pytest.mark.parametrize(
        ("dtype", "which"), [(torch.bfloat16, "forward"), (torch.float16, "backward")]
    )
    def test_narrow_dtypes_pass_their_check(self, on_cpu, dtype, which):
        row = on_cpu.measure(
            layer(on_cpu, stride=1), which, 3, dtype, bandwidth=1.0, inductor=False, min_time=0.0
        )
        assert row["verified"], row["checks"]

    @pytest.mark.parametrize("which", ["forward", "backward"])
    def test_a_wrong_kernel_fails_its_check(self, on_cpu, which):
        one = layer(on_cpu)
        x, weight, bias = one.tensors(20)
        grad = on_cpu.gradient(one, x, weight, bias) if which == "backward" else None
        calls, _ = on_cpu.contenders(one, which, x, weight, bias, grad, inductor=False)
        right = calls["cvfast_cpu"]()
        assert on_cpu.verify(one, x, weight, bias, grad, right)
        for wrong in range(1 if which == "forward" else 3):
            tensors = [right.clone()] if which == "forward" else [t.clone() for t in right]
            tensors[wrong][(-1,) * tensors[wrong].dim()] += 1
            result = tensors[0] if which == "forward" else tensors
            assert not on_cpu.verify(one, x, weight, bias, grad, result)

    def test_bytes_of_a_pass(self, on_cpu):
        one = layer(on_cpu, channels=16, size=8, stride=1)
        x, *_ = one.tensors(2, torch.float16)
        weights, image = 4 * 16 * 10, 2 * 16 * 8 * 8 * 2
        assert on_cpu.least_bytes(one, "forward", x) == weights + 2 * image
        # x, grad and y in, the gradient of x out
        assert on_cpu.least_bytes(one, "backward", x) == weights + 4 * image

    def test_an_error_of_our_kernel_is_raised_and_one_of_a_peer_reported(self, on_cpu, monkeypatch):
        one = layer(on_cpu)
        x, weight, bias = one.tensors(1)

        def fail(*args):
            raise RuntimeError("illegal address")

        monkeypatch.setattr(on_cpu, "eager", fail)
        calls, unavailable = on_cpu.contenders(
            one, "forward", x, weight, bias, None, inductor=False
        )
        assert set(calls) == {"cvfast_cpu", "copy"}
        assert unavailable["eager_nhwc"] == "RuntimeError: illegal address"
        monkeypatch.setattr(on_cpu, "prepacked_op", lambda backend: fail)
        with pytest.raises(RuntimeError, match="illegal address"):
            on_cpu.contenders(one, "forward", x, weight, bias, None, inductor=False)

    def test_a_backend_that_cannot_serve_says_why(self, on_cpu, monkeypatch):
        monkeypatch.setattr(on_cpu, "BACKENDS", ("cpu", "triton"))
        one = layer(on_cpu)
        calls, unavailable = on_cpu.contenders(
            one, "forward", *one.tensors(1), None, inductor=False
        )
        assert "cvfast_cpu" in calls
        assert "runs on cuda" in unavailable["cvfast_triton"] or "triton" in calls

    def test_mobilenet_v2_comes_first(self, on_cpu):
        layers = [layer(on_cpu), on_cpu.DepthwiseLayer("mobilenet_v2", 3, 6, 9, 3, 1, "relu6")]
        order = [
            (one.model, which, batch)
            for one, which, batch, _ in on_cpu.settings(
                layers, ["forward", "backward"], [256, 1], ["float16"]
            )
        ]
        assert order[:3] == [
            ("mobilenet_v2", "forward", 256), ("net", "forward", 256),
            ("mobilenet_v2", "backward", 256),
        ]  # fmt: skip
        assert len(order) == 8

    def arguments(self, path, **changes):
        return argparse.Namespace(**{
            "budget": None, "json": path, "passes": ["forward"], "batch": [1], "filter": "",
            "dtype": ["float32"], "no_inductor": True, "min_time": 0.0, **changes,
        })  # fmt: skip

    def test_a_second_run_adds_what_is_missing(self, on_cpu, tmp_path, monkeypatch, capsys):
        path = tmp_path / "gpu" / "depthwise.json"
        layers = [layer(on_cpu)]
        assert on_cpu.run(self.arguments(path), layers, path) == 0
        written = json.loads(path.read_text())
        assert written["copy_bandwidth"] == 1e10
        assert written["environment"]["packages"]["torch"] == torch.__version__
        args = self.arguments(path, batch=[1, 2])
        assert on_cpu.run(args, layers, path) == 0
        assert "1 of 1 settings measured" in capsys.readouterr().out
        assert [row["batch"] for row in json.loads(path.read_text())["rows"]] == [1, 2]
        git = {"commit": "other", "dirty": False}
        monkeypatch.setattr(on_cpu.environment, "git", lambda: git)
        assert on_cpu.run(self.arguments(path), layers, path) == 0
        assert "measured anew" in capsys.readouterr().out
        assert len(json.loads(path.read_text())["rows"]) == 1

    def test_no_row_starts_without_budget_and_nothing_measured_is_no_success(
        self, on_cpu, tmp_path
    ):
        path = tmp_path / "depthwise.json"
        assert on_cpu.run(self.arguments(path, budget=0.0), [layer(on_cpu)], path) == 1
        assert not path.exists()


@pytest.fixture
def networks(monkeypatch):
    module = script("bench_gpu_networks")
    monkeypatch.setattr(module, "SETTLE", 0.0)
    return module


WORKER = """
import json, os, sys, time
model, *batches = sys.argv[1:]
def say(message):
    print(json.dumps(message), flush=True)
for batch in map(int, batches):
    row = {"model": model, "shape": [batch, 3, 8, 8], "dtype": "float16", "ok": True}
    if model == "refuses":
        say({"row": {**row, "ok": False, "error": "out of memory"}})
        continue
    if model == "slow":
        time.sleep(60)
    say({"ready": batch})
    sys.stdin.readline()
    if model == "crashes" and batch > 1:
        os.kill(os.getpid(), 11)
    if model == "hangs":
        time.sleep(60)
    before = time.time()
    time.sleep(0.2)
    say({"row": {**row, "timed": [before, time.time()]}})
while model == "compiles":
    time.sleep(0.01)
    print(time.time(), file=sys.stderr, flush=True)
"""


class TestConduct:
    def run(self, networks, tmp_path, tasks, *, workers=4, seconds=30.0):
        rows, alive = [], []

        class Counted(networks.Worker):
            def __init__(self, model, batches):
                command = [sys.executable, "-c", WORKER, model, *map(str, batches)]
                super().__init__(model, batches, command, tmp_path / f"{model}.log")
                alive.append(self)

        budget = results_file.Budget(seconds)
        missing = networks.conduct(tasks, Counted, rows.append, workers=workers, budget=budget)
        assert all(worker.process.poll() is not None for worker in alive)
        return rows, missing, alive

    def test_rows_are_timed_one_at_a_time(self, networks, tmp_path):
        tasks = [(name, [1, 2]) for name in "abc"]
        rows, missing, _ = self.run(networks, tmp_path, tasks)
        assert missing == []
        assert {(row["model"], row["shape"][0]) for row in rows} == {
            (name, batch) for name in "abc" for batch in (1, 2)
        }
        spans = sorted(row["timed"] for row in rows)
        assert all(a[1] <= b[0] for a, b in itertools.pairwise(spans))

    def test_the_others_stand_still_meanwhile(self, networks, tmp_path):
        tasks = [("compiles", []), ("a", [1]), ("b", [1])]
        rows, missing, _ = self.run(networks, tmp_path, tasks, seconds=3.0)
        assert missing == ["compiles"]
        ticks = [float(line) for line in (tmp_path / "compiles.log").read_text().split()]
        assert len(rows) == 2
        for start, end in (row["timed"] for row in rows):
            assert not [tick for tick in ticks if start + 0.05 < tick < end]
        assert ticks[-1] > max(row["timed"][1] for row in rows)

    def test_what_fails_is_recorded_and_the_rest_goes_on(self, networks, tmp_path):
        tasks = [("crashes", [1, 2, 3]), ("refuses", [1]), ("fine", [1])]
        rows, missing, _ = self.run(networks, tmp_path, tasks)
        outcome = {(row["model"], row["shape"][0]): row.get("error", "") for row in rows}
        assert missing == []
        assert outcome == {
            ("crashes", 1): "",
            ("crashes", 2): "its process ended with status -11",
            ("crashes", 3): "its process ended with status -11",
            ("refuses", 1): "out of memory",
            ("fine", 1): "",
        }

    def test_a_worker_that_hangs_while_it_is_timed_is_ended(self, networks, tmp_path, monkeypatch):
        monkeypatch.setattr(networks, "ROW_TIMEOUT", 0.3)
        rows, missing, _ = self.run(networks, tmp_path, [("hangs", [1]), ("fine", [1])])
        outcome = {row["model"]: row.get("error", "") for row in rows}
        assert outcome == {"hangs": "its process ended with status -9", "fine": ""}
        assert missing == []

    def test_the_budget_ends_what_is_being_built(self, networks, tmp_path):
        tasks = [("fine", [1]), ("slow", [1]), ("later", [1])]
        rows, missing, alive = self.run(networks, tmp_path, tasks, workers=1, seconds=1.5)
        assert [row["model"] for row in rows] == ["fine"]
        assert missing == ["slow", "later"]
        assert len(alive) == 2  # the third never started


class TestNetworks:
    def test_what_has_a_row_is_skipped_and_the_wanted_come_first(self, networks, tmp_path):
        models = networks.ordered(["alexnet", "resnet50", "mobilenet_v2", "vgg"])
        assert models == ["mobilenet_v2", "resnet50", "alexnet", "vgg"]
        assert set(networks.PRIORITY) <= set(networks.list_models())
        results = results_file.Results(tmp_path / "n.json", networks.key)
        results.add({"model": "resnet50", "dtype": "float16", "shape": [1, 3, 224, 224]})
        results.add(
            networks.failed({"model": "vgg", "dtype": "float16", "shape": [1]}, "its process ended")
        )
        assert networks.todo(models, [1, 256], "float16", results) == [
            ("mobilenet_v2", [1, 256]), ("resnet50", [256]), ("alexnet", [1, 256]), ("vgg", [256]),
        ]  # fmt: skip
        assert len(networks.todo(models, [1], "bfloat16", results)) == 4

    def test_rows_of_other_code_and_of_processes_that_died_are_measured_again(self, networks):
        here = networks.environment.capture()
        row = {"model": "vgg", "dtype": "float16", "shape": [1, 3, 224, 224], "environment": here}
        later = {**here, "date": "2027", "memory_bytes": 1}
        assert networks.kept(row, later)
        assert not networks.kept(row, {**here, "git": {"commit": "other", "dirty": False}})
        assert not networks.kept(row, {**here, "gpus": [{"name": "NVIDIA H100"}]})
        assert not networks.kept(networks.failed({"model": "vgg", "shape": [1]}, "died"), here)

    @pytest.fixture
    def on_cpu(self, networks, monkeypatch):
        monkeypatch.setattr(networks, "DEVICE", "cpu")
        monkeypatch.setattr(networks.peers, "_BUILDERS", networks.peers._CUDA_BUILDERS)
        monkeypatch.setattr(networks.gpu_timing, "capture", lambda call: call)

        def out_of_memory(*args, **kwargs):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB\nmore")

        monkeypatch.setattr(torch, "compile", out_of_memory)

        def interleave(variants, *, log, **kwargs):
            return timing.interleave(variants, min_rounds=1, min_time=0.0, burst=1, settle=0)

        monkeypatch.setattr(networks.gpu_timing, "interleave_cuda", interleave)
        return networks

    def test_a_worker_builds_waits_and_hands_in_its_row(self, on_cpu):
        channel, orders = io.StringIO(), io.StringIO("go\n")
        on_cpu.work("cifar_resnet20", [2], "float32", channel, orders)
        ready, handed = map(json.loads, channel.getvalue().splitlines())
        assert ready == {"ready": 2}
        row = handed["row"]
        assert row["shape"] == [2, 3, 32, 32]
        assert row["ok"], row
        assert set(row["variants"]) == {
            "eager", "eager_channels_last", "eager_graph", "cvfast", "cvfast_graph",
        }  # fmt: skip
        assert all(variant["ok"] for variant in row["variants"].values())
        assert row["unavailable"]["max_autotune"] == (
            "max_autotune: OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB"
        )
        assert row["best"] in on_cpu.OURS
        assert row["speedup"] > 0
        variant = row["variants"]["eager"]
        assert variant["images_per_second"] == pytest.approx(2 / variant["median"])
        assert "cifar_resnet20" in on_cpu.describe(row)

    def test_a_worker_whose_master_is_gone_ends(self, on_cpu):
        channel = io.StringIO()
        on_cpu.work("cifar_resnet20", [1, 2], "float32", channel, io.StringIO(""))
        assert [json.loads(line) for line in channel.getvalue().splitlines()] == [{"ready": 1}]

    def test_a_wrong_network_has_no_speedup(self, on_cpu, monkeypatch):
        class Wrong(torch.nn.Module):
            def __init__(self, model):
                super().__init__()
                self.model = model
                self.report = Report("Wrong")

            def forward(self, x):
                return 1.01 * self.model(x)

        monkeypatch.setattr(on_cpu.cvfast, "optimize", lambda model, inputs: Wrong(model))
        channel = io.StringIO()
        on_cpu.work("cifar_resnet20", [2], "float32", channel, io.StringIO("go\n"))
        row = json.loads(channel.getvalue().splitlines()[-1])["row"]
        assert not row["ok"]
        assert row["speedup"] is None
        assert row["best_peer"].startswith("eager")
        assert "FAILED" in on_cpu.describe(row)

    def test_a_network_that_runs_nowhere_is_a_row(self, on_cpu, monkeypatch):
        def fail(*args, **kwargs):
            raise RuntimeError("an illegal memory access was encountered")

        monkeypatch.setattr(on_cpu.peers, "build", fail)
        monkeypatch.setattr(on_cpu.cvfast, "optimize", fail)
        channel = io.StringIO()
        on_cpu.work("cifar_resnet20", [1], "float32", channel, io.StringIO("go\n"))
        row = json.loads(channel.getvalue().splitlines()[-1])["row"]
        assert row["error"] == "eager: RuntimeError: an illegal memory access was encountered"

    def test_a_network_that_cannot_be_built_at_all_is_a_row(self, on_cpu, monkeypatch):
        def fail(*args):
            raise torch.OutOfMemoryError("CUDA out of memory.")

        monkeypatch.setattr(on_cpu, "build", fail)
        channel = io.StringIO()
        on_cpu.work("cifar_resnet20", [1, 2], "float32", channel, io.StringIO())
        rows = [json.loads(line)["row"] for line in channel.getvalue().splitlines()]
        assert [row["error"] for row in rows] == ["OutOfMemoryError: CUDA out of memory."] * 2
        assert "not measured" in on_cpu.describe(rows[0])


class TestOps:
    PROBLEM = Problem(2, 6, 9, 9, (3, 3), (2, 2), (1, 1), dtype=torch.float32)
    CALL = calls.Call("depthwise", PROBLEM, "forward", "relu6")

    @pytest.fixture
    def ops(self, monkeypatch):
        """On the CPU, with the definition in place of the kernels, the CUDA extension missing."""
        module = script("bench_gpu_ops")
        right = module.inventory.example

        def example(call, *, device):
            one = right(call, device=device)
            return replace(one, kernel=lambda backend, launch: one.definition(*one.inputs))

        def interleave(variants, *, cold_l2, log, **kwargs):
            return timing.interleave(variants, min_rounds=1, min_time=0.0, burst=1, settle=0)

        missing = extension.Status("cuda", False, "not built", "pip install .")
        monkeypatch.setattr(module, "DEVICE", "cpu")
        monkeypatch.setattr(module.inventory, "example", example)
        monkeypatch.setattr(
            module.extension, "load", lambda name: missing if name == "cuda" else True
        )
        monkeypatch.setattr(module.gpu_timing, "interleave_cuda", interleave)
        return module

    def test_row(self, ops):
        row = ops.measure(self.CALL, bandwidth=1e10, inductor=False, min_time=0.0)
        json.dumps(row)
        assert row["verified"], row["checks"]
        assert row["best"] == "cvfast_triton"
        assert set(row["seconds"]) == {"cvfast_triton", "eager", "copy"}
        assert set(row["speedup"]) == {"eager", "copy"}
        assert "not built" in row["unavailable"]["cvfast_cuda"]
        seconds = row["seconds"]["cvfast_triton"]["median"]
        assert row["bytes"] == self.PROBLEM.bytes()
        assert row["share_of_copy_bandwidth"] == pytest.approx(row["bytes"] / seconds / 1e10)
        assert row["tflops"] == pytest.approx(1e-12 * self.PROBLEM.flops() / seconds)
        assert "cvfast_triton" in ops.describe(row)

    def test_a_wrong_kernel_fails_its_check(self, ops, monkeypatch):
        right = ops.inventory.example

        def wrong(call, *, device):
            one = right(call, device=device)
            definition = one.definition
            return replace(
                one, kernel=lambda b, launch: [1.01 * y for y in definition(*one.inputs)]
            )

        monkeypatch.setattr(ops.inventory, "example", wrong)
        row = ops.measure(self.CALL, bandwidth=1e10, inductor=False, min_time=0.0)
        assert not row["verified"]
        assert "FAILED" in ops.describe(row)

    def test_a_peer_that_does_not_run_is_reported(self, ops, monkeypatch):
        def fail(*args, **kwargs):
            raise RuntimeError("no compiler")

        monkeypatch.setattr(torch, "compile", lambda *args, **kwargs: fail)
        row = ops.measure(self.CALL, bandwidth=1e10, inductor=True, min_time=0.0)
        assert row["unavailable"]["inductor"] == "RuntimeError: no compiler"
        assert row["verified"]

    def test_operators_come_in_turn_and_the_largest_calls_first(self, ops):
        found = ops.wanted(list(calls.OPS), [256], ["float16"])
        assert {call.op for call in found[: len(calls.OPS)]} == set(calls.OPS)
        for op in calls.OPS:
            sizes = [call.problem.bytes() for call in found if call.op == op]
            assert sizes == sorted(sizes, reverse=True)

    @pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
    def test_without_a_gpu_it_says_so(self, ops, monkeypatch, capsys):
        monkeypatch.setattr(sys, "argv", ["bench_gpu_ops.py"])
        assert ops.main() == 2
        assert "on a GPU" in capsys.readouterr().out

    def test_a_second_run_adds_what_is_missing(self, ops, monkeypatch, tmp_path, capsys):
        path = tmp_path / "ops.json"
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(ops.gpu_timing, "copy_bandwidth", lambda: 1e10)
        monkeypatch.setattr(ops.devices, "current", lambda: ops.devices.find("H200"))
        other = replace(self.CALL, activation="none")
        for found in ([self.CALL], [self.CALL, other]):
            monkeypatch.setattr(ops, "wanted", lambda *args, found=found: found)
            monkeypatch.setattr(
                sys, "argv", ["bench_gpu_ops.py", "--json", str(path), "--no-inductor"]
            )
            assert ops.main() == 0
            assert capsys.readouterr().out.count("cvfast_triton") == 1
        rows = json.loads(path.read_text())["rows"]
        assert [row["call"] for row in rows] == [self.CALL.describe(), other.describe()]


class TestSanitize:
    @pytest.fixture
    def sanitize(self):
        return script("sanitize_kernels")

    @pytest.mark.usefixtures("cpu_extension")
    def test_cases_agree_with_the_reference(self, sanitize):
        assert sanitize.exercise(("cpu",), "cpu") == []

    @pytest.mark.usefixtures("cpu_extension")
    def test_a_kernel_that_does_nothing_is_named(self, sanitize, monkeypatch):
        original = sanitize._gradients

        def silent(case, backend, inputs):
            results = original(case, backend, inputs)
            return [torch.zeros_like(t) for t in results] if backend == "cpu" else results

        monkeypatch.setattr(sanitize, "_gradients", silent)
        wrong = sanitize.exercise(("cpu",), "cpu")
        assert len(wrong) >= 4 * len(sanitize.CASES) - 4  # a ReLU may leave nothing of a tiny case
        assert wrong[0].startswith("cpu: y of Case(channels=64")

    def test_the_kernels_of_every_operator_run_and_wrong_results_are_named(
        self, sanitize, monkeypatch
    ):
        problem = Problem(1, 6, 5, 4, (3, 3), padding=(1, 1), dtype=torch.float32)
        chosen = [
            calls.Call("depthwise", replace(problem, dtype=dtype), "forward", "relu")
            for dtype in calls.DTYPES
        ]
        monkeypatch.setattr(calls, "general_calls", lambda: chosen)
        monkeypatch.setattr(extension, "load", lambda name: name == "triton")
        monkeypatch.setenv("TRITON_INTERPRET", "1")
        assert sanitize.exercise_all("cpu") == []
        monkeypatch.setattr(Example, "run", lambda self, backend: [torch.zeros(1, 6, 5, 4)])
        assert sanitize.exercise_all("cpu") == [
            f"triton: depthwise forward {call.describe()}" for call in (chosen[0], chosen[2])
        ]

    def test_slices_are_aligned_to_nothing(self, sanitize):
        case = next(case for case in sanitize.CASES if case.sliced)
        x, *_ = case.tensors("cpu")
        assert x.stride(1) == 1
        assert x.stride(3) == case.channels + 8
        assert x.storage_offset() == 3

    @pytest.fixture
    def tool(self, sanitize, tmp_path, monkeypatch):
        """A compute-sanitizer that does as the tool's name says."""
        path = tmp_path / "compute-sanitizer"
        path.write_text(
            '#!/bin/sh\n[ -n "$PYTORCH_NO_CUDA_MEMORY_CACHING" ] || exit 3\n'
            'case "$2" in\n'
            "memcheck) echo '========= ERROR SUMMARY: 0 errors';;\n"
            "racecheck) echo '========= Race reported'; exit $4;;\n"
            "*) echo '========= Error: Device not supported'; exit 1;;\nesac\n"
        )
        path.chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")

    @pytest.mark.usefixtures("tool")
    def test_outcomes(self, sanitize, tmp_path, monkeypatch, capsys):
        assert dict(sanitize.sanitize(sanitize.TOOLS, tmp_path / "logs", ["true"])) == {
            "memcheck": "passed", "racecheck": "failed", "initcheck": "Error: Device not supported",
        }  # fmt: skip
        arguments = ["sanitize_kernels.py", "--logs", str(tmp_path / "logs"), "--tools"]
        for tools, status in (
            (["memcheck", "initcheck"], 0), (["memcheck", "racecheck"], 1), (["initcheck"], 77),
        ):  # fmt: skip
            monkeypatch.setattr(sys, "argv", [*arguments, *tools])
            assert sanitize.main() == status
        assert "Race reported" in capsys.readouterr().out

    def test_without_the_tool_it_is_skipped(self, sanitize, tmp_path, monkeypatch, capsys):
        monkeypatch.setenv("PATH", str(tmp_path))
        monkeypatch.setattr(sys, "argv", ["sanitize_kernels.py"])
        assert sanitize.main() == 77
        assert "compute-sanitizer is not on PATH" in capsys.readouterr().out


def ncu_output(kernels):
    """What ncu prints: lines of its own, names of columns, units, a row per kernel."""
    columns = {
        "ID": "",
        "thread Domain:Push/Pop_Range:PL_Type:PL_Value:CLR_Type:Color:Msg_Type:Msg": "",
        "Kernel Name": "",
        "dram__bytes_read.sum": "byte",
        "dram__bytes_write.sum": "byte",
        "dram__throughput.avg.pct_of_peak_sustained_elapsed": "%",
    }
    text = io.StringIO()
    writer = csv.writer(text, quoting=csv.QUOTE_ALL)
    writer.writerow(columns)
    writer.writerow(columns.values())
    for index, (label, *cells) in enumerate(kernels):
        writer.writerow([index, f"7  <default domain>:{label}:none" if label else "", *cells])
    head = '==PROF== Connected to process 7\n==PROF== Profiling "depthwise_tile" - 0: 3 passes\n'
    return head + text.getvalue().replace("\r", "")


_RANGE = "cvfast/depthwise/64x96x112x112_k3_s2_float16_relu6/"
NCU = ncu_output(
    [
        (f"{_RANGE}forward.cuda", "cvfast::tile<__half>", "51,380,224", "51380224", "91.25"),
        (f"{_RANGE}backward_input.cuda", "void at::native::fill", "1", "1", "1"),
        (f"{_RANGE}backward_input.triton", "_patch_kernel", "102760448", "n/a", "80"),
        ("", "some other kernel", "1", "1", "1"),
    ]
)


class TestProfile:
    @pytest.fixture
    def profile(self):
        return script("profile_kernels")

    def test_rows_of_the_csv(self, profile):
        first, second = profile.parse(NCU.splitlines())
        assert first == {
            "op": "depthwise",
            "layer": "64x96x112x112_k3_s2_float16_relu6",
            "pass": "forward",
            "backend": "cuda",
            "kernel": "cvfast::tile<__half>",
            "dram_bytes_read": 51380224.0,
            "dram_bytes_written": 51380224.0,
            "dram_percent": 91.25,
        }
        assert (second["pass"], second["backend"]) == ("backward_input", "triton")
        assert second["dram_bytes_written"] is None
        profiled, backward = profile.with_least_bytes([first, second])
        images = profile.BATCH * 96 * (112 * 112 + 56 * 56) * 2
        assert profiled["least_bytes"] == images + 4 * 96 * 10
        assert "0.53 of the least  dram 91 %" in profile.describe(profiled)
        assert "least_bytes" not in backward
        assert "80 %" in profile.describe(backward)

    def test_every_operator_and_pass_is_profiled_at_one_batch(self, profile):
        chosen = profile.profiled()
        assert {(call.op, call.pass_) for call in chosen} == {
            (column.op, pass_) for column in calls.COLUMNS for pass_ in column.passes
        }
        assert {call.problem.dtype for call in chosen} == {profile.DTYPE}
        labels = {profile.range_name(call, "cuda") for call in chosen}
        assert len(labels) == len(chosen)
        assert all(label.count("/") == 3 and not {":", '"', " "} & set(label) for label in labels)
        assert f"{_RANGE}forward.cuda" in labels

    def test_each_kernel_runs_before_it_is_profiled(self, profile, monkeypatch):
        events = []
        problem = Problem(1, 8, 5, 5, (3, 3), dtype=torch.float32)
        call = calls.Call("depthwise", problem, "forward", "none")

        def example(call, *, device):
            assert device == "cpu"
            run = lambda backend, launch: events.append(backend) or torch.zeros(1)  # noqa: E731
            return Example((), torch.zeros, run)

        monkeypatch.setattr(profile, "profiled", lambda: [call])
        monkeypatch.setattr(profile.inventory, "example", example)
        monkeypatch.setattr(profile.extension, "load", lambda name: name != "cuda")
        monkeypatch.setattr(profile.nvtx, "enable", lambda: True)
        monkeypatch.setattr(
            profile.nvtx, "range", lambda name: events.append(name) or nullcontext()
        )
        for name in ("start", "stop"):
            monkeypatch.setattr(torch.cuda.profiler, name, lambda name=name: events.append(name))
        monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
        profile.run("cpu")
        label = profile.range_name(call, "triton")
        assert events == ["triton", "start", label, "triton", "stop"]

    def test_a_metric_that_an_architecture_lacks_is_done_without(
        self, profile, tmp_path, monkeypatch
    ):
        script = f"""#!/bin/sh
case "$*" in *pipe_tensor*) echo '==ERROR== Failed to find metric sm__pipe_tensor'; exit 1;; esac
cat <<'END'
{NCU}
END
"""
        status, path = self.main(profile, tmp_path, monkeypatch, NCU, script=script)
        assert status == 0
        assert len(json.loads(path.read_text())["rows"]) == 2

    def main(self, profile, tmp_path, monkeypatch, output, status=0, script=None):
        ncu = tmp_path / "ncu"
        ncu.write_text(script or f"#!/bin/sh\ncat <<'END'\n{output}\nEND\nexit {status}\n")
        ncu.chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
        path, log = tmp_path / "gpu" / "profile.json", tmp_path / "ncu.log"
        arguments = ["profile_kernels.py", "--json", str(path), "--log", str(log)]
        monkeypatch.setattr(sys, "argv", arguments)
        result = profile.main()
        assert output.strip() in log.read_text()
        return result, path

    def test_result_is_written(self, profile, tmp_path, monkeypatch):
        status, path = self.main(profile, tmp_path, monkeypatch, NCU)
        assert status == 0
        written = json.loads(path.read_text())
        assert len(written["rows"]) == 2
        assert written["batch"] == profile.BATCH
        assert written["environment"]["packages"]["torch"]

    def test_counters_that_may_not_be_read_are_a_reason_to_skip(
        self, profile, tmp_path, monkeypatch, capsys
    ):
        output = "==ERROR== ERR_NVGPUCTRPERM - The user does not have permission"
        status, path = self.main(profile, tmp_path, monkeypatch, output, status=1)
        assert status == 77
        assert capsys.readouterr().out.startswith("skipped: the driver permits")
        assert not path.exists()

    def test_any_other_failure_is_one(self, profile, tmp_path, monkeypatch):
        assert self.main(profile, tmp_path, monkeypatch, "Segmentation fault", 1)[0] == 1

    def test_without_ncu_it_is_skipped(self, profile, tmp_path, monkeypatch):
        monkeypatch.setenv("PATH", str(tmp_path))
        monkeypatch.setattr(sys, "argv", ["profile_kernels.py"])
        assert profile.main() == 77
