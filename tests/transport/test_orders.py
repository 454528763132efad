"""The loops' order of sends and receives through real lanes, with each switch on and off: values and order.

`serve` does what the event loop of a stage does with our seams, as far as messages are concerned: requests,
proxies over the device lane (gloo: a rendezvous), tokens home. That none waits in a circle for any sizes and
bounds is searched for in test_circles.py.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import pytest
import torch

from rig.harness import Here, Rank, Team, results, trace_of
from sglang_npu_pp.observe.trace import Event
from sglang_npu_pp.settings import Settings
from sglang_npu_pp.streams import PassedEvent
from sglang_npu_pp.transport.message import Kind

pytestmark = pytest.mark.timeout(180)

ITERATIONS = 12
SIZES = (1, 300_000, 1000)  # elements, by iteration: 1.2 MB is far beyond what a socket takes at once


class Order(NamedTuple):
    early_send: bool
    early_receive: bool

    def __str__(self) -> str:
        send, receive = ("early" if early else "late" for early in self)
        return f"{send}-send-{receive}-receive"


ORDERS = [Order(send, receive) for send in (True, False) for receive in (True, False)]
orders = pytest.mark.parametrize("order", ORDERS, ids=str)


def serve(here: Here, slots: int, order: Order) -> list[int]:
    """A stage's iterations; the token of each, as it came from the last stage: the sum of what all added."""
    link = here.link
    last = link.stages - 1
    tokens: list[int] = []
    for iteration in range(ITERATIONS + slots - 1):
        slot, runs = iteration % slots, iteration < ITERATIONS
        here.trace.record("iteration", "", slot, iteration)
        if link.stage > 0:
            link.post(Kind.REQUESTS, link.stage - 1, iteration=iteration).wait_values()
        if link.stage < last:
            link.push(Kind.REQUESTS, link.stage + 1, iteration=iteration)
        hidden = launch(here, slot, iteration) if runs else None
        if hidden is not None and order.early_send:
            send(here, hidden, slot, iteration)
        finished = iteration + 1 - slots
        if finished >= 0 and link.stage < last:
            ids = link.post(Kind.OUTPUT, last, slot=finished % slots, iteration=finished).wait()
            tokens.append(int(ids["token"]))
        if hidden is not None and not order.early_send:
            send(here, hidden, slot, iteration)
    return tokens


def launch(here: Here, slot: int, iteration: int) -> torch.Tensor | None:
    """The forward, which changes the received tensor in place; None on the last stage, which sends tokens."""
    link = here.link
    if link.stage == 0:
        hidden = torch.full((SIZES[iteration % len(SIZES)],), iteration, dtype=torch.int32)
    else:
        pending = link.post(
            Kind.PROXY, link.stage - 1, slot=slot, iteration=iteration, overtaken_by=Kind.REQUESTS
        )
        hidden = pending.wait()["hidden_states"]
    here.trace.record("launch", "", slot, iteration)
    hidden += 1000
    here.trace.record("launched", "", slot, iteration)
    if link.stage < link.stages - 1:
        return hidden
    assert len(hidden.unique()) == 1, f"iteration {iteration} got {hidden.unique()[:3]} ..."
    for stage in range(link.stages - 1):
        token = {"token": hidden[:1].clone()}
        link.push_tensors(Kind.OUTPUT, stage, token, slot=slot, iteration=iteration)
    link.release(PassedEvent())
    return None


def send(here: Here, hidden: torch.Tensor, slot: int, iteration: int) -> None:
    proxies = {"hidden_states": hidden}
    here.link.push_tensors(Kind.PROXY, here.link.stage + 1, proxies, slot=slot, iteration=iteration)
    here.link.release(PassedEvent())


def open_links(team: Team, stages: int, order: Order) -> list[Rank]:
    settings = Settings(wait_limit_s=20, early_receive="1" if order.early_receive else "0")
    return team.open_links(stages, settings, slots=2)


@orders
@pytest.mark.parametrize(("stages", "depth"), [(2, 0), (2, 2), (3, 0), (3, 1)])
def test_every_stage_gets_the_tokens_of_every_iteration(
    team: Team, stages: int, depth: int, order: Order
) -> None:
    """Two slots in the device lane, and up to four microbatches in flight."""
    chosen = open_links(team, stages, order)
    found = results([rank.start(serve, stages + depth, order) for rank in chosen])
    assert found == [[iteration + 1000 * stages for iteration in range(ITERATIONS)]] * (stages - 1) + [[]]


def steps(trace: Iterable[Event], *names: str) -> list[tuple[str, str, int]]:
    return [(event.name, event.kind, event.iteration) for event in trace if event.name in names]


@orders
def test_what_is_sent_and_posted_when(team: Team, order: Order) -> None:
    first, last = open_links(team, 2, order)
    results([rank.start(serve, 2, order) for rank in (first, last)])
    sender, receiver = first.call(trace_of), last.call(trace_of)
    for iteration in range(1, ITERATIONS):
        at_launch = steps(sender, "launched", "push", "ready").index(("launched", "", iteration))
        behind = steps(sender, "launched", "push", "ready")[at_launch + 1 :][:2]
        both = [("push", "proxy", iteration), ("ready", "output", iteration - 1)]
        assert behind == (both if order.early_send else both[::-1])
    found = steps(receiver, "wait", "arrive", "post_receive", "ready")
    for iteration in range(ITERATIONS):
        posted, header, wait, ready = (
            found.index((name, "proxy", iteration)) for name in ("post_receive", "arrive", "wait", "ready")
        )
        assert header < posted < ready
        assert (posted == header + 1) if order.early_receive else (wait < posted)


def push_everything(here: Here, count: int) -> None:
    for iteration in range(count):
        send(here, torch.full((1000,), iteration, dtype=torch.int32), 0, iteration)


def look_before_and_in_the_waits(here: Here, count: int, headers: int) -> list[int]:
    """How many receives are posted when so many headers are here, and behind each wait."""

    def posted() -> int:
        return sum(event.name == "post_receive" for event in here.trace.events())

    channel = here.lane.channel(0, Kind.PROXY)
    for _ in here.lane.wait_steps(channel, headers - 1):
        pass
    found = [posted()]
    for iteration in range(count):
        hidden = here.link.post(Kind.PROXY, 0, slot=0, iteration=iteration).wait()["hidden_states"]
        assert hidden.unique().tolist() == [iteration]
        found.append(posted())
        here.link.release(PassedEvent())
    return found


@pytest.mark.parametrize(
    ("early", "headers", "expected"),
    [(True, 4, [2, 2, 3, 4, 4]), (False, 3, [0, 1, 2, 3, 4])],
    ids=["early", "late"],
)
def test_how_many_receives_are_posted(team: Team, early: bool, headers: int, expected: list[int]) -> None:
    """Four messages, two slots on each side: as many as there is room for, or one in each wait. Without a
    receive, the sender waits for a slot in the third message, whose header has left."""
    first, last = open_links(team, 2, Order(early_send=True, early_receive=early))
    sending = first.start(push_everything, 4)
    assert last.call(look_before_and_in_the_waits, 4, headers) == expected
    sending.result()


def push_two_kinds(here: Here) -> None:
    for number, kind in enumerate((Kind.PROXY, Kind.TENSORS, Kind.PROXY)):
        here.link.push_tensors(kind, 1, {"t": torch.full((1000,), float(number))})


def take_the_second_kind_first(here: Here) -> list[float]:
    found = []
    for kind in (Kind.TENSORS, Kind.PROXY, Kind.PROXY):
        found.append(float(here.link.post(kind, 0).wait()["t"].mean()))
        here.link.release(PassedEvent())
    return found


def test_a_late_receive_is_posted_behind_those_of_earlier_headers(team: Team) -> None:
    """Device messages carry no name: the first to be posted gets the first that was sent."""
    first, last = open_links(team, 2, Order(early_send=True, early_receive=False))
    sending = first.start(push_two_kinds)
    assert last.call(take_the_second_kind_first) == [1, 0, 2]
    sending.result()
    assert steps(last.call(trace_of), "post_receive") == [
        ("post_receive", kind, -1) for kind in ("proxy", "tensors", "proxy")
    ]
