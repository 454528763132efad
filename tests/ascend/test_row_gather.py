"""Rows of three ranks on simulated NPUs: over HCCL, beside the forwards, and read behind their event."""

from __future__ import annotations

from contextlib import ExitStack

import pytest
import torch
import torch.distributed as dist

from ascend_sim.kernels import occupy
from rig.harness import Here, Team, results
from sglang_npu_pp.observe.telemetry import ChannelCounters
from sglang_npu_pp.row_gather import RowGather, create_row_group

from . import ranks
from .mutation import Rule, broken
from .rest import at_rest, holding

_FUNCTION = "RowGather._post_on_device"
OWN_STREAM = Rule(
    "rows have a stream of their own",
    "sglang_npu_pp.row_gather",
    _FUNCTION,
    "self._streams.use(self._stream)",
    "self._streams.use(None)",
)
EVENT = Rule(
    "rows are read behind the event of their copy",
    "sglang_npu_pp.row_gather",
    _FUNCTION,
    "return self._streams.record().synchronize",
    "return lambda: None",
)


FETCH = Rule(
    "rows are copied to plain memory where they are read",
    "sglang_npu_pp.row_gather",
    "RowGather._fetch",
    "self._rows.copy_(self._rows_there)",
)

pins = pytest.mark.parametrize("pinned", [True, False], ids=["pinned", "plain"])


def open_rows(here: Here, pinned: bool = True) -> None:
    group, where = create_row_group(range(3), here.device), f"rank {here.index}"
    with ranks.on_forward_stream(here):  # so that it is known to be in use
        rows = here.kept["rows"] = RowGather(group, 2, here.device, ChannelCounters(), where, pinned)
        rows.warm_up()
    assert rows._row.is_pinned() == rows._rows.is_pinned() == pinned


def come_round(here: Here, before: int) -> None:
    """torch hands out so many streams, and then the one of the default group's collectives again."""
    ranks.forward_stream(here)
    dist.all_reduce(torch.ones(8, device=here.device))
    forwards = ranks.stream_of_group(here)
    npu = ranks.npu(here)
    order = [npu.Stream().stream_id]
    while (stream := npu.Stream().stream_id) != order[0]:
        order.append(stream)
    for _ in range((order.index(forwards) - 1 - before) % len(order)):
        npu.Stream()


def post(here: Here, number: int, rule: Rule | None = None) -> None:
    with broken(rule):
        here.kept["rows"].post([number, here.index])
    ranks.flush(here)


def read(here: Here, rule: Rule | None = None) -> list[list[int]]:
    with broken(rule):
        rows: list[list[int]] = here.kept["rows"].wait().tolist()
    return rows


def gather_behind_a_forward(here: Here, number: int, rule: Rule | None = None) -> list[list[int]]:
    """A forward with a collective has been launched and does not end."""
    with ranks.on_forward_stream(here):
        occupy(1)
        dist.all_reduce(torch.ones(8, device=here.device))
        post(here, number, rule)
        return read(here)


def expected(number: int) -> list[list[int]]:
    return [[number, index] for index in range(3)]


@pins
def test_rows_do_not_wait_for_the_forwards_that_were_launched(young_npu_team: Team, pinned: bool) -> None:
    """Neither on their stream nor on their communicator."""
    young_npu_team.each(open_rows, pinned)
    for number, rule in ((1, None), (2, OWN_STREAM)):
        with ExitStack() as held:
            for rank in young_npu_team.ranks:
                held.enter_context(holding(rank, "occupy"))
            calls = [rank.start(gather_behind_a_forward, number, rule) for rank in young_npu_team.ranks]
            if rule is None:
                assert results(calls) == [expected(number)] * 3
            else:
                at_rest(*young_npu_team.ranks)
                assert not any(call.has_answer for call in calls)
        if rule is not None:
            found = results(calls)
            assert found == [expected(number)] * 3 or not pinned  # then they are fetched on the own stream


@pytest.mark.parametrize("before", range(4))
def test_rows_have_streams_apart_when_torchs_come_round(young_npu_team: Team, before: int) -> None:
    """The own stream, and the one that their communicator takes behind it, wherever the pool stands."""
    young_npu_team.each(come_round, before)
    young_npu_team.each(open_rows)
    with ExitStack() as held:
        for rank in young_npu_team.ranks:
            held.enter_context(holding(rank, "occupy"))
        assert young_npu_team.each(gather_behind_a_forward, 1) == [expected(1)] * 3


def test_who_reads_waits_for_the_copy_and_who_posts_does_not(young_npu_team: Team) -> None:
    young_npu_team.each(open_rows)
    first, *others = young_npu_team.ranks
    for number, rule in ((1, None), (2, EVENT)):
        with holding(first, "memcpy D2H"):
            first.call(post, number, rule)
            for rank in others:
                rank.call(post, number)
            reading = first.start(read)
            if rule is None:
                at_rest(*young_npu_team.ranks)
                assert not reading.has_answer
            else:
                assert reading.result() == expected(1)  # of the step before
        if rule is None:
            assert reading.result() == expected(number)
        assert results([rank.start(read) for rank in others]) == [expected(number)] * 2


def test_who_reads_into_plain_memory_waits_for_the_gather_and_who_posts_does_not(
    young_npu_team: Team,
) -> None:
    young_npu_team.each(open_rows, False)
    first, *others = young_npu_team.ranks
    first.call(post, 1)  # comes back although no other rank has posted
    reading = first.start(read)
    at_rest(first)
    assert not reading.has_answer
    for rank in others:
        rank.call(post, 1)
    assert results([reading, *(rank.start(read) for rank in others)]) == [expected(1)] * 3
    young_npu_team.each(post, 2)
    assert first.call(read, FETCH) == expected(1)  # of the step before
    assert results([rank.start(read) for rank in others]) == [expected(2)] * 2
