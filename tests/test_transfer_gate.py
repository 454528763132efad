"""Who waits for a chunk that is not computed yet, with events that pass when the test says so."""

from __future__ import annotations

import queue
import threading
from types import SimpleNamespace
from typing import Any

from sglang_npu_pp.observe.trace import Trace
from sglang_npu_pp.streams import DeviceStreams
from sglang_npu_pp.transfer_gate import TransferGate

LIMIT_S = 30.0


class Event:
    """An event of a device, which passes when the test says so."""

    def __init__(self) -> None:
        self._passed = threading.Event()
        self.waited_for = threading.Event()
        self.threads: list[str] = []

    def pass_(self) -> None:
        self._passed.set()

    def synchronize(self) -> None:
        self.threads.append(threading.current_thread().name)
        self.waited_for.set()
        assert self._passed.wait(LIMIT_S), "the event did not pass"

    def query(self) -> bool:
        return self._passed.is_set()


class Worker:
    """A thread of a transfer engine, which takes chunks from a queue as upstream's does."""

    def __init__(self, gate: TransferGate) -> None:
        self._gate = gate
        self.chunks: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self.read: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="worker", daemon=True)
        self._thread.start()

    def put(self, chunk: Any) -> None:
        self._gate.queued(chunk)
        self.chunks.put(chunk)

    def end(self) -> None:
        self.chunks.put(None)
        self._thread.join(LIMIT_S)
        assert not self._thread.is_alive(), "the worker has not ended"

    def _run(self) -> None:
        while True:
            chunk = self.chunks.get()
            self._gate.taken(chunk)
            if chunk is None:
                return
            self.read.put(chunk.number)


def chunk(number: int) -> Any:
    return SimpleNamespace(number=number, pages=[number], state=None)


def make_gate(trace: Trace | None = None) -> TransferGate:
    return TransferGate(DeviceStreams("cpu"), trace or Trace())


def test_the_worker_waits_and_who_queues_does_not() -> None:
    trace = Trace(enabled=True)
    gate = make_gate(trace)
    worker, written = Worker(gate), Event()
    with gate.behind(written):
        worker.put(chunk(1))
    assert written.waited_for.wait(LIMIT_S), "the worker did not wait"
    assert worker.read.empty()
    written.pass_()
    assert worker.read.get(timeout=LIMIT_S) == 1
    assert written.threads == ["worker"]
    worker.end()
    assert [event.name for event in trace.events()] == ["chunk_queued", "chunk_taken"]


def test_each_chunk_waits_for_its_own_launch() -> None:
    gate = make_gate()
    worker, events = Worker(gate), [Event(), Event()]
    for number, event in enumerate(events):
        with gate.behind(event):
            worker.put(chunk(number))
    events[0].pass_()
    assert worker.read.get(timeout=LIMIT_S) == 0
    assert events[1].waited_for.wait(LIMIT_S)
    assert worker.read.empty()
    events[1].pass_()
    assert worker.read.get(timeout=LIMIT_S) == 1
    worker.end()


def test_what_is_queued_outside_is_read_at_once() -> None:
    gate = make_gate()
    worker = Worker(gate)
    with gate.behind(Event()):
        pass
    worker.put(chunk(1))
    assert worker.read.get(timeout=LIMIT_S) == 1
    worker.end()


def test_another_thread_that_queues_meanwhile_is_not_concerned() -> None:
    """A worker puts a chunk back that cannot be sent yet."""
    gate = make_gate()
    worker = Worker(gate)
    with gate.behind(Event()):
        other = threading.Thread(target=worker.put, args=(chunk(1),))
        other.start()
        other.join(LIMIT_S)
    assert worker.read.get(timeout=LIMIT_S) == 1
    worker.end()


def test_a_chunk_that_comes_back_does_not_wait_again() -> None:
    gate = make_gate()
    written, returned = Event(), chunk(1)
    written.pass_()
    with gate.behind(written):
        gate.queued(returned)
    gate.taken(returned)
    gate.queued(returned)
    gate.taken(returned)
    assert len(written.threads) == 1
