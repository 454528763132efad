"""KV chunks of a prefill server on a simulated NPU, through SGLang's AscendKVManager (see `engine`)."""

from __future__ import annotations

import time

import pytest

from rig.harness import Rank

from . import engine
from .engine import LIMIT_S, UNWRITTEN
from .mutation import Rule
from .rest import at_rest, holding

IMPORT_LIMIT_S = 120.0
SUCCESS, FAILED = 4, 0  # of upstream's KVPoll
PAGE_BYTES = 16

WAITING = Rule(
    "the transfer worker waits for the forward",
    "sglang_npu_pp.transfer_gate",
    "TransferGate.taken",
    "event.synchronize()",
)
NUMBERS = Rule(
    "the transfer worker waits for the page numbers",
    "sglang_npu_pp.transfer_gate",
    "LateIndices.wait",
    "self._passed.synchronize()",
)


def open_prefill(rank: Rank, length: int, rule: Rule | None = None, first_page: int = 0) -> None:
    rank.start(engine.open_prefill, rule).result(IMPORT_LIMIT_S)
    rank.call(engine.begin_request, length, first_page)


def wait_for_writes(rank: Rank, count: int) -> None:
    deadline = time.monotonic() + LIMIT_S
    while len(rank.call(engine.writes)) < count:
        assert time.monotonic() < deadline, f"{count} transfers did not begin in {LIMIT_S:.0f} s"
        time.sleep(0.005)


def test_chunks_leave_one_by_one_behind_their_forwards(rank: Rank) -> None:
    """Three are queued while no forward has run; each is read when its own has, in order, in whole pages."""
    open_prefill(rank, 22)
    with holding(rank, "occupy"):
        for number, end in ((1, 10), (2, 20), (3, 22)):
            rank.call(engine.launch, number, end)
        at_rest(rank)
        assert rank.call(engine.writes) == []
    wait_for_writes(rank, 2)
    rank.call(engine.send_last)
    found = rank.call(engine.finish)
    assert found["tokens"] == [1] * 10 + [2] * 10 + [3] * 2
    assert found["writes"][:2] == [[PAGE_BYTES] * 4, [PAGE_BYTES] * 6]  # keys and values of 2 and 3 pages
    assert found["aux"] == [7] * 4
    assert found["status"] == SUCCESS
    assert found["opened"] == ("Prefill", 0, "sdma")


@pytest.mark.parametrize(("rule", "first_page"), [(None, 0), (NUMBERS, 50)], ids=["kept", "broken"])
def test_page_numbers_are_waited_for_in_the_worker(rank: Rank, rule: Rule | None, first_page: int) -> None:
    """They are copied to the host without the scheduler; without the wait the worker has others, as those of
    the last test, whose memory this one got."""
    open_prefill(rank, 22, rule, first_page)
    with holding(rank, "memcpy D2H"):
        rank.call(engine.launch, 1, 20)  # comes back although no number has arrived
        if rule is None:
            at_rest(rank)
            assert rank.call(engine.writes) == []
        else:
            assert rank.call(engine.finish)["tokens"] != [1] * 20 + [UNWRITTEN] * 2
    if rule is None:
        assert rank.call(engine.finish)["tokens"] == [1] * 20 + [UNWRITTEN] * 2


def test_without_the_wait_the_engine_reads_what_was_there_before(rank: Rank) -> None:
    open_prefill(rank, 22, WAITING)
    with holding(rank, "occupy"):
        rank.call(engine.launch, 1, 20)
        wait_for_writes(rank, 1)
        assert rank.call(engine.finish)["tokens"] == [UNWRITTEN] * 22


def test_an_abort_between_chunks_ends_the_transfers(rank: Rank) -> None:
    """The chunk before it has left; the one that was queued is not read, and nothing is queued behind it."""
    open_prefill(rank, 30)
    rank.call(engine.launch, 1, 10)
    wait_for_writes(rank, 1)
    with holding(rank, "occupy"):
        rank.call(engine.launch, 2, 20)
        rank.call(engine.fail)
        rank.call(engine.launch, 3, 28)
    found = rank.call(engine.finish)
    assert found["tokens"] == [1] * 8 + [UNWRITTEN] * 22
    assert found["writes"] == [[PAGE_BYTES] * 4]
    assert found["status"] == FAILED
