"""SGLang's own decode queue and receivers, with bootstrap servers that are well, slow, wrong and dead.

Real are the queue's and the receivers' functions, patched, the HTTP servers and the lookups. Made by hand is
what they need of a scheduler and of a transfer engine, which no function under test reaches.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
from sglang.srt.disaggregation.base.conn import KVPoll
from sglang.srt.disaggregation.common.conn import CommonKVReceiver
from sglang.srt.disaggregation.decode import DecodePreallocQueue, DecodeRequest
from sglang.srt.disaggregation.mooncake.conn import MooncakeKVSender

from rig.bootstrap_server import BootstrapServer, bootstrap_server, dead_address
from sglang_npu_pp.lookups import Lookups, RetryPolicy
from sglang_npu_pp.patches import bootstrap, load_contracts, sglang_release
from sglang_npu_pp.patching import AppliedPatches

from .disaggregated import bare, make_manager

LIMIT_S = 60.0
RETRY_POLICY = RetryPolicy(total_s=1.0, attempt_s=0.3, first_pause_s=0.02, longest_pause_s=0.2)


@pytest.fixture(autouse=True)
def patched() -> Iterator[None]:
    contract = load_contracts()[sglang_release()]
    patches = AppliedPatches([patch for patch in bootstrap.PATCHES if patch.is_needed(contract)])
    bootstrap.set_lookups(Lookups(RETRY_POLICY))
    yield
    bootstrap.set_lookups(None)
    patches.undo()


@pytest.fixture(autouse=True)
def no_network_here() -> Iterator[None]:
    """The thread of the test is the event loop: it connects to nobody."""
    import socket

    original = socket.socket.connect

    def connect(self: Any, address: Any) -> Any:
        assert threading.current_thread() is not threading.main_thread(), f"connected to {address}"
        return original(self, address)

    with mock.patch.object(socket.socket, "connect", connect):
        yield


@pytest.fixture
def server() -> Iterator[BootstrapServer]:
    with bootstrap_server() as server:
        yield server


class Receiver(CommonKVReceiver):
    """A receiver of an engine that has nothing to register."""

    def poll(self) -> Any:
        return self.kv_mgr.check_status(self.bootstrap_room)

    def failure_exception(self) -> None:
        raise AssertionError(self.kv_mgr.failure_records[self.bootstrap_room])


def make_queue() -> Any:
    """A decode queue with one stage and one rank, and its manager, as far as the handshake reads them."""
    manager = make_manager(
        kv_args=SimpleNamespace(page_size=1, state_types=[], engine_rank=0),
        kv_cache_dtype_str="auto",
        dsv41_spec_layout=None,
        kv_layout=None,
        server_args=SimpleNamespace(kv_cache_dtype="auto"),
        dcp_size=1,
        prefill_info_table={},
        connection_pool={},
        connection_lock=threading.Lock(),
        required_prefill_response_num_table={},
    )
    return bare(
        DecodePreallocQueue,
        kv_manager=manager,
        queue=[],
        pending_reqs=[],
        _ensure_retry_count={},
        _ensure_last_attempt_time={},
        _ensure_retry_interval=1.0,
        _max_ensure_retries=15,
        _prefill_dp_rank_queries={},
    )


def add(queue: Any, address: str, room: int, dp_rank: int | None = None) -> Any:
    """What `DecodePreallocQueue.add` does with a new request, behind its checks."""
    host, port = address.split(":")
    req = SimpleNamespace(
        rid=f"request{room}",
        bootstrap_host=host,
        bootstrap_port=int(port),
        bootstrap_room=room,
        disagg_prefill_dp_rank=dp_rank,
    )
    receiver = Receiver(queue.kv_manager, address, room)
    decode_req = DecodeRequest(req=req, kv_receiver=receiver)
    queue.queue.append(decode_req)
    rank = queue._resolve_prefill_dp_rank(req)
    if rank is not None:
        receiver.init(rank)
    else:
        queue.pending_reqs.append(decode_req)
    return decode_req


def state(queue: Any, decode_req: Any) -> Any:
    return queue.kv_manager.check_status(decode_req.req.bootstrap_room)


def iterate(queue: Any, until: Callable[[], bool]) -> None:
    deadline = time.monotonic() + LIMIT_S
    while not until():
        assert time.monotonic() < deadline, f"{len(queue.pending_reqs)} requests are still pending"
        queue._resolve_pending_reqs()
        time.sleep(0.001)


def settle(queue: Any) -> None:
    iterate(queue, lambda: not queue.pending_reqs)


def why(queue: Any, decode_req: Any) -> str:
    return str(queue.kv_manager.failure_records[decode_req.req.bootstrap_room])


def test_a_request_joins_the_handshake_when_all_addresses_are_known(server: BootstrapServer) -> None:
    queue = make_queue()
    request = add(queue, server.address, room=1)
    assert state(queue, request) == KVPoll.Bootstrapping
    settle(queue)
    assert state(queue, request) == KVPoll.WaitingForInput
    ports = [info["rank_port"] for info in request.kv_receiver.bootstrap_infos]
    assert ports == [1001, 1000]  # as upstream orders them: the last stage first


def test_the_first_request_asks_for_all_that_follow(server: BootstrapServer) -> None:
    queue = make_queue()
    add(queue, server.address, room=1)
    settle(queue)
    asked = len(server.seen)
    assert asked == 3  # the layout, and an address for each stage
    following = [add(queue, server.address, room) for room in range(2, 20)]
    assert {state(queue, request) for request in following} == {KVPoll.WaitingForInput}
    assert len(server.seen) == asked


def test_a_connection_that_was_given_up_is_asked_for_again(server: BootstrapServer) -> None:
    queue = make_queue()
    request = add(queue, server.address, room=1)
    settle(queue)
    request.kv_receiver.kv_mgr.connection_pool.clear()
    again = add(queue, server.address, room=2)
    assert state(queue, again) == KVPoll.Bootstrapping
    settle(queue)
    assert state(queue, again) == KVPoll.WaitingForInput
    assert len(server.seen) == 5


def test_a_rank_that_nobody_registered_is_looked_for_within_the_limit(server: BootstrapServer) -> None:
    server.more = {"dp_size": 2, "follow_bootstrap_room": False}
    queue = make_queue()
    found, lost = add(queue, server.address, room=1), add(queue, server.address, room=2)
    server.registered[1] = 1
    settle(queue)
    assert state(queue, found) == KVPoll.WaitingForInput
    assert found.kv_receiver.prefill_dp_rank == 1
    assert state(queue, lost) == KVPoll.Failed
    assert "the answer has no '2'" in why(queue, lost)


def test_a_prefill_server_that_does_not_fit_fails_the_request_alone() -> None:
    queue = make_queue()
    with bootstrap_server(page_size=64) as other, bootstrap_server() as server:
        wrong, right = add(queue, other.address, room=1), add(queue, server.address, room=2)
        settle(queue)
    assert state(queue, wrong) == KVPoll.Failed
    assert "Page size mismatch" in why(queue, wrong)
    assert state(queue, right) == KVPoll.WaitingForInput


def test_a_request_that_is_aborted_while_it_waits_is_dropped(server: BootstrapServer) -> None:
    server.behaviour = "slow"
    queue = make_queue()
    aborted, other = add(queue, server.address, room=1), add(queue, server.address, room=2)
    server.wait_seen(1)
    aborted.kv_receiver.abort()
    server.behaviour = "well"
    server.release()
    settle(queue)
    assert state(queue, aborted) == KVPoll.Failed
    assert why(queue, aborted) == "Aborted by AbortReq."
    assert state(queue, other) == KVPoll.WaitingForInput


def test_of_200_requests_with_servers_in_trouble_none_is_lost() -> None:
    """One server is dead, one slow, one wrong, one well: each request ends as its own server lets it."""
    queue = make_queue()
    with bootstrap_server() as well, bootstrap_server() as slow, bootstrap_server() as wrong:
        slow.behaviour, wrong.behaviour = "slow", "error"
        addresses = {
            "well": well.address,
            "slow": slow.address,
            "wrong": wrong.address,
            "dead": dead_address(),
        }
        requests = [
            (name, add(queue, addresses[name], room))
            for room, name in zip(range(200), 50 * list(addresses), strict=True)
        ]
        healthy = [request for name, request in requests if name == "well"]
        iterate(queue, lambda: all(state(queue, each) == KVPoll.WaitingForInput for each in healthy))
        # They did not wait for the others, of which none can have an answer yet: its server holds it back.
        assert {state(queue, each) for name, each in requests if name == "slow"} == {KVPoll.Bootstrapping}
        settle(queue)
    ends = Counter((name, state(queue, request)) for name, request in requests)
    assert ends == {
        ("well", KVPoll.WaitingForInput): 50,
        ("slow", KVPoll.Failed): 50,
        ("wrong", KVPoll.Failed): 50,
        ("dead", KVPoll.Failed): 50,
    }
    for name, request in requests:
        if name != "well":
            assert addresses[name] in why(queue, request)
    assert not bootstrap.lookups().failed()


def test_a_server_that_is_killed_and_comes_back_serves_the_next_request() -> None:
    queue = make_queue()
    first = BootstrapServer()
    first.kill()
    lost = add(queue, first.address, room=1)
    settle(queue)
    assert state(queue, lost) == KVPoll.Failed
    with bootstrap_server(port=first.port):
        found = add(queue, first.address, room=2)
        settle(queue)
    assert state(queue, found) == KVPoll.WaitingForInput


def test_an_answer_that_nobody_waits_for_any_more_is_not_told_to_the_next_request() -> None:
    """As on a stage whose lookup fails when another one has already failed the request."""
    queue = make_queue()
    first = BootstrapServer()
    first.kill()
    add(queue, first.address, room=1).kv_receiver.abort()
    settle(queue)
    deadline = time.monotonic() + LIMIT_S
    while not bootstrap.lookups().failed():
        assert time.monotonic() < deadline, "the lookup has not failed"
        time.sleep(0.001)
    queue._resolve_pending_reqs()
    with bootstrap_server(port=first.port):
        found = add(queue, first.address, room=2)
        settle(queue)
    assert state(queue, found) == KVPoll.WaitingForInput


def make_sender(address: str, room: int) -> Any:
    """A sender that has to say which rank has its request."""
    manager = make_manager(attn_dp_rank=1, request_status={room: KVPoll.Bootstrapping})
    return bare(MooncakeKVSender, kv_mgr=manager, bootstrap_room=room, bootstrap_server_url=address)


def test_a_rank_registers_its_requests_from_another_thread(server: BootstrapServer) -> None:
    sender = make_sender(server.address, room=7)
    sender._register_prefill_dp_rank()
    server.wait_seen(1)
    deadline = time.monotonic() + LIMIT_S
    while bootstrap.lookups().counters["answers"] < 1:
        assert time.monotonic() < deadline, "the registration was not answered"
        time.sleep(0.001)
    assert server.registered == {7: 1}
    assert sender.kv_mgr.check_status(7) == KVPoll.Bootstrapping


def test_a_request_whose_rank_cannot_be_registered_fails() -> None:
    sender = make_sender(dead_address(), room=7)
    sender._register_prefill_dp_rank()
    deadline = time.monotonic() + LIMIT_S
    while sender.kv_mgr.check_status(7) != KVPoll.Failed:
        assert time.monotonic() < deadline, "the request was not failed"
        time.sleep(0.001)
    assert "/register_dp_rank had no answer in" in sender.kv_mgr.failure_records[7]
