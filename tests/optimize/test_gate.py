from __future__ import annotations

import threading

import pytest

from cvfast.optimize.gate import Gate

WAIT = 5.0


@pytest.fixture
def gate() -> Gate:
    return Gate()


def started(work: object) -> threading.Thread:
    thread = threading.Thread(target=work, daemon=True)  # type: ignore[arg-type]
    thread.start()
    return thread


def test_tracing_waits_for_running_and_running_for_tracing(gate: Gate) -> None:
    events: list[str] = []
    inside, leave = threading.Event(), threading.Event()

    def trace() -> None:
        with gate.exclusive():
            events.append("trace begins")
            inside.set()
            assert leave.wait(WAIT)
            events.append("trace ends")

    with gate.shared():
        tracer = started(trace)
        assert not inside.wait(0.1)
        events.append("run ends")
    assert inside.wait(WAIT)

    def run() -> None:
        with gate.shared():
            events.append("second run")

    runner = started(run)
    runner.join(0.1)
    assert events == ["run ends", "trace begins"]
    leave.set()
    tracer.join(WAIT)
    runner.join(WAIT)
    assert events == ["run ends", "trace begins", "trace ends", "second run"]


def test_the_tracing_thread_may_enter_again(gate: Gate) -> None:
    with gate.exclusive(), gate.exclusive(), gate.shared():
        pass
    gate.wait()


def test_two_threads_that_run_may_both_come_to_trace(gate: Gate) -> None:
    together = threading.Barrier(2)
    tracing: list[int] = []

    def work() -> None:
        with gate.shared(), gate.shared():
            together.wait(WAIT)
            with gate.exclusive():
                tracing.append(1)
                assert sum(tracing) == 1
                tracing.pop()

    threads = [started(work) for _ in range(2)]
    for thread in threads:
        thread.join(WAIT)
        assert not thread.is_alive()


def test_an_exception_opens_the_gate(gate: Gate) -> None:
    for enter in (gate.shared, gate.exclusive):
        with pytest.raises(KeyError), enter():
            raise KeyError
    thread = started(gate.exclusive().__enter__)
    thread.join(WAIT)
    assert not thread.is_alive()
