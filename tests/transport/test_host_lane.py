"""The host lane between real processes: order, values, bounds, damage by a peer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rig.harness import (
    Here,
    Team,
    announce_blocking,
    await_message,
    receive,
    results,
    send,
    take_number,
    telemetry_of,
    trace_of,
)
from rig.samples import assert_same, python_values, realise, tensor_dicts
from sglang_npu_pp.errors import MessageError, SequenceError, WaitLimitError
from sglang_npu_pp.settings import Settings
from sglang_npu_pp.transport.message import INLINE_BYTES, Kind, Message, encode

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
