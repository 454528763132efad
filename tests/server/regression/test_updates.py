"""flush_cache and weight updates while requests run and wait.

They reach every stage in the list of requests of one iteration; a stage that did them an iteration later
would have other pages in its prefix cache, or other weights, than its neighbours.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from rig import battery
from rig.agreement import assert_stages_agree
from rig.launcher import DIGITS_MODEL, RANDOM_MODEL
from rig.loads import ABORTED, Pool, ask, greedy, running
from rig.server import Server

pytestmark = pytest.mark.thorough

CACHED = greedy(battery.prompt(300, seed=4242), 4)
LONG_TOKENS = 500
LONG = greedy(battery.prompt(60, seed=4243), LONG_TOKENS)
LIMIT_S = 120


@pytest.fixture(autouse=True)
def in_agreement(patched: Server) -> Iterator[None]:
    yield
    assert_stages_agree(patched)


def cached_tokens(server: Server) -> int:
    count: int = battery.generate(server, **CACHED)["meta_info"]["cached_tokens"]
    return count


def update_weights(server: Server, model: Path, **options: Any) -> None:
    response = server.post(
        "/update_weights_from_disk", {"model_path": str(model), **options}, timeout_s=LIMIT_S
    )
    assert response.ok, response.text
    assert response.json()["success"], response.text


def test_a_flush_that_meets_requests_leaves_the_cache_and_their_answers_alone(
    patched: Server, pool: Pool
) -> None:
    cached_tokens(patched)
    assert cached_tokens(patched) > 256
    with running(patched, LONG) as finish, ThreadPoolExecutor(40) as threads:
        answers = [threads.submit(ask, patched, body) for body in pool.bodies[:40]]
        refused = [patched.post("/flush_cache") for _ in range(5)]
        assert not pool.wrong(enumerate(answer.result() for answer in answers))
        assert len(finish()) == LONG_TOKENS
    assert not any(response.ok for response in refused)
    assert cached_tokens(patched) > 256


def test_a_flush_waits_for_requests_and_empties_every_stage(patched: Server, pool: Pool) -> None:
    with running(patched, LONG) as finish, ThreadPoolExecutor(41) as threads:
        answers = [threads.submit(ask, patched, body) for body in pool.bodies[:40]]
        flushed = threads.submit(patched.post, f"/flush_cache?timeout={LIMIT_S}", timeout_s=LIMIT_S)
        assert not pool.wrong(enumerate(answer.result() for answer in answers))
        assert len(finish()) == LONG_TOKENS
        assert flushed.result().ok, flushed.result().text
    state = assert_stages_agree(patched)
    assert state["cached"] <= 2, "more than the request of the check itself"
    assert cached_tokens(patched) == 0


def test_a_weight_update_waits_for_requests_and_holds_back_the_next(patched: Server, pool: Pool) -> None:
    """A request that runs keeps its weights to the end; those that come meanwhile get the new ones."""
    random_long = ask(patched, LONG)
    update_weights(patched, DIGITS_MODEL)
    trained_long = ask(patched, LONG)
    assert trained_long != random_long, "the update changed nothing"
    with running(patched, LONG) as finish, ThreadPoolExecutor(41) as threads:
        update = threads.submit(update_weights, patched, RANDOM_MODEL)
        answers = [threads.submit(ask, patched, body) for body in pool.bodies[:40]]
        assert finish() == trained_long
        update.result()
        early = [index for index, answer in enumerate(answers) if answer.result() != pool.alone[index]]
    assert len(early) < 20, "requests behind the update got the old weights"  # some may have come before it
    assert ask(patched, LONG) == random_long
    assert not pool.ask_many(patched, 40)


def test_a_weight_update_that_aborts_requests(patched: Server, pool: Pool) -> None:
    with running(patched, LONG) as finish:
        update_weights(patched, RANDOM_MODEL, abort_all_requests=True)
        assert finish() == ABORTED
    assert not pool.ask_many(patched, 40)
