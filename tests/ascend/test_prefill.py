"""The host prepares a prefill without waiting for a simulated NPU, and with upstream's values."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from rig.harness import Rank, close_lanes

from . import prefill
from .rest import at_rest, holding

IMPORT_LIMIT_S = 120.0


def open_prefill(rank: Rank, **options: bool) -> None:
    rank.start(prefill.open_prefill, **options).result(IMPORT_LIMIT_S)


def behind_a_forward(rank: Rank, waits: bool, function: Callable[..., Any], **options: Any) -> list[Any]:
    """What `function` made, of which the host comes back, or not (`waits`), before the device begins."""
    with holding(rank, "occupy"):
        launching = rank.start(function, **options)
        if waits:
            at_rest(rank)
            assert not launching.has_answer
        else:
            launching.result()
    if waits:
        launching.result()
    return rank.call(prefill.read)


def test_pages_are_counted_without_the_device(rank: Rank) -> None:
    made = []
    for patched in (False, True):
        open_prefill(rank, patched=patched)
        made.append(behind_a_forward(rank, not patched, prefill.allocate))
        rank.call(close_lanes)
    assert made[0] == made[1]
    slots, free_pages = made[0]
    assert len(slots) == sum(prefill.TOTALS) - sum(prefill.PREFIXES)
    assert len(free_pages) == 3


@pytest.mark.parametrize("pinned", [True, False], ids=["pinned", "plain"])
@pytest.mark.parametrize("decode", [False, True], ids=["prefill", "decode"])
def test_multimodal_positions_are_copied_without_waiting(rank: Rank, decode: bool, pinned: bool) -> None:
    made = []
    for patched in (False, True):
        open_prefill(rank, patched=patched, pinned=pinned)
        made.append(behind_a_forward(rank, not patched, prefill.compute_positions, decode=decode))
        rank.call(close_lanes)
    assert made[0] == made[1]
    assert len(made[0][0]) == 3


def test_the_simulated_kernel_that_writes_rows_does_not_wait(rank: Rank) -> None:
    """As a real one: it follows addresses that only the device knows."""
    open_prefill(rank, patched=True)
    rank.call(prefill.allocate)
    table, *parts = behind_a_forward(rank, False, prefill.write_rows)
    *prefixes, new = parts
    for row, prefix, before, after in zip((3, 0, 2), prefixes, prefill.PREFIXES, prefill.TOTALS, strict=True):
        taken, new = new[: after - before], new[after - before :]
        assert table[row] == [*prefix, *taken, *[-1] * (prefill.CONTEXT - after)]
    assert table[1] == [-1] * prefill.CONTEXT
