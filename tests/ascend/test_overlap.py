"""What goes on while a transfer is not done, on simulated Ascend: order, not time."""

from __future__ import annotations

from contextlib import ExitStack

from rig.harness import Team

from . import ranks
from .rest import at_rest, ended, holding, position


def test_a_pending_receive_stops_neither_the_last_forward_nor_the_host(npu_team: Team) -> None:
    """The forward of microbatch 0 runs when the receive of microbatch 1 is posted, and ends before it."""
    first, second = npu_team.open_links(2)
    with ExitStack() as receive_held:
        with holding(second, "occupy"):
            first.call(ranks.push, [0])
            second.call(ranks.take, [0], occupied=True)  # launched; the forward is held
            at_rest(first, second)
            receive_held.enter_context(holding(second, "HcclRecv"))
            start = position(second)
            first.call(ranks.push, [1])
            second.call(ranks.take, [1])  # the host posts, waits on the stream, launches, and comes back
        at_rest(first, second)
        assert ended(second, "occupy", start) == 1
        assert ended(second, "HcclRecv", start) == 0
    assert second.call(ranks.read_numbers) == [0, 1]


def test_a_pending_send_stops_neither_the_next_forward_nor_the_host(npu_team: Team) -> None:
    """As long as there are slots; when all are taken the forward stream waits, and still not the host."""
    first, second = npu_team.open_links(2, slots=2)
    with holding(second, "HcclRecv"):
        start = position(first)
        for number in range(2):
            first.call(ranks.push, [number], occupied=True)
        at_rest(first)
        assert ended(first, "occupy", start) == 2
        assert ended(first, "HcclSend", start) == 0
        first.call(ranks.push, [2, 3], occupied=True)
        at_rest(first)
        assert ended(first, "occupy", start) == 3  # the third forward runs; packing it waits for a slot
        second.call(ranks.take, range(2))
    second.call(ranks.take, range(2, 4))
    assert second.call(ranks.read_numbers) == [0, 1, 2, 3]


def test_a_sampled_token_that_is_not_there_stops_no_launch(npu_team: Team) -> None:
    """The copy of the last microbatch's token ids is held; the next forward runs meanwhile."""
    last = npu_team.open_links(2)[1]
    with holding(last, "memcpy D2H"):
        last.call(ranks.start_copy, 1)
        start = position(last)
        last.call(ranks.start_forward)
        at_rest(last)
        assert ended(last, "occupy", start) == 1
    assert last.call(ranks.read_copy) == 1
