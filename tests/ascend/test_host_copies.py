"""Copies to and from plain memory on a simulated NPU: who waits, and that no byte is read or freed early.

With pinned memory the same is shown in test_lane_rules.py and test_token_return.py. Each rule is shown twice:
kept, and with one piece of code taken out.
"""

from __future__ import annotations

import itertools

import pytest

from rig.harness import Team
from tests.field_cases import field_case

from . import ranks
from .mutation import Rule
from .rest import at_rest, holding

MODULE = "sglang_npu_pp.host_copies"
NUMBERS = itertools.count(1000)  # never the same twice: memory that is used again still holds the last one

APART = Rule("uploads have a stream of their own", MODULE, "upload", "streams.apart()", "streams.use(None)")
KEPT = Rule("what is staged lives until it is copied", MODULE, "upload", "streams.keep(staged)")
PRODUCED = Rule(
    "outputs are copied when they are produced", MODULE, "PlainCopy.wait", "self.ready.synchronize()"
)


@field_case("sglang-39423")
def test_an_upload_waits_for_no_forward(npu_team: Team) -> None:
    (rank,) = npu_team.open_lanes(1)
    for rule in (None, APART):
        with holding(rank, "occupy"):
            uploading = rank.start(
                ranks.start_upload, number := next(NUMBERS), rule=rule, occupied=True, pinned=False
            )
            if rule is None:
                uploading.result()  # comes back although the forward has not run
            else:
                at_rest(rank)
                assert not uploading.has_answer
        if rule is not None:
            uploading.result()
        assert rank.call(ranks.read_numbers) == [number]


def test_what_is_staged_is_not_used_again_before_it_is_copied(npu_team: Team) -> None:
    """Two more uploads follow, while the stream that reads them stands at a forward."""
    (rank,) = npu_team.open_lanes(1)
    for rule in (None, KEPT):
        with holding(rank, "occupy"):
            rank.call(ranks.start_upload, number := next(NUMBERS), rule=rule, occupied=True, pinned=False)
            at_rest(rank)
        assert (rank.call(ranks.read_numbers) == [number]) == (rule is None)


@pytest.mark.parametrize("rule", [None, PRODUCED], ids=["kept", "broken"])
def test_outputs_are_copied_by_who_waits_when_they_are_produced(npu_team: Team, rule: Rule | None) -> None:
    (rank,) = npu_team.open_lanes(1)
    with holding(rank, "occupy"):
        # Comes back although nothing is produced.
        rank.call(ranks.start_copy, number := next(NUMBERS), occupied=True, pinned=False)
        reading = rank.start(ranks.read_copy, rule=rule)
        if rule is not None:
            assert reading.result() != number
        else:
            at_rest(rank)
            assert not reading.has_answer
    if rule is None:
        assert reading.result() == number


def test_outputs_that_the_scheduler_drops_live_until_they_are_copied(npu_team: Team) -> None:
    """The next forward takes whatever memory is free."""
    (rank,) = npu_team.open_lanes(1)
    with holding(rank, "occupy"):
        rank.call(ranks.start_copy, number := next(NUMBERS), occupied=True, pinned=False)
        at_rest(rank)
    assert rank.call(ranks.read_copy) == number
