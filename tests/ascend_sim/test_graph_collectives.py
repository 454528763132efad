"""HCCL in NPU graphs: every replay is one more collective, with the replays of the other ranks."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist

from ascend_sim import kernels
from ascend_sim.controls import Simulator
from ascend_sim.deadlock import deadlock_among
from rig.harness import Here, Rank, Team, TeamKeeper
from rig.npu_ranks import start_team

pytestmark = pytest.mark.thorough

LIMIT_S = 20.0
ELEMENTS = 5


@pytest.fixture(scope="module")
def _pair_keeper() -> Iterator[TeamKeeper]:
    keeper = TeamKeeper(lambda: start_team(2, process_group=True, kernels=True, memory_mb=256, poison=1))
    yield keeper
    keeper.close()


@pytest.fixture
def pair(_pair_keeper: TeamKeeper) -> Iterator[Team]:
    """Two ranks in one process group over the simulated HCCL."""
    yield _pair_keeper.team()
    _pair_keeper.after_test()


# --- in the rank processes -----------------------------------------------------------------------


def npu() -> Any:
    return torch.get_device_module("npu")


def filled(here: Here, value: float) -> torch.Tensor:
    return torch.full((ELEMENTS,), float(value), device=here.device)


def warm_up(here: Here) -> None:
    """The communicator of the group, and those of the pair: making one is nothing for a capture."""
    dist.all_reduce(filled(here, 1))
    if here.index == 0:
        dist.send(filled(here, 1), 1)
    else:
        dist.recv(filled(here, 0), 0)
    npu().synchronize()


def capture_sum(here: Here) -> None:
    """As a layer of tensor parallelism does: an operator, a sum over the ranks, another operator."""
    warm_up(here)
    x = here.kept["x"] = filled(here, 0)
    graph = here.kept["graph"] = npu().NPUGraph()
    with npu().graph(graph):
        partial = x * 2
        dist.all_reduce(partial)
        here.kept["y"] = partial + 1


def replay(here: Here, value: float, *, synchronize: bool = True) -> list[float] | None:
    here.kept["x"].fill_(value)
    here.kept["graph"].replay()
    if not synchronize:
        return None
    found: list[float] = here.kept["y"].tolist()
    return found


def replay_often(here: Here, times: int) -> list[float]:
    """All launched before the first has ended; each output is kept."""
    outputs = []
    for number in range(times):
        here.kept["x"].fill_(number + here.index)
        here.kept["graph"].replay()
        outputs.append(here.kept["y"].clone())
    return [output[0].item() for output in outputs]


def other_collectives(here: Here) -> dict[str, list[float]]:
    """What a graph of several collectives writes in its second replay."""
    warm_up(here)
    x = filled(here, 0)
    gathered = torch.empty(2 * ELEMENTS, device=here.device)
    scattered = torch.empty(ELEMENTS, device=here.device)
    graph = npu().NPUGraph()
    with npu().graph(graph):
        dist.all_gather_into_tensor(gathered, x)
        dist.reduce_scatter_tensor(scattered, gathered + 1)
        root = x.clone()
        dist.broadcast(root, 1)
    for value in (1, 2):
        x.fill_(10 * value + here.index)
        graph.replay()
    return {name: tensor.tolist() for name, tensor in locals().items() if name in NAMES}


NAMES = ("gathered", "scattered", "root")


def messages(here: Here) -> list[float]:
    """A send in the graph of rank 0, its receive in that of rank 1."""
    warm_up(here)
    x, y = filled(here, 0), filled(here, -1)
    graph = npu().NPUGraph()
    with npu().graph(graph):
        if here.index == 0:
            dist.send(x + 1, 1)
        else:
            dist.recv(y, 0)
    found = []
    for value in (5, 6):
        x.fill_(value)
        graph.replay()
        found.append(y[0].item())
    return found


def send_first(here: Here) -> None:
    """Rank 0 sends before its replay; rank 1 receives after its own."""
    message = filled(here, 3)
    here.kept["x"].fill_(1)
    if here.index == 0:
        dist.send(message, 1)
        here.kept["graph"].replay()
    else:
        here.kept["graph"].replay()
        dist.recv(message, 0)
    npu().synchronize()


def replays_queued_in_different_order(here: Here) -> None:
    """Two graphs with a sum each, replayed in one order on rank 0 and in the other one on rank 1."""
    second = here.kept["second"] = npu().NPUGraph()
    group = dist.new_group([0, 1])
    x = here.kept["x of second"] = filled(here, 1)
    dist.all_reduce(x, group=group)
    npu().synchronize()
    with npu().graph(second):
        dist.all_reduce(x, group=group)
    kernels.occupy(1)
    graphs = [here.kept["graph"], second]
    for graph in graphs if here.index == 0 else graphs[::-1]:
        graph.replay()
    npu().synchronize()


# --- tests ---------------------------------------------------------------------------------------


def test_a_sum_in_a_graph_is_made_at_every_replay(pair: Team) -> None:
    pair.each(capture_sum)
    for first, second in ((1.0, 2.0), (5.0, -3.0)):
        calls = [rank.start(replay, value) for rank, value in zip(pair.ranks, (first, second), strict=True)]
        for call in calls:
            assert call.result() == [2 * (first + second) + 1] * ELEMENTS


def test_replays_are_matched_in_order(pair: Team) -> None:
    pair.each(capture_sum)
    for found in pair.each(replay_often, 20):
        assert found == [2 * (2 * number + 1) + 1.0 for number in range(20)]


def test_other_collectives_in_one_graph(pair: Team) -> None:
    for rank, found in enumerate(pair.each(other_collectives)):
        assert found["gathered"] == [20.0] * ELEMENTS + [21.0] * ELEMENTS
        assert found["scattered"] == [2 * (21.0 + rank)] * ELEMENTS
        assert found["root"] == [21.0] * ELEMENTS


def test_a_message_between_two_graphs(pair: Team) -> None:
    _, received = pair.each(messages)
    assert received == [6.0, 7.0]


def test_a_replay_waits_for_that_of_the_other_rank(pair: Team) -> None:
    """And its host does not. What it waits for is in the listing."""
    pair.each(capture_sum)
    early, late = pair.ranks
    early.call(replay, 1, synchronize=False)
    with Simulator(early.pid) as simulator:
        stream = _wait_for_stream_of_graph(simulator, "HcclAllReduce")
        assert stream.running.partners.pids == [late.pid]
        listed = [each.running for each in simulator.listing().streams if not each.graph]
        (replaying,) = [task for task in listed if task is not None]
        assert replaying.name == f"graph {stream.graph} replay"
        assert [inner.name for inner in replaying.contains] == ["HcclAllReduce"]
    assert late.call(replay, 2) == [7.0] * ELEMENTS


def test_a_deadlock_names_the_task_in_the_graph(pair: Team) -> None:
    """A send in front of a replay whose sum the receiver has already begun: both wait for the other one."""
    pair.each(capture_sum)
    pids = [rank.pid for rank in pair.ranks]
    assert deadlock_among(pids, limit_s=0) is None
    _start_and_give_up(pair, send_first)
    deadlock = deadlock_among(pids, LIMIT_S)
    assert deadlock is not None
    assert deadlock.pids == set(pids)
    assert any(task.startswith("HcclAllReduce in graph") for task in deadlock.tasks), str(deadlock)
    assert "HcclSend" in deadlock.tasks
    assert "HcclAllReduce in graph" in str(deadlock)


def test_graphs_replayed_in_different_order_are_a_deadlock(pair: Team) -> None:
    pair.each(capture_sum)
    pids = [rank.pid for rank in pair.ranks]
    _start_and_give_up(pair, replays_queued_in_different_order)
    deadlock = deadlock_among(pids, LIMIT_S)
    assert deadlock is not None
    assert deadlock.pids == set(pids)
    assert len([task for task in deadlock.tasks if task.startswith("HcclAllReduce in graph")]) == 2


# --- in the test's process -----------------------------------------------------------------------


def _wait_for_stream_of_graph(simulator: Simulator, task: str) -> Any:
    """The stream of a graph that stands still in a task of that name."""
    deadline = time.monotonic() + LIMIT_S
    while time.monotonic() < deadline:
        for stream in simulator.listing().streams:
            running = stream.running
            if stream.graph and running and running.name == task and running.waiting:
                return stream
        time.sleep(0.005)
    raise AssertionError(f"no graph stands still in {task} after {LIMIT_S:g} s:\n{simulator.listing()}")


def _start_and_give_up(pair: Team, function: Callable[[Here], None]) -> None:
    """Begin what never ends: the team is not used again."""
    ranks: list[Rank] = pair.ranks
    for rank in ranks:
        rank.start(function)
        rank.failed = True
