"""The host lane between real processes: order, bounds, unauthenticated clients, damage, lost peers, ends."""

from __future__ import annotations

import contextlib
import ctypes
import os
import resource
import select
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import zmq
from hypothesis import given, settings
from hypothesis import strategies as st
from zmq.utils.monitor import recv_monitor_message

from rig.harness import (
    Call,
    Here,
    Rank,
    Team,
    announce_blocking,
    await_message,
    close_lanes,
    open_host_lane,
    receive,
    results,
    send,
    store_exchange,
    take_number,
    telemetry_of,
    trace_of,
)
from rig.samples import assert_same, python_values, realise, tensor_dicts
from sglang_npu_pp.errors import (
    MessageError,
    PeerLostError,
    PipelineError,
    SequenceError,
    TransportError,
    WaitLimitError,
)
from sglang_npu_pp.settings import Settings
from sglang_npu_pp.tools.certify.ports import free_ports
from sglang_npu_pp.transport import connection_monitor, host_lane
from sglang_npu_pp.transport.context import RankContext
from sglang_npu_pp.transport.endpoints import EndpointRecord, Exchange, KeyPair, bind_tcp, node_identity
from sglang_npu_pp.transport.host_lane import HostLane
from sglang_npu_pp.transport.message import INLINE_BYTES, Buffer, Kind, Message, encode

pytestmark = pytest.mark.timeout(180)

KINDS = [kind for kind in Kind if kind > Kind.GOODBYE]
MEBIBYTE = 1 << 20

transports = pytest.mark.parametrize("transport", ["ipc", "tcp"])


# --- order and values --------------------------------------------------------------------------


def send_each(here: Here, peer: int, messages: list[tuple[Kind, dict[str, Any], Any]]) -> None:
    for index, (kind, tensors, values) in enumerate(messages):
        made = realise(tensors)
        only_tensors = {name: value for name, value in made.items() if hasattr(value, "data_ptr")}
        message = Message(
            kind, index, 7 * index, keys=tuple(only_tensors), tensors=only_tensors, values=realise(values)
        )
        here.lane.send(peer, message)


def check_each(
    here: Here, source: int, messages: list[tuple[Kind, dict[str, Any], Any]], order: list[Kind]
) -> None:
    """Take one message of each kind in `order` and compare it with what was sent."""
    sent_by_kind: dict[Kind, list[int]] = {kind: [] for kind in KINDS}
    for index, (kind, _, _) in enumerate(messages):
        sent_by_kind[kind].append(index)
    taken = dict.fromkeys(KINDS, 0)
    for kind in order:
        number = taken[kind]
        taken[kind] += 1
        message = take_number(here, source, kind, number)
        index = sent_by_kind[kind][number]
        _, tensors, values = messages[index]
        assert (message.kind, message.source, message.number) == (kind, source, number)
        assert (message.slot, message.iteration) == (index, 7 * index)
        expected = {n: v for n, v in realise(tensors).items() if hasattr(v, "data_ptr")}
        assert message.keys == tuple(expected)
        assert_same(message.tensors, expected)
        assert_same(message.values, realise(values))


@pytest.mark.parametrize(("transport", "checksum"), [("ipc", "small"), ("tcp", "full")])
@settings(max_examples=25)
@given(data=st.data())
def test_every_kind_keeps_its_order_whatever_the_others_do(
    team: Team, transport: str, checksum: str, data: st.DataObject
) -> None:
    message = st.tuples(st.sampled_from(KINDS[:4]), tensor_dicts, python_values)
    messages = data.draw(st.lists(message, max_size=14))
    order = data.draw(st.permutations([kind for kind, _, _ in messages]))
    a, b = team.open_lanes(2, Settings(host_transport=transport, checksum=checksum, wait_limit_s=20))
    results([a.start(send_each, 1, messages), b.start(check_each, 0, messages, order)])
    results([b.start(send_each, 0, messages), a.start(check_each, 1, messages, order)])


@transports
def test_three_stages_talk_in_every_direction(team: Team, transport: str) -> None:
    ranks = team.open_lanes(3, Settings(host_transport=transport, wait_limit_s=20))
    for rank in ranks:
        for peer in ranks:
            if rank is not peer:
                rank.call(send, peer.index, Kind.OUTPUT, *[(rank.index, peer.index, i) for i in range(5)])
    for rank in ranks:
        for source in ranks:
            if rank is not source:
                found = rank.call(receive, source.index, Kind.OUTPUT, range(5))
                assert found == [(source.index, rank.index, i) for i in range(5)]


def transport_to(here: Here, peer: int) -> tuple[str, bool]:
    endpoint = here.lane._outboxes[peer].endpoint
    return endpoint.partition("://")[0], here.lane.is_local(peer)


def test_stages_of_one_node_use_ipc_and_others_encrypted_tcp(team: Team) -> None:
    """Stage 2 stands on another machine, in that it says so."""
    ranks = team.open_lanes(3, nodes={2: "another machine"})
    found = {(r.index, p): r.call(transport_to, p) for r in ranks for p in range(3) if p != r.index}
    near, far = ("ipc", True), ("tcp", False)
    assert found == {(0, 1): near, (1, 0): near, (0, 2): far, (1, 2): far, (2, 0): far, (2, 1): far}
    ranks[0].call(send, 2, Kind.PROXY, "far")
    ranks[0].call(send, 1, Kind.PROXY, "near")
    assert ranks[2].call(receive, 0, Kind.PROXY, range(1)) == ["far"]
    assert ranks[1].call(receive, 0, Kind.PROXY, range(1)) == ["near"]


def test_an_early_proxy_does_not_hold_up_an_output(team: Team) -> None:
    a, b = team.open_lanes(2)
    a.call(send, 1, Kind.PROXY, "proxy 0", "proxy 1")
    a.call(send, 1, Kind.OUTPUT, "output 0")
    assert b.call(receive, 0, Kind.OUTPUT, range(1)) == ["output 0"]
    assert b.call(receive, 0, Kind.PROXY, range(2)) == ["proxy 0", "proxy 1"]


def wait_once_it_is_there(here: Here, source: int, kind: Kind) -> Any:
    await_message(here, source, kind, 0)
    here.trace.record("asked for")
    return take_number(here, source, kind, 0).values


def test_a_message_is_pushed_without_being_asked_for(team: Team) -> None:
    a, b = team.open_lanes(2)
    assert a.call(send, 1, Kind.PROXY, "pushed") == 1  # returns, and nobody has asked yet
    assert b.call(wait_once_it_is_there, 0, Kind.PROXY) == "pushed"
    assert [event.name for event in b.call(trace_of)] == ["arrive", "asked for"]


@transports
def test_a_port_of_a_thread_of_its_own_shares_no_connection(team: Team, transport: str) -> None:
    settings = Settings(host_transport=transport, wait_limit_s=20, start_limit_s=20)
    ranks = team.open_lanes(3, settings, extra_ports={"tokens": [2]})
    ranks[2].call(send_on_port, "tokens", 0, "by the other door")
    ranks[2].call(send, 0, Kind.PROXY, "by the main door")
    assert ranks[0].call(receive, 2, Kind.OUTPUT, range(1)) == ["by the other door"]
    assert ranks[0].call(receive, 2, Kind.PROXY, range(1)) == ["by the main door"]


def send_on_port(here: Here, port: str, peer: int, value: Any) -> None:
    here.kept[port][peer].send(Message(Kind.OUTPUT, values=value))


# --- bounds ------------------------------------------------------------------------------------


def send_until_full(here: Here, peer: int, kind: Kind, values: list[Any]) -> int:
    """How many of `values` went before the wait for room ran into its limit."""
    for sent, value in enumerate(values):
        try:
            here.lane.send(peer, Message(kind, values=value))
        except WaitLimitError as error:
            assert "took no proxy message for 1 s while" in str(error)
            return sent
    return len(values)


def test_a_sender_stops_at_its_window_and_goes_on_with_every_quarter(team: Team) -> None:
    a, b = team.open_lanes(2, Settings(window=8, wait_limit_s=1))
    values = list(range(20))
    assert a.call(send_until_full, 1, Kind.PROXY, values) == 8
    assert b.call(receive, 0, Kind.PROXY, range(1)) == [0]  # less than a quarter: no credit yet
    assert a.call(send_until_full, 1, Kind.PROXY, values) == 0
    assert b.call(receive, 0, Kind.PROXY, range(1, 2)) == [1]
    assert a.call(send_until_full, 1, Kind.PROXY, ["a", "b", "c"]) == 2
    assert b.call(receive, 0, Kind.PROXY, range(2, 10)) == [2, 3, 4, 5, 6, 7, "a", "b"]


def test_a_blocked_sender_is_counted_and_goes_on_when_the_receiver_takes(team: Team) -> None:
    a, b = team.open_lanes(2, Settings(window=4, wait_limit_s=20))
    a.call(announce_blocking, 1)
    sending = a.start(send, 1, Kind.PROXY, *range(5))
    assert sending.note() == "blocked"
    assert b.call(receive, 0, Kind.PROXY, range(1)) == [0]
    assert sending.result() == 5
    assert [event.name for event in a.call(trace_of)] == ["push"] * 4 + ["full", "blocked", "push"]
    counters = a.call(telemetry_of).sent["proxy"]
    assert (counters.messages, counters.backpressure) == (5, 1)
    assert counters.backpressure_s > 0
    assert b.call(receive, 0, Kind.PROXY, range(1, 5)) == [1, 2, 3, 4]


def test_the_window_bounds_bytes_too(team: Team) -> None:
    a, b = team.open_lanes(2, Settings(window=64, window_mb=1, wait_limit_s=1))
    third = [bytes(MEBIBYTE // 3)] * 5
    assert a.call(send_until_full, 1, Kind.PROXY, third) == 2  # with its header the third is too much
    assert b.call(receive, 0, Kind.PROXY, range(1)) == third[:1]
    assert a.call(send_until_full, 1, Kind.PROXY, third) == 1


def test_a_message_larger_than_the_window_goes_alone(team: Team) -> None:
    a, b = team.open_lanes(2, Settings(window=64, window_mb=1, wait_limit_s=1))
    large = bytes(3 * MEBIBYTE)
    assert a.call(send_until_full, 1, Kind.PROXY, [large, large]) == 1
    assert b.call(receive, 0, Kind.PROXY, range(1)) == [large]
    assert a.call(send_until_full, 1, Kind.PROXY, [large]) == 1
    assert b.call(receive, 0, Kind.PROXY, range(1, 2)) == [large]


def test_a_large_message_behind_a_small_one_that_was_taken_is_not_stuck(team: Team) -> None:
    """The small one earns no credit by itself."""
    a, b = team.open_lanes(2, Settings(window=64, window_mb=1, wait_limit_s=5))
    a.call(send, 1, Kind.PROXY, "small")
    assert b.call(receive, 0, Kind.PROXY, range(1)) == ["small"]
    large = bytes(MEBIBYTE)
    assert a.call(send, 1, Kind.PROXY, large) == 1
    assert b.call(receive, 0, Kind.PROXY, range(1, 2)) == [large]


def send_headers(here: Here, peer: int, count: int, nbytes: int) -> None:
    for _ in range(count):
        here.lane.send(peer, Message(Kind.PROXY, keys=("k" * nbytes,)))


def take_headers(here: Here, source: int, count: int) -> None:
    for number in range(count):
        assert take_number(here, source, Kind.PROXY, number).tensors == {}


def test_headers_do_not_eat_up_the_window(team: Team) -> None:
    """What the receiver returns as credit is what the sender has counted, headers included."""
    a, b = team.open_lanes(2, Settings(window=16, window_mb=1, wait_limit_s=5))
    count, nbytes = 300, 10_000  # three times the window
    results([a.start(send_headers, 1, count, nbytes), b.start(take_headers, 0, count)])
    sent, received = a.call(telemetry_of).sent["proxy"], b.call(telemetry_of).received["proxy"]
    assert (sent.messages, sent.bytes) == (received.messages, received.bytes)
    assert sent.bytes > count * nbytes


def test_each_kind_and_each_peer_has_a_window_of_its_own(team: Team) -> None:
    a, b, c = team.open_lanes(3, Settings(window=4, wait_limit_s=1))
    assert a.call(send_until_full, 1, Kind.PROXY, list(range(5))) == 4
    assert a.call(send, 1, Kind.OUTPUT, "another kind") == 1
    assert a.call(send, 2, Kind.PROXY, "another peer") == 1
    assert b.call(receive, 0, Kind.OUTPUT, range(1)) == ["another kind"]
    assert c.call(receive, 0, Kind.PROXY, range(1)) == ["another peer"]


def test_a_wait_has_a_limit_and_the_lane_goes_on_after_it(team: Team) -> None:
    a, b = team.open_lanes(2)
    with pytest.raises(WaitLimitError, match=r"stage 1 rank 0: proxy message 0 of stage 0 .* 0\.2 s"):
        b.call(receive, 0, Kind.PROXY, range(1), 0.2)
    a.call(send, 1, Kind.PROXY, "late")
    assert b.call(receive, 0, Kind.PROXY, range(1)) == ["late"]
    assert b.call(telemetry_of).received["proxy"].waits == 2


def send_unpicklable(here: Here, peer: int) -> None:
    here.lane.send(peer, Message(Kind.REQUESTS, values=lambda: None))


def test_what_cannot_be_pickled_raises_and_uses_up_no_number(team: Team) -> None:
    a, b = team.open_lanes(2)
    with pytest.raises(Exception, match="pickle"):
        a.call(send_unpicklable, 1)
    a.call(send, 1, Kind.REQUESTS, "fine")
    assert b.call(receive, 0, Kind.REQUESTS, range(1)) == ["fine"]


# --- unauthenticated clients ----------------------------------------------------------------------


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
        assert isinstance(failure(opening), TransportError)  # nobody listens at our own address


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


# --- a rank that cannot have Python's lock -------------------------------------------------------


def hold_pythons_lock(seconds: float) -> None:
    """As a library does that is loaded, or that computes without giving the lock back."""
    ctypes.PyDLL(None).usleep(int(seconds * 1e6))


def open_a_port_late(here: Here, seconds: float) -> list[int]:
    """The handshake of whoever connects meanwhile asks a thread of ours, which waits for the lock."""
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


# --- damage by a peer --------------------------------------------------------------------------


def send_frames(here: Here, peer: int, frames: list[bytes]) -> None:
    """Past the encoder, over the authenticated connection."""
    here.lane._outboxes[peer]._socket.send_multipart(frames)


def proxy_frames(number: int, value: Any = b"x" * INLINE_BYTES) -> list[bytes]:
    frames = encode(Message(Kind.PROXY, values=value), source=0, number=number, check_all=True)
    return [bytes(frame) for frame in frames]


@pytest.mark.parametrize("number", [5, 0], ids=["skipped", "repeated"])
def test_an_unexpected_number_names_both_numbers_and_the_stage(team: Team, number: int) -> None:
    a, b = team.open_lanes(2)
    a.call(send, 1, Kind.PROXY, "the first")
    a.call(send_frames, 1, proxy_frames(number))
    with pytest.raises(
        SequenceError, match=rf"stage 1 rank 0: expected proxy message 1 of stage 0 but number {number} came"
    ):
        b.call(receive, 0, Kind.PROXY, range(2))


def test_a_peer_that_ignores_its_window_is_found_out(team: Team) -> None:
    a, b = team.open_lanes(2, Settings(window=4))
    for number in range(5):
        a.call(send_frames, 1, proxy_frames(number))
    with pytest.raises(SequenceError, match="stage 0 has more than 4 proxy messages in flight"):
        b.call(receive, 0, Kind.OUTPUT, range(1))


def flipped(frame: bytes, position: int) -> bytes:
    return frame[:position] + bytes([frame[position] ^ 1]) + frame[position + 1 :]


DAMAGE: dict[str, Callable[[bytes, bytes], list[bytes]]] = {
    "a frame is missing": lambda head, body: [head],
    "a frame is cut": lambda head, body: [head, body[:-1]],
    "a frame is repeated": lambda head, body: [head, body, body],
    "a bit of a frame is flipped": lambda head, body: [head, flipped(body, 50)],
    "the header is cut": lambda head, body: [head[:-1], body],
    "a bit of the header is flipped": lambda head, body: [flipped(head, 20), body],
    "there is only an empty frame": lambda head, body: [b""],
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_message_of_a_peer_is_one_error_that_names_it(team: Team, damage: str) -> None:
    a, b = team.open_lanes(2)
    head, body = proxy_frames(0)
    a.call(send_frames, 1, DAMAGE[damage](head, body))
    with pytest.raises(MessageError, match=r"stage 1 rank 0: a message of stage 0 cannot be used\."):
        b.call(receive, 0, Kind.PROXY, range(1))
    assert b.call(telemetry_of).refused == 1


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


# --- start -------------------------------------------------------------------------------------


def lane(stage: int = 0, *, host: str = "127.0.0.1", port: int = 0, **values: Any) -> HostLane:
    """A lane of this process, one of two stages."""
    return HostLane(RankContext.begin(stage, 2, Settings(**values)), host=host, port=port)


def alone_with(other: EndpointRecord) -> Exchange:
    """An exchange for stage 0 in which stage 1 always says `other`."""
    return lambda data: [data, msgspec.msgpack.encode(other)]


NEIGHBOUR = EndpointRecord(stage=1, node=node_identity())
FAR_AWAY = EndpointRecord(stage=1, node="another machine")


def fails_to_open(lane: HostLane, exchange: Exchange) -> str:
    """The one sentence of a lane that cannot be opened; closing it again must be harmless."""
    with pytest.raises(TransportError) as caught:
        lane.open(exchange)
    lane.close()
    return str(caught.value)


def test_an_ipc_directory_that_does_not_exist_is_named(ipc_dir: Path) -> None:
    missing = ipc_dir / "missing"
    sentence = fails_to_open(lane(ipc_dir=missing), alone_with(NEIGHBOUR))
    assert sentence.startswith("stage 0 rank 0: cannot make a directory for ipc sockets in")
    assert str(missing) in sentence
    assert "set SGLANG_NPU_PP_IPC_DIR to one that this user can write" in sentence


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can stand in for another user")
def test_an_ipc_directory_of_another_user_is_named(ipc_dir: Path) -> None:
    ipc_dir.chmod(0o700)
    another_user = 65534
    os.seteuid(another_user)
    try:
        sentence = fails_to_open(lane(ipc_dir=ipc_dir), alone_with(NEIGHBOUR))
    finally:
        os.seteuid(0)
    assert f"{ipc_dir} (Permission denied); set SGLANG_NPU_PP_IPC_DIR" in sentence


def test_an_ipc_directory_whose_path_is_too_long_is_named_and_left_empty(ipc_dir: Path) -> None:
    deep = ipc_dir / ("d" * 90)
    deep.mkdir()
    sentence = fails_to_open(lane(ipc_dir=deep), alone_with(NEIGHBOUR))
    assert "longer than 107 bytes; set SGLANG_NPU_PP_IPC_DIR to a shorter directory" in sentence
    assert not list(deep.iterdir())


def test_a_port_in_use_is_named() -> None:
    with zmq.Context() as context, context.socket(zmq.ROUTER) as other:
        (endpoint,) = bind_tcp(other, ["127.0.0.1"], 0, "")
        port = int(endpoint.rpartition(":")[2])
        sentence = fails_to_open(lane(port=port), alone_with(FAR_AWAY))
    assert f"the host lane cannot listen on 127.0.0.1:{port} (Address already in use)" in sentence
    assert "set SGLANG_NPU_PP_PORT to a range that is free on this node" in sentence


def test_an_address_of_another_machine_is_named() -> None:
    sentence = fails_to_open(lane(host="198.51.100.1"), alone_with(FAR_AWAY))
    assert "the host lane cannot listen on 198.51.100.1:any port (" in sentence
    assert "set SGLANG_NPU_PP_HOST to an address or interface of this node" in sentence


def test_a_name_that_is_nothing_here_is_named() -> None:
    sentence = fails_to_open(lane(host="no.such.host.invalid"), alone_with(FAR_AWAY))
    assert sentence.startswith("stage 0 rank 0: SGLANG_NPU_PP_HOST='no.such.host.invalid' is no address, no ")


def test_a_stage_that_cannot_listen_tells_the_others_why() -> None:
    """They would wait for its record for as long as gloo waits."""
    record = msgspec.structs.replace(FAR_AWAY, failure="stage 1 rank 0: no.")
    sentence = fails_to_open(lane(), alone_with(record))
    assert sentence == "stage 0 rank 0: another stage cannot listen. stage 1 rank 0: no."


def test_a_peer_that_says_an_address_that_is_none_is_named_at_once() -> None:
    """Its connection cannot be made; what was made before does not keep the process from ending."""
    record = msgspec.structs.replace(FAR_AWAY, tcp=("tcp://*:5000",), key=KeyPair.generate().public)
    sentence = fails_to_open(lane(), alone_with(record))
    assert sentence.startswith("stage 0 rank 0: cannot connect to stage 1 at tcp://*:5000 (Invalid argument)")
    assert "SGLANG_NPU_PP_HOST" in sentence


def open_with_few_descriptors(here: Here, spare: int) -> str:
    used = len(os.listdir("/proc/self/fd"))
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (used + spare, hard))
    record = EndpointRecord(1, "another machine", tcp=("tcp://127.0.0.1:1",), key=KeyPair.generate().public)
    return fails_to_open(lane(start_limit_s=0.2), alone_with(record))


@pytest.mark.parametrize(
    "spare", [10, *(pytest.param(spare, marks=pytest.mark.slow) for spare in (3, 20, 40))]
)
def test_a_process_that_may_open_no_more_files_is_told_so(team: Team, spare: int) -> None:
    victim = team.recruit()
    sentence = victim.call(open_with_few_descriptors, spare)
    assert "may open " in sentence
    assert "ulimit -n" in sentence
    team.dismiss(victim)


def test_ipc_between_nodes_is_refused() -> None:
    sentence = fails_to_open(lane(host_transport="ipc"), alone_with(FAR_AWAY))
    assert "SGLANG_NPU_PP_HOST_TRANSPORT=ipc, but the stages are on several nodes; set it to auto" in sentence


def test_a_stage_that_does_not_answer_is_named_when_the_limit_is_over(ipc_dir: Path) -> None:
    with zmq.Context() as context, context.socket(zmq.ROUTER) as silent:
        silent.bind(f"ipc://{ipc_dir}/silent")
        record = msgspec.structs.replace(NEIGHBOUR, ipc=f"ipc://{ipc_dir}/silent")
        one = lane(ipc_dir=ipc_dir, start_limit_s=0.5)
        sentence = fails_to_open(one, alone_with(record))
    assert sentence.startswith("stage 0 rank 0: after 0.5 s stage 1 at ipc://")
    assert "did not answer and stage 1 did not connect to us" in sentence
    assert [path.name for path in ipc_dir.iterdir() if path.is_dir()] == []


def test_a_stage_that_is_not_there_is_named() -> None:
    nowhere = msgspec.structs.replace(
        FAR_AWAY, tcp=(f"tcp://127.0.0.1:{free_ports(1)[0]}",), key=KeyPair.generate().public
    )
    sentence = fails_to_open(lane(start_limit_s=0.5), alone_with(nowhere))
    assert sentence.startswith("stage 0 rank 0: ")
    assert "stage 1" in sentence


def test_the_given_port_is_used(team: Team) -> None:
    ports = dict(enumerate(free_ports(2)))
    ranks = team.open_lanes(2, Settings(host_transport="tcp"), ports=ports)
    assert [rank.call(endpoint_of)[0] for rank in ranks] == [f"tcp://127.0.0.1:{p}" for p in ports.values()]
    assert_serving(ranks[0], ranks[1])


def test_errors_of_the_lane_are_all_of_one_family() -> None:
    family = (MessageError, PeerLostError, SequenceError, TransportError, WaitLimitError)
    assert all(issubclass(error, PipelineError) for error in family)
    assert host_lane.MAIN_PORT == "main"
