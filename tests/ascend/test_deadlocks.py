"""A catalogue of deadlocks of P2P on HCCL, on simulated Ascend: how each comes about, and that ours does not.

The bad half of a case is the order that hangs, in as few lines as show it, on the real ProcessGroupHCCL. It
is found in what streams and host threads wait for (a cycle), so it takes no time-out. The good half does
the same work with the lanes. What is called a send below is HcclSend: it occupies its stream until the
peer's HcclRecv runs. Real HCCL may let small messages through (buffers); relying on that bites users.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.distributed as dist

from ascend_sim.controls import Simulator
from ascend_sim.deadlock import deadlock_among
from rig.harness import Call, Here, Team, results
from sglang_npu_pp.transport.message import Kind
from tests.field_cases import field_case

from . import ranks
from .conftest import start_npu_team

FOUND_WITHIN_S = 20.0

BadOrder = Callable[[Here], None]


def message(here: Here) -> torch.Tensor:
    return ranks.numbered(here, here.index)


def room(here: Here) -> torch.Tensor:
    return ranks.numbered(here, -1)


def exchange_in_a_batch(here: Here, group: dist.ProcessGroup | None = None) -> None:
    """Ranks 0 and 1 send to each other and receive from each other in one call."""
    peer = 1 - here.index
    sending = dist.P2POp(dist.isend, message(here), peer, group=group)
    receiving = dist.P2POp(dist.irecv, room(here), peer, group=group)
    dist.batch_isend_irecv([sending, receiving])


def warm_up(here: Here) -> None:
    """Make the communicators of the world and of its pairs: no case hangs only because they are cold."""
    dist.all_reduce(message(here))
    size = dist.get_world_size()
    for sender in range(size if size > 2 else 1):
        receiver = (sender + 1) % size
        if here.index == sender:
            dist.send(message(here), receiver)
        elif here.index == receiver:
            dist.recv(room(here), sender)
    ranks.npu(here).synchronize()


# --- the orders that hang: one function a case, run by each of two or three ranks ----------------


def both_ranks_send_first(here: Here) -> None:
    """Two ranks exchange tensors with isend, then irecv (sglang #23472, #30844, #35559).

    Both directions of a pair share one communicator and one stream: neither receive is ever reached.
    """
    dist.isend(message(here), 1 - here.index)
    dist.irecv(room(here), 1 - here.index)


def a_ring_of_sends_that_are_waited_for(here: Here) -> None:
    """Three ranks send to the next one, wait, then receive (sglang #23477, #38249).

    Every pair has a stream of its own, but waiting for the send orders the receive behind it.
    """
    sending = dist.isend(message(here), (here.index + 1) % 3)
    assert sending is not None
    sending.wait()
    dist.irecv(room(here), (here.index - 1) % 3)


def cold_groups_used_in_another_order(here: Here) -> None:
    """The first use of a group makes its communicator, and blocks the host until all members come
    (Megatron #5240). Rank 0 names the meeting point of each, so rank 1 waits for that in torch's store."""
    groups = {name: dist.new_group([0, 1]) for name in ("first", "second")}
    for name in groups if here.index == 0 else reversed(groups):
        here.note(name)
        dist.all_reduce(message(here), group=groups[name])


def a_first_batch_by_a_subset(here: Here) -> None:
    """`batch_isend_irecv` makes the communicator of the whole group, which needs a third rank; that one waits
    for a message that the second sends after the batch."""
    group = dist.new_group([0, 1, 2])
    if here.index < 2:
        exchange_in_a_batch(here, group)
    if here.index == 1:
        dist.isend(message(here), 2)
    if here.index == 2:
        dist.recv(room(here), 1)
        ranks.npu(here).synchronize()
        dist.all_reduce(message(here), group=group)


def isend_against_a_batched_irecv(here: Here) -> None:
    """A lone isend uses the communicator of the pair, a batch that of the group: they never meet, and what
    would match them comes later."""
    if here.index == 0:
        sending = dist.isend(message(here), 1)
        assert sending is not None
        sending.wait()
        dist.batch_isend_irecv([dist.P2POp(dist.isend, message(here), 1)])
    else:
        for work in dist.batch_isend_irecv([dist.P2POp(dist.irecv, room(here), 0)]):
            work.wait()
        dist.irecv(room(here), 0)


def batch_and_collective_in_another_order(here: Here) -> None:
    """Both run on the group's one stream: one rank has the batch before the all-reduce, the other behind."""
    if here.index == 0:
        exchange_in_a_batch(here)
    dist.all_reduce(message(here))
    if here.index == 1:
        exchange_in_a_batch(here)


def outputs_before_proxies(here: Here) -> None:
    """The order of SGLang 0.5.18 at pp 2 on NPU, re-enacted (its `send_first`).

    In each iteration outputs are sent, then received; stage 0 sends its proxies last, stage 1 receives them
    first. From the third microbatch on both stages have outputs to send at that place: the last stage new
    ones, stage 0 those of the iteration before, which it hands on round the ring.
    """
    peer = 1 - here.index
    for iteration in range(4):
        if here.index == 0:
            if iteration >= 2:
                dist.isend(message(here), peer)  # outputs, handed on
            if iteration >= 1:
                dist.irecv(room(here), peer)  # outputs of the last microbatch
            dist.isend(message(here), peer)  # proxies of this one
        else:
            dist.irecv(room(here), peer)  # proxies of this microbatch
            dist.isend(message(here), peer)  # its outputs
            if iteration >= 1:
                dist.irecv(room(here), peer)  # outputs, handed on


def bad_order(order: BadOrder, ranks: int, *cases: str) -> object:
    return pytest.param(
        order,
        ranks,
        id=order.__name__.replace("_", "-"),
        marks=[field_case(*cases)] if cases else [],
    )


BAD_ORDERS = [  # with how many ranks it takes
    bad_order(both_ranks_send_first, 2, "sglang-23472"),
    bad_order(a_ring_of_sends_that_are_waited_for, 3, "sglang-23472"),
    bad_order(a_first_batch_by_a_subset, 3),
    bad_order(isend_against_a_batched_irecv, 2),
    bad_order(batch_and_collective_in_another_order, 2, "vllm-56956"),
    bad_order(outputs_before_proxies, 2, "sglang-23472"),
]


@contextmanager
def hanging(
    order: BadOrder, size: int, prepare: Callable[[Here], None] = warm_up
) -> Iterator[list[Call[None]]]:
    """Calls of that order, by ranks of their own (they are killed at the end) with warm communicators."""
    team = start_npu_team(size)
    try:
        team.each(prepare)
        yield [rank.start(order) for rank in team.ranks]
    finally:
        team.close()


@pytest.mark.parametrize(("order", "size"), BAD_ORDERS)
def test_order_that_hangs(order: BadOrder, size: int) -> None:
    with hanging(order, size) as calls:
        found = deadlock_among([call.rank.pid for call in calls], FOUND_WITHIN_S)
    assert found is not None, f"{order.__name__} does not hang"


@field_case("megatron-5240")
def test_cold_groups_that_hang() -> None:
    """Rank 1 waits in torch's store, which the simulator does not see. But it has got no further than its
    first group, for which it needs rank 0; and that one stands in the other group, for which it needs rank 1.
    """
    with hanging(cold_groups_used_in_another_order, 2) as (first, second):
        assert (first.note(), second.note()) == ("first", "second")
        with Simulator(first.rank.pid) as simulator:
            await_join(simulator)
            (wait,) = simulator.listing().host
        assert wait.partners is not None
        assert wait.partners.unknown == 1
        assert not first.has_answer
        assert not second.has_answer


def await_join(simulator: Simulator) -> None:
    """Return when a host thread of that process waits for members of a communicator."""
    deadline = time.monotonic() + FOUND_WITHIN_S
    while not any(wait.partners and wait.partners.operation == "join" for wait in simulator.listing().host):
        assert time.monotonic() < deadline, simulator.listing()
        time.sleep(0.01)


# --- the same work with the lanes ----------------------------------------------------------------

ITERATIONS = 8


def serve(here: Here, iterations: int) -> list[int | str]:
    """What a stage does in its iterations: proxies go on, token ids come home, "outputs first" as in
    `outputs_before_proxies`. Returns what the token ids say, one number a microbatch."""
    last = here.link.stages - 1
    outputs: list[Any] = []
    for iteration in range(iterations):
        if here.link.stage > 0:
            ranks.take(here, [iteration])
        if here.link.stage < last:
            if iteration:
                outputs.append(here.link.post(Kind.OUTPUT, last, iteration=iteration - 1).wait())
            ranks.push(here, [iteration])
        else:
            ranks.start_copy(here, iteration)
            ids = here.kept.pop("copy").wait()
            for stage in range(last):
                here.link.push_tensors(Kind.OUTPUT, stage, ids, iteration=iteration)
            outputs.append(ids)
    if here.link.stage < last:
        outputs.append(here.link.post(Kind.OUTPUT, last, iteration=iterations - 1).wait())
    return [ranks.number_of(ids["next_token_ids"]) for ids in outputs]


@field_case("sglang-23472")
@pytest.mark.parametrize("stages", [2, 3])
def test_stages_that_send_first_through_the_lanes(npu_team: Team, stages: int) -> None:
    chosen = npu_team.open_links(stages, slots=2)
    numbers = list(range(ITERATIONS))
    assert results([rank.start(serve, ITERATIONS) for rank in chosen]) == [numbers] * stages
    for rank in chosen[1:]:
        assert rank.call(ranks.read_numbers) == numbers


@field_case("megatron-5240")
def test_lanes_open_whichever_stage_comes_first(npu_team: Team) -> None:
    for order in ([2, 0, 1], [1, 2, 0]):
        chosen = npu_team.open_links(3, arrival=order)
        chosen[0].call(ranks.push, [1])
        chosen[1].call(ranks.take, [1])
        assert chosen[1].call(ranks.read_numbers) == [1]
        npu_team.reset()


def test_two_stages_need_no_third(npu_team: Team) -> None:
    """Unlike a first batch in a group of three: the third rank does nothing at all."""
    first, second, _ = npu_team.open_links(3)
    first.call(ranks.push, range(3))
    second.call(ranks.take, range(3))
    assert second.call(ranks.read_numbers) == [0, 1, 2]


def push_and_reduce(here: Here) -> None:
    ranks.push(here, [1])
    reduce(here)


def reduce_and_take(here: Here) -> None:
    reduce(here)
    ranks.take(here, [1])


def reduce(here: Here) -> None:
    with ranks.on_forward_stream(here):
        dist.all_reduce(message(here))


@field_case("vllm-56956")
def test_a_collective_may_stand_on_either_side_of_a_message(npu_team: Team) -> None:
    """Unlike a batch: the lanes have communicators of their own."""
    first, second, third = npu_team.open_links(3)
    results([first.start(push_and_reduce), second.start(reduce_and_take), third.start(reduce)])
    assert second.call(ranks.read_numbers) == [1]
