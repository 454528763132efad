"""A peer that told several addresses is reached at the first of them at which it proves who it is."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import ExitStack

import pytest
import zmq
from zmq.auth.thread import ThreadAuthenticator

from sglang_npu_pp.errors import TransportError
from sglang_npu_pp.tools.certify.ports import free_ports
from sglang_npu_pp.transport import dialing
from sglang_npu_pp.transport.dialing import MOST_AT_ONCE, reach
from sglang_npu_pp.transport.endpoints import EndpointRecord, KeyPair, KnownKeys, bind_tcp

pytestmark = pytest.mark.timeout(120)

LIMIT_S = 30.0
OURS, THEIRS, ANOTHER = (KeyPair.generate() for _ in range(3))


class Network:
    """Sockets of the loopback interface that stand for what is found at an address."""

    def __init__(self, stack: ExitStack) -> None:
        self._stack = stack
        self.context = stack.enter_context(zmq.Context())
        authenticator = ThreadAuthenticator(self.context)
        authenticator.start()
        stack.callback(authenticator.stop)
        authenticator.configure_curve_callback("*", KnownKeys(OURS.public))

    def peer(self, keys: KeyPair = THEIRS) -> str:
        router = self._stack.enter_context(self.context.socket(zmq.ROUTER))
        router.setsockopt(zmq.LINGER, 0)
        router.setsockopt(zmq.CURVE_SERVER, 1)
        router.setsockopt(zmq.CURVE_SECRETKEY, keys.secret)
        (endpoint,) = bind_tcp(router, ["127.0.0.1"], 0, "")
        return endpoint

    def mute(self) -> str:
        """Accepts connections and says nothing, as some proxies do."""
        listener = self._stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        return f"tcp://127.0.0.1:{listener.getsockname()[1]}"

    def nothing(self) -> str:
        return f"tcp://127.0.0.1:{free_ports(1)[0]}"

    def reach(self, *endpoints: str, limit_s: float = LIMIT_S) -> str:
        record = EndpointRecord(1, "there", tcp=endpoints, key=THEIRS.public)
        return reach(self.context, [record], OURS, where="stage 0 rank 0", limit_s=limit_s)[1]


@pytest.fixture
def network() -> Iterator[Network]:
    with ExitStack() as stack:
        yield Network(stack)


def test_the_first_address_that_answers_is_taken(network: Network, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dialing, "STAGGER_S", LIMIT_S)  # no second one is tried
    first, second = network.peer(), network.peer()
    assert network.reach(first, second) == first
    assert network.reach(second, first) == second


def test_what_does_not_answer_or_is_another_is_passed_over(network: Network) -> None:
    right = network.peer()
    for wrong in (network.nothing(), network.mute(), network.peer(ANOTHER), "tcp://[fd00:dead::1]:1"):
        assert network.reach(wrong, right) == right


def test_the_last_of_many_is_found(network: Network, monkeypatch: pytest.MonkeyPatch) -> None:
    """With as many descriptors as for a few."""
    monkeypatch.setattr(dialing, "STAGGER_S", 0.05)
    monkeypatch.setattr(dialing, "ANSWER_S", 0.2)
    wrong = [network.mute() for _ in range(MOST_AT_ONCE)] + [network.nothing() for _ in range(MOST_AT_ONCE)]
    right = network.peer()
    most = 0
    start = dialing._Dial._start

    def counted(dial: dialing._Dial, now: float) -> None:
        nonlocal most
        start(dial, now)
        most = max(most, len(dial.under_way))

    monkeypatch.setattr(dialing._Dial, "_start", counted)
    assert network.reach(*wrong, right) == right
    assert most == MOST_AT_ONCE


def test_a_peer_that_accepts_and_is_busy_keeps_its_chance(
    network: Network, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As one whose Python is held up by an import: what does not even accept makes room first."""
    monkeypatch.setattr(dialing, "STAGGER_S", 0.05)
    busy = [network.mute() for _ in range(2)]
    right = network.peer()
    closed: list[str] = []
    close = dialing._Attempt.close

    def noted(attempt: dialing._Attempt) -> None:
        closed.append(attempt.endpoint)
        close(attempt)

    monkeypatch.setattr(dialing._Attempt, "close", noted)
    nowhere = [network.nothing() for _ in range(3)]
    assert network.reach(*busy, *nowhere, right) == right
    assert closed[:3] == nowhere, "these made room"


def test_a_peer_that_listens_late_is_found(network: Network) -> None:
    """Its port is taken by nothing when the first attempts are made."""
    late = network.nothing()
    router = network.context.socket(zmq.ROUTER)
    with router:
        router.setsockopt(zmq.CURVE_SERVER, 1)
        router.setsockopt(zmq.CURVE_SECRETKEY, THEIRS.secret)
        step = dialing._Dial.step
        seen = 0

        def stepped(dial: dialing._Dial, now: float) -> str | None:
            nonlocal seen
            seen += 1
            if seen == 5:
                router.bind(late)
            return step(dial, now)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(dialing._Dial, "step", stepped)
            assert network.reach(network.nothing(), late) == late


def test_all_that_was_tried_is_named(network: Network) -> None:
    nothing, mute, other = network.nothing(), network.mute(), network.peer(ANOTHER)
    with pytest.raises(TransportError) as caught:
        network.reach(nothing, mute, other, limit_s=2.5)
    assert str(caught.value) == (
        f"stage 0 rank 0: after 2.5 s stage 1 did not answer at {nothing} (no connection), "
        f"{mute} (it does not show its key), {other} (it does not show its key); set SGLANG_NPU_PP_HOST "
        "there to an address or interface that this node reaches, and see that its ports are open."
    )


def test_a_connection_that_was_closed_before_the_next_look_was_one(
    network: Network, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As of a peer that refuses our key at once. The events are put in by hand: when they come is chance."""
    events = [zmq.EVENT_CONNECTED, zmq.EVENT_DISCONNECTED]
    monkeypatch.setattr(dialing, "recv_monitor_message", lambda monitor: {"event": events.pop(0)})
    attempt = dialing._Attempt(network.context, network.nothing(), OURS, THEIRS.public)
    try:
        monkeypatch.setattr(attempt.monitor, "poll", lambda timeout: bool(events))
        attempt.look()
        assert (attempt.accepted, attempt.connected) == (True, False)
    finally:
        attempt.close()


def test_every_peer_that_is_missing_is_named_and_nothing_stays_open(network: Network) -> None:
    nowhere = {stage: (network.nothing(), network.nothing()) for stage in (1, 2)}
    records = [EndpointRecord(stage, "there", tcp=tcp, key=THEIRS.public) for stage, tcp in nowhere.items()]
    here = EndpointRecord(3, "there", tcp=(network.peer(), network.peer()), key=THEIRS.public)
    with pytest.raises(TransportError, match="stage 1 did not answer at .* and stage 2 did not answer at"):
        reach(network.context, [*records, here], OURS, where="stage 0 rank 0", limit_s=1.5)
    assert reach(network.context, [here], OURS, where="", limit_s=LIMIT_S) == {3: here.tcp[0]}
    # A socket that was left open would keep the fixture's context from ending.
