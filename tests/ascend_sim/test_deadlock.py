"""Finding deadlocks: in listings made by hand, and in real processes that talk over the simulated HCCL."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
import torch.distributed as dist

from ascend_sim.controls import Contained, Listing, Partners, Simulator, Stream, Task, Wait
from ascend_sim.deadlock import Deadlock, deadlock_among, find_deadlock
from rig.harness import Here, Team
from rig.npu_ranks import start_team

pytestmark = pytest.mark.thorough

LIMIT_S = 20.0
A, B, C = 100, 200, 300  # pids


# --- listings by hand ----------------------------------------------------------------------------


def operation(
    name: str, kind: str, peers: Sequence[int], *, number: int = 1, communicator: str = "pair"
) -> Task:
    """One that is queued."""
    return Task(number, name, Partners(communicator, kind, list(peers)))


def running(task: Task, for_pids: Sequence[int] | None = None) -> Task:
    """The same when it runs, and waits for all its partners or for some."""
    assert task.partners is not None
    pids = task.partners.pids if for_pids is None else list(for_pids)
    partners = Partners(task.partners.communicator, task.partners.operation, pids)
    return Task(task.number, task.name, task.partners, Wait(0, "stream", "no partner yet", partners))


def send(peer: int, **options: Any) -> Task:
    return operation("HcclSend", "send", [peer], **options)


def receive(peer: int, **options: Any) -> Task:
    return operation("HcclRecv", "receive", [peer], **options)


def event_wait(number: int, record: int) -> Task:
    return Task(
        number, "event wait", None, Wait(0, "stream", f"event recorded by task {record}", None, record)
    )


def event_record(number: int) -> Task:
    return Task(number, "event record")


def kernel(number: int) -> Task:
    return Task(number, "aten::mm")


def stream(number: int, now: Task | None, *queued: Task, error: int | None = None) -> Stream:
    return Stream(number, 0, list(queued), now, 0, error)


def synchronising(pid: int, task: int, *, thread: int | None = None, name: str = "python") -> Wait:
    return Wait(pid if thread is None else thread, name, "synchronising with a stream", None, task)


def joining(pid: int, communicator: str, pids: Sequence[int] = (), unknown: int = 0) -> Wait:
    return Wait(pid, "python", f"joining {communicator}", Partners(communicator, "join", list(pids), unknown))


def process(pid: int, *streams: Stream, host: Sequence[Wait] = ()) -> Listing:
    return Listing(pid, list(streams), list(host))


def found(*listings: Listing) -> Deadlock:
    deadlock = find_deadlock(listings)
    assert deadlock is not None
    assert find_deadlock(listings[::-1]) == deadlock, "the order of the listings does not matter"
    return deadlock


def test_nothing_to_find() -> None:
    assert find_deadlock([]) is None
    assert find_deadlock([process(A), process(B, stream(0, kernel(1), kernel(2)))]) is None


def test_both_send_first() -> None:
    deadlock = found(
        process(A, stream(0, running(send(B)), receive(B, number=2))),
        process(B, stream(5, running(send(A)), receive(A, number=2))),
    )
    assert deadlock.pids == {A, B}
    assert deadlock.tasks == ["HcclSend", "HcclSend"]
    assert str(deadlock).splitlines() == [
        "deadlock (process 100, 200):",
        "  stream 0 of process 100, in HcclSend, waits for stream 5 of process 200: "
        "HcclRecv is queued on stream 5 behind HcclSend",
        "  stream 5 of process 200, in HcclSend, waits for stream 0 of process 100: "
        "HcclRecv is queued on stream 0 behind HcclSend",
    ]


def test_the_receive_runs_on_another_stream() -> None:
    assert (
        find_deadlock(
            [
                process(A, stream(0, running(send(B))), stream(1, running(receive(B, number=2)))),
                process(B, stream(0, running(send(A))), stream(1, running(receive(A, number=2)))),
            ]
        )
        is None
    )


def test_the_peer_will_get_there() -> None:
    """Behind a kernel, or at a gate, or at a peer that is not stuck."""
    held = Task(1, "HcclSend", send(A).partners, Wait(0, "stream", "held at gate 1"))
    for head in (kernel(1), held):
        assert (
            find_deadlock(
                [
                    process(A, stream(0, running(send(B)), receive(B, number=2))),
                    process(B, stream(0, head, receive(A, number=2))),
                ]
            )
            is None
        )


def test_communicators_are_told_apart() -> None:
    """An isend and a batched irecv are on different ones, and both hosts wait for what they have started."""
    first = process(
        A,
        stream(0, running(send(B, number=7, communicator="pair"))),
        host=[synchronising(A, 7)],
    )
    second = process(
        B,
        stream(0, running(operation("HcclBatchSendRecv", "batch", [A], number=9, communicator="world"))),
        host=[synchronising(B, 9)],
    )
    assert found(first, second).pids == {A, B}
    matching = process(
        B,
        stream(0, running(operation("HcclBatchSendRecv", "batch", [A], number=9))),
        host=[synchronising(B, 9)],
    )
    assert find_deadlock([first, matching]) is None


def test_a_host_that_has_yet_to_call_may_do_so() -> None:
    waiting = process(A, stream(0, running(send(B, number=7))), host=[synchronising(A, 7)])
    assert find_deadlock([waiting, process(B)]) is None
    assert find_deadlock([waiting]) is None
    helper = synchronising(B, 3, thread=B + 1, name="helper")
    stuck = process(B, stream(0, running(receive(A, number=3, communicator="other"))), host=[helper])
    assert find_deadlock([waiting, stuck]) is None, "its main thread may call it"


def test_a_task_queue_that_is_stuck_lets_no_operation_through() -> None:
    """torch_npu's own thread waits in a copy of memory that is not pinned."""
    copying = synchronising(B, 3, thread=B + 1, name="acl_thread")
    deadlock = found(
        process(A, stream(0, running(send(B, number=7)), receive(B, number=8))),
        process(B, stream(0, running(send(A, number=2)), Task(3, "memcpy H2D")), host=[copying]),
    )
    assert "acl_thread: synchronising with a stream" in deadlock.tasks


def test_events_carry_the_wait_to_other_streams() -> None:
    deadlock = found(
        process(
            A,
            stream(0, event_wait(5, 4), send(B, number=6)),
            stream(1, running(receive(B, number=3)), event_record(4)),
        ),
        process(
            B,
            stream(0, event_wait(5, 4), send(A, number=6)),
            stream(1, running(receive(A, number=3)), event_record(4)),
        ),
    )
    assert deadlock.tasks == ["event wait", "HcclRecv"] * 2


def test_an_event_that_has_happened_is_not_waited_for() -> None:
    assert find_deadlock([process(A, stream(0, event_wait(5, 4)))]) is None


def test_a_collective_and_a_batch_in_different_order() -> None:
    def both(first: str, second: str, peer: int) -> Stream:
        ahead = operation(f"Hccl {first}", first, [peer], communicator="world")
        behind = operation(f"Hccl {second}", second, [peer], number=2, communicator="world")
        return stream(0, running(ahead), behind)

    deadlock = found(process(A, both("batch", "all reduce", B)), process(B, both("all reduce", "batch", A)))
    assert deadlock.tasks == ["Hccl batch", "Hccl all reduce"]


def test_a_ring_of_three() -> None:
    def named(pid: int, previous: int, following: int) -> Listing:
        ahead = send(following, communicator=f"{pid} to {following}")
        behind = receive(previous, number=2, communicator=f"{previous} to {pid}")
        return process(pid, stream(0, running(ahead), behind))

    ring = [named(A, C, B), named(B, A, C), named(C, B, A)]
    assert found(*ring).pids == {A, B, C}
    assert find_deadlock(ring[:2]) is None, "the third one is not known to be stuck"


def test_who_waits_for_a_deadlock_is_not_part_of_it() -> None:
    pair = [
        process(A, stream(0, running(send(B)), receive(B, number=2))),
        process(
            B, stream(0, running(send(A)), receive(A, number=2), send(C, number=3, communicator="other"))
        ),
    ]
    third = process(C, stream(0, running(receive(B, communicator="other"))))
    assert found(*pair, third).pids == {A, B}


def test_a_collective_waits_for_those_that_are_missing() -> None:
    everyone = {A: [B, C], B: [A, C], C: [A, B]}
    tasks = {
        pid: operation("HcclAllReduce", "all reduce", peers, communicator="world")
        for pid, peers in everyone.items()
    }
    here = [process(pid, stream(0, running(tasks[pid], for_pids=[C]))) for pid in (A, B)]
    late = process(C, stream(0, running(send(A, number=9)), tasks[C]))
    assert find_deadlock([*here, late]) is None
    here[0] = process(A, stream(0, running(tasks[A], for_pids=[C]), receive(C, number=2)))
    assert found(*here, late).pids == {A, C}


def test_cold_groups_in_different_order() -> None:
    deadlock = found(process(A, host=[joining(A, "one", [B])]), process(B, host=[joining(B, "two", [A])]))
    assert deadlock.tasks == ["python: joining one", "python: joining two"]
    assert (
        find_deadlock([process(A, host=[joining(A, "one", [B])]), process(B, host=[joining(B, "one")])])
        is None
    )


def test_members_whose_pids_are_unknown() -> None:
    """A communicator of two waits for one of two others, a communicator of three for both."""
    stuck = process(B, host=[joining(B, "two", [A])])
    free = process(C)
    assert find_deadlock([process(A, host=[joining(A, "one", unknown=1)]), stuck, free]) is None
    assert found(process(A, host=[joining(A, "one", unknown=2)]), stuck, free).pids == {A, B}
    also_stuck = process(C, host=[joining(C, "three", [A])])
    assert A in found(process(A, host=[joining(A, "one", unknown=1)]), stuck, also_stuck).pids


def test_an_operation_in_a_replay_that_is_queued() -> None:
    """It is found where the replay is, behind what runs there; one that runs comes before it."""
    inner = operation("HcclAllReduce", "all reduce", [B], communicator="world")
    replay = Task(7, "graph 3 replay", contains=[Contained(inner.name, inner.partners)])
    behind = process(A, stream(0, running(send(B)), replay))
    peer = operation("HcclAllReduce", "all reduce", [A], communicator="world")
    in_graph = Stream(5, 0, [receive(A, number=9)], running(peer), 0, graph=4)
    deadlock = found(behind, process(B, in_graph))
    assert deadlock.tasks == ["HcclSend", "HcclAllReduce in graph 4"]
    assert "HcclAllReduce in graph 3 replay is queued on stream 0 behind HcclSend" in str(deadlock)
    begun = process(A, stream(0, running(send(B)), replay), stream(6, running(inner)))
    assert find_deadlock([begun, process(B, in_graph)]) is None


def test_a_stream_that_has_failed_waits_for_nobody() -> None:
    failed = stream(0, running(send(B)), receive(B, number=2), error=507048)
    assert (
        find_deadlock([process(A, failed), process(B, stream(0, running(send(A)), receive(A, number=2)))])
        is None
    )


# --- in rank processes ---------------------------------------------------------------------------


def exchange(here: Here, send_first: bool) -> None:
    """A message in each direction between two ranks."""
    peer = 1 - here.index
    outgoing = torch.full((8,), float(here.index)).to(here.device)
    incoming = torch.full((8,), -1.0).to(here.device)
    orders: dict[bool, Sequence[Callable[[], Any]]] = {
        True: (lambda: dist.isend(outgoing, peer), lambda: dist.irecv(incoming, peer)),
        False: (lambda: dist.irecv(incoming, peer), lambda: dist.isend(outgoing, peer)),
    }
    for start in orders[send_first]:
        start().wait()
    torch.get_device_module("npu").synchronize()
    assert set(incoming.tolist()) == {float(peer)}


def reduce_before_message(here: Here) -> None:
    """Rank 0 makes the communicator of a new group before it sends, rank 1 wants the message before that."""
    group = dist.new_group([0, 1])
    message = torch.ones(4).to(here.device)
    if here.index == 1:
        dist.irecv(message, 0)
        torch.get_device_module("npu").synchronize()
    dist.all_reduce(message, group=group)


@contextlib.contextmanager
def pair() -> Iterator[tuple[Team, list[int]]]:
    """Two ranks over HCCL, thrown away in the end."""
    team = start_team(2, process_group=True, memory_mb=64, hccl_connect_timeout=40)
    try:
        yield team, [rank.pid for rank in team.ranks]
    finally:
        team.close()


def test_two_ranks_that_send_first() -> None:
    with pair() as (team, pids):
        for call in [rank.start(exchange, send_first=rank.index == 0) for rank in team.ranks]:
            call.result()
        assert deadlock_among(pids, limit_s=0) is None
        for rank in team.ranks:
            rank.start(exchange, send_first=True)
        deadlock = deadlock_among(pids, LIMIT_S)
        assert deadlock is not None
        assert deadlock.tasks == ["HcclSend", "HcclSend"], str(deadlock)
        assert deadlock.pids == set(pids)


def test_a_rank_held_at_a_gate_is_no_deadlock() -> None:
    with pair() as (team, pids), Simulator(pids[1]) as simulator:
        with simulator.hold("HcclRecv", 1) as gate:
            calls = [rank.start(exchange, send_first=rank.index == 0) for rank in team.ranks]
            gate.wait_until_held()
            assert deadlock_among(pids, limit_s=0.5) is None
        for call in calls:
            call.result()


def test_a_rank_that_joins_a_group_and_one_that_waits_for_its_message() -> None:
    with pair() as (team, pids):
        for call in [rank.start(exchange, send_first=rank.index == 0) for rank in team.ranks]:
            call.result()
        for rank in team.ranks:
            rank.start(reduce_before_message)
        deadlock = deadlock_among(pids, LIMIT_S)
        assert deadlock is not None
        assert deadlock.pids == set(pids)
        assert "HcclRecv" in deadlock.tasks
        assert any("joining communicator" in task for task in deadlock.tasks), str(deadlock)
        assert any("synchronising" in task for task in deadlock.tasks), str(deadlock)
