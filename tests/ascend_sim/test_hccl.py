"""The simulated HCCL as the real ProcessGroupHCCL uses it: messages, who waits for whom, communicators.

Values of collectives are in test_hccl_collectives.py, what goes wrong is in test_hccl_failures.py.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from ascend_sim.controls import Simulator
from rig.harness import Call, Here, Team, results
from rig.npu_ranks import run_program, start_team

from .hccl_ranks import (
    LIMIT_S,
    numbered,
    numbers_in,
    receive_numbers,
    room,
    running,
    send_numbers,
    synchronize,
    wait_for,
    warm_up,
)

SIZES = [1, 5, 1000, 300_001, 3, 70_000]  # int32; the large ones are more than a channel holds, 256 KiB


# --- in the rank processes -----------------------------------------------------------------------


def timed(here: Here, function: Callable[..., Any], *arguments: Any) -> tuple[float, float]:
    """Seconds that passed, and seconds of a core that this process used."""
    synchronize(here)
    began, used = time.monotonic(), time.process_time()
    function(here, *arguments)
    return time.monotonic() - began, time.process_time() - used


def time_stamped(here: Here, post: Callable[..., Any], peer: int) -> float:
    """Post 400 kB, and note whether it is out; milliseconds between events in front of it and behind it."""
    npu = torch.get_device_module("npu")
    before, behind = npu.Event(enable_timing=True), npu.Event(enable_timing=True)
    message = numbered(here, 1, 100_000)
    before.record()
    work = post(message, peer)
    here.note("completed" if work.is_completed() else "not completed")
    work.wait()
    behind.record()
    behind.synchronize()
    return float(before.elapsed_time(behind))


def exchange_in_batch(here: Here, to: int, source: int, elements: int) -> list[list[int]]:
    """Two messages to one rank and two from one, sends first, all in one batch."""
    received = [room(here, elements), room(here, elements + 1)]
    operations = [
        dist.P2POp(dist.isend, numbered(here, 10 * here.index, elements), to),
        dist.P2POp(dist.isend, numbered(here, 10 * here.index + 1, elements + 1), to),
        *(dist.P2POp(dist.irecv, tensor, source) for tensor in received),
    ]
    for work in dist.batch_isend_irecv(operations):
        work.wait()
    return [numbers_in(tensor) for tensor in received]


# --- in the test's process -----------------------------------------------------------------------


@contextlib.contextmanager
def links(simulator: Simulator, **speed: int) -> Iterator[None]:
    """The links of a process, as fast as usual again in the end."""
    simulator.links(**speed)
    try:
        yield
    finally:
        simulator.links()


def test_messages_arrive_whole_and_in_order(hccl_team: Team) -> None:
    first, _, third = hccl_team.ranks
    for sender, receiver in ((first, third), (third, first)):
        sending = sender.start(send_numbers, receiver.index, SIZES)
        receiving = receiver.start(receive_numbers, sender.index, SIZES)
        assert results([sending, receiving])[1] == [[number] for number in range(len(SIZES))]


def test_a_send_does_not_end_before_its_receive_runs(hccl_team: Team) -> None:
    hccl_team.each(warm_up)
    sender, receiver = hccl_team.ranks[:2]
    with Simulator(sender.pid) as ours, Simulator(receiver.pid) as theirs, theirs.hold("HcclRecv") as gate:
        receiving = receiver.start(receive_numbers, 0, [8])
        gate.wait_until_held()
        sending = sender.start(send_numbers, 1, [8])
        send = wait_for(ours, "HcclSend", "its HcclRecv has not begun")
        (receive,) = running(theirs, "HcclRecv")
        assert send.partners is not None
        assert receive.partners is not None
        assert (send.partners.operation, send.partners.pids) == ("send", [receiver.pid])
        assert (receive.partners.operation, receive.partners.pids) == ("receive", [sender.pid])
        assert send.partners.communicator == receive.partners.communicator
        assert send.waiting is not None
        assert send.waiting.partners == send.partners
        gate.release()
        assert results([sending, receiving])[1] == [[0]]


def test_a_receive_waits_for_its_send(hccl_team: Team) -> None:
    hccl_team.each(warm_up)
    sender, receiver = hccl_team.ranks[:2]
    with Simulator(receiver.pid) as theirs:
        receiving = receiver.start(receive_numbers, 0, [8])
        wait_for(theirs, "HcclRecv", "its HcclSend has not begun")
        sender.call(send_numbers, 1, [8])
        assert receiving.result() == [[0]]


def test_small_messages_need_no_receive_where_that_is_allowed(hccl_team: Team) -> None:
    hccl_team.each(warm_up)
    sender, receiver = hccl_team.ranks[:2]
    with Simulator(sender.pid) as ours, links(ours, eager_bytes=1024):
        sender.call(send_numbers, 1, [256, 0, 255])  # ends although nobody receives
        sending = sender.start(send_numbers, 1, [257])
        wait_for(ours, "HcclSend", "its HcclRecv has not begun")
        assert receiver.call(receive_numbers, 0, [256, 255, 257]) == [[0], [2], [0]]
        sending.result()


def test_a_message_takes_the_time_of_its_link(hccl_team: Team) -> None:
    hccl_team.each(warm_up)
    sender, receiver = hccl_team.ranks[:2]
    speed = {"us_per_message": 300_000, "mb_per_s": 1}
    with Simulator(sender.pid) as ours, Simulator(receiver.pid) as theirs, links(ours, **speed):
        calls: list[Call[Any]] = [
            sender.start(timed, send_numbers, 1, [50_000]),
            receiver.start(timed, receive_numbers, 0, [50_000]),
        ]
        wait_for(ours, "HcclSend", "on its way")
        wait_for(theirs, "HcclRecv", "its message has not arrived")
        for seconds, of_a_core in results(calls):
            assert seconds >= 0.5  # 0.3 s for the message and 0.2 s for its bytes
            assert of_a_core < seconds / 2


def test_a_link_keeps_streams_busy_and_no_host(hccl_team: Team) -> None:
    """Time stamps of the device, so nothing but a lower bound; the host had gone on long before."""
    hccl_team.each(warm_up)
    sender, receiver = hccl_team.ranks[:2]
    with Simulator(sender.pid) as ours, Simulator(receiver.pid) as theirs:
        for speed, least_ms in (({"us_per_message": 50_000}, 50), ({"mb_per_s": 100}, 4)):
            with links(ours, **speed), theirs.hold("HcclRecv", count=1) as gate:
                calls = [
                    sender.start(time_stamped, dist.isend, 1),
                    receiver.start(time_stamped, dist.irecv, 0),
                ]
                assert [call.note() for call in calls] == ["not completed"] * 2
                gate.release()
                assert all(milliseconds >= least_ms for milliseconds in results(calls))


def test_a_batch_goes_on_in_all_directions_at_once(hccl_team: Team) -> None:
    """Every rank sends first, more than a channel holds, round the ring and between two."""
    calls = [
        rank.start(exchange_in_batch, (rank.index + 1) % 3, (rank.index - 1) % 3, 300_001)
        for rank in hccl_team.ranks
    ]
    assert results(calls) == [[[20], [21]], [[0], [1]], [[10], [11]]]
    calls = [rank.start(exchange_in_batch, 1 - rank.index, 1 - rank.index, 7) for rank in hccl_team.ranks[:2]]
    assert results(calls) == [[[10], [11]], [[0], [1]]]


def test_a_batch_says_what_it_waits_for(hccl_team: Team) -> None:
    hccl_team.each(warm_up)
    first, second, third = hccl_team.ranks
    with Simulator(first.pid) as simulator:
        call = first.start(exchange_in_batch, 1, 2, 4)
        task = wait_for(simulator, "HcclBatchSendRecv", "to rank 1: its HcclRecv has not begun; ")
        assert task.waiting is not None
        assert "from rank 2: its HcclSend has not begun" in task.waiting.reason
        assert task.partners is not None
        assert (task.partners.operation, task.partners.pids) == ("batch", [second.pid, third.pid])
        others = [second.start(exchange_in_batch, 2, 0, 4), third.start(exchange_in_batch, 0, 1, 4)]
        results([call, *others])


def test_a_collective_says_who_is_missing(hccl_team: Team) -> None:
    first, second, third = hccl_team.ranks
    hccl_team.each(warm_up)
    with Simulator(first.pid) as simulator:
        calls = [first.start(add_up), second.start(add_up)]
        task = wait_for(simulator, "HcclAllReduce", "rank 2 not in it yet")
        assert task.waiting is not None
        assert task.waiting.partners is not None
        assert task.waiting.partners.pids == [third.pid]
        assert task.partners is not None
        assert (task.partners.operation, task.partners.pids) == ("HcclAllReduce", [second.pid, third.pid])
        assert results([*calls, third.start(add_up)]) == [[3]] * 3


def add_up(here: Here) -> list[int]:
    tensor = numbered(here, 1, 100)
    dist.all_reduce(tensor)
    return numbers_in(tensor)


# --- communicators ---------------------------------------------------------------------------------


def send_late_in_a_new_group(here: Here) -> None:
    group = dist.new_group([0, 1])
    here.note("has a group")
    dist.send(numbered(here, 7, 4), 1, group=group)
    synchronize(here)


def receive_in_a_new_group(here: Here) -> list[int]:
    group = dist.new_group([0, 1])
    received = room(here, 4)
    assert here.store.get("may receive")
    dist.recv(received, 0, group=group)
    return numbers_in(received)


def make_group(here: Here) -> None:
    """All ranks have to, torch wants it; this one is not a member."""
    dist.new_group([0, 1])


def test_who_joins_a_communicator_waits_for_the_others(hccl_team: Team) -> None:
    first, second, third = hccl_team.ranks
    calls: list[Call[Any]] = [first.start(send_late_in_a_new_group), second.start(receive_in_a_new_group)]
    third.call(make_group)
    assert calls[0].note() == "has a group"
    with Simulator(first.pid) as simulator:
        deadline = time.monotonic() + LIMIT_S
        while not (waits := simulator.listing().host):
            assert time.monotonic() < deadline, simulator.listing()
            time.sleep(0.005)
    (wait,) = waits
    assert "rank 1 not here yet" in wait.reason
    assert wait.partners is not None
    assert (wait.partners.operation, wait.partners.pids, wait.partners.unknown) == ("join", [], 1)
    hccl_team.store.set("may receive", "yes")
    assert results(calls)[1] == [7]


def descriptors_and_mappings() -> list[str]:
    """Those of this process that belong to communicators."""
    descriptors = []
    for link in Path("/proc/self/fd").iterdir():
        try:
            descriptors.append(os.readlink(link))
        except FileNotFoundError:  # that of the directory itself
            continue
    mappings = Path("/proc/self/maps").read_text().splitlines()
    return [text for text in descriptors + mappings if "ascend-sim-hccl" in text]


def resident_kilobytes() -> list[int]:
    """Of each communicator's memory in this process."""
    entries = re.split(r"\n(?=[0-9a-f]+-[0-9a-f]+ )", Path("/proc/self/smaps").read_text())
    sizes = [
        re.search(r"^Rss: +(\d+) kB", entry, re.MULTILINE) for entry in entries if "ascend-sim-hccl" in entry
    ]
    return [int(size[1]) for size in sizes if size is not None]


def use_and_destroy(here: Here) -> None:
    peer = 1 - here.index
    if here.index == 0:
        send_numbers(here, peer, SIZES)
        receive_numbers(here, peer, SIZES)
    else:
        receive_numbers(here, peer, SIZES)
        send_numbers(here, peer, SIZES)
    (pair,) = resident_kilobytes()
    assert pair < 1024
    dist.all_reduce(numbered(here, 1, 1_000_000))
    synchronize(here)
    found = descriptors_and_mappings()
    assert len(found) == 2, f"not just one mapping for each of the two communicators: {found}"
    dist.destroy_process_group()
    assert descriptors_and_mappings() == []


def test_nothing_is_left_of_a_communicator() -> None:
    before = set(os.listdir("/dev/shm"))
    team = start_team(2, process_group=True)
    try:
        team.each(use_and_destroy)
    finally:
        team.close()
    new = set(os.listdir("/dev/shm")) - before
    assert not [name for name in new if "ascend" in name or "hccl" in name]


# --- calls that torch_npu makes on other devices or versions of CANN only ------------------------

SUCCESS, INVALID, NOT_SUPPORTED = 0, 1, 5  # HcclResult
INT32 = 2  # HcclDataType


class Library:
    """libhccl.so, called with the communicator of the process group on the current stream."""

    def __init__(self, here: Here) -> None:
        synchronize(here)
        backend: Any = dist.distributed_c10d._get_default_group()._get_backend(here.device)
        self.communicator = ctypes.c_void_p(backend.get_hccl_comm(here.index))
        self.stream = ctypes.c_void_p(torch.get_device_module(here.device).current_stream().npu_stream)
        self._functions = ctypes.CDLL("libhccl.so")

    def call(self, function: str, *arguments: Any) -> int:
        """With the arguments in front of the communicator and the stream."""
        result: int = self._functions[function](*arguments, self.communicator, self.stream)
        return result

    def group(self, function: str) -> int:
        result: int = self._functions[function]()
        return result

    def transfer(self, function: str, tensor: torch.Tensor, peer: int) -> int:
        return self.call(function, address(tensor), ctypes.c_uint64(tensor.numel()), INT32, peer)


def address(tensor: torch.Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(tensor.data_ptr())


def list_of(*numbers: int) -> Any:
    return (ctypes.c_uint64 * len(numbers))(*numbers)


def exchange_in_group(here: Here) -> list[int]:
    """Both ranks send first. Newer versions of CANN have these calls, and torch_npu makes batches of them."""
    library = Library(here)
    sent, received = numbered(here, here.index, 300_000), room(here, 300_000)
    synchronize(here)
    assert library.group("HcclGroupStart") == library.group("HcclGroupStart") == SUCCESS
    assert library.transfer("HcclSend", sent, 1 - here.index) == SUCCESS
    assert library.transfer("HcclRecv", received, 1 - here.index) == SUCCESS
    assert library.call("HcclBatchSendRecv", None, 0) == NOT_SUPPORTED
    assert library.group("HcclGroupEnd") == library.group("HcclGroupEnd") == SUCCESS
    assert library.group("HcclGroupEnd") == NOT_SUPPORTED
    return numbers_in(received)


def reduce_and_scatter_different_sizes(here: Here) -> list[int]:
    """Rank r gets r + 1 of the six elements; all contribute the same."""
    library = Library(here)
    contribution = torch.tensor([0, 1, 1, 2, 2, 2], dtype=torch.int32).to(here.device)
    received = room(here, here.index + 1)
    synchronize(here)
    counts, starts = list_of(1, 2, 3), list_of(0, 1, 3)
    sizes = (
        address(contribution),
        counts,
        starts,
        address(received),
        ctypes.c_uint64(here.index + 1),
        INT32,
        0,
    )
    assert library.call("HcclReduceScatterV", *sizes) == SUCCESS
    return numbers_in(received)


def barrier(here: Here) -> None:
    assert Library(here).call("HcclBarrier") == SUCCESS
    synchronize(here)


def invalid_calls(here: Here) -> None:
    library, tensor = Library(here), numbered(here, 1, 4)
    assert library.transfer("HcclSend", tensor, here.index) == NOT_SUPPORTED
    assert library.transfer("HcclSend", tensor, 3) == INVALID
    assert library.call("HcclBroadcast", address(tensor), ctypes.c_uint64(4), INT32, 3) == INVALID
    assert library.call("HcclBroadcast", address(tensor), ctypes.c_uint64(4), 99, 0) == INVALID
    library.communicator = ctypes.c_void_p(1)
    assert library.call("HcclBarrier") == INVALID


def send_on_two_streams(here: Here) -> None:
    """The second one begins when the first one runs."""
    library = Library(here)
    module = torch.get_device_module(here.device)
    streams = [module.Stream(), module.Stream()]
    messages = [numbered(here, number, 4) for number in range(2)]
    synchronize(here)
    with Simulator() as simulator:
        reasons = "its HcclRecv has not begun", "an earlier send"
        for stream, message, reason in zip(streams, messages, reasons, strict=True):
            library.stream = ctypes.c_void_p(stream.npu_stream)
            assert library.transfer("HcclSend", message, 1) == SUCCESS
            wait_for(simulator, "HcclSend", reason)
    here.note("both run")
    synchronize(here)


def receive_directly(here: Here) -> list[list[int]]:
    library = Library(here)
    received = [room(here, 4) for _ in range(2)]
    synchronize(here)
    for tensor in received:
        assert library.transfer("HcclRecv", tensor, 0) == SUCCESS
    return [numbers_in(tensor) for tensor in received]


def test_a_group_of_sends_and_receives_is_a_batch(hccl_team: Team) -> None:
    hccl_team.each(warm_up)
    calls = [rank.start(exchange_in_group) for rank in hccl_team.ranks[:2]]
    assert results(calls) == [[1], [0]]


def test_reduce_scatter_of_different_sizes(hccl_team: Team) -> None:
    hccl_team.each(warm_up)
    assert hccl_team.each(reduce_and_scatter_different_sizes) == [[0], [3], [6]]


def test_barrier(hccl_team: Team) -> None:
    hccl_team.each(warm_up)
    first, *others = hccl_team.ranks
    with Simulator(first.pid) as simulator:
        call = first.start(barrier)
        wait_for(simulator, "HcclBarrier", "ranks 1, 2 not in it yet")
        results([call, *(rank.start(barrier) for rank in others)])


def test_invalid_calls_are_refused(hccl_team: Team) -> None:
    hccl_team.each(warm_up)
    hccl_team.ranks[0].call(invalid_calls)


def test_sends_on_different_streams_match_in_the_order_in_which_they_begin(hccl_team: Team) -> None:
    hccl_team.each(warm_up)
    sender, receiver = hccl_team.ranks[:2]
    sending = sender.start(send_on_two_streams)
    assert sending.note() == "both run"
    assert results([sending, receiver.start(receive_directly)])[1] == [[0], [1]]


def test_sub_communicators_are_not_simulated() -> None:
    ended = run_program("import ctypes; ctypes.CDLL('libhccl.so').HcclCreateSubCommConfig()")
    assert ended.returncode < 0
    assert "HcclCreateSubCommConfig" in ended.stderr
