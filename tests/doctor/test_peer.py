"""The link test between two nodes: here two sides of one process, over sockets of the loopback interface."""

from __future__ import annotations

import itertools
import socket
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import pytest
import zmq

from sglang_npu_pp.errors import TransportError
from sglang_npu_pp.settings import Settings
from sglang_npu_pp.tools.certify.ports import free_ports
from sglang_npu_pp.tools.doctor import link_test, peer, rendezvous
from sglang_npu_pp.tools.doctor.findings import Finding, Level
from sglang_npu_pp.tools.doctor.peer import PeerTest
from sglang_npu_pp.tools.doctor.rendezvous import Rendezvous, key_pair, new_key

pytestmark = pytest.mark.timeout(120)

LIMIT_S = 20.0
Found = tuple[list[Finding], dict[str, Any]]


@pytest.fixture(autouse=True)
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(link_test, "AIM_S", 0.02)
    monkeypatch.setattr(link_test, "ROUND_TRIPS", 5)
    monkeypatch.setattr(rendezvous, "ANSWER_LIMIT_S", LIMIT_S)
    monkeypatch.setattr(peer, "ANSWER_LIMIT_S", LIMIT_S)


@pytest.fixture
def listener() -> PeerTest:
    return PeerTest(
        host="127.0.0.1",
        port=free_ports(1)[0],
        key=new_key(),
        listens=True,
        limit_s=LIMIT_S,
        stages=2,
        forward_ms=20,
    )


def at_once(first: Callable[[], Any], second: Callable[[], Any]) -> tuple[Any, Any]:
    with ThreadPoolExecutor(2) as threads:
        sides: list[Future[Any]] = [threads.submit(first), threads.submit(second)]
    return sides[0].result(), sides[1].result()


def check_both(listener: PeerTest, *settings: Settings, **theirs: Any) -> tuple[Found, Found]:
    here, there = settings or (Settings(), Settings())
    other = replace(listener, listens=False, **{"host": "127.0.0.1", **theirs})
    return at_once(lambda: peer.check(listener, here), lambda: peer.check(other, there))


@pytest.mark.parametrize("listens_on", ["127.0.0.1", ""], ids=["address", "everywhere"])
def test_both_sides_see_the_same_link(listener: PeerTest, listens_on: str) -> None:
    here, there = check_both(replace(listener, host=listens_on))
    for findings, data in (here, there):
        assert [finding.level for finding in findings] == [Level.OK, Level.OK], findings
        assert data["depth_by_forward_ms"] == {"20": link_test.LinkReport(**report(data)).depth(20, 2)}
    assert here[1]["shortest_round_trip_s"] == there[1]["shortest_round_trip_s"] > 0
    assert here[1]["sent_mib_per_s"] == there[1]["received_mib_per_s"] > 0
    assert here[1]["received_mib_per_s"] == there[1]["sent_mib_per_s"] > 0


def report(data: dict[str, Any]) -> dict[str, float]:
    return {name: value for name, value in data.items() if name not in ("one_way_s", "depth_by_forward_ms")}


def test_without_a_forward_time_several_are_answered(listener: PeerTest) -> None:
    (_, data), _ = check_both(replace(listener, forward_ms=None), forward_ms=None)
    assert [float(forward) for forward in data["depth_by_forward_ms"]] == list(link_test.FORWARDS_MS)


def test_the_host_lane_listens_where_the_settings_say(
    listener: PeerTest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A firewall that lets only these ports through is what the test is for."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        settings = Settings(host="127.0.0.1", port=taken.getsockname()[1])
        monkeypatch.setattr(rendezvous, "ANSWER_LIMIT_S", 0.5)  # the other side waits so long
        monkeypatch.setattr(peer, "ANSWER_LIMIT_S", 0.5)
        (findings, _), _ = check_both(listener, settings, settings)
    assert f"the host lane cannot listen on 127.0.0.1:{settings.port}" in findings[0].text


def test_what_the_nodes_do_not_have_in_common_is_named(
    listener: PeerTest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The link is measured all the same. With windows of their own the wider one would overrun the other."""
    monkeypatch.setattr(link_test, "AIM_S", 0.2)
    for findings, data in check_both(listener, Settings(window=4), Settings(window=1000)):
        assert [finding.level for finding in findings] == [Level.WRONG, Level.OK, Level.OK]
        assert findings[0].text.startswith("SGLANG_NPU_PP_WINDOW is '4' on rank 0 but '1000' on rank 1;")
        assert data["shortest_round_trip_s"] > 0


def test_nodes_that_would_not_understand_each_other_do_not_try(
    listener: PeerTest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(peer, "PROTOCOL", EachTimeAnother())
    for findings, data in check_both(listener):
        assert [finding.level for finding in findings] == [Level.WRONG]
        assert findings[0].text.startswith("protocol is '")
        assert data == {}


class EachTimeAnother:
    """A version of the protocol that the two sides, which share a process here, see differently."""

    def __init__(self) -> None:
        self._versions = itertools.count()

    def __str__(self) -> str:
        return str(next(self._versions))


# --- unauthenticated clients, and none at all -------------------------------------------------------


def test_another_key_gets_no_answer(listener: PeerTest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peer, "ANSWER_LIMIT_S", 1.0)
    (here, _), (there, _) = check_both(replace(listener, limit_s=1.5), key=new_key())
    assert "no node with the key came" in here[0].text
    assert "gave no answer within 1 s" in there[0].text
    assert "the key is the one that it printed" in there[0].text


@pytest.mark.parametrize("knows_public_key", [False, True], ids=["no keys", "the public key"])
def test_a_connection_without_the_secret_reaches_nothing(listener: PeerTest, knows_public_key: bool) -> None:
    """Even one that knows the key of the listener, which never travels, cannot say who it is."""
    with (
        Rendezvous(listener.host, listener.port, listener.key, listens=True, limit_s=1.0) as here,
        zmq.Context() as context,
        context.socket(zmq.REQ) as client,
    ):
        client.setsockopt(zmq.LINGER, 0)
        if knows_public_key:
            own = key_pair(new_key())
            client.setsockopt(zmq.CURVE_SERVERKEY, key_pair(listener.key).public)
            client.setsockopt(zmq.CURVE_PUBLICKEY, own.public)
            client.setsockopt(zmq.CURVE_SECRETKEY, own.secret)
        client.connect(f"tcp://{listener.host}:{listener.port}")
        client.send(b"{}", zmq.NOBLOCK)
        with pytest.raises(TransportError, match="no node with the key came"):
            here.exchange(b"secret")
        assert not client.poll(0)


def test_the_one_with_the_key_is_served_among_unauthenticated_clients(listener: PeerTest) -> None:
    with socket.socket() as scanner, ThreadPoolExecutor(1) as threads:
        waiting = threads.submit(peer.check, listener, Settings())
        other = replace(listener, listens=False)
        rendezvous._reach(listener.host, listener.port)
        scanner.connect((listener.host, listener.port))
        scanner.sendall(b"GET / HTTP/1.1\r\n\r\n" + bytes(5000))
        findings, _ = peer.check(other, Settings())
        assert [finding.level for finding in waiting.result()[0]] == [Level.OK, Level.OK]
    assert [finding.level for finding in findings] == [Level.OK, Level.OK]


def test_nobody_listens(listener: PeerTest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rendezvous, "_REACH_S", 0.2)
    (finding,), _ = peer.check(replace(listener, listens=False), Settings())
    assert finding.level is Level.WRONG
    assert finding.text.startswith(f"127.0.0.1:{listener.port} cannot be reached (Connection refused)")


def test_a_port_in_use_is_named(listener: PeerTest) -> None:
    with socket.socket() as taken:
        taken.bind((listener.host, listener.port))
        taken.listen()
        (finding,), _ = peer.check(listener, Settings())
    assert f"cannot listen on 127.0.0.1:{listener.port} (Address already in use)" in finding.text


def test_the_other_side_goes_away_before_the_lane_is_open(
    listener: PeerTest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rendezvous, "ANSWER_LIMIT_S", 0.5)

    def leave() -> None:
        with Rendezvous(listener.host, listener.port, listener.key, listens=False, limit_s=LIMIT_S) as there:
            there.exchange(f'{{"dialled": "127.0.0.1", "protocol": "{peer.PROTOCOL}"}}'.encode())

    (findings, _), _ = at_once(lambda: peer.check(listener, Settings()), leave)
    assert findings[-1].level is Level.WRONG
    assert findings[-1].text == "the other node stopped answering for 0.5 s; look at what its doctor says."


@pytest.mark.parametrize("key", ["", "short", "ä" * 64, "a" * 63, "A" * 64])
def test_a_key_that_is_none_is_refused(key: str) -> None:
    with pytest.raises(ValueError, match="^the key must be the 64 characters"):
        key_pair(key)


def test_the_secret_is_not_shown(listener: PeerTest) -> None:
    assert listener.key not in repr(key_pair(listener.key))
    assert listener.key not in repr(listener)
