"""Peers of the host lane that are lost: without Python's lock, stopped, killed, closed."""

from __future__ import annotations

import ctypes
import os
import select
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from rig.harness import Here, Rank, Team, announce_blocking, close_lanes, receive, results, send, take_number
from sglang_npu_pp.errors import PeerLostError
from sglang_npu_pp.settings import Settings
from sglang_npu_pp.transport import connection_monitor
from sglang_npu_pp.transport.message import Kind, Message

from .test_host_lane import transports
from .test_host_lane_clients import failure

pytestmark = pytest.mark.timeout(180)


# --- a rank that cannot have Python's lock -------------------------------------------------------


def hold_pythons_lock(seconds: float) -> None:
    """As a library does that is loaded, or that computes without giving the lock back."""
    ctypes.PyDLL(None).usleep(int(seconds * 1e6))


def open_a_port_late(here: Here, seconds: float) -> list[int]:
    """The handshake of a peer that connects meanwhile asks a thread of ours, which waits for the lock."""
    here.note("not yet")
    hold_pythons_lock(seconds)
    return sorted(here.lane.open_port("late", senders=[1]))


def open_a_port(here: Here) -> int:
    """How often the connection was made."""
    outboxes = here.lane.open_port("late", senders=[1])
    here.closers += [outbox.close for outbox in outboxes.values()]
    return 1 + outboxes[0]._attempt


def limit_handshakes(here: Here, limit_ms: int) -> None:
    connection_monitor.HANDSHAKE_LIMIT_MS = limit_ms


@pytest.fixture
def absent(team: Team) -> Iterator[Rank]:
    """A rank that may hold Python's lock for long; it disconnects after 0.3 s who has not shown its key."""
    rank = team.recruit()
    rank.call(limit_handshakes, 300)
    yield rank
    team.dismiss(rank)


def test_a_peer_without_pythons_lock_is_connected_when_it_has_it_again(team: Team, absent: Rank) -> None:
    """Longer than the time-out for lost peers, and than the limit of a handshake."""
    # Heartbeats come from threads of ZeroMQ; on a busy machine they may be half a second late.
    settings = Settings(host_transport="tcp", peer_timeout_s=2, wait_limit_s=20)
    _, other = team.open_lanes([absent, team.ranks[1]], settings)
    late = absent.start(open_a_port_late, 5.0)
    assert late.note() == "not yet"
    assert other.call(open_a_port) > 1
    assert late.result() == []
    other.call(send, 0, Kind.OUTPUT, "still")
    assert absent.call(receive, 1, Kind.OUTPUT, [0]) == ["still"]


def test_a_peer_that_ends_before_it_lets_us_in_is_lost_at_once(team: Team, absent: Rank) -> None:
    """And not when the limit of the start is over."""
    settings = Settings(host_transport="tcp", start_limit_s=100)
    _, other = team.open_lanes([absent, team.ranks[1]], settings)
    assert absent.start(open_a_port_late, 60.0).note() == "not yet"
    opening = other.start(open_a_port)
    os.kill(absent.pid, signal.SIGKILL)
    error = failure(opening)
    assert isinstance(error, PeerLostError)
    assert str(error).startswith("stage 1 rank 0: stage 0 is gone")


# --- a peer is lost ----------------------------------------------------------------------------


def send_for_ever(here: Here, peer: int) -> None:
    """A stage that never waits for anything."""
    here.note("sending")
    while True:
        here.lane.send(peer, Message(Kind.PROXY, values=b""))
        time.sleep(0.01)  # a pace, so that the window does not fill


def wait_for_ever(here: Here, source: int) -> None:
    here.note("waiting")
    take_number(here, source, Kind.PROXY, 0)


@pytest.mark.slow
@transports
def test_a_stopped_and_a_killed_peer_are_noticed_by_who_waits_and_by_who_only_sends(
    team: Team, ipc_dir: Path, transport: str
) -> None:
    victim = team.recruit()
    settings = Settings(
        host_transport=transport, ipc_dir=ipc_dir, peer_timeout_s=1.5, wait_limit_s=60, window=4096
    )
    waiter, _, sender = [team.ranks[0], victim, team.ranks[1]]
    for sign, how in [
        (signal.SIGSTOP, "is gone: its connection broke or was silent for 1.5 s"),
        (signal.SIGKILL, "is gone: its connection broke"),
    ]:
        team.open_lanes([waiter, victim, sender], settings)
        assert not list(ipc_dir.iterdir()), "files are left though everyone is connected"
        waiter.call(send, 1, Kind.OUTPUT, "last words")
        calls = [waiter.start(wait_for_ever, 1), sender.start(send_for_ever, 1)]
        assert [call.note() for call in calls] == ["waiting", "sending"]
        os.kill(victim.pid, sign)
        for call, stage, last in zip(calls, (0, 2), ("output message 0", "proxy message"), strict=True):
            error = failure(call)
            assert isinstance(error, PeerLostError)
            assert f"stage {stage} rank 0: stage 1 {how}" in str(error)
            assert f"(last sent to it: {last}" in str(error)
        if sign == signal.SIGSTOP:
            os.kill(victim.pid, signal.SIGCONT)
            results([rank.start(close_lanes) for rank in (waiter, victim, sender)])
    victim.await_end()
    assert not list(ipc_dir.iterdir()), "a killed rank has left files"
    team.dismiss(victim)


@pytest.mark.slow
@transports
def test_ranks_that_are_stopped_together_and_continued_lose_nobody(team: Team, transport: str) -> None:
    """Longer than the time-out: a suspended machine, a paused container, Ctrl-Z."""
    victims = [team.recruit(), team.recruit()]
    timeout_s = 0.5
    team.open_lanes(victims, Settings(host_transport=transport, peer_timeout_s=timeout_s, wait_limit_s=60))
    for _ in range(3):
        calls = [rank.start(stay_for, 2.0) for rank in victims]
        for call in calls:
            assert call.note() == "here"
        for rank in victims:
            os.kill(rank.pid, signal.SIGSTOP)
        begin = time.monotonic()
        for rank in victims:
            await_state(rank.pid, "T")
        while time.monotonic() - begin < 3 * timeout_s:
            select.select([], [], [], 0.1)
        for rank in victims:
            os.kill(rank.pid, signal.SIGCONT)
        results(calls)
    assert victims[0].call(send, 1, Kind.OUTPUT, "still") == 1
    assert victims[1].call(receive, 0, Kind.OUTPUT, range(1)) == ["still"]
    for rank in victims:
        team.dismiss(rank)


@pytest.mark.slow
@transports
def test_a_peer_that_is_stopped_alone_is_lost_and_a_shorter_pause_is_none(team: Team, transport: str) -> None:
    victim = team.recruit()
    team.open_lanes(
        [team.ranks[0], victim], Settings(host_transport=transport, peer_timeout_s=2, wait_limit_s=60)
    )
    looking = team.ranks[0].start(stay_for, 3.0)
    assert looking.note() == "here"
    os.kill(victim.pid, signal.SIGSTOP)
    select.select([], [], [], 1.0)
    os.kill(victim.pid, signal.SIGCONT)
    looking.result()
    looking = team.ranks[0].start(stay_for, 60.0)
    assert looking.note() == "here"
    os.kill(victim.pid, signal.SIGSTOP)
    with pytest.raises(PeerLostError, match="stage 0 rank 0: stage 1 is gone: .* was silent for 2 s"):
        looking.result()
    team.dismiss(victim)


def stay_for(here: Here, seconds: float) -> None:
    """As a scheduler that waits for requests; stopped time does not count."""
    here.note("here")
    for _ in range(int(seconds / 0.1)):
        here.lane.poll(100)
        here.lane.check()


def await_state(pid: int, state: str) -> None:
    deadline = time.monotonic() + 20
    while Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != state:
        assert time.monotonic() < deadline, f"process {pid} is not {state}"


@transports
def test_a_peer_that_closes_has_shut_down_and_its_last_messages_arrive(team: Team, transport: str) -> None:
    a, b = team.open_lanes(2, Settings(host_transport=transport, wait_limit_s=60))
    b.call(send, 0, Kind.PROXY, "one", "two")
    b.call(close_lanes)
    assert a.call(receive, 1, Kind.PROXY, range(2)) == ["one", "two"]
    with pytest.raises(PeerLostError, match=r"stage 0 rank 0: stage 1 has shut down .*nothing"):
        a.call(receive, 1, Kind.PROXY, range(2, 3))


@transports
def test_sending_to_a_peer_that_closed_raises_instead_of_blocking(team: Team, transport: str) -> None:
    a, b = team.open_lanes(2, Settings(host_transport=transport, wait_limit_s=60, window=4096))
    b.call(close_lanes)
    with pytest.raises(PeerLostError, match="stage 0 rank 0: stage 1 has shut down"):
        a.call(send_for_ever_without_note, 1)


def send_for_ever_without_note(here: Here, peer: int) -> None:
    while True:
        here.lane.send(peer, Message(Kind.PROXY, values=b""))


def test_a_sender_that_is_held_up_notices_that_its_peer_is_gone(team: Team) -> None:
    a, b = team.open_lanes(2, Settings(window=4, wait_limit_s=60))
    a.call(announce_blocking, 1)
    sending = a.start(send, 1, Kind.PROXY, *range(5))
    assert sending.note() == "blocked"
    b.call(close_lanes)
    with pytest.raises(PeerLostError):
        sending.result()


def close_twice(here: Here) -> None:
    here.lane.close()
    here.lane.close()


def test_closing_twice_and_in_any_order_ends(team: Team) -> None:
    for first, second in ((0, 1), (1, 0)):
        ranks = team.open_lanes(2)
        ranks[first].call(close_twice)
        ranks[second].call(close_twice)
    ranks = team.open_lanes(2)
    results([rank.start(close_twice) for rank in ranks])
