"""Lookups against a real HTTP server: answers, failures with their reasons, and that nobody waits."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

import pytest

from rig.bootstrap_server import BootstrapServer, bootstrap_server, dead_address
from sglang_npu_pp.lookups import HttpRequest, LookupFailedError, Lookups, RetryPolicy

QUICK = RetryPolicy(total_s=0.5, attempt_s=0.2, first_pause_s=0.02, longest_pause_s=0.1)
PATIENT = RetryPolicy(total_s=30.0, attempt_s=10.0, first_pause_s=0.01, longest_pause_s=0.05)
LIMIT_S = 30.0


@pytest.fixture
def server() -> Iterator[BootstrapServer]:
    with bootstrap_server() as server:
        yield server


@pytest.fixture
def patient() -> Iterator[Lookups]:
    lookups = Lookups(PATIENT)
    yield lookups
    lookups.close()


@pytest.fixture
def quick() -> Iterator[Lookups]:
    lookups = Lookups(QUICK)
    yield lookups
    lookups.close()


def layout(address: str) -> HttpRequest:
    query = "prefill_dp_rank=-1&prefill_cp_rank=-1&target_tp_rank=-1&target_pp_rank=-1"
    return HttpRequest(f"http://{address}/route?{query}", expects="pp_size")


def answer(lookups: Lookups, request: HttpRequest) -> Any:
    """Ask until it is known; for tests, which have time."""
    deadline = time.monotonic() + LIMIT_S
    while (found := lookups.ask(request)) is None:
        assert time.monotonic() < deadline, f"nothing is known of {request} after {LIMIT_S:.0f} s"
        time.sleep(0.002)
    return found


def reason(lookups: Lookups, request: HttpRequest) -> str:
    with pytest.raises(LookupFailedError) as caught:
        answer(lookups, request)
    return str(caught.value)


def test_an_answer_is_fetched_once(patient: Lookups, server: BootstrapServer) -> None:
    request = layout(server.address)
    assert patient.ask(request) is None
    assert answer(patient, request)["pp_size"] == 2
    assert answer(patient, request)["pp_size"] == 2
    assert len(server.seen) == 1
    patient.forget(request)
    answer(patient, request)
    assert len(server.seen) == 2


def test_who_asks_does_not_wait_for_a_slow_server(patient: Lookups, server: BootstrapServer) -> None:
    server.behaviour = "slow"
    request = layout(server.address)
    assert patient.ask(request) is None
    server.wait_seen(1)
    assert patient.ask(request) is None  # it hangs at the server, not here
    server.release()
    assert answer(patient, request)["pp_size"] == 2
    assert patient.counters["attempts"] == 1


@pytest.mark.parametrize("behaviour", ["error", "garbage", "starting"])
def test_what_may_pass_is_repeated(patient: Lookups, server: BootstrapServer, behaviour: str) -> None:
    server.behaviour = behaviour
    request = layout(server.address)
    assert patient.ask(request) is None
    server.wait_seen(3)
    server.behaviour = "well"
    assert answer(patient, request)["pp_size"] == 2


def test_a_server_that_comes_back_at_its_address_is_found(patient: Lookups) -> None:
    first = BootstrapServer()
    port = first.port
    first.kill()
    request = layout(first.address)
    assert patient.ask(request) is None
    deadline = time.monotonic() + LIMIT_S
    while patient.counters["attempts"] < 2:  # it was found dead
        assert time.monotonic() < deadline, "the dead server was not asked a second time"
        time.sleep(0.002)
    with bootstrap_server(port=port):
        assert answer(patient, request)["pp_size"] == 2


@pytest.mark.parametrize(
    ("behaviour", "why"),
    [
        ("error", "HTTP status 500 (error)"),
        ("garbage", "the answer is not JSON"),
        ("slow", "it took longer than"),
        ("well", "the answer has no 'room'"),
    ],
)
def test_a_failure_says_what_was_asked_and_what_was_wrong(
    quick: Lookups, server: BootstrapServer, behaviour: str, why: str
) -> None:
    server.behaviour = behaviour
    request = HttpRequest(layout(server.address).url, expects="room")
    text = reason(quick, request)
    assert text.startswith(f"GET {request.url} had no answer in ")
    assert why in text
    assert quick.failed() == [request]
    assert quick.counters["failures"] == 1


def test_an_answer_without_end_is_not_read_to_its_end(patient: Lookups, server: BootstrapServer) -> None:
    """It once took memory for as long as an attempt may last."""
    server.behaviour = "endless"
    request = HttpRequest(layout(server.address).url, expects="room")
    assert reason(patient, request).endswith("the answer is longer than 4 MiB")
    server.kill()  # which waits for nothing: the connection is closed
    assert server.sent_bytes < 32 << 20  # with what fits into the buffers of both sockets


def test_an_answer_that_unpacks_to_much_is_not_unpacked(quick: Lookups, server: BootstrapServer) -> None:
    server.behaviour = "packed"
    assert "the answer is not JSON" in reason(quick, layout(server.address))
    assert quick.counters["answers"] == 0


def test_threads_may_ask_and_look_at_the_failures_at_once() -> None:
    """Each request is asked once, and who looks while others ask finds no half of anything."""
    lookups = Lookups(RetryPolicy(total_s=0.01, attempt_s=0.01))
    address = dead_address()
    requests = [HttpRequest(f"http://{address}/{number}") for number in range(400)]

    def ask(order: list[HttpRequest]) -> None:
        for request in order:
            with suppress(LookupFailedError):
                lookups.ask(request)
            lookups.failed()

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(ask, [requests, requests, requests[::-1], requests[::-1]]))
    finally:
        sys.setswitchinterval(interval)
        lookups.close()
    assert len(lookups._states) == len(requests)


def test_a_dead_server_fails_the_request(quick: Lookups) -> None:
    text = reason(quick, layout(dead_address()))
    assert "attempts" in text
    assert "Cannot connect" in text


def test_an_answer_that_will_not_change_is_not_asked_for_again(
    patient: Lookups, server: BootstrapServer
) -> None:
    server.behaviour = "refuse"
    assert "one attempt" in reason(patient, layout(server.address))
    assert len(server.seen) == 1


def test_a_failure_stays_until_it_is_forgotten(patient: Lookups, server: BootstrapServer) -> None:
    server.behaviour = "refuse"
    request = layout(server.address)
    reason(patient, request)
    server.behaviour = "well"
    reason(patient, request)
    patient.forget(request)
    assert answer(patient, request)["pp_size"] == 2


def test_a_slow_server_does_not_hold_up_another(patient: Lookups, server: BootstrapServer) -> None:
    server.behaviour = "slow"
    for number in range(100):
        assert patient.ask(HttpRequest(f"http://{server.address}/route?target_pp_rank={number}")) is None
    server.wait_seen(1)
    with bootstrap_server() as other:
        assert answer(patient, layout(other.address))["pp_size"] == 2


def test_what_is_told_arrives_or_says_why_not(quick: Lookups, server: BootstrapServer) -> None:
    url = f"http://{server.address}/register_dp_rank"
    failures: list[str] = []
    told = threading.Event()
    quick.send(HttpRequest(url, '{"bootstrap_room": 7, "dp_rank": 1}'), failures.append)
    server.wait_seen(1)
    server.behaviour = "error"

    def failed(text: str) -> None:
        failures.append(text)
        told.set()

    quick.send(HttpRequest(url, '{"bootstrap_room": 8, "dp_rank": 1}'), failed)
    assert told.wait(LIMIT_S), "nobody was told of the failure"
    assert server.registered[7] == 1
    (text,) = failures
    assert text.startswith(f"POST {url} had no answer in ")


def test_close_gives_up_what_is_under_way(server: BootstrapServer) -> None:
    server.behaviour = "slow"
    lookups = Lookups(PATIENT)
    lookups.ask(layout(server.address))
    server.wait_seen(1)
    lookups.close()
    lookups.close()
    assert not lookups._thread.is_alive()


def test_pauses_grow_to_their_limit_and_differ() -> None:
    policy = RetryPolicy(first_pause_s=0.1, longest_pause_s=2.0)
    assert [policy.pause_s(attempt, 1.0) for attempt in range(7)] == [0.1, 0.2, 0.4, 0.8, 1.6, 2.0, 2.0]
    assert policy.pause_s(1000, 1.0) == 2.0
    assert policy.pause_s(3, 0.0) == pytest.approx(0.4)
