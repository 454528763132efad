"""Each rule that keeps bytes right on the device lane and on the way of the tokens, on simulated Ascend.

The simulator holds a transfer, a copy or a forward at a gate for as long as it takes everything else to come
to rest, so an order that is only usually right shows itself every time. Memory that is freed is overwritten.
Each rule is shown twice: with it the bytes are right, and with that one piece of code taken out they are not.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import pytest

from rig.harness import Team
from tests.field_cases import field_case

from . import ranks
from .mutation import Rule
from .rest import at_rest, ended, holding, position

LANE = "sglang_npu_pp.transport.device_lane"
TOKENS = "sglang_npu_pp.host_copies"

Scenario = Callable[[Team, Rule | None], None]

NUMBERS = itertools.count(
    100
)  # never the same twice: pinned memory that is used again still holds the last one


# --- what happens, and what must come of it --------------------------------------------------------


def more_messages_than_send_slots(team: Team, rule: Rule | None) -> None:
    """Six messages leave a stage with two send slots before the first is received."""
    first, second = team.open_links(2, slots=2)
    with holding(second, "HcclRecv"):
        first.call(ranks.push, range(6), rule=rule)
        taking = second.start(ranks.take, range(2))
        at_rest(first, second)
    taking.result()
    second.call(ranks.take, range(2, 6))
    assert second.call(ranks.read_numbers) == list(range(6))


def a_send_behind_a_long_forward(team: Team, rule: Rule | None) -> None:
    """The receiver is ready for the message long before the forward that makes it has run."""
    first, second = team.open_links(2)
    with holding(first, "occupy"):
        first.call(ranks.push, [7], rule=rule, occupied=True)
        second.call(ranks.take, [7])
        at_rest(first, second)
    assert second.call(ranks.read_numbers) == [7]


def a_source_that_the_next_forward_overwrites(team: Team, rule: Rule | None) -> None:
    """A graph writes its proxies to the same memory every time, also while the last message has not left."""
    first, second = team.open_links(2)
    with holding(first, "HcclSend"):
        first.call(ranks.push, [3, 4], rule=rule, graph=True)
        at_rest(first)
    second.call(ranks.take, [3, 4])
    assert second.call(ranks.read_numbers) == [3, 4]


def proxies_that_are_views(team: Team, rule: Rule | None) -> None:
    """The forward's output is a part of a larger tensor."""
    first, second = team.open_links(2)
    offsets = first.call(ranks.push_view, 6, rule=rule)
    second.call(ranks.take, [6])
    assert offsets == [0]
    assert second.call(ranks.read_numbers) == [6]


def a_reader_that_is_slower_than_the_link(team: Team, rule: Rule | None) -> None:
    """One receive slot; the next message is there before the forward has read the last one."""
    first, second = team.open_links(2, slots=1)
    with holding(second, "occupy"):
        first.call(ranks.push, range(3))
        second.call(ranks.take, range(3), rule=rule, occupied=True)
        at_rest(first, second)
    assert second.call(ranks.read_numbers) == [0, 1, 2]


def a_reader_of_a_slot_that_grows(team: Team, rule: Rule | None) -> None:
    """As above, but the next message is larger, so that its slot gets other memory and the old is freed."""
    first, second = team.open_links(2, slots=1)
    with holding(second, "occupy"):
        first.call(ranks.push, [0])
        first.call(ranks.push, [1], elements=4 * ranks.ELEMENTS)
        second.call(ranks.take, range(2), rule=rule, occupied=True)
        at_rest(first, second)
    assert second.call(ranks.read_numbers) == [0, 1]


def a_send_slot_that_grows(team: Team, rule: Rule | None) -> None:
    """One send slot; the next message is larger, so the memory of the one that is still leaving is freed."""
    first, second = team.open_links(2, slots=1)
    with holding(first, "HcclSend"):
        first.call(ranks.push, [0], rule=rule)
        first.call(ranks.push, [1], elements=4 * ranks.ELEMENTS, rule=rule)
        second.call(ranks.take, [0])
        at_rest(first, second)
    second.call(ranks.take, [1])
    assert second.call(ranks.read_numbers) == [0, 1]


def a_forward_before_its_proxies(team: Team, rule: Rule | None) -> None:
    """The forward is launched while its proxies are still on the way."""
    first, second = team.open_links(2)
    with holding(second, "HcclRecv"):
        first.call(ranks.push, [5])
        second.call(ranks.take, [5], rule=rule)
        at_rest(first, second)
    assert second.call(ranks.read_numbers) == [5]


def a_receive_behind_a_held_forward(team: Team, rule: Rule | None) -> None:
    """A middle stage whose forward takes long gets the next proxies nevertheless: what it has still to
    send does not stand in the way of what it receives."""
    first, second, third = team.open_links(3)
    with holding(second, "occupy"):
        start = position(second)
        second.call(ranks.push, [0], rule=rule, occupied=True)
        first.call(ranks.push, [1])
        second.call(ranks.take, [1])
        at_rest(first, second)
        arrived = ended(second, "HcclRecv", start)
    third.call(ranks.take, [0])
    assert arrived == 1, "the receive waits for a forward that it does not need"
    assert second.call(ranks.read_numbers) == [1]


def tokens_of_a_long_forward(team: Team, rule: Rule | None) -> None:
    """The copy of the token ids is started before the forward has sampled them."""
    last = team.open_links(2)[1]
    with holding(last, "occupy"):
        last.call(ranks.start_copy, number := next(NUMBERS), rule=rule, occupied=True)
        at_rest(last)
    assert last.call(ranks.read_copy) == number


def tokens_that_are_freed_on_the_device(team: Team, rule: Rule | None) -> None:
    """The scheduler drops the device's token ids, and the next forward takes their memory, before they
    have been copied."""
    last = team.open_links(2)[1]
    with holding(last, "memcpy D2H*"):
        last.call(ranks.start_copy, number := next(NUMBERS), rule=rule)
        at_rest(last)
    assert last.call(ranks.read_copy) == number


def tokens_that_are_read_early(team: Team, rule: Rule | None) -> None:
    """Whoever reads the token ids comes before they are on the host."""
    last = team.open_links(2)[1]
    with holding(last, "memcpy D2H*"):
        last.call(ranks.start_copy, number := next(NUMBERS))
        reading = last.start(ranks.read_copy, rule=rule)
        at_rest(last)
    assert reading.result() == number


def rule(
    name: str,
    scenario: Scenario,
    module: str,
    function: str,
    text: str,
    replacement: str = "pass",
    cases: Sequence[str] = (),
) -> object:
    """`cases`: failures from the field that the rule prevents."""
    return pytest.param(
        scenario,
        Rule(name, module, function, text, replacement),
        id=name.replace(" ", "-"),
        marks=[field_case(*cases)] if cases else [],
    )


RULES = [
    rule(
        "a send slot is packed again when its last send is out",
        more_messages_than_send_slots,
        LANE,
        "DeviceLane._wait_until_sent",
        "slot.work.wait()",
        cases=["tensorrt-llm-10488"],
    ),
    rule(
        "a send starts when its message is packed",
        a_send_behind_a_long_forward,
        LANE,
        "DeviceLane.send",
        "self._streams.wait_for(packed)",
        cases=["sglang-15545"],
    ),
    rule(
        "a send owns its bytes",
        a_source_that_the_next_forward_overwrites,
        LANE,
        "DeviceLane.send",
        "dist.isend(buffer,",
        "dist.isend(next(iter(tensors.values())),",
        cases=["vllm-54962", "tensorrt-llm-10488", "megatron-4047"],
    ),
    rule(
        "a message starts where its storage starts",
        proxies_that_are_views,
        LANE,
        "DeviceLane.send",
        "dist.isend(buffer,",
        "dist.isend(next(iter(tensors.values())),",
        cases=["sglang-22747"],
    ),
    rule(
        "a receive slot is filled again when its reader is done",
        a_reader_that_is_slower_than_the_link,
        LANE,
        "DeviceLane.post_receive",
        "self._streams.wait_for(slot.freed)",
        cases=["sglang-36248"],
    ),
    rule(
        "a released slot remembers its reader",
        a_reader_that_is_slower_than_the_link,
        LANE,
        "Receive.release",
        "self._slot.freed = reader",
    ),
    rule(
        "a forward starts when its proxies are there",
        a_forward_before_its_proxies,
        LANE,
        "Receive.wait",
        "self._work.wait()",
        cases=["sglang-15545"],
    ),
    rule(
        "sends and receives have a stream each",
        a_receive_behind_a_held_forward,
        LANE,
        "DeviceLane.send",
        "self._streams.use(self._sending)",
        "self._streams.use(self._receiving)",
    ),
    rule(
        "tokens are copied when they have been sampled",
        tokens_of_a_long_forward,
        TOKENS,
        "copy_to_host",
        "streams.wait_for(produced)",
    ),
    rule(
        "a copy keeps its sources",
        tokens_that_are_freed_on_the_device,
        TOKENS,
        "copy_to_host",
        "sources=dict(outputs)",
        "sources={}",
        cases=["megatron-4047"],
    ),
    rule(
        "tokens are read when their event has passed",
        tokens_that_are_read_early,
        TOKENS,
        "HostCopy.wait",
        "self.ready.synchronize()",
    ),
]


def assert_holds_and_is_needed(team: Team, scenario: Scenario, rule: Rule) -> None:
    scenario(team, None)
    team.reset()
    with pytest.raises(AssertionError):
        scenario(team, rule)


@pytest.mark.parametrize(("scenario", "rule"), RULES)
def test_rule_holds_and_without_it_bytes_are_wrong(npu_team: Team, scenario: Scenario, rule: Rule) -> None:
    assert_holds_and_is_needed(npu_team, scenario, rule)


@field_case("sglang-36248")
def test_a_graph_gets_its_proxies_where_it_was_captured(npu_team: Team) -> None:
    """A graph reads one place for ever, and our proxies are in one slot after another: SGLang's graph runners
    copy them to their own place, on the forward stream. A graph captured on a slot reads others' proxies.
    """
    for copied, read in ((True, [0, 1, 2, 3]), (False, [0, 0, 2, 2])):
        first, second = npu_team.open_links(2, slots=2)
        first.call(ranks.push, range(4))
        second.call(ranks.take_by_graph, range(4), copied=copied)
        found = second.call(ranks.read_numbers)
        assert (found == read) if copied else (found != list(range(4))), found
        npu_team.reset()


@pytest.mark.parametrize("scenario", [a_reader_of_a_slot_that_grows, a_send_slot_that_grows])
def test_slots_grow(npu_team: Team, scenario: Scenario) -> None:
    """torch_npu keeps the memory of a transfer until its watchdog has looked at it, up to a second later, so
    the order that makes growing safe cannot be shown to be needed."""
    scenario(npu_team, None)
