"""Tokens on their way home: order, who waits, and what happens when sending fails.

An asynchronous device cannot be had here, so the device's event is a double, which passes when the test says
so. In the first half the link and the outbox are doubles too, that record calls; in the second half tokens
travel between three real ranks.
"""

from __future__ import annotations

import os
import socket
import threading
from typing import Any

import psutil
import pytest
import torch

from rig.harness import Here, Rank, Team, close_lanes, receive, results
from sglang_npu_pp.errors import PeerLostError, PipelineError
from sglang_npu_pp.host_copies import HostCopy, copy_to_host
from sglang_npu_pp.settings import Settings
from sglang_npu_pp.streams import DeviceStreams
from sglang_npu_pp.token_return import PORT, TokenReturn
from sglang_npu_pp.transport.message import Kind
from tests.device_event import LIMIT_S, DeviceEvent


class RecordingLink:
    """Double of StageLink: the last of three stages; remembers what was pushed."""

    stage, stages, rank = 2, 3, 0

    def __init__(self, fails: bool = False) -> None:
        self.host_lane = self
        self.watching: list[Any] = []
        self.pushed: list[tuple[int, int, list[int]]] = []
        self.fails = fails
        self.may_push = threading.Event()
        self.may_push.set()
        self.sent = threading.Semaphore(0)

    def push_tensors(self, kind: Kind, peer: int, values: Any, **options: Any) -> None:
        assert self.may_push.wait(LIMIT_S)
        assert kind is Kind.OUTPUT
        assert options["owned"]
        if self.fails:
            self.sent.release()
            raise PipelineError("the probe does not send")
        self.pushed.append((peer, options["slot"], values["next_token_ids"].tolist()))
        self.sent.release()

    def watch(self, check: Any, outboxes: Any) -> None:
        self.watching.append(check)

    def poll(self) -> None:
        return

    def check(self) -> None:
        for check in self.watching:
            check()

    def await_pushes(self, count: int) -> None:
        for _ in range(count):
            assert self.sent.acquire(timeout=LIMIT_S), "a push did not come"


class SilentOutbox:
    """Double of an Outbox that is looked at and closed, by one thread."""

    def __init__(self) -> None:
        self.closed = False
        self.users: set[str] = set()

    def check(self) -> None:
        self.users.add(threading.current_thread().name)

    def abandon(self) -> None:
        return

    def close(self) -> None:
        self.users.add(threading.current_thread().name)
        self.closed = True


def copy_of(token: int, event: Any) -> HostCopy:
    return HostCopy({"next_token_ids": torch.tensor([token])}, event)


def on_cpu(token: int) -> HostCopy:
    return copy_to_host({"next_token_ids": torch.tensor([token])}, DeviceStreams("cpu"), None, None)


def test_on_cpu_tokens_leave_at_once_to_every_other_stage() -> None:
    link = RecordingLink()
    tokens = TokenReturn(link, None)  # type: ignore[arg-type]
    own = on_cpu(7)
    tokens.post(own, slot=1, iteration=4)
    assert link.pushed == [(0, 1, [7]), (1, 1, [7])]
    assert own.wait()["next_token_ids"].tolist() == [7]
    assert own.sources["next_token_ids"] is own.values["next_token_ids"]


def test_on_a_device_tokens_wait_for_their_event_and_the_scheduler_does_not() -> None:
    link, events = RecordingLink(), [DeviceEvent(), DeviceEvent()]
    tokens = TokenReturn(link, {0: SilentOutbox(), 1: SilentOutbox()})  # type: ignore[arg-type, dict-item]
    for slot, event in enumerate(events):
        tokens.post(copy_of(10 + slot, event), slot, iteration=slot)  # returns although nothing passed
    events[1].passed.set()
    assert events[0].awaited.wait(LIMIT_S), "nobody waits for the first event"
    assert link.pushed == []  # the first is not there yet, and order is kept
    events[0].passed.set()
    link.await_pushes(4)
    assert link.pushed == [(0, 0, [10]), (1, 0, [10]), (0, 1, [11]), (1, 1, [11])]
    tokens.close()


def test_the_last_stage_goes_on_when_its_tokens_were_sent() -> None:
    link, event = RecordingLink(), DeviceEvent()
    tokens = TokenReturn(link, {0: SilentOutbox(), 1: SilentOutbox()})  # type: ignore[arg-type, dict-item]
    link.may_push.clear()
    own = copy_of(5, event)
    tokens.post(own, slot=0, iteration=3)
    event.passed.set()
    threading.Timer(0.2, link.may_push.set).start()  # later than a caller that does not wait
    assert tokens.wait(own, iteration=3)["next_token_ids"].tolist() == [5]
    assert link.pushed == [(0, 0, [5]), (1, 0, [5])]
    tokens.close()


def test_close_sends_what_is_queued_and_closes_the_connections() -> None:
    link, event, outbox = RecordingLink(), DeviceEvent(), SilentOutbox()
    tokens = TokenReturn(link, {0: outbox})  # type: ignore[arg-type, dict-item]
    tokens.post(copy_of(5, event), 0, 0)
    event.passed.set()
    tokens.close()
    assert [push[2] for push in link.pushed] == [[5], [5]]
    assert outbox.closed
    assert outbox.users == {"token-return"}, "sockets belong to one thread"


def test_a_failure_of_the_sending_thread_surfaces_in_the_scheduler() -> None:
    link, event = RecordingLink(fails=True), DeviceEvent()
    tokens = TokenReturn(link, {0: SilentOutbox()})  # type: ignore[arg-type, dict-item]
    event.passed.set()
    tokens.post(copy_of(5, event), 0, 0)
    link.await_pushes(1)
    assert tokens._thread is not None
    tokens._thread.join(LIMIT_S)
    with pytest.raises(PipelineError, match="the probe does not send"):
        tokens.check()
    with pytest.raises(PipelineError, match="the probe does not send"):
        tokens.wait(copy_of(5, event), 0)
    with pytest.raises(PipelineError, match="the probe does not send"):
        tokens.post(copy_of(6, event), 1, 1)
    (check,) = link.watching
    with pytest.raises(PipelineError, match="the probe does not send"):
        check()  # by whoever waits for a message meanwhile


# --- between real ranks ------------------------------------------------------------------------


def tokens_of(iteration: int) -> dict[str, Any]:
    return {
        "next_token_ids": torch.arange(3) + 10 * iteration,
        "logprobs": [torch.full((2,), 0.5 * iteration), None],
        "top": [1, (2, iteration)],
    }


def start_return(here: Here, threaded: bool) -> None:
    """The last stage's side; `threaded` as on a device, else as on CPU."""
    tokens = TokenReturn(here.link, here.kept[PORT] if threaded else None)
    here.kept["token return"] = tokens
    here.closers.append(tokens.close)


def post_and_let_pass(here: Here, count: int) -> list[str]:
    """Post outputs that are still on the device, do other work, let the events pass, the last one first."""
    tokens: TokenReturn = here.kept["token return"]
    events = [DeviceEvent() for _ in range(count)]
    for iteration, event in enumerate(events):
        tokens.post(HostCopy(tokens_of(iteration), event), slot=iteration % 3, iteration=iteration)
        here.trace.record("posted")
    here.link.push(Kind.REQUESTS, 0, "meanwhile")
    assert events[0].awaited.wait(LIMIT_S), "nobody waits for the first event"
    for event in reversed(events):
        here.trace.record("passes")
        event.passed.set()
    tokens.close()  # sends what is queued
    return [event.name if event.kind != "requests" else "meanwhile" for event in here.trace.events()]


def post_from_cpu(here: Here, count: int) -> None:
    tokens: TokenReturn = here.kept["token return"]
    streams = DeviceStreams("cpu")
    for iteration in range(count):
        copy = copy_to_host(tokens_of(iteration), streams, None, None)
        tokens.post(copy, slot=iteration % 3, iteration=iteration)
        assert_tokens(copy.wait(), iteration)


def take_tokens(here: Here, count: int) -> None:
    for iteration in range(count):
        pending = here.link.post(Kind.OUTPUT, 2, slot=iteration % 3, iteration=iteration)
        assert_tokens(pending.wait(), iteration)


def assert_tokens(found: Any, iteration: int) -> None:
    expected = tokens_of(iteration)
    assert list(found) == list(expected)
    assert found["next_token_ids"].tolist() == expected["next_token_ids"].tolist()
    assert found["logprobs"][0].tolist() == expected["logprobs"][0].tolist()
    assert found["logprobs"][1] is None
    assert found["top"] == expected["top"]


def open_returns(team: Team, transport: str, *, threaded: bool) -> list[Rank]:
    settings = Settings(host_transport=transport, wait_limit_s=20, start_limit_s=20)
    ranks = team.open_lanes(3, settings, extra_ports={PORT: [2]} if threaded else None)
    ranks[2].call(start_return, threaded)
    return ranks


@pytest.mark.parametrize("transport", ["ipc", "tcp"])
def test_tokens_of_a_device_reach_every_stage_in_order_once_they_are_there(
    team: Team, transport: str
) -> None:
    ranks = open_returns(team, transport, threaded=True)
    taking = [rank.start(take_tokens, 3) for rank in ranks[:2]]
    order = ranks[2].call(post_and_let_pass, 3)
    assert order == ["posted"] * 3 + ["meanwhile"] + ["passes"] * 3 + ["push"] * 6
    results(taking)
    assert ranks[0].call(receive, 2, Kind.REQUESTS, range(1)) == ["meanwhile"]


def test_tokens_of_a_cpu_reach_every_stage_and_the_last_keeps_its_own(team: Team) -> None:
    ranks = open_returns(team, "ipc", threaded=False)
    results([ranks[2].start(post_from_cpu, 5), *(rank.start(take_tokens, 5) for rank in ranks[:2])])


def post_until_it_fails(here: Here) -> None:
    tokens: TokenReturn = here.kept["token return"]
    while True:
        event = DeviceEvent()
        event.passed.set()
        tokens.post(HostCopy(tokens_of(0), event), slot=0, iteration=0)
        assert tokens._thread is not None
        tokens._thread.join(0.01)  # a pace, so that the queue does not grow


def test_a_stage_that_is_gone_surfaces_in_the_scheduler_of_the_last_one(team: Team) -> None:
    ranks = open_returns(team, "ipc", threaded=True)
    ranks[1].call(close_lanes)
    with pytest.raises(PeerLostError, match="stage 2 rank 0: stage 1 "):
        ranks[2].call(post_until_it_fails)


def fail_in_the_thread(here: Here, values: dict[str, Any]) -> str:
    """Post what cannot be sent, then wait as the loop does for the next requests."""
    tokens: TokenReturn = here.kept["token return"]
    event = DeviceEvent()
    event.passed.set()
    tokens.post(HostCopy(values, event), slot=0, iteration=0)
    try:
        here.lane.receive(0, Kind.REQUESTS)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "came"


def wait_for_a_device(here: Here) -> None:
    tokens: TokenReturn = here.kept["token return"]
    event = DeviceEvent()
    own = HostCopy(tokens_of(0), event)
    tokens.post(own, slot=0, iteration=0)
    here.note("waits")
    try:
        tokens.wait(own, iteration=0)
    finally:
        event.passed.set()  # or its thread would never end


def test_a_stage_that_is_gone_ends_the_last_ones_wait_for_its_device(team: Team) -> None:
    """It may wait for proxies of that stage, and never comes to an end."""
    ranks = open_returns(team, "ipc", threaded=True)
    waiting = ranks[2].start(wait_for_a_device)
    assert waiting.note() == "waits"
    ranks[0].call(close_lanes)
    with pytest.raises(PeerLostError, match="stage 2 rank 0: stage 0 has shut down"):
        waiting.result()


def test_a_failure_of_the_sending_thread_ends_whoever_waits(team: Team) -> None:
    ranks = open_returns(team, "ipc", threaded=True)
    said = ranks[2].call(fail_in_the_thread, {"next_token_ids": torch.arange(3), "info": Unpicklable()})
    assert "only a test makes this" in said


class Unpicklable:
    """Can be sent to a rank process, and not from there."""

    def __init__(self, sent: bool = False) -> None:
        self.sent = sent

    def __reduce__(self) -> Any:
        if self.sent:
            raise TypeError("only a test makes this")
        return Unpicklable, (True,)


def open_tokens(here: Here, sender: int) -> None:
    """The connections of the sending thread, and which descriptors they have."""
    before = {each.laddr for each in psutil.Process().net_connections("tcp")}
    here.kept[PORT] = here.lane.open_port(PORT, [sender])
    here.kept["descriptors"] = [
        each.fd for each in psutil.Process().net_connections("tcp") if each.laddr not in before
    ]


def cut_tokens(here: Here) -> None:
    """As a firewall's reset does; the main connections stay."""
    (descriptor,) = here.kept["descriptors"]
    with socket.socket(fileno=os.dup(descriptor)) as connection:
        connection.shutdown(socket.SHUT_RDWR)


def wait_for_requests(here: Here) -> None:
    cut_tokens(here)
    try:
        here.lane.receive(0, Kind.REQUESTS)
    finally:
        close_lanes(here)  # as a scheduler that has failed


def wait_for_outputs(here: Here) -> None:
    here.lane.receive(1, Kind.OUTPUT)


def test_a_cut_of_the_tokens_connection_alone_is_the_end_of_both_stages(team: Team) -> None:
    """Nobody sends on it: an idle server, or one that waits for requests."""
    ranks = team.open_lanes(2, Settings(host_transport="tcp", wait_limit_s=600, peer_timeout_s=2))
    results([rank.start(open_tokens, 1) for rank in ranks])
    ranks[1].call(start_return, True)
    calls = [ranks[0].start(wait_for_outputs), ranks[1].start(wait_for_requests)]
    with pytest.raises(PeerLostError, match="stage 1 rank 0: stage 0 is gone: its connection broke"):
        calls[1].result()
    with pytest.raises(PeerLostError, match="stage 0 rank 0: stage 1 "):
        calls[0].result()


def close_with_a_full_window(here: Here) -> list[bool]:
    """Six outputs where four may be in flight, to a stage that takes none."""
    tokens: TokenReturn = here.kept["token return"]
    for iteration in range(6):
        event = DeviceEvent()
        event.passed.set()
        tokens.post(HostCopy(tokens_of(iteration), event), slot=iteration, iteration=iteration)
    tokens.close()
    assert tokens._thread is not None
    return [tokens._thread.is_alive(), all(outbox._socket.closed for outbox in here.kept[PORT].values())]


@pytest.mark.slow
def test_a_thread_that_waits_for_room_is_ended_and_closes_its_own_connections(
    team: Team, monkeypatch: pytest.MonkeyPatch
) -> None:
    ranks = team.open_lanes(2, Settings(window=4, wait_limit_s=600), extra_ports={PORT: [1]})
    ranks[1].call(start_return, True)
    assert ranks[1].call(close_with_a_full_window) == [False, True]


def close_behind_a_dead_device(here: Here) -> bool:
    tokens: TokenReturn = here.kept["token return"]
    tokens.post(HostCopy(tokens_of(0), NeverPasses()), slot=0, iteration=0)
    here.closers.clear()
    tokens.close()
    here.lane.close()
    here.opened = False
    assert tokens._thread is not None
    return tokens._thread.is_alive()


class NeverPasses:
    """Double of the event of a device that does not answer any more."""

    def synchronize(self) -> None:
        threading.Event().wait()

    def query(self) -> bool:
        return False


@pytest.mark.slow
def test_a_device_that_does_not_answer_does_not_keep_the_lane_open(team: Team) -> None:
    victim = team.recruit()
    ranks = team.open_lanes([team.ranks[0], victim], Settings(wait_limit_s=600), extra_ports={PORT: [1]})
    ranks[1].call(start_return, True)
    assert ranks[1].call(close_behind_a_dead_device), "its thread cannot be ended"
    team.dismiss(victim)
