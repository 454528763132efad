"""The catalogue of deadlocks (`test_deadlocks`) with captured graphs: tp 2 on two stages, sums in the graphs.

Ranks 0 and 1 are stage 0, ranks 2 and 3 stage 1; rank 0 sends to rank 2 and rank 1 to rank 3. A replay holds
its stream until the other rank of its stage has come to the same sum, and that one may wait for a message.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist

from ascend_sim.controls import Simulator
from ascend_sim.deadlock import deadlock_among
from rig.harness import Here, Rank, TeamKeeper, results
from sglang_npu_pp.transport.message import Kind
from tests.field_cases import field_case

from . import ranks
from .conftest import start_npu_team
from .test_deadlocks import FOUND_WITHIN_S, BadOrder, hanging, message

pytestmark = [pytest.mark.thorough, pytest.mark.timeout(240)]

STAGES = ((0, 1), (2, 3))
ITERATIONS = 200
LINK_US = 500
SUM = "HcclAllReduce"


class SummingGraph:
    """A layer of tensor parallelism as a graph: twice the input, summed over the stage's ranks, plus 1."""

    def __init__(self, here: Here, group: dist.ProcessGroup) -> None:
        npu = ranks.npu(here)
        self.inputs = ranks.numbered(here, 0)
        self._graph = npu.NPUGraph()
        with npu.graph(self._graph, stream=npu.Stream()):
            partial = self.inputs.mul(2)
            dist.all_reduce(partial, group=group)
            self.outputs = partial.add(1)

    def __call__(self, hidden: torch.Tensor | None = None) -> torch.Tensor:
        if hidden is not None:
            self.inputs.copy_(hidden)
        self._graph.replay()
        return self.outputs


def made_of(first: int, second: int) -> int:
    return 2 * (first + second) + 1


def column(here: Here) -> int:
    return here.index % 2


def peer(here: Here) -> int:
    """The rank of the other stage that this one exchanges messages with."""
    return (here.index + 2) % 4


def prepare(here: Here) -> None:
    """Groups of the stages, warm communicators, and the graph."""
    groups = [dist.new_group(list(members)) for members in STAGES]
    group = groups[here.index // 2]
    assert isinstance(group, dist.ProcessGroup)
    dist.all_reduce(message(here), group=group)
    if here.index < 2:
        dist.send(message(here), peer(here))
    else:
        dist.recv(message(here), peer(here))
    ranks.npu(here).synchronize()
    with ranks.on_forward_stream(here):
        here.kept["graph"] = SummingGraph(here, group)


# --- the orders that hang ------------------------------------------------------------------------


def messages_on_either_side_of_a_replay(here: Here) -> None:
    """On either stage one rank waits for its message before the replay, and the other one exchanges its own
    behind it. No two ranks wait for each other; all four do, in a circle."""
    replay: SummingGraph = here.kept["graph"]
    with ranks.on_forward_stream(here):
        if here.index == 0:
            waited_for(dist.isend(message(here), peer(here)))
            replay()
        elif here.index == 1:
            replay()
            dist.isend(message(here), peer(here))
        elif here.index == 2:
            replay()
            dist.irecv(message(here), peer(here))
        else:
            waited_for(dist.irecv(message(here), peer(here)))
            replay()
    ranks.flush(here)


def both_stages_send_first_between_replays(here: Here) -> None:
    """Proxies forward and outputs back, both sent before anything is received, and replays wait for them."""
    replay: SummingGraph = here.kept["graph"]
    with ranks.on_forward_stream(here):
        for _ in range(2):
            hidden = replay()
            dist.isend(hidden, peer(here))
            waited_for(dist.irecv(message(here), peer(here)))
    ranks.flush(here)


def waited_for(work: dist.Work | None) -> None:
    """By the current stream."""
    assert work is not None
    work.wait()


def of_ranks(order: BadOrder, waiting: set[int], *inside: str) -> object:
    return pytest.param(order, waiting, inside, id=order.__name__.replace("_", "-"))


@field_case("sglang-23472")
@pytest.mark.parametrize(
    ("order", "waiting", "inside"),
    [
        of_ranks(messages_on_either_side_of_a_replay, {0, 1, 2, 3}, SUM),
        of_ranks(both_stages_send_first_between_replays, {0, 2}),
    ],
)
def test_order_that_hangs(order: BadOrder, waiting: set[int], inside: tuple[str, ...]) -> None:
    """A cycle is found, in which the sum within a replay is named where one waits for it."""
    with hanging(order, 4, prepare) as calls:
        found = deadlock_among([call.rank.pid for call in calls], FOUND_WITHIN_S)
    assert found is not None, f"{order.__name__} does not hang"
    members = {call.rank.index for call in calls if call.rank.pid in found.pids}
    # Of the second order either column's cycle may be the one that is found.
    assert members in (waiting, {index + 1 for index in waiting}), found
    for name in inside:
        assert name in str(found)


# --- the same work with the lanes ----------------------------------------------------------------


@pytest.fixture(scope="module")
def _square_keeper() -> Iterator[TeamKeeper]:
    keeper = TeamKeeper(lambda: start_npu_team(4))
    yield keeper
    keeper.close()


@pytest.fixture
def square(_square_keeper: TeamKeeper) -> Iterator[list[Rank]]:
    """Four ranks with their graphs, and with links between the stages of either column."""
    team = _square_keeper.team()
    team.open_columns(slots=2)
    team.each(prepare)
    yield team.ranks
    _square_keeper.after_test()


def on_either_side(here: Here) -> None:
    """The order of `messages_on_either_side_of_a_replay`."""
    replay: SummingGraph = here.kept["graph"]
    messages = ranks.push if here.link.stage == 0 else ranks.take
    if here.index in (0, 3):
        messages(here, [column(here)])
    with ranks.on_forward_stream(here):
        replay()
    if here.index in (1, 2):
        messages(here, [column(here)])
    ranks.flush(here)


def serve(here: Here, iterations: int) -> list[int]:
    """Decode as a stage does it: replays, proxies that go on, token ids that come home. Returns the ids."""
    replay: SummingGraph = here.kept["graph"]
    link, outputs = here.link, []
    for iteration in range(iterations):
        if link.stage == 0:
            if iteration:
                outputs.append(link.post(Kind.OUTPUT, 1, iteration=iteration - 1).wait())
            with ranks.on_forward_stream(here):
                hidden = replay(ranks.numbered(here, iteration + column(here)))
                link.push_tensors(Kind.PROXY, 1, {"hidden_states": hidden}, iteration=iteration)
        else:
            with ranks.on_forward_stream(here):
                proxies = link.post(Kind.PROXY, 0, iteration=iteration).wait()
                ids = replay(proxies["hidden_states"]).clone()
                link.release(ranks.event(here))
                outputs.append({"next_token_ids": ids.cpu()})
            link.push_tensors(Kind.OUTPUT, 0, outputs[-1], iteration=iteration)
    if link.stage == 0:
        outputs.append(link.post(Kind.OUTPUT, 1, iteration=iterations - 1).wait())
    return [the_number(ids["next_token_ids"]) for ids in outputs]


def the_number(ids: Any) -> int:
    number = ranks.number_of(ids)
    assert isinstance(number, int), number
    return number


@field_case("sglang-23472")
def test_messages_may_stand_on_either_side_of_a_replay(square: list[Rank]) -> None:
    results([rank.start(on_either_side) for rank in square])
    assert square[2].call(ranks.read_numbers) == [0]
    assert square[3].call(ranks.read_numbers) == [1]


@field_case("sglang-23472")
def test_stages_with_sums_in_their_graphs_serve(square: list[Rank]) -> None:
    """Over slow links. Every rank has the ids, which are sums of sums over both stages."""
    for rank in square:
        with Simulator(rank.pid) as simulator:
            simulator.links(us_per_message=LINK_US, mb_per_s=0)
    expected = [
        made_of(proxy, proxy) for proxy in (made_of(number, number + 1) for number in range(ITERATIONS))
    ]
    assert results([rank.start(serve, ITERATIONS) for rank in square]) == [expected] * 4
