"""Rows of three real ranks over gloo: who waits for whom, and what arrives."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from rig.harness import Here, Team, results
from sglang_npu_pp.errors import PeerLostError, PipelineError
from sglang_npu_pp.observe.telemetry import ChannelCounters
from sglang_npu_pp.row_gather import RowGather, create_row_group

WIDTH = 4


def open_rows(here: Here, ranks: int) -> None:
    group = create_row_group(range(ranks), here.device)
    counters = here.kept["counters"] = ChannelCounters()
    rows = here.kept["rows"] = RowGather(group, WIDTH, here.device, counters, f"stage 0 rank {here.index}")
    rows.warm_up()


def row(index: int, step: int) -> list[int]:
    return [index, step, -step * (index + 1), 1 << 40]


def post(here: Here, step: int) -> None:
    here.kept["rows"].post(row(here.index, step))


def read(here: Here) -> list[list[int]]:
    rows: list[list[int]] = here.kept["rows"].wait().tolist()
    return rows


def several_steps(here: Here, steps: int) -> tuple[list[list[list[int]]], set[int], int, int]:
    """What was read, where it lay, and how many gathers and waits were counted."""
    rows, counters = here.kept["rows"], here.kept["counters"]
    found, places = [], set()
    before = counters.messages, counters.waits
    for step in range(steps):
        post(here, step)
        gathered = rows.wait()
        places.add(gathered.data_ptr())
        found.append(gathered.tolist())
    return found, places, counters.messages - before[0], counters.waits - before[1]


def test_rows_of_all_ranks_arrive_in_their_order(team: Team) -> None:
    """One gather and one wait a step, always in the same memory."""
    team.each(open_rows, 3)
    for found, places, gathers, waits in team.each(several_steps, 30):
        assert found == [[row(index, step) for index in range(3)] for step in range(30)]
        assert (len(places), gathers, waits) == (1, 30, 30)


def test_who_posts_does_not_wait_and_who_reads_does(team: Team) -> None:
    team.each(open_rows, 3)
    first, *others = team.ranks
    first.call(post, 7)  # comes back although nobody else has posted
    reading = first.start(read)
    for rank in others:
        assert not reading.has_answer
        rank.call(post, 7)
    expected = [row(index, 7) for index in range(3)]
    assert results([reading, *(rank.start(read) for rank in others)]) == [expected] * 3


def misuse(here: Here) -> list[str]:
    found = []
    with pytest.raises(PipelineError) as error:
        here.kept["rows"].wait()
    found.append(str(error.value))
    post(here, 1)
    with pytest.raises(PipelineError) as error:
        post(here, 2)
    assert here.kept["rows"].wait()[:, 1].tolist() == [1, 1, 1]
    return [*found, str(error.value)]


def test_one_gather_at_a_time(team: Team) -> None:
    team.each(open_rows, 3)
    for index, (early, twice) in enumerate(team.each(misuse)):
        assert early == f"stage 0 rank {index}: rows are read that were not posted; report this."
        assert twice.startswith(f"stage 0 rank {index}: a row is posted before the rows of the last step")


def lose(here: Here) -> str:
    post(here, 1)
    with pytest.raises(PeerLostError) as error:
        here.kept["rows"].wait()
    return str(error.value)


@pytest.mark.slow
def test_a_rank_that_is_gone_is_named_as_the_reason() -> None:
    team = Team(2, process_group=True)
    try:
        team.each(open_rows, 2)
        survivor, victim = team.ranks
        victim.kill()
        message = survivor.call(lose)
    finally:
        team.close()
    assert message.startswith("stage 0 rank 0: another rank of this stage is gone, so the metadata of")


def test_a_group_that_brings_other_rows_is_refused() -> None:
    class Group:
        """A stand-in: no real group does that."""

        def size(self) -> int:
            return 2

        def rank(self) -> int:
            return 0

    group: Any = Group()
    rows = RowGather(group, WIDTH, torch.device("cpu"), ChannelCounters(), "stage 3 rank 0")
    rows._post_on_host = lambda: lambda: None  # type: ignore[method-assign]
    with pytest.raises(PipelineError, match=r"^stage 3 rank 0: the first gather .* of \[0, 0\]"):
        rows.warm_up()
