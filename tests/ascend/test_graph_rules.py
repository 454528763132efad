"""The rules of the lanes (`test_lane_rules`) with captured graphs, whose inputs and outputs lie in one place.

Shown twice, too: with the rule the bytes are right, and without it they are not.
"""

from __future__ import annotations

import pytest

from ascend_sim.controls import Simulator
from rig.harness import Team, results
from tests.field_cases import field_case

from . import graph_ranks, ranks
from .graph_ranks import made_of
from .mutation import Rule
from .rest import at_rest, holding
from .test_lane_rules import LANE, NUMBERS, TOKENS, Scenario, assert_holds_and_is_needed, rule

MICROBATCHES = 3000
SLOTS = 3
LINK_US = 100
LIMIT_S = 240.0


def proxies_while_the_last_message_has_not_left(team: Team, broken: Rule | None) -> None:
    """Two replays; the first one's proxies are sent when the second has written to the same place."""
    first, second = team.open_links(2)
    first.call(graph_ranks.capture)
    with holding(first, "HcclSend"):
        first.call(graph_ranks.push, [3, 4], rule=broken)
        at_rest(first)
    second.call(ranks.take, [3, 4])
    assert second.call(ranks.read_numbers) == [made_of(3), made_of(4)]


def a_send_while_the_replay_runs(team: Team, broken: Rule | None) -> None:
    """The receiver is ready for the proxies before the replay has made them."""
    first, second = team.open_links(2)
    first.call(graph_ranks.capture)
    with holding(first, graph_ranks.INSIDE):
        first.call(graph_ranks.push, [7], rule=broken)
        second.call(ranks.take, [7])
        at_rest(first, second)
    assert second.call(ranks.read_numbers) == [made_of(7)]


def proxies_that_come_late(team: Team, broken: Rule | None) -> None:
    """The copy to the graph's input, and the replay, are launched before the proxies are there."""
    first, second = team.open_links(2)
    second.call(graph_ranks.capture)
    with holding(second, "HcclRecv"):
        first.call(ranks.push, [5])
        second.call(graph_ranks.take, [5], rule=broken)
        at_rest(first, second)
    assert second.call(ranks.read_numbers) == [made_of(5)]


def proxies_that_come_while_a_replay_runs(team: Team, broken: Rule | None) -> None:
    """The next proxies are there, and would be copied to the input that the replay still reads."""
    first, second = team.open_links(2)
    second.call(graph_ranks.capture)
    with holding(second, graph_ranks.INSIDE):
        first.call(ranks.push, range(3))
        second.call(graph_ranks.take, range(3), rule=broken)
        at_rest(first, second)
    assert second.call(ranks.read_numbers) == [made_of(0), made_of(1), made_of(2)]


def a_slot_that_the_input_is_copied_from(team: Team, broken: Rule | None) -> None:
    """One receive slot; the next proxies are on their way before the last ones have been copied out of it."""
    first, second = team.open_links(2, slots=1)
    second.call(graph_ranks.capture)
    with holding(second, "occupy"):
        first.call(ranks.push, range(3))
        second.call(graph_ranks.take, range(3), rule=broken, occupied=True)
        at_rest(first, second)
    assert second.call(ranks.read_numbers) == [made_of(0), made_of(1), made_of(2)]


def tokens_of_a_replay_that_runs(team: Team, broken: Rule | None) -> None:
    """Their copy is started while the replay runs; behind it are other replays."""
    last = team.open_links(2)[1]
    last.call(graph_ranks.capture)
    with holding(last, graph_ranks.INSIDE):
        last.call(graph_ranks.start_copy, number := next(NUMBERS), rule=broken)
        at_rest(last)
    assert last.call(ranks.read_copy) == made_of(number)


RULES = [
    rule(
        "a send owns its bytes",
        proxies_while_the_last_message_has_not_left,
        LANE,
        "DeviceLane.send",
        "dist.isend(buffer,",
        "dist.isend(next(iter(tensors.values())),",
    ),
    rule(
        "a send starts when its message is packed",
        a_send_while_the_replay_runs,
        LANE,
        "DeviceLane.send",
        "self._streams.wait_for(packed)",
    ),
    rule(
        "an input is written when its proxies are there",
        proxies_that_come_late,
        LANE,
        "Receive.wait",
        "self._work.wait()",
    ),
    rule(
        "a receive slot is filled again when its reader is done",
        a_slot_that_the_input_is_copied_from,
        LANE,
        "DeviceLane.post_receive",
        "self._streams.wait_for(slot.freed)",
        cases=["sglang-36248"],
    ),
    rule(
        "an input is written behind the last replay",
        proxies_that_come_while_a_replay_runs,
        "tests.ascend.graph_ranks",
        "GraphForward.__call__",
        "self.inputs.copy_(hidden)",
        "copy_on_another_stream(self.inputs, hidden)",
    ),
    rule(
        "tokens are copied when they have been sampled",
        tokens_of_a_replay_that_runs,
        TOKENS,
        "copy_to_host",
        "streams.wait_for(produced)",
    ),
]


@pytest.mark.parametrize(("scenario", "rule"), RULES)
def test_rule_holds_and_without_it_bytes_are_wrong(npu_team: Team, scenario: Scenario, rule: Rule) -> None:
    assert_holds_and_is_needed(npu_team, scenario, rule)


@field_case("vllm-54962")
@pytest.mark.thorough
@pytest.mark.timeout(2 * LIMIT_S)
def test_proxies_arrive_intact_over_many_replays(npu_team: Team) -> None:
    """Three stages, slow links, and one of them with slow replays; freed memory is overwritten."""
    chosen = npu_team.open_links(3, slots=SLOTS)
    for rank in chosen:
        rank.call(graph_ranks.capture)
        with Simulator(rank.pid) as simulator:
            simulator.links(us_per_message=LINK_US)
    with Simulator(chosen[1].pid) as simulator:
        simulator.delay(graph_ranks.INSIDE, LINK_US)
        counts = results([rank.start(graph_ranks.run_stage, MICROBATCHES) for rank in chosen], LIMIT_S)
        simulator.delay(graph_ranks.INSIDE, 0)
    assert counts == [0, 0, 0]
