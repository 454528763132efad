"""Clients of the host lane that are not of this server, and peers that claim to be another: nothing is
unpickled. test_unauthenticated.py has many of them."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import zmq
from zmq.utils.monitor import recv_monitor_message

from rig.harness import Call, Here, Rank, Team, open_host_lane, receive, results, send, store_exchange
from sglang_npu_pp.errors import MessageError, PeerLostError, TransportError
from sglang_npu_pp.settings import Settings
from sglang_npu_pp.tools.certify.ports import free_ports
from sglang_npu_pp.transport.endpoints import EndpointRecord, Exchange, KeyPair
from sglang_npu_pp.transport.message import Buffer, Kind, Message, encode

pytestmark = pytest.mark.timeout(180)


class Trap:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[[str], object], tuple[str]]:
        return _spring, (str(self.path),)


def _spring(path: str) -> None:
    Path(path).touch()


def trap_frames(path: Path, *, source: int = 1, number: int = 0) -> list[Buffer]:
    message = Message(Kind.PROXY, values=Trap(path))
    return encode(message, source=source, number=number, check_all=True)


def hello_frames(source: int) -> list[Buffer]:
    return encode(Message(Kind.HELLO), source=source, number=0, check_all=True)


@pytest.fixture
def trap(tmp_path: Path) -> Path:
    """A file that appears when a `Trap` is unpickled."""
    return tmp_path / "unpickled"


def endpoint_of(here: Here) -> tuple[str, bytes]:
    """TCP endpoint and public key of this rank."""
    record = here.lane._records[here.lane.stage]
    return record.tcp[0], record.key


class UnauthenticatedClient:
    """A DEALER that is not made by our code."""

    def __init__(
        self,
        endpoint: str,
        identity: bytes,
        *,
        keys: KeyPair | None = None,
        server_key: bytes = b"",
    ) -> None:
        self._context = zmq.Context()
        self.socket = self._context.socket(zmq.DEALER)
        self.socket.setsockopt(zmq.LINGER, 0)
        self.socket.setsockopt(zmq.ROUTING_ID, identity)
        self.socket.setsockopt(zmq.RECONNECT_IVL, -1)
        if keys is not None:
            self.socket.setsockopt(zmq.CURVE_PUBLICKEY, keys.public)
            self.socket.setsockopt(zmq.CURVE_SECRETKEY, keys.secret)
            self.socket.setsockopt(zmq.CURVE_SERVERKEY, server_key)
        self._monitor = self.socket.get_monitor_socket()
        self.socket.connect(endpoint)

    def is_let_in(self) -> bool:
        """How the handshake ends."""
        refused = {
            zmq.EVENT_HANDSHAKE_FAILED_AUTH,
            zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL,
            zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL,
            zmq.EVENT_DISCONNECTED,
        }
        while self._monitor.poll(20_000):
            event = recv_monitor_message(self._monitor)["event"]
            if event == zmq.EVENT_HANDSHAKE_SUCCEEDED:
                return True
            if event in refused:
                return False
        raise AssertionError("the client was neither refused nor let in within 20 s")

    def close(self) -> None:
        self.socket.disable_monitor()
        self._monitor.close()
        self.socket.close()
        self._context.term()


@contextlib.contextmanager
def unauthenticated_client(endpoint: str, identity: bytes, **options: Any) -> Iterator[UnauthenticatedClient]:
    someone = UnauthenticatedClient(endpoint, identity, **options)
    try:
        yield someone
    finally:
        someone.close()


def assert_serving(a: Rank, b: Rank, number: int = 0) -> None:
    """Both directions of a pair work."""
    a.call(send, b.index, Kind.OUTPUT, "still")
    b.call(send, a.index, Kind.OUTPUT, "serving")
    assert b.call(receive, a.index, Kind.OUTPUT, range(number, number + 1)) == ["still"]
    assert a.call(receive, b.index, Kind.OUTPUT, range(number, number + 1)) == ["serving"]


@pytest.mark.parametrize("credentials", ["no key", "an unknown key", "the wrong server key"])
def test_an_unauthenticated_client_on_the_network_is_refused_and_nothing_is_unpickled(
    team: Team, trap: Path, credentials: str
) -> None:
    a, b = team.open_lanes(2, Settings(host_transport="tcp", wait_limit_s=20))
    endpoint, key = a.call(endpoint_of)
    options: dict[str, Any] = {}
    if credentials != "no key":
        server_key = key if credentials == "an unknown key" else KeyPair.generate().public
        options = {"keys": KeyPair.generate(), "server_key": server_key}
    with unauthenticated_client(endpoint, b"1/other", **options) as someone:
        with contextlib.suppress(zmq.Again):  # the connection may be refused already
            someone.socket.send_multipart(hello_frames(1), zmq.NOBLOCK)
            someone.socket.send_multipart(trap_frames(trap), zmq.NOBLOCK)
        assert not someone.is_let_in()
        assert_serving(a, b)
    assert_serving(a, b, 1)
    assert not trap.exists()


def pretend(here: Here, path: Path, claimed: int, endpoint: str, server_key: bytes) -> None:
    """Connect to a peer with this rank's own good key, but as another stage."""
    with unauthenticated_client(
        endpoint, b"%d/other" % claimed, keys=here.lane._keys, server_key=server_key
    ) as someone:
        someone.socket.setsockopt(zmq.LINGER, 10_000)
        someone.socket.send_multipart(hello_frames(claimed))
        someone.socket.send_multipart(trap_frames(path, source=claimed))


def pump_until_refused(here: Here, count: int) -> None:
    deadline = time.monotonic() + 20
    while here.telemetry.refused < count:
        assert time.monotonic() < deadline, f"{here.telemetry.refused} of {count} frames were refused"
        here.lane.poll(100)
    assert here.telemetry.refused == count


def test_a_stage_cannot_speak_for_another_one(team: Team, trap: Path) -> None:
    a, b, c = team.open_lanes(3, Settings(host_transport="tcp", wait_limit_s=20))
    endpoint, key = a.call(endpoint_of)
    b.call(pretend, trap, 2, endpoint, key)
    a.call(pump_until_refused, 2)
    assert_serving(a, b)
    assert_serving(a, c)
    assert not trap.exists()


def claim_another_source(here: Here, path: Path) -> None:
    """Over our own good connection, a message that says it is from somebody else."""
    here.lane._outboxes[0]._socket.send_multipart(trap_frames(path, source=2))


def test_a_header_cannot_name_another_source_than_its_connection(team: Team, trap: Path) -> None:
    a, b, _ = team.open_lanes(3)
    b.call(claim_another_source, trap)
    with pytest.raises(MessageError, match=r"a message of stage 1 cannot be used\. .* from stage 2"):
        a.call(receive, 1, Kind.PROXY, range(1))
    assert not trap.exists()


def announce_endpoint(here: Here, exchange: Exchange) -> Exchange:
    """Tell the test where we listen, before anybody has connected, and wait for its word."""
    calls = 0

    def wrapped(data: bytes) -> list[bytes]:
        nonlocal calls
        calls += 1
        records = exchange(data)
        if calls == 2:
            record = msgspec.msgpack.decode(data, type=EndpointRecord)
            here.note(record.ipc or record.tcp[0])
            here.store.get(f"go on, {record.ipc or record.tcp[0]}")
        return records

    return wrapped


def test_an_ipc_client_that_said_no_hello_is_refused_and_nothing_is_unpickled(team: Team, trap: Path) -> None:
    """It may even name a stage: only a proper hello opens a connection."""
    name = team.new_round()
    settings = Settings(host_transport="ipc", wait_limit_s=20, start_limit_s=20)
    opening_a = team.ranks[0].start(open_host_lane, name, 0, 2, settings, wrap_exchange=announce_endpoint)
    opening_b = team.ranks[1].start(open_host_lane, name, 1, 2, settings)
    endpoint = opening_a.note()
    said: list[list[Buffer]] = [
        [b"garbage"],
        [b""],
        [b"", b""],
        [b"\0" * 300, b"more"],
        trap_frames(trap),
        hello_frames(1)[:1] + [b"and more"],
        [bytes(hello_frames(1)[0])[:-1]],
        hello_frames(0),
        encode(Message(Kind.GOODBYE), source=1, number=0, check_all=True),
    ]
    identities = [b"who", b"1/ghost"]
    with contextlib.ExitStack() as stack:
        for identity in identities:
            someone = stack.enter_context(unauthenticated_client(endpoint, identity))
            someone.socket.setsockopt(zmq.LINGER, 10_000)  # on a busy machine it is closed before it has sent
            for frames in said:
                someone.socket.send_multipart(frames)
        team.store.set(f"go on, {endpoint}", "")
        results([opening_a, opening_b])
        team.ranks[0].call(pump_until_refused, len(identities) * len(said))
        assert_serving(team.ranks[0], team.ranks[1])
    assert not trap.exists()


def test_a_stage_that_connects_at_once_is_known_already(team: Team) -> None:
    """The other stage may have our address before we have looked at what it said in return."""
    name = team.new_round()
    settings = Settings(host_transport="tcp", start_limit_s=0.5)
    opening = team.ranks[0].start(open_host_lane, name, 0, 2, settings, wrap_exchange=announce_endpoint)
    exchange = store_exchange(team.store, name, 1, 2)
    keys = KeyPair.generate()
    mine = EndpointRecord(1, "another machine", tcp=(f"tcp://127.0.0.1:{free_ports(1)[0]}",), key=keys.public)
    for _ in range(2):
        theirs = msgspec.msgpack.decode(exchange(msgspec.msgpack.encode(mine))[0], type=EndpointRecord)
    assert opening.note() == theirs.tcp[0]  # and there it waits until we say so
    with unauthenticated_client(theirs.tcp[0], b"1/main", keys=keys, server_key=theirs.key) as peer:
        assert peer.is_let_in()
        team.store.set(f"go on, {theirs.tcp[0]}", "")
        assert isinstance(failure(opening), TransportError)  # none but us listens at our own address


def lie_about_the_key(here: Here, exchange: Exchange) -> Exchange:
    key = KeyPair.generate().public

    def wrapped(data: bytes) -> list[bytes]:
        record = msgspec.msgpack.decode(data, type=EndpointRecord)
        return exchange(msgspec.msgpack.encode(msgspec.structs.replace(record, key=key)))

    return wrapped


def failure(call: Call[Any]) -> BaseException:
    """What the call raised."""
    try:
        call.result()
    except BaseException as error:
        return error
    raise AssertionError("the call raised nothing")


def test_a_peer_with_another_key_than_its_card_says_is_not_connected(team: Team) -> None:
    name = team.new_round()
    settings = Settings(host_transport="tcp", start_limit_s=10)
    honest = team.ranks[0].start(open_host_lane, name, 0, 2, settings)
    liar = team.ranks[1].start(open_host_lane, name, 1, 2, settings, wrap_exchange=lie_about_the_key)
    error = failure(liar)
    assert isinstance(error, TransportError)
    assert "stage 1 rank 0: stage 0 at tcp://127.0.0.1:" in str(error)
    assert "refused our connection (authentication failed)" in str(error)
    error = failure(honest)
    assert isinstance(error, PeerLostError)  # the other one has ended by then
    assert "stage 0 rank 0" in str(error)
    assert "stage 1" in str(error)
