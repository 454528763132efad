"""A server on two nodes whose stages, and the link between them, are struck.

A part of what `python -m scripts.lost_peers` does. The peer time-out is short, so that a test is.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from rig.launcher import RANDOM_MODEL
from scripts.bench.link import EmulatedLink, reason_for_loopback
from scripts.lost_peers.episode import Episode, on_two_nodes
from scripts.lost_peers.faults import PAUSE, SLOW, STOP, Fault

pytestmark = [
    pytest.mark.skipif(bool(reason_for_loopback()), reason=reason_for_loopback()),
]

TIMEOUT_S = 4.0
END_LIMIT_S = 30.0  # a slow machine takes some seconds more than the time-out


@pytest.fixture(scope="module")
def episode(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Episode]:
    folder = tmp_path_factory.mktemp("lost-peers")
    env = {"SGLANG_NPU_PP": "require", "SGLANG_NPU_PP_PEER_TIMEOUT_S": f"{TIMEOUT_S:g}"}
    with ExitStack() as stack:
        link = stack.enter_context(EmulatedLink(folder))
        server = stack.enter_context(on_two_nodes(RANDOM_MODEL, 2, folder, link, env))
        yield Episode(server, link)


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("fault", "stage"),
    [(PAUSE, 1), (SLOW, 0)],
    ids=["stage 1 paused", "slow link"],
)
def test_what_is_over_before_the_time_out_changes_no_token(
    episode: Episode, fault: Fault, stage: int
) -> None:
    outcome = episode.survive(fault, stage, seconds=0.8 * TIMEOUT_S)
    assert set(outcome.clients) == {"answer"}
    assert not outcome.left


def test_a_lost_peer_ends_the_server_with_a_sentence_and_leaves_nothing(episode: Episode) -> None:
    """The last test here: the server has ended behind it."""
    outcome = episode.lose(STOP, 1, busy=True, limit_s=END_LIMIT_S)
    assert outcome.ended, outcome.left
    assert not outcome.left
    (noticed,), (ended,) = outcome.sentences
    assert noticed.startswith("stage 0 rank 0: stage 1 is gone")
    assert re.match(r"stage 1 rank 0: process \d+ has been stopped", ended)
    assert set(outcome.clients) <= {"answer", "error"}
