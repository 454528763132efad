"""Whoever is not of this server, at the port of a host lane: real sockets, 10,000 malformed messages.

The rank that is attacked is a process of its own, whose memory and descriptors are looked at from outside.
"""

from __future__ import annotations

import contextlib
import ctypes
import random
import socket
import struct
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from rig.harness import Here, Rank, Team, open_host_lane, receive, results, take_number, telemetry_of
from scripts.soak.unauthenticated import (
    GREETING,
    LONG_COMMAND,
    LONG_MESSAGE,
    SCANS,
    connect,
    damaged,
    send_much,
)
from sglang_npu_pp.errors import MessageError, PeerLostError, SequenceError
from sglang_npu_pp.settings import Settings
from sglang_npu_pp.transport import connection_monitor
from sglang_npu_pp.transport.endpoints import KeyPair
from sglang_npu_pp.transport.message import INLINE_BYTES, Kind, Message, encode
from sglang_npu_pp.transport.parts import PART_BYTES

from .test_host_lane import flipped, send_frames
from .test_host_lane_clients import announce_endpoint, assert_serving, endpoint_of, unauthenticated_client

pytestmark = pytest.mark.timeout(180)

SETTINGS = Settings(host_transport="tcp", wait_limit_s=20)
Address = tuple[str, int]

LIMIT_S = 30.0
# One part for each connection that is open at a time, and what an allocator does not give back.
GROWTH_LIMIT_MIB = 32


@pytest.fixture
def ranks(team: Team) -> list[Rank]:
    """Two ranks whose lanes are on TCP; the first one is attacked."""
    return team.open_lanes(2, SETTINGS)


@pytest.fixture
def address(ranks: list[Rank]) -> Address:
    return address_of(ranks[0].call(endpoint_of)[0])


def address_of(endpoint: str) -> Address:
    return "127.0.0.1", int(endpoint.rpartition(":")[2])


def is_closed(connection: socket.socket) -> bool:
    """Wait until the other side has closed it; whatever it says before is read."""
    with contextlib.suppress(ConnectionError):
        while connection.recv(4096):
            pass
    return True


def memory_mib(rank: Rank, which: str) -> float:
    """VmRSS: what the process has; VmHWM: the most it had since that was reset."""
    for line in Path(f"/proc/{rank.pid}/status").read_text().splitlines():
        if line.startswith(f"{which}:"):
            return int(line.split()[1]) / 1024
    raise AssertionError(f"no {which}")


def descriptors(rank: Rank) -> int:
    return sum(1 for _ in Path(f"/proc/{rank.pid}/fd").iterdir())


def await_refused(rank: Rank, count: int) -> None:
    """Wait until exactly so many connections have been counted."""
    deadline = time.monotonic() + LIMIT_S
    while (found := rank.call(telemetry_of).refused_connections) < count:
        assert time.monotonic() < deadline, f"{found} of {count} refused connections were counted"
    assert found == count


@contextlib.contextmanager
def memory_is_bounded(rank: Rank, limit_mib: float = GROWTH_LIMIT_MIB) -> Iterator[None]:
    """At no time meanwhile."""
    Path(f"/proc/{rank.pid}/clear_refs").write_text("5")  # resets VmHWM
    before = memory_mib(rank, "VmRSS")
    yield
    grown = memory_mib(rank, "VmHWM") - before
    assert grown < limit_mib, f"{grown:.0f} MiB more than before"


# --- who does not speak our language -------------------------------------------------------------


@pytest.mark.parametrize("said", SCANS)
def test_a_scanner_of_ports_is_counted(ranks: list[Rank], address: Address, said: bytes) -> None:
    for _ in range(20):
        connect(address, said).close()
    await_refused(ranks[0], 20)
    assert_serving(ranks[0], ranks[1])


def answer_after_a_long_call(here: Here, seconds: float) -> None:
    """A call that does not give Python's lock back, so that no thread of this process listens to anything."""
    here.note("begins")
    ctypes.PyDLL(None).usleep(int(seconds * 1e6))
    here.lane.send(1, Message(Kind.OBJECT, values="done"))


@pytest.mark.slow
def test_a_flood_while_pythons_lock_is_taken_does_not_stop_the_network_thread(team: Team) -> None:
    """ZeroMQ waited for a thread of ours to hear of each of them, and sent no heartbeat for so long."""
    settings = Settings(host_transport="tcp", wait_limit_s=60, peer_timeout_s=1)
    attacked, peer = team.open_lanes(2, settings)
    address = address_of(attacked.call(endpoint_of)[0])
    answering = attacked.start(answer_after_a_long_call, 6.0)
    assert answering.note() == "begins"
    waiting = peer.start(receive, 0, Kind.OBJECT, [0])
    for _ in range(2000):
        connect(address, b"").close()
    assert results([waiting, answering], limit_s=60)[0] == ["done"]
    assert_serving(attacked, peer)


def test_without_an_unauthenticated_client_nothing_is_counted(ranks: list[Rank]) -> None:
    assert_serving(ranks[0], ranks[1])
    assert [rank.call(telemetry_of).refused_connections for rank in ranks] == [0, 0]


def keys_of(here: Here) -> KeyPair:
    return here.lane._keys


def test_a_rank_of_an_earlier_start_is_refused(team: Team) -> None:
    """With its old key, and also when it knows the new key of the one it connects to."""
    ranks = team.open_lanes(2, SETTINGS)
    old_keys, (_, old_server_key) = ranks[1].call(keys_of), ranks[0].call(endpoint_of)
    ranks = team.open_lanes(2, SETTINGS)
    endpoint, server_key = ranks[0].call(endpoint_of)
    for known_key in (old_server_key, server_key):
        with unauthenticated_client(endpoint, b"1/main", keys=old_keys, server_key=known_key) as someone:
            assert not someone.is_let_in()
    with unauthenticated_client(endpoint, b"1/main") as someone:
        assert not someone.is_let_in()
    await_refused(ranks[0], 3)
    assert_serving(ranks[0], ranks[1])


# --- who says too much ---------------------------------------------------------------------------


@pytest.mark.parametrize("announced", [LONG_COMMAND, LONG_MESSAGE], ids=["command", "message"])
def test_an_unauthenticated_client_that_announces_a_gibibyte_and_sends_it_is_refused(
    ranks: list[Rank], address: Address, announced: bytes
) -> None:
    with memory_is_bounded(ranks[0]):
        for _ in range(4):
            with connect(address, GREETING + announced) as connection:
                send_much(connection)
    await_refused(ranks[0], 4)
    assert_serving(ranks[0], ranks[1])


def test_a_part_is_all_that_an_unauthenticated_client_can_have_kept(
    ranks: list[Rank], address: Address
) -> None:
    """As long as it may be; it is read to its end, and then it is no handshake."""
    longest = b"\x06" + struct.pack(">Q", PART_BYTES)
    with memory_is_bounded(ranks[0], 2 * GROWTH_LIMIT_MIB), contextlib.ExitStack() as stack:
        said = GREETING + longest + bytes(PART_BYTES // 2)
        connections = [stack.enter_context(connect(address, said)) for _ in range(20)]
        for connection in connections:
            with contextlib.suppress(ConnectionError):
                connection.sendall(bytes(PART_BYTES - PART_BYTES // 2))
        assert all(is_closed(connection) for connection in connections)
    await_refused(ranks[0], 20)
    assert_serving(ranks[0], ranks[1])


def send_until_lost(here: Here, peer: int, frame_bytes: int) -> None:
    """A frame that is not cut, and then look at the connection."""
    send_frames(here, peer, [bytes(frame_bytes)])
    deadline = time.monotonic() + LIMIT_S
    while time.monotonic() < deadline:
        here.lane.check()
        here.lane.poll(100)


@pytest.mark.slow
def test_a_peer_that_sends_a_frame_that_is_too_long_loses_its_connection(ranks: list[Rank]) -> None:
    with memory_is_bounded(ranks[0]), pytest.raises(PeerLostError, match="stage 0 is gone"):
        ranks[1].call(send_until_lost, 0, 64 << 20)


# --- who says too little -------------------------------------------------------------------------


def limit_handshakes(here: Here, milliseconds: int) -> int:
    before = connection_monitor.HANDSHAKE_LIMIT_MS
    connection_monitor.HANDSHAKE_LIMIT_MS = milliseconds
    return before


def test_two_hundred_connections_that_say_next_to_nothing_are_given_back(team: Team) -> None:
    """They are there before the other stage comes, which is let in all the same."""
    attacked = team.ranks[0]
    usual = attacked.call(limit_handshakes, 2000)
    name = team.new_round()
    openings = [
        rank.start(open_host_lane, name, stage, 2, SETTINGS, wrap_exchange=announce_endpoint)
        for stage, rank in enumerate(team.ranks[:2])
    ]
    endpoints = [opening.note() for opening in openings]
    before = descriptors(attacked)
    with contextlib.ExitStack() as stack:
        slow = [stack.enter_context(connect(address_of(endpoints[0]))) for _ in range(200)]
        for at in range(len(GREETING)):  # a byte at a time, every second one; the others are silent
            with contextlib.suppress(ConnectionError):
                for connection in slow[::2]:
                    connection.sendall(GREETING[at : at + 1])
            if at == 0:
                for endpoint in endpoints:
                    team.store.set(f"go on, {endpoint}", "")
                results(openings)
        assert_serving(attacked, team.ranks[1])
        assert all(is_closed(connection) for connection in slow)
    await_refused(attacked, 200)
    attacked.call(limit_handshakes, usual)
    assert descriptors(attacked) < before + 20  # its peer's connections, and its own
    assert_serving(attacked, team.ranks[1], 1)


# --- malformed messages --------------------------------------------------------------------------


def record_handshake(endpoint: str, server_key: bytes) -> bytes:
    """What an unauthenticated client with a key of its own says to the port; a relay listens."""
    with socket.create_server(("127.0.0.1", 0)) as relay:
        relay.settimeout(LIMIT_S)
        said = b""
        address = f"tcp://127.0.0.1:{relay.getsockname()[1]}"
        with unauthenticated_client(address, b"1/other", keys=KeyPair.generate(), server_key=server_key):
            theirs, _ = relay.accept()
            with theirs, connect(address_of(endpoint)) as ours:
                for direction in (theirs, ours):
                    direction.setblocking(False)
                deadline = time.monotonic() + LIMIT_S
                while time.monotonic() < deadline:
                    heard = _pass_on(theirs, ours)
                    answered = _pass_on(ours, theirs)
                    if heard is None or answered is None:
                        return said
                    said += heard
    raise AssertionError("the handshake had no end")


def _pass_on(source: socket.socket, target: socket.socket) -> bytes | None:
    """What could be read, None at the end."""
    try:
        data = source.recv(65536)
        if data:
            target.sendall(data)
        return data or None
    except BlockingIOError:
        return b""
    except ConnectionError:
        return None


@pytest.mark.slow
def test_five_thousand_damaged_handshakes_do_no_harm(ranks: list[Rank], address: Address) -> None:
    said = record_handshake(*ranks[0].call(endpoint_of))
    assert said[9:32] == GREETING[9:32]
    assert len(said) > len(GREETING) + 200  # a CURVE hello at least
    generator = random.Random(7)
    with memory_is_bounded(ranks[0]):
        for batch in range(100):
            for _ in range(50):  # fewer than wait to be accepted at a time: others would try again later
                connect(address, damaged(said, generator)).close()
            await_refused(ranks[0], 1 + 50 * (batch + 1))  # one of them is the one that was recorded
    assert_serving(ranks[0], ranks[1])


def send_damaged(here: Here, peer: int, kind: Kind, count: int, every: int) -> int:
    """`count` damaged messages, and a good one behind `every` of them; returns how many good ones."""
    generator = random.Random(11)
    good = 0
    for index in range(count):
        body = generator.randbytes(generator.choice((3, 30, 300, 3000, INLINE_BYTES)))
        message = Message(kind, index, index, values={"index": index, "body": body})
        head, *rest = (bytes(f) for f in encode(message, source=here.lane.stage, number=good, check_all=True))
        send_frames(here, peer, DAMAGE[index % len(DAMAGE)](head, rest, generator))
        if index % every == every - 1:
            send_frames(
                here,
                peer,
                [
                    bytes(f)
                    for f in encode(
                        Message(kind, values=good), source=here.lane.stage, number=good, check_all=True
                    )
                ],
            )
            good += 1
    return good


DAMAGE: list[Callable[[bytes, list[bytes], random.Random], list[bytes]]] = [
    lambda head, rest, at: [flipped(head, at.randrange(len(head))), *rest],
    lambda head, rest, at: [head[: at.randrange(len(head))], *rest],
    lambda head, rest, at: [head + at.randbytes(5), *rest],
    lambda head, rest, at: [head, *rest, at.randbytes(at.randrange(50))],
    lambda head, rest, at: [at.randbytes(at.randrange(100)), *rest],
    lambda head, rest, at: rest or [b""],
    lambda head, rest, at: [damaged(head, at) + b"\0", *rest],
]


def take_good_ones(here: Here, source: int, kind: Kind, good: int) -> tuple[list[Any], int, set[str]]:
    """Values of the good messages, how often receiving raised, and what."""
    values: list[Any] = []
    kinds: set[str] = set()
    refused = 0
    deadline = time.monotonic() + LIMIT_S
    while len(values) < good:
        assert time.monotonic() < deadline, f"{len(values)} of {good} good messages came"
        try:
            values.append(take_number(here, source, kind, len(values)).values)
        except (MessageError, SequenceError) as error:
            refused += 1
            kinds.add(type(error).__name__)
    return values, refused, kinds


def test_five_thousand_damaged_messages_of_a_peer_are_five_thousand_errors(ranks: list[Rank]) -> None:
    """The scheduler ends at the first. Whoever goes on, as this test does, finds nothing out of order."""
    count, every = 5000, 50
    with memory_is_bounded(ranks[0]):
        sending = ranks[1].start(send_damaged, 0, Kind.PROXY, count, every)
        values, refused, kinds = ranks[0].call(take_good_ones, 1, Kind.PROXY, count // every)
        assert sending.result() == count // every
    assert values == list(range(count // every))
    assert refused == count
    assert ranks[0].call(telemetry_of).refused == count
    assert kinds <= {"MessageError", "SequenceError"}
    assert_serving(ranks[0], ranks[1])
