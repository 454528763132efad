"""Devices, memory, streams and events of the simulated Ascend, as the real torch_npu uses them."""

from __future__ import annotations

import ctypes
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from ascend_sim.controls import Entry, Listing, Simulator, Wait
from rig.harness import Here, TeamKeeper
from rig.npu_ranks import run_program, start_program, start_team

pytestmark = pytest.mark.thorough

LIMIT_S = 20.0
ELEMENTS = 1000
POISON = 0xFF


@pytest.fixture(scope="module")
def _runtime_keeper() -> Iterator[TeamKeeper]:
    keeper = TeamKeeper(lambda: start_team(1, devices=2, memory_mb=256, poison=1))
    yield keeper
    keeper.close()


@pytest.fixture
def rank(_runtime_keeper: TeamKeeper) -> Iterator[Callable[..., Any]]:
    """Calls a function in a process with two devices of 256 MiB, whose memory is poisoned."""
    yield _runtime_keeper.team().ranks[0].call
    _runtime_keeper.after_test()


# --- in the rank's process -----------------------------------------------------------------------


def npu(here: Here) -> Any:
    return torch.get_device_module("npu")


def number_of(stream: Any) -> int:
    """The number of a stream in the listing: that of its default stream before it has any task."""
    with Simulator() as simulator:
        start = simulator.history().next
        event = torch.get_device_module("npu").Event()
        event.record(stream)
        stream.synchronize()
        return simulator.history(start).entries[0].stream


def pinned(value: float, elements: int = ELEMENTS) -> torch.Tensor:
    return torch.full((elements,), value).pin_memory()


def upload(tensor: torch.Tensor, device: str = "npu:0") -> torch.Tensor:
    """Put a copy on the current stream; the host goes on when the tensor is pinned."""
    return tensor.to(device, non_blocking=True)


def values_of(tensor: torch.Tensor) -> set[float]:
    return set(tensor.cpu().tolist())


def in_background(work: Callable[[], object]) -> tuple[threading.Thread, Callable[[], None]]:
    """A thread that does something, and how to wait for its end."""
    thread = threading.Thread(target=work, daemon=True)
    thread.start()

    def finish() -> None:
        thread.join(LIMIT_S)
        assert not thread.is_alive(), f"{work} has not ended within {LIMIT_S:g} s"

    return thread, finish


def until(simulator: Simulator, what: str, found: Callable[[Listing], Any]) -> Any:
    """Look at the listing until something true is found in it."""
    deadline = time.monotonic() + LIMIT_S
    while not (seen := found(simulator.listing())):
        assert time.monotonic() < deadline, f"no {what} within {LIMIT_S:g} s:\n{simulator.listing()}"
        time.sleep(0.005)
    return seen


def host_wait(simulator: Simulator, reason: str) -> Wait:
    """A host thread stands still for this reason."""

    def found(listing: Listing) -> list[Wait]:
        return [wait for wait in listing.host if reason in wait.reason]

    wait: Wait = until(simulator, f"host thread in {reason!r}", found)[0]
    return wait


def tasks_in_order(here: Here) -> list[Entry]:
    with Simulator() as simulator:
        stream = npu(here).Stream()
        start = simulator.history().next
        with npu(here).stream(stream), simulator.hold("memcpy H2D", 1) as gate:
            sources = [pinned(value) for value in range(3)]
            copies = [upload(source) for source in sources]
            gate.wait_until_held()
            held = simulator.listing()
            assert not stream.query()
        stream.synchronize()
        assert stream.query()
        assert [values_of(copy) for copy in copies] == [{0.0}, {1.0}, {2.0}]
        running = [s.running for s in held.streams if s.running is not None]
        assert [task.waiting and task.waiting.reason for task in running] == [f"held at gate {gate.number}"]
        assert [[task.name for task in s.queued] for s in held.streams if s.queued] == [["memcpy H2D"] * 2]
        return [entry for entry in simulator.history(start).entries if entry.task == "memcpy H2D"]


def events_order_streams(here: Here) -> None:
    first, second = npu(here).Stream(), npu(here).Stream()
    with Simulator() as simulator, simulator.hold("memcpy H2D", 1) as gate:
        with npu(here).stream(first):
            source = pinned(7)
            copy = upload(source)
            event = npu(here).Event()
            event.record()
        gate.wait_until_held()
        second.wait_event(event)
        with npu(here).stream(second):
            result = copy.to("cpu", non_blocking=True)
        waiting = until(simulator, "stream in an event wait", _waiting_for_events)[0]
        holder = next(s for s in simulator.listing().streams if s.running and s.running.name == "memcpy H2D")
        assert waiting.running.waiting.task == holder.queued[0].number
        assert holder.queued[0].name == "event record"
        assert not event.query()
        assert not second.query()
        gate.release()
        second.synchronize()
        assert event.query()
        assert values_of(result) == {7.0}


def _waiting_for_events(listing: Listing) -> list[Any]:
    return [s for s in listing.streams if s.running and s.running.name == "event wait" and s.running.waiting]


def without_the_event(here: Here) -> None:
    """The counterpart: without the event the second stream does not wait."""
    first, second = npu(here).Stream(), npu(here).Stream()
    with Simulator() as simulator, simulator.hold("memcpy H2D", 1) as gate:
        with npu(here).stream(first):
            source = pinned(8)
            copy = upload(source)
        gate.wait_until_held()
        with npu(here).stream(second):
            result = copy.to("cpu", non_blocking=True)
        second.synchronize()
        assert 8.0 not in values_of(result), "the first copy has not run"
        gate.release()
        first.synchronize()


def wait_for_the_record_of_the_call(here: Here) -> None:
    first, second = npu(here).Stream(), npu(here).Stream()
    event = npu(here).Event()
    event.record(first)
    first.synchronize()
    with Simulator() as simulator, simulator.hold("memcpy H2D", 1) as gate:
        second.wait_event(event)
        with npu(here).stream(first):
            source = pinned(1)
            upload(source)
            event.record()
        gate.wait_until_held()
        second.synchronize()  # would not end if it waited for the second record
        assert not event.query()


def never_recorded(here: Here) -> None:
    event = npu(here).Event()
    npu(here).current_stream().wait_event(event)
    event.synchronize()
    assert event.query()
    npu(here).synchronize()


def synchronisation_waits(here: Here, what: str) -> None:
    """A host thread that synchronises is listed with the last task that it waits for, and waits for it."""
    stream = npu(here).Stream()
    went_on: list[str] = []
    with Simulator() as simulator, simulator.hold("event record", 1) as gate:
        with npu(here).stream(stream):
            source = pinned(1)
            upload(source)
            event = npu(here).Event()
            event.record()
        gate.wait_until_held()
        wait_by = {
            "stream": stream.synchronize,
            "event": event.synchronize,
            "device": lambda: npu(here).synchronize("npu:0"),
        }[what]

        def work() -> None:
            npu(here).set_device(0)
            wait_by()
            went_on.append(what)

        thread, finish = in_background(work)
        wait = host_wait(simulator, "event" if what == "event" else "synchronising with stream")
        (last,) = [s.running for s in simulator.listing().streams if s.running]
        assert wait.task == last.number
        assert wait.thread == thread.native_id
        assert not went_on
        gate.release()
        finish()
        assert went_on == [what]
        assert not simulator.listing().host


def pinned_memory_is_read_late(here: Here) -> None:
    stream = npu(here).Stream()
    with Simulator() as simulator, npu(here).stream(stream):
        source = pinned(1)
        with simulator.hold("memcpy H2D", 1) as gate:
            copy = upload(source)  # returns although the copy cannot run
            gate.wait_until_held()
            source.fill_(2)
        stream.synchronize()
        assert values_of(copy) == {2.0}


def pinned_memory_is_written_late(here: Here) -> None:
    stream = npu(here).Stream()
    with Simulator() as simulator, npu(here).stream(stream):
        device = upload(pinned(1))
        stream.synchronize()
        target = pinned(0)
        with simulator.hold("memcpy D2H", 1) as gate:
            target.copy_(device, non_blocking=True)
            gate.wait_until_held()
            assert set(target.tolist()) == {0.0}
        stream.synchronize()
        assert set(target.tolist()) == {1.0}


def unpinned_memory_blocks(here: Here) -> None:
    source = torch.full((ELEMENTS,), 1.0)
    copies: list[torch.Tensor] = []
    with Simulator() as simulator, simulator.hold("memcpy H2D", 1) as gate:

        def work() -> None:
            npu(here).set_device(0)
            copies.append(upload(source))

        _, finish = in_background(work)
        gate.wait_until_held()
        host_wait(simulator, "a copy of memory that is not pinned")
        assert not copies
        gate.release()
        finish()
        source.fill_(2)
        assert values_of(copies[0]) == {1.0}


def allocate(here: Here, mib: int) -> str:
    """What torch_npu says about an allocation of so much."""
    npu(here).empty_cache()
    try:
        torch.empty(mib << 20, dtype=torch.uint8, device="npu:0")
    except RuntimeError as error:
        return str(error)
    return ""


def bytes_of_new_memory(here: Here) -> set[int]:
    npu(here).empty_cache()
    tensor = torch.empty(4 << 20, dtype=torch.uint8, device="npu:0")
    assert tensor.data_ptr() % 512 == 0
    return set(tensor.cpu().unique().tolist())


def free_memory(here: Here, device: int) -> tuple[int, int]:
    npu(here).empty_cache()
    free, total = npu(here).mem_get_info(device)
    return free, total


def memory_of_two_devices(here: Here) -> None:
    free, total = free_memory(here, 1)
    assert total == 256 << 20
    kept = torch.empty(100 << 20, dtype=torch.uint8, device="npu:1")
    assert free - free_memory(here, 1)[0] >= kept.numel()
    assert allocate(here, 200) == "", "device 0 has its own memory"


def copies_between_devices(here: Here) -> None:
    assert npu(here).device_count() == 2
    tensor = upload(pinned(3), "npu:1").to("npu:0")
    assert tensor.device.index == 0
    assert values_of(tensor) == {3.0}


def acl() -> ctypes.CDLL:
    return ctypes.CDLL("libascendcl.so")


def destroy_a_blocked_stream(here: Here) -> None:
    npu(here).set_device(0)
    stream = ctypes.c_void_p()
    memory = torch.zeros(16)
    put = acl().aclrtMemsetAsync
    put.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int32, ctypes.c_size_t, ctypes.c_void_p]
    with Simulator() as simulator, simulator.hold("memset", 1) as gate:
        assert acl().aclrtCreateStream(ctypes.byref(stream)) == 0
        for _ in range(2):
            assert put(memory.data_ptr(), 64, POISON, 64, stream) == 0
        gate.wait_until_held()
        assert acl().aclrtDestroyStream(stream) == 0
        until(simulator, "empty gate", lambda listing: not any(state.holds for state in listing.gates))
    assert not memory.any(), "tasks of a destroyed stream do not run"


def fill_the_history(here: Here, tasks: int) -> tuple[int, list[Entry]]:
    """Many tasks; what the history says about them, and how much it has lost."""
    stream = ctypes.c_void_p()
    memory = torch.zeros(16)
    put = acl().aclrtMemsetAsync
    put.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int32, ctypes.c_size_t, ctypes.c_void_p]
    assert acl().aclrtCreateStream(ctypes.byref(stream)) == 0
    with Simulator() as simulator:
        start = simulator.history().next
        for _ in range(tasks):
            put(memory.data_ptr(), 64, 0, 64, stream)
        assert acl().aclrtSynchronizeStream(stream) == 0
        history = simulator.history(start)
    assert acl().aclrtDestroyStream(stream) == 0
    return history.lost, history.entries


def seconds_of_cores_while_held(here: Here, seconds: float) -> float:
    stream = npu(here).Stream()
    with Simulator() as simulator, npu(here).stream(stream), simulator.hold("memcpy H2D", 1) as gate:
        source = pinned(1)
        upload(source)
        _, finish = in_background(stream.synchronize)
        gate.wait_until_held()
        host_wait(simulator, "synchronising")
        before = time.process_time()
        time.sleep(seconds)
        used = time.process_time() - before
        gate.release()
        finish()
        return used


# --- tests ---------------------------------------------------------------------------------------


def test_tasks_of_a_stream_run_one_after_the_other_in_order(rank: Callable[..., Any]) -> None:
    entries = rank(tasks_in_order)
    assert len({entry.stream for entry in entries}) == 1
    numbers = sorted({entry.task_number for entry in entries})
    assert len(numbers) == 3
    ran = [(entry.event, entry.task_number) for entry in entries if entry.event != "queued"]
    assert ran == [(event, number) for number in numbers for event in ("began", "ended")]
    assert [entry.task_number for entry in entries if entry.event == "queued"] == numbers


def test_an_event_orders_two_streams(rank: Callable[..., Any]) -> None:
    rank(events_order_streams)


def test_streams_are_not_ordered_without_an_event(rank: Callable[..., Any]) -> None:
    rank(without_the_event)


def test_a_wait_is_for_the_record_at_the_time_of_the_call(rank: Callable[..., Any]) -> None:
    rank(wait_for_the_record_of_the_call)


def test_an_event_that_was_never_recorded_holds_nobody(rank: Callable[..., Any]) -> None:
    rank(never_recorded)


@pytest.mark.parametrize("what", ["stream", "event", "device"])
def test_synchronising_waits_and_is_listed(rank: Callable[..., Any], what: str) -> None:
    rank(synchronisation_waits, what)


def test_a_copy_from_pinned_memory_reads_it_when_it_runs(rank: Callable[..., Any]) -> None:
    rank(pinned_memory_is_read_late)


def test_a_copy_to_pinned_memory_writes_it_when_it_runs(rank: Callable[..., Any]) -> None:
    rank(pinned_memory_is_written_late)


def test_a_copy_from_memory_that_is_not_pinned_blocks_the_host(rank: Callable[..., Any]) -> None:
    rank(unpinned_memory_blocks)


def test_memory_ends_as_on_a_device(rank: Callable[..., Any]) -> None:
    assert rank(allocate, 200) == ""
    assert "out of memory" in rank(allocate, 300)
    assert rank(allocate, 200) == "", "nothing is lost by a failed allocation"


def test_each_device_has_memory_of_its_own(rank: Callable[..., Any]) -> None:
    rank(memory_of_two_devices)


def test_new_memory_is_poisoned_and_aligned(rank: Callable[..., Any]) -> None:
    assert rank(bytes_of_new_memory) == {POISON}


def test_copies_between_devices(rank: Callable[..., Any]) -> None:
    rank(copies_between_devices)


def test_a_blocked_stream_can_be_destroyed(rank: Callable[..., Any]) -> None:
    rank(destroy_a_blocked_stream)


def test_the_history_is_long_and_says_what_it_lost(rank: Callable[..., Any]) -> None:
    lost, entries = rank(fill_the_history, 1000)
    assert lost == 0
    assert len(entries) == 3000
    lost, entries = rank(fill_the_history, 100_000)
    assert len(entries) >= 200_000
    assert lost + len(entries) == 300_000
    numbers = [entry.number for entry in entries]
    assert numbers == list(range(numbers[0], numbers[0] + len(numbers)))


def test_waiting_takes_no_core(rank: Callable[..., Any]) -> None:
    assert rank(seconds_of_cores_while_held, 0.5) < 0.25


BLOCKED = """
import os, sys, torch, torch_npu
from ascend_sim.controls import Simulator
torch.npu.set_device(0)
tensor = torch.ones(4).pin_memory()
torch.npu.synchronize()
gate = Simulator().hold("memcpy*")
with torch.npu.stream(torch.npu.Stream()):
    copy = tensor.to("npu", non_blocking=True)
gate.wait_until_held()
print("blocked", flush=True)
"""


@pytest.mark.parametrize(
    ("end", "code"),
    [("sys.exit(3)", 3), ("raise ValueError('on purpose')", 1), ("os._exit(4)", 4)],
    ids=["exit", "exception", "os-exit"],
)
def test_a_process_with_a_blocked_stream_ends(end: str, code: int) -> None:
    result = run_program(f"{BLOCKED}\n{end}", limit_s=40)
    assert result.returncode == code, result.stderr
    assert result.stdout.startswith("blocked\n"), result.stderr


def test_what_is_not_simulated_aborts_with_its_name() -> None:
    result = run_program("import ctypes; ctypes.CDLL('libascendcl.so').aclrtProcessReport(0)")
    assert result.returncode == -signal.SIGABRT
    assert "simulated Ascend: aclrtProcessReport is not simulated" in result.stderr


@pytest.mark.parametrize(
    ("source", "sentence"),
    [
        (
            "stream = torch.npu.Stream(); acl.aclrtDestroyStream(ctypes.c_void_p(stream.npu_stream));"
            "stream.synchronize()",
            "the use of a stream that does not exist, or no longer, is not simulated",
        ),
        (
            "os.fork() or acl.aclrtCreateStream(ctypes.byref(ctypes.c_void_p()))\n"
            "os._exit(os.wait()[1] & 127)",
            "the use of a device in a forked process is not simulated",
        ),
    ],
    ids=["destroyed-stream", "fork"],
)
def test_misuse_aborts_with_a_sentence(source: str, sentence: str) -> None:
    result = run_program(
        "import ctypes, os, torch, torch_npu; torch.npu.set_device(0); acl = ctypes.CDLL('libascendcl.so')\n"
        + source
    )
    assert result.returncode != 0
    assert sentence in result.stderr


def test_a_setting_that_is_no_number_is_refused() -> None:
    result = run_program("import torch, torch_npu; torch.empty(1, device='npu')", poison="yes")
    assert result.returncode == -signal.SIGABRT
    assert "ASCEND_SIM_POISON=yes is not a whole number" in result.stderr


def test_a_killed_process_leaves_nothing_behind() -> None:
    """Its control socket has no file, and nothing of it is in /dev/shm that could stay there."""
    with start_program(f"{BLOCKED}\nsys.stdin.read()") as program:
        assert program.stdout is not None
        assert program.stdout.readline() == "blocked\n"
        assert f"@ascend-sim-{program.pid}\n" in Path("/proc/net/unix").read_text()
        process = Path(f"/proc/{program.pid}")
        assert "/dev/shm" not in (process / "maps").read_text()
        assert not [file for file in (process / "fd").iterdir() if "/dev/shm" in str(file.readlink())]
        program.send_signal(signal.SIGKILL)
        program.wait(LIMIT_S)
    assert f"@ascend-sim-{program.pid}\n" not in Path("/proc/net/unix").read_text()
