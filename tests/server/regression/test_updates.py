"""flush_cache and weight updates while requests run and wait.

They reach every stage in the list of requests of one iteration; a stage that did them an iteration later
would have other pages in its prefix cache, or other weights, than its neighbours.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from scripts.lib.server import Server
from tests.server import battery
from tests.server.conftest import DIGITS_MODEL, RANDOM_MODEL

from .agreement import assert_stages_agree
from .loads import ABORTED, Pool, ask

pytestmark = pytest.mark.server

CACHED: dict[str, Any] = {
    "input_ids": battery.prompt(300, seed=4242),
    "sampling_params": {"temperature": 0, "max_new_tokens": 4, "ignore_eos": True},
}
LONG: dict[str, Any] = {"temperature": 0, "ignore_eos": True}
LIMIT_S = 120


@pytest.fixture(autouse=True)
def in_agreement(patched: Server) -> Iterator[None]:
    yield
    assert_stages_agree(patched)


def cached_tokens(server: Server) -> int:
    count: int = battery.generate(server, **CACHED)["meta_info"]["cached_tokens"]
    return count


def await_running(server: Server) -> None:
    """Wait until the server says that it runs a request."""
    deadline = time.monotonic() + LIMIT_S
    while not any(load["num_running_reqs"] for load in server.get("/v1/loads").json()["loads"]):
        server.check_alive("before it ran a request")
        assert time.monotonic() < deadline, f"no request runs after {LIMIT_S} s"


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
    with ThreadPoolExecutor(41) as threads:
        long = threads.submit(ask, patched, {**CACHED, "sampling_params": {**LONG, "max_new_tokens": 500}})
        await_running(patched)
        answers = [threads.submit(ask, patched, body) for body in pool.bodies[:40]]
        refused = [patched.post("/flush_cache") for _ in range(5)]
        assert not pool.wrong(enumerate(answer.result() for answer in answers))
        assert len(long.result()) == 500
    assert not any(response.ok for response in refused)
    assert cached_tokens(patched) > 256


def test_a_flush_waits_for_requests_and_empties_every_stage(patched: Server, pool: Pool) -> None:
    with ThreadPoolExecutor(40) as threads:
        answers = [threads.submit(ask, patched, body) for body in pool.bodies[:40]]
        await_running(patched)
        flushed = patched.post(f"/flush_cache?timeout={LIMIT_S}", timeout_s=LIMIT_S)
        assert not pool.wrong(enumerate(answer.result() for answer in answers))
    assert flushed.ok, flushed.text
    assert patched.post("/flush_cache").ok
    state = assert_stages_agree(patched)
    assert state["cached"] == 0
    assert cached_tokens(patched) == 0


def test_a_weight_update_waits_for_requests_and_holds_back_the_next(patched: Server, pool: Pool) -> None:
    """Requests that run keep their weights to the end; those that come meanwhile get the new ones."""
    before = ask(patched, CACHED)
    update_weights(patched, DIGITS_MODEL)
    trained = Pool.asked_alone(patched, pool.bodies[:20])
    after = ask(patched, CACHED)
    assert after != before, "the update changed nothing"
    with ThreadPoolExecutor(60) as threads:
        running = [threads.submit(ask, patched, body) for body in trained.bodies]
        await_running(patched)
        update = threads.submit(update_weights, patched, RANDOM_MODEL)
        waiting = [threads.submit(ask, patched, body) for body in pool.bodies]
        update.result()
        either = [answer.result() for answer in running]
        late = [answer.result() for answer in waiting]
    for index, answer in enumerate(either):
        assert answer in (trained.alone[index], pool.alone[index])
    for index, answer in enumerate(late):
        assert answer == pool.alone[index] or (index < 20 and answer == trained.alone[index])
    assert ask(patched, CACHED) == before
    assert not pool.ask_many(patched, 40)


def test_a_weight_update_that_aborts_requests(patched: Server, pool: Pool) -> None:
    body = {**CACHED, "sampling_params": {**LONG, "max_new_tokens": 2000}}
    with ThreadPoolExecutor(8) as threads:
        running = [threads.submit(ask, patched, body) for _ in range(8)]
        await_running(patched)
        update_weights(patched, RANDOM_MODEL, abort_all_requests=True)
        ended = [answer.result() for answer in running]
    assert ABORTED in ended
    assert not pool.ask_many(patched, 40)
