"""Seeing and steering processes on the simulated Ascend."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from ascend_sim.controls import Entry, Links, Simulator, SimulatorError, Stream
from rig.harness import Here, Rank, TeamKeeper
from rig.npu_ranks import start_program, start_team

pytestmark = pytest.mark.thorough

LIMIT_S = 20.0


@pytest.fixture(scope="module")
def _controls_keeper() -> Iterator[TeamKeeper]:
    keeper = TeamKeeper(lambda: start_team(1, memory_mb=64))
    yield keeper
    keeper.close()


@pytest.fixture
def rank(_controls_keeper: TeamKeeper) -> Iterator[Rank]:
    """A process with one device."""
    rank = _controls_keeper.team().ranks[0]
    rank.call(upload, 1)
    yield rank
    _controls_keeper.after_test()


@pytest.fixture
def simulator(rank: Rank) -> Iterator[Simulator]:
    """A connection to that process."""
    with Simulator(rank.pid) as simulator:
        yield simulator


# --- in the rank's process -----------------------------------------------------------------------


def upload(here: Here, count: int, *, wait: bool = True) -> None:
    """So many copies to the device on a stream of their own, each followed by the record of an event."""
    npu = torch.get_device_module("npu")
    stream = here.kept["stream"] = npu.Stream()
    source = here.kept["source"] = torch.ones(4).pin_memory()
    with npu.stream(stream):
        for _ in range(count):
            here.kept.setdefault("copies", []).append(source.to("npu", non_blocking=True))
            npu.Event().record()
    _ = stream.npu_stream  # empties torch_npu's task queue
    if wait:
        stream.synchronize()


def synchronize(here: Here) -> None:
    here.kept["stream"].synchronize()


# --- tests ---------------------------------------------------------------------------------------


def until(what: str, found: Callable[[], Any]) -> Any:
    deadline = time.monotonic() + LIMIT_S
    while not (seen := found()):
        assert time.monotonic() < deadline, f"no {what} within {LIMIT_S:g} s"
        time.sleep(0.005)
    return seen


def busy(simulator: Simulator) -> list[Stream]:
    return [stream for stream in simulator.listing().streams if stream.busy]


def moments(simulator: Simulator, start: int, name: str) -> list[Entry]:
    return [entry for entry in simulator.history(start).entries if entry.task == name]


def test_a_listing_shows_what_runs_and_what_is_queued(rank: Rank, simulator: Simulator) -> None:
    assert simulator.pid == simulator.listing().pid == rank.pid
    assert not busy(simulator)
    with simulator.hold("memcpy H2D", 1) as gate:
        rank.call(upload, 2, wait=False)
        gate.wait_until_held()
        (stream,) = busy(simulator)
        assert stream.running is not None
        assert stream.running.name == "memcpy H2D"
        assert stream.running.waiting is not None
        assert stream.running.waiting.reason == f"held at gate {gate.number}"
        assert [task.name for task in stream.queued] == ["event record", "memcpy H2D", "event record"]
        numbers = [task.number for task in [stream.running, *stream.queued]]
        assert numbers == list(range(numbers[0], numbers[0] + 4))
        assert (stream.ended, stream.device, stream.error) == (0, 0, None)
    rank.call(synchronize)
    assert simulator.listing().stream(stream.stream).ended == 4


def test_a_gate_holds_so_many_tasks(rank: Rank, simulator: Simulator) -> None:
    with simulator.hold("memcpy*", 1) as gate:
        rank.call(upload, 1, wait=False)
        gate.wait_until_held()
        assert gate.holds == 1
        rank.call(upload, 3)  # on another stream, which the gate does not hold any more
        assert gate.holds == 1
    until("idle process", lambda: not busy(simulator))


def test_a_gate_without_a_number_holds_all(rank: Rank, simulator: Simulator) -> None:
    gate = simulator.hold("memcpy*")
    rank.call(upload, 1, wait=False)
    rank.call(upload, 1, wait=False)
    gate.wait_until_held(tasks=2)
    gate.release()
    until("idle process", lambda: not busy(simulator))
    assert gate.holds == 0
    gate.release()  # the second time it does nothing


def test_a_gate_holds_what_was_queued_before_it_closed(rank: Rank, simulator: Simulator) -> None:
    with simulator.hold("memcpy H2D", 1) as first:
        rank.call(upload, 1, wait=False)
        first.wait_until_held()
        with simulator.hold("event record", 1) as second:
            assert second.holds == 0
            first.release()
            second.wait_until_held()
    rank.call(synchronize)


def test_a_task_that_two_gates_want_passes_both(rank: Rank, simulator: Simulator) -> None:
    with simulator.hold("memcpy H2D", 1) as first, simulator.hold("memcpy*", 1) as second:
        rank.call(upload, 1, wait=False)
        first.wait_until_held()
        assert second.holds == 0
        first.release()
        second.wait_until_held()
    rank.call(synchronize)


@pytest.mark.parametrize(
    ("pattern", "held"), [("memcpy H2D", True), ("memcpy ?2D", True), ("memcpy", False), ("[n-z]*", False)]
)
def test_patterns_are_of_whole_names(rank: Rank, simulator: Simulator, pattern: str, held: bool) -> None:
    with simulator.hold(pattern) as gate:
        rank.call(upload, 1, wait=False)
        if held:
            gate.wait_until_held()
        else:
            until("idle process", lambda: not busy(simulator))
    rank.call(synchronize)


def test_a_gate_that_holds_nothing_says_what_there_is(rank: Rank, simulator: Simulator) -> None:
    with (
        simulator.hold("HcclSend") as gate,
        pytest.raises(SimulatorError, match=rf"(?s)'HcclSend'.*process {rank.pid}"),
    ):
        gate.wait_until_held(0.05)


def test_a_delay_makes_tasks_take_time(rank: Rank, simulator: Simulator) -> None:
    milliseconds = 150
    simulator.delay("memcpy*", milliseconds * 1000)
    begin = time.monotonic()
    rank.call(upload, 2)
    assert time.monotonic() - begin >= 2 * milliseconds / 1000
    simulator.delay("memcpy*", 10_000_000)  # in the place of the first one
    simulator.delay("memcpy H2D", 0)  # another pattern, without a rule
    simulator.delay("memcpy*", 0)
    begin = time.monotonic()
    rank.call(upload, 2)
    assert time.monotonic() - begin < 5


def test_the_latest_delay_counts(rank: Rank, simulator: Simulator) -> None:
    simulator.delay("memcpy*", 60_000_000)
    simulator.delay("*H2D", 1)
    rank.call(upload, 1)
    simulator.delay("*H2D", 0)
    simulator.delay("memcpy*", 0)


def test_the_history_has_every_moment_in_order(rank: Rank, simulator: Simulator) -> None:
    start = simulator.history().next
    rank.call(upload, 2)
    history = simulator.history(start)
    assert history.lost == 0
    assert [entry.number for entry in history.entries] == list(range(start, history.next))
    for name in ("memcpy H2D", "event record"):
        of_name = [entry for entry in history.entries if entry.task == name]
        for number in {entry.task_number for entry in of_name}:
            events = [entry.event for entry in of_name if entry.task_number == number]
            assert events == ["queued", "began", "ended"]
        assert len(of_name) >= 6, "torch_npu records events of its own, too"
    assert simulator.history(history.next).entries == []


def test_a_held_task_has_not_begun(rank: Rank, simulator: Simulator) -> None:
    start = simulator.history().next
    with simulator.hold("memcpy H2D", 1) as gate:
        rank.call(upload, 1, wait=False)
        gate.wait_until_held()
        assert [entry.event for entry in moments(simulator, start, "memcpy H2D")] == ["queued"]
    rank.call(synchronize)
    assert [entry.event for entry in moments(simulator, start, "memcpy H2D")] == ["queued", "began", "ended"]


def test_several_may_look_at_once(rank: Rank, simulator: Simulator) -> None:
    with contextlib.ExitStack() as stack:
        others = [stack.enter_context(Simulator(rank.pid)) for _ in range(5)]
        assert {other.listing().pid for other in [simulator, *others]} == {rank.pid}


def test_links_are_set(simulator: Simulator) -> None:
    simulator.links(us_per_message=1, mb_per_s=2, eager_bytes=3)
    assert simulator.listing().links == Links(us_per_message=1, mb_per_s=2, eager_bytes=3)
    simulator.links()
    assert simulator.listing().links == Links()


@pytest.mark.parametrize(
    "words",
    [["lost"], ["list", "all"], ["hold"], ["delay", "*"], ["delay", "*", "soon"], ["release", "999999"]],
)
def test_what_is_not_understood_is_an_error(simulator: Simulator, words: list[str]) -> None:
    with pytest.raises(SimulatorError, match=" ".join(words).replace("*", r"\*")):
        simulator.ask(*words)
    assert simulator.listing(), "and the connection goes on"


def test_a_process_without_a_simulator_is_an_error() -> None:
    with pytest.raises(SimulatorError, match=f"process {os.getpid()}"):
        Simulator()


DEVICE_IN_USE = """
import sys, torch, torch_npu
torch.npu.set_device(0)
torch.npu.synchronize()
print("ready", flush=True)
sys.stdin.read()
"""


def test_a_process_that_is_killed_is_an_error() -> None:
    with start_program(DEVICE_IN_USE) as program:
        assert program.stdout is not None
        assert program.stdout.readline() == "ready\n"
        with Simulator(program.pid) as simulator:
            gate = simulator.hold("*")
            program.kill()
            program.wait(LIMIT_S)
            with pytest.raises(ConnectionError):
                simulator.listing()
            with gate:
                pass  # opening it is of no use, and no error
        with pytest.raises(SimulatorError):
            Simulator(program.pid)


ANOTHER_USER = """
import os, socket, sys
os.setuid(65534)
connection = socket.socket(socket.AF_UNIX)
connection.connect("\\0ascend-sim-" + sys.argv[1])
connection.settimeout(20)
try:
    connection.sendall(b"list\\n")
    print(connection.recv(100))
except ConnectionError:
    print(b"")
"""


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become another user")
def test_another_user_is_not_served(rank: Rank) -> None:
    command = [sys.executable, "-c", ANOTHER_USER, str(rank.pid)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S, check=True)
    assert result.stdout == "b''\n"
