"""Updates and replays of captured graphs, on simulated Ascend: SGLang's own backend, with and without ours.

An update of step i + 1 must come behind replay i. Upstream's host waits for that; ours lets the stream of
updates wait. Without either, replay i runs with lengths of later steps, and the replay behind it never ends.
"""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest

from ascend_sim.build import torch_npu
from ascend_sim.controls import Simulator
from rig.harness import Rank, Team, TeamKeeper
from rig.releases import EARLY, IN_VENV, NEWEST, RELEASES, Release

from . import graph_steps as steps
from .conftest import start_sglang_team
from .mutation import Rule
from .rest import POLL_S, at_rest, holding

UPDATES_WAIT = Rule(
    "updates wait for the previous replay",
    "sglang_npu_pp.patches.npu_graphs",
    "replay_with_input_update",
    "_let_updates_wait_for(replayed, backend._graphs[shape_key])",
)
REPLAYS = 10_000
LIMIT_S = 120.0


def start_with_graphs(release: Release) -> Team:
    """One rank that imports SGLang from that release."""
    package = torch_npu()
    assert package is not None
    team = start_sglang_team(str(package.parent), process_group=True, kernels=True)
    if release.folder is not None:
        team.each(steps.use, str(release.folder))
    return team


@pytest.fixture(
    scope="module",
    params=[IN_VENV, *(pytest.param(each, marks=pytest.mark.thorough) for each in (EARLY, NEWEST))],
)
def release(request: pytest.FixtureRequest) -> str:
    """0.5.15 has no fence: there the lengths, which are read from the device, come behind the replay."""
    name: str = request.param
    return name


@pytest.fixture(scope="module")
def _sglang_keeper(release: str) -> Iterator[TeamKeeper]:
    keeper = TeamKeeper(lambda: start_with_graphs(RELEASES[release]))
    yield keeper
    keeper.close()


def ran_with(length: int) -> list[list[int]]:
    return [[length] * steps.REQUESTS] * steps.LAYERS


def expect_a_wrong_replay_and_one_that_never_ends(rank: Rank, later: int, replays_left: int) -> None:
    """Replay 0 ran with lengths of a later step; the next one waits for an event that is never recorded."""
    at_rest(rank)
    assert rank.call(steps.lengths_seen, 0) == [ran_with(later)]
    at_rest(rank)
    with Simulator(rank.pid) as simulator:
        streams = simulator.listing().streams
    (graph,) = (stream for stream in streams if stream.running and "value wait" in str(stream.running))
    assert "which no queued task writes" in str(graph.running)
    for _ in range(replays_left):
        rank.call(steps.raise_all_flags)
        at_rest(rank)


def test_each_replay_runs_with_the_lengths_of_its_step(rank: Rank) -> None:
    rank.call(steps.capture, patched=True)
    rank.call(steps.step, [5, 9, 1, 128])
    assert rank.call(steps.lengths_seen, *range(4)) == [ran_with(5), ran_with(9), ran_with(1), ran_with(128)]


def test_upstreams_host_waits_for_the_previous_replay(rank: Rank, release: str) -> None:
    """Or, without its read of the lengths, does not, and bytes are wrong (0.5.15)."""
    rank.call(steps.capture, patched=False)
    with holding(rank, steps.ATTENTION):
        going_on = rank.start(steps.step, [5, 9])
        if release == EARLY:
            assert going_on.result() == 2
        else:
            wait_until_the_host_waits(rank)
            assert not going_on.has_answer
    if release == EARLY:
        expect_a_wrong_replay_and_one_that_never_ends(rank, later=9, replays_left=1)
    else:
        assert going_on.result() == 2
        assert rank.call(steps.lengths_seen, 0, 1) == [ran_with(5), ran_with(9)]


def wait_until_the_host_waits(rank: Rank) -> None:
    """For an event, and it still does when nothing moves any more."""
    deadline = time.monotonic() + LIMIT_S
    with Simulator(rank.pid) as simulator:
        while not _waits_for_event(simulator):
            assert time.monotonic() < deadline, f"the host waits for no event:\n{simulator.listing()}"
            time.sleep(POLL_S)
        at_rest(rank)
        assert _waits_for_event(simulator), simulator.listing()


def _waits_for_event(simulator: Simulator) -> bool:
    return any("event" in wait.reason for wait in simulator.listing().host)


def test_the_host_goes_on_while_the_previous_replay_runs(rank: Rank) -> None:
    rank.call(steps.capture, patched=True)
    with holding(rank, steps.ATTENTION):
        assert rank.call(steps.step, [5, 9, 1]) == 3
    assert rank.call(steps.lengths_seen, *range(3)) == [ran_with(5), ran_with(9), ran_with(1)]


def test_without_the_rule_a_replay_runs_with_later_lengths_and_the_next_never_ends(rank: Rank) -> None:
    rank.call(steps.capture, patched=True)
    with holding(rank, steps.ATTENTION):
        rank.call(steps.step, [5, 9, 1], UPDATES_WAIT)
        at_rest(rank)
    expect_a_wrong_replay_and_one_that_never_ends(rank, later=1, replays_left=2)


@pytest.mark.thorough
@pytest.mark.timeout(3 * LIMIT_S)
def test_many_replays_with_delays_between(rank: Rank) -> None:
    """Updates are slowed down, then attention is: in either case each replay has its lengths."""
    rank.call(steps.capture, patched=True)
    lengths = [1 + number % 128 for number in range(REPLAYS)]
    with Simulator(rank.pid) as simulator:
        for slow, number in ((steps.ATTENTION, 0), ("task update", REPLAYS // 2)):
            simulator.delay(slow, 200)
            rank.start(steps.step, lengths[number : number + REPLAYS // 2]).result(LIMIT_S)
            simulator.delay(slow, 0)
    seen = rank.start(steps.lengths_seen, *range(REPLAYS)).result(LIMIT_S)
    assert seen == [ran_with(length) for length in lengths]
