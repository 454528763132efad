"""Requests that end early, at every phase and under load; all stages must drop the same ones.

Field cases: sglang #25887, #28881, #29405, #34572. A stage that decided for itself, or missed a request that
was in another microbatch slot, ran other rows than its neighbours: a size mismatch after hours, or ranks
that waited for each other while /health said 200. What happens when stages do differ: test_divergence.py.
"""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from rig import battery
from rig.agreement import assert_stages_agree
from rig.loads import ABORTED, CONCURRENCY, Pool, ask, ask_in_pieces, given, greedy
from rig.server import Server
from tests.field_cases import field_case

pytestmark = pytest.mark.thorough

PHASES = ("grammar", "waiting", "chunk", "prefill", "decode", "last")
VICTIMS = 4  # a phase

_runs = itertools.count()  # a name is given once in the life of a server
_seeds = itertools.count(9000)


@pytest.fixture(scope="module", params=["crowded", pytest.param("four_stages", marks=pytest.mark.release)])
def server(request: pytest.FixtureRequest) -> Server:
    server: Server = request.getfixturevalue(request.param)
    return server


@pytest.fixture(autouse=True)
def in_agreement(server: Server) -> Iterator[None]:
    yield
    assert_stages_agree(server)


def victim(phase: str, number: int) -> dict[str, Any]:
    """A request that can be found in that phase."""
    body = greedy(battery.prompt(30, seed=5000 + number), 8)
    if phase == "grammar":
        body["sampling_params"] |= {"regex": f"[a-c]{{2,{number + 3}}}", "ignore_eos": False}
    if phase == "chunk":
        body["input_ids"] = battery.prompt(1500, seed=6000 + number)
    return body


def unlike_any_other(length: int, new_tokens: int) -> dict[str, Any]:
    """A prompt that no prefix cache knows."""
    return greedy(battery.prompt(length, seed=next(_seeds)), new_tokens)


def load(pool: Pool, count: int) -> list[int]:
    """Requests of the pool that keep a server busy."""
    return random.Random(count).choices(range(len(pool.bodies)), k=count)


@field_case("sglang-25887")
def test_aborts_at_every_phase_under_load(server: Server, pool: Pool) -> None:
    """Stage 0 aborts each of them in the iteration in which it finds it there."""
    run = next(_runs)
    names = [(phase, number) for number in range(VICTIMS) for phase in PHASES]
    random.Random(run).shuffle(names)
    others = load(pool, 60)
    queue = [unlike_any_other(300, 1) for _ in range(20)]  # so that whoever comes behind them waits
    with ThreadPoolExecutor(CONCURRENCY + len(queue) + len(names)) as threads:
        fillers = [threads.submit(ask, server, body) for body in queue]
        answers = [threads.submit(ask, server, pool.bodies[index]) for index in others]
        ends = {
            (phase, number): threads.submit(
                ask, server, victim(phase, number + run * VICTIMS), f"abort-at-{phase}-{run}-{number}"
            )
            for phase, number in names
        }
        found = [answer.result() for answer in answers]
        assert all(len(filler.result()) == 1 for filler in fillers)
    assert not pool.wrong(zip(others, found, strict=True))
    for phase in PHASES:
        caught = [ends[phase, number].result() == ABORTED for number in range(VICTIMS)]
        assert any(caught), f"none was found at {phase}"  # some may be done before anyone looks


@field_case("sglang-25887")
def test_aborts_and_disconnects_at_any_time_under_load(server: Server, pool: Pool) -> None:
    run = next(_runs)
    generator = random.Random(run)
    chosen = load(pool, 120)

    def ask_or_leave(position: int) -> Any:
        body, name = pool.bodies[chosen[position]], f"random-{run}-{position}"
        if position % 4 == 0:
            return ask_in_pieces(server, body, name, leave_after=generator.randrange(4))
        return ask_in_pieces(server, body, name) if position % 4 == 1 else ask(server, body, name)

    with ThreadPoolExecutor(CONCURRENCY) as threads:
        answers = [threads.submit(ask_or_leave, position) for position in range(len(chosen))]
        for position in generator.sample(range(len(chosen)), k=40):
            assert server.post("/abort_request", {"rid": f"random-{run}-{position}"}).ok
        found = [answer.result() for answer in answers]
    finished = given(chosen, found)
    assert not pool.wrong(finished)
    assert 0 < len(finished) < len(chosen)


def test_abort_of_everything(server: Server, pool: Pool) -> None:
    chosen = load(pool, 40)
    with ThreadPoolExecutor(len(chosen)) as threads:
        answers = [threads.submit(ask, server, pool.bodies[index]) for index in chosen]
        while not all(answer.done() for answer in answers):
            assert server.post("/abort_request", {"abort_all": True}).ok
        found = [answer.result() for answer in answers]
    assert ABORTED in found
    assert not pool.wrong(given(chosen, found))


@field_case("sglang-25887")
@pytest.mark.parametrize(("limit", "seconds"), [("running", 0.2), ("waiting", 0.001)])
def test_time_limits(server: Server, pool: Pool, limit: str, seconds: float) -> None:
    """Upstream's limits on how long a request may run or wait, by its own clock and code. Four of the victims
    run for seconds, twenty take many iterations until all of them have been prefilled."""
    if limit == "running":
        victims = [unlike_any_other(40, 1000) for _ in range(4)]
    else:
        victims = [unlike_any_other(300, 4) for _ in range(20)]
    chosen = load(pool, 40)
    limits = server.log.parent / "limits"
    limits.write_text(json.dumps({limit: seconds}))
    try:
        with ThreadPoolExecutor(len(chosen) + len(victims)) as threads:
            ends = [threads.submit(ask, server, body) for body in victims]
            answers = [threads.submit(ask, server, pool.bodies[index]) for index in chosen]
            found = [answer.result() for answer in answers]
            ended = [end.result() for end in ends]
    finally:
        limits.unlink()
    assert ABORTED in ended
    assert not pool.wrong(given(chosen, found))


def test_the_next_200_requests_are_answered(server: Server, pool: Pool) -> None:
    """Behind all of the above, on the same server."""
    assert not pool.ask_many(server, 200)
