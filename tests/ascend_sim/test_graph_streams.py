"""Several streams in an NPU graph on the simulated Ascend; gates, listing and history inside a replay."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest
import torch

from ascend_sim import kernels
from ascend_sim.controls import Listing, Simulator, Stream
from rig.harness import Here

pytestmark = pytest.mark.thorough

REPLAYS = 10


# --- in the rank's process -----------------------------------------------------------------------


def npu() -> Any:
    return torch.get_device_module("npu")


def filled(value: int) -> torch.Tensor:
    return torch.full((4,), value, device="npu")


def two_streams(x: torch.Tensor, side: Any) -> torch.Tensor:
    """Work on the current stream and on another one, which join in the end; each is held by an `occupy`."""
    current = npu().current_stream()
    doubled = x * 2
    side.wait_stream(current)
    with npu().stream(side):
        kernels.occupy(1)
        tripled = doubled * 3
    on_current = doubled + 1
    current.wait_stream(side)
    tripled.record_stream(current)
    return tripled + on_current


def values_over_streams(here: Here) -> list[tuple[int, int]]:
    x, side, graph = filled(0), npu().Stream(), npu().NPUGraph()
    with npu().graph(graph):
        y = two_streams(x, side)
    found = []
    for value in (1, 2, 3):
        x.fill_(value)
        graph.replay()
        found.append((int(y[0].item()), value * 6 + value * 2 + 1))
    return found


def many_streams(here: Here) -> list[int]:
    """A stream that joins by way of another one, and goes back that way."""
    x, graph = filled(1), npu().NPUGraph()
    near, far = npu().Stream(), npu().Stream()
    with npu().graph(graph):
        current = npu().current_stream()
        a = x + 1
        near.wait_stream(current)
        with npu().stream(near):
            b = a * 10
        far.wait_stream(near)
        with npu().stream(far):
            c = b + 5
        near.wait_stream(far)
        with npu().stream(near):
            d = c * 2
        current.wait_stream(near)
        y = d + a
    graph.replay()
    found: list[int] = y.tolist()
    return found


def held_on_the_side(here: Here) -> dict[str, Any]:
    """A replay, the side stream of which is held: what the listing says, and whether the rest goes on."""
    x, side, graph = filled(5), npu().Stream(), npu().NPUGraph()
    with npu().graph(graph):
        y = two_streams(x, side)
    with Simulator() as simulator:
        start = simulator.history().next
        with simulator.hold("occupy", 1) as gate:
            graph.replay()
            after = y + 1000
            gate.wait_until_held()
            simulator_listing = _when_only_the_side_moves(simulator)
        result = after[0].item()
        return {
            "listing": simulator_listing,
            "text": str(simulator_listing),
            "result": result,
            "history": simulator.history(start).entries,
        }


def _when_only_the_side_moves(simulator: Simulator) -> Listing:
    """The listing, once the first stream of the graph has come to its wait for the other one."""
    deadline = time.monotonic() + 20
    while True:
        listing = simulator.listing()
        of_graph = [stream for stream in listing.streams if stream.graph and stream.running]
        if len(of_graph) == 2 and {stream.running.name for stream in of_graph if stream.running} == {
            "occupy",
            "event wait",
        }:
            return listing
        if time.monotonic() > deadline:
            raise AssertionError(f"the graph is somewhere else:\n{listing}")
        time.sleep(0.005)


def replays_on_two_streams(here: Here) -> list[list[str]]:
    """For each stream of a graph the names of its tasks, in the order in which they ran."""
    x, graph, side = filled(5), npu().NPUGraph(), npu().Stream()
    with npu().graph(graph):
        side.wait_stream(npu().current_stream())
        for stream in (npu().current_stream(), side):
            with npu().stream(stream):
                own = x.clone()
                for _ in range(20):
                    own.add_(1)
                    own.mul_(2)
                    own.sub_(3)
        npu().current_stream().wait_stream(side)
    streams = [npu().Stream(), npu().Stream()]
    with Simulator() as simulator:
        start = simulator.history().next
        for _ in range(REPLAYS):
            with simulator.hold("graph*", 2) as gate:  # so that both begin at the same time
                for stream in streams:
                    with npu().stream(stream):
                        graph.replay()
                gate.wait_until_held(tasks=2)
            npu().synchronize()
        entries = simulator.history(start).entries
    streams_of_graph = sorted({entry.stream for entry in entries if entry.task.startswith("aten")})
    return [
        [entry.task for entry in entries if entry.stream == number and entry.event == "began"]
        for number in streams_of_graph
    ]


def a_copy_to_the_host(here: Here) -> dict[str, Any]:
    """A copy to pinned memory in a graph, which is held and delayed like any other."""
    x, graph = filled(3), npu().NPUGraph()
    pinned = torch.zeros(4, dtype=torch.int64).pin_memory()
    with npu().graph(graph):
        pinned.copy_(x, non_blocking=True)
    with Simulator() as simulator:
        with simulator.hold("memcpy D2H", 1) as gate:
            graph.replay()
            gate.wait_until_held()
            before = pinned.tolist()
        npu().synchronize()
        return {"before": before, "after": pinned.tolist()}


def stretches(here: Here) -> list[kernels.Stretch]:
    """A stretch around a replay, and one inside of it."""
    graph = npu().NPUGraph()
    with npu().graph(graph):
        kernels.begin_stretch()
        kernels.occupy(20)
        kernels.end_stretch()
    npu().synchronize()
    kernels.take_stretches()
    kernels.begin_stretch()
    graph.replay()
    kernels.end_stretch()
    npu().synchronize()
    return kernels.take_stretches()


# --- tests ---------------------------------------------------------------------------------------


def test_a_graph_over_two_streams(rank: Callable[..., Any]) -> None:
    for found, expected in rank(values_over_streams):
        assert found == expected


def test_a_stream_that_joins_by_way_of_another_one(rank: Callable[..., Any]) -> None:
    assert rank(many_streams) == [52] * 4


def test_a_task_of_a_replay_is_held_and_listed(rank: Callable[..., Any]) -> None:
    found = rank(held_on_the_side)
    listing: Listing = found["listing"]
    first, side = sorted(_of_graph(listing), key=lambda stream: stream.stream)
    assert side.running is not None
    assert first.running is not None
    assert side.running.name == "occupy"
    assert side.running.waiting is not None
    assert side.running.waiting.reason.startswith("held at gate")
    assert [task.name for task in side.queued] == ["aten::mul.Tensor", "event record"]
    assert first.running.name == "event wait"
    assert first.running.waiting is not None
    assert first.running.waiting.task == side.queued[-1].number
    running = [stream.running.name for stream in listing.streams if stream.running]
    assert f"graph {first.graph} replay" in running
    assert f"stream {side.stream} of graph {side.graph}: occupy (held at gate" in found["text"]
    assert found["result"] == 1041


def test_the_history_has_the_tasks_of_a_replay(rank: Callable[..., Any]) -> None:
    entries = rank(held_on_the_side)["history"]
    (replay,) = {entry.task_number for entry in entries if entry.task.endswith("replay")}
    began = next(entry.number for entry in entries if entry.task_number == replay and entry.event == "began")
    ended = next(entry.number for entry in entries if entry.task_number == replay and entry.event == "ended")
    occupied = [entry.number for entry in entries if entry.task == "occupy"]
    assert len(occupied) == 3
    assert all(began < number < ended for number in occupied)


def test_replays_of_one_graph_do_not_overlap(rank: Callable[..., Any]) -> None:
    found = rank(replays_on_two_streams)
    assert len(found) == 2
    for tasks in found:
        once = tasks[: len(tasks) // (2 * REPLAYS)]
        assert once.count("aten::sub_.Tensor") == 20
        assert tasks == once * (2 * REPLAYS)


def test_a_copy_to_the_host_is_made_in_the_replay(rank: Callable[..., Any]) -> None:
    assert rank(a_copy_to_the_host) == {"before": [0] * 4, "after": [3] * 4}


def test_a_stretch_counts_what_a_replay_does_and_not_that_it_waits_for_it(rank: Callable[..., Any]) -> None:
    inside, around = rank(stretches)
    for stretch in (inside, around):
        busy = (stretch.tasks_by_end - stretch.tasks_before) - (stretch.waited_by_end - stretch.waited_before)
        assert busy >= 19_000_000


def _of_graph(listing: Listing) -> list[Stream]:
    return [stream for stream in listing.streams if stream.graph and stream.busy]
