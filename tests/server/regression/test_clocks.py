"""What is decided by a clock is decided by that of stage 0: here the ranks have clocks that are hours apart.

A stage that decided by its own closed a session that the others kept, and ran the next request of it as an
aborted one of a single token; or gave up a flush_cache that the others did, and kept the pages in its prefix
cache; or ended a request that ran on with the others (up to 0.5.18).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import requests

from rig import battery
from rig.agreement import assert_stages_agree
from rig.launcher import Launcher
from rig.loads import ABORTED, ask, greedy, running
from rig.releases import IN_VENV, NEWEST, RELEASES
from rig.server import Server
from tests.server.clocks import HOUR_S, LEADERS, OTHERS, Conversation, advance

from .conftest import CLOCKS_APART, LIMIT_HOURS

pytestmark = pytest.mark.thorough

LIMIT_S = 120
CACHED = greedy(battery.prompt(300, seed=5252), 4)
LONG_TOKENS = 500
LONG = greedy(battery.prompt(60, seed=5253), LONG_TOKENS)

# All ranks of all stages meet in every iteration; a stage that stayed away would hold the others up for ever.
BARRIER = {"SGLANG_ENABLE_COLOCATED_BATCH_GEN": "1"}
LAYOUTS = [  # release, tp, pp
    ("oldest", 1, 2),
    pytest.param((IN_VENV, 2, 2), marks=pytest.mark.release),
    pytest.param((NEWEST, 1, 4), marks=pytest.mark.release),
]


@pytest.fixture(scope="module", params=LAYOUTS, ids=lambda layout: "{}-tp{}-pp{}".format(*layout))
def server(request: pytest.FixtureRequest, make_launcher: Callable[[str], Launcher]) -> Iterator[Server]:
    release, tp, pp = request.param
    if release == "oldest":
        yield request.getfixturevalue(release)
        return
    launcher = make_launcher("clocks")
    env = CLOCKS_APART | (BARRIER if release == NEWEST else {})
    yield launcher.start(tp, pp, patched=True, release=RELEASES[release], env=env)
    launcher.stop_all()


@pytest.fixture(autouse=True)
def in_agreement(server: Server) -> Iterator[None]:
    yield
    assert_stages_agree(server)


def test_a_session_lives_as_long_as_the_first_stage_says(server: Server) -> None:
    session = Conversation(server)
    session.turn()
    advance(server, OTHERS)
    asked, answer = session.turn()
    assert answer == ask(server, greedy(asked, 8))


def test_a_session_ends_on_all_stages_when_the_first_says_so(server: Server) -> None:
    session = Conversation(server)
    session.turn()
    advance(server, LEADERS)
    refused = session.say(battery.prompt(20))
    assert refused.status_code == requests.codes.bad_request, refused.text
    assert f"session id {session.id} does not exist" in refused.text
    assert server.post("/open_session", {"capacity_of_str_len": 10, "session_id": session.id}).ok


def cached_tokens(server: Server) -> int:
    count: int = battery.generate(server, **CACHED)["meta_info"]["cached_tokens"]
    return count


def flush_while_a_clock_runs_ahead(server: Server, whose: str) -> requests.Response:
    """A flush that may wait for an hour, for a request of 500 tokens."""
    cached_tokens(server)
    with running(server, LONG) as finish, ThreadPoolExecutor(2) as threads:
        flush = threads.submit(server.post, f"/flush_cache?timeout={HOUR_S}", timeout_s=LIMIT_S)
        answer = threads.submit(finish)
        while not (answer.done() or flush.done()):
            advance(server, whose)
        assert len(answer.result()) == LONG_TOKENS
        return flush.result()


def test_a_flush_waits_as_long_as_the_first_stage_says(server: Server) -> None:
    flushed = flush_while_a_clock_runs_ahead(server, OTHERS)
    assert flushed.ok, flushed.text
    assert cached_tokens(server) == 0


def test_a_flush_that_the_first_stage_gives_up_is_given_up_by_all(server: Server) -> None:
    refused = flush_while_a_clock_runs_ahead(server, LEADERS)
    assert "Timed out waiting for idle state" in refused.text
    assert cached_tokens(server) > 256


@pytest.mark.parametrize(("whose", "answer_is"), [(OTHERS, "whole"), (LEADERS, "aborted")])
def test_a_request_runs_as_long_as_the_first_stage_says(server: Server, whose: str, answer_is: str) -> None:
    with running(server, LONG) as finish, ThreadPoolExecutor(1) as threads:
        answer = threads.submit(finish)
        while not answer.done():
            advance(server, whose, hours=2 * LIMIT_HOURS)
        found = answer.result()
    assert (found == ABORTED) if answer_is == "aborted" else (len(found) == LONG_TOKENS)
