"""Updates of captured NPU graphs on the simulated Ascend, by torch_npu's graph dispatcher.

An update is a task of the update stream: it changes the graph when that stream gets there, whether a replay
runs or not. An external event in the graph waits for it, once.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch

from ascend_sim.controls import Simulator
from ascend_sim.deadlock import deadlock_among
from rig.harness import Here, Rank

from . import attention_scenarios
from .graph_operators import define_scale

pytestmark = pytest.mark.thorough

LIMIT_S = 20.0


@pytest.fixture
def rank(rank_process: Rank) -> Rank:
    return rank_process


# --- in the rank's process -----------------------------------------------------------------------


def npu() -> Any:
    return torch.get_device_module("npu")


def attention(here: Here, changes: list[list[int]]) -> list[float]:
    """How far a decode step in a graph is from PyTorch's attention, for each of several lists of lengths."""
    import torch_npu

    paged = attention_scenarios.Paged([7, 9, 4])
    tensors, options = paged.arguments()
    graph = npu().NPUGraph()
    with npu().graph(graph, auto_dispatch_capture=True):
        hidden = tensors[0] * 1
        attended, _ = torch_npu.npu_fused_infer_attention_score(hidden, *tensors[1:], **options)
        y = attended + 1
    found = []
    for lengths in changes:
        graph.update(cpu_update_input=[{"actual_seq_lengths_kv": lengths}])
        graph.replay()
        expected = paged.expected(lengths).view(len(lengths), 1, -1)
        found.append((y.cpu() - 1 - expected).abs().max().item())
    return found


def capture_scale(here: Here) -> None:
    """x + 1, times a number that an update gives, plus 100; the product may be held at a gate."""
    define_scale(here)
    x, scaled = torch.ones(2, device="npu"), torch.zeros(2, device="npu")
    graph = npu().NPUGraph()
    with npu().graph(graph, auto_dispatch_capture=True):
        y = x + 1
        torch.ops.graph_tests.scale.out(y, [3], out=scaled)
        z = scaled + 100
    here.kept.update(graph=graph, x=x, z=z, scaled=scaled)


def update(here: Here, number: int) -> None:
    here.kept["graph"].update(cpu_update_input=[{"numbers": [number]}])


def replay(here: Here) -> None:
    here.kept["graph"].replay()
    _ = npu().current_stream().npu_stream  # empties torch_npu's task queue


def output(here: Here) -> float:
    value: float = here.kept["z"][0].item()
    return value


def update_behind_the_task(here: Here) -> list[float]:
    """Outputs of two replays; the update for the second comes when the first has the product behind it."""
    capture_scale(here)
    update(here, 5)
    with Simulator() as simulator:
        with simulator.hold("aten::add.Tensor") as gate:
            replay(here)
            gate.wait_until_held()
            gate.release()
        first = output(here)
        with simulator.hold("task update", 1) as gate:
            update(here, 6)
            replay(here)
            gate.wait_until_held()
            assert any("value wait" in str(stream.running) for stream in simulator.listing().streams)
        return [first, output(here)]


def update_in_front_of_the_task(here: Here) -> dict[str, Any]:
    """An update for the next replay, while this one has not come to its product: it changes this one."""
    capture_scale(here)
    update(here, 5)
    with Simulator() as simulator, simulator.hold("aten::mul.out", 1) as gate:
        replay(here)
        gate.wait_until_held()
        update(here, 6)
        here.kept["graph"].graph_dispatch_mode.update_stream.synchronize()
    return {"this replay": output(here)}


def two_updates_for_one_wait(here: Here) -> dict[str, Any]:
    """Both replays' updates come before the first replay waits for its own: the second one waits in vain."""
    capture_scale(here)
    with Simulator() as simulator:
        with simulator.hold("value wait", 1) as gate:
            update(here, 5)
            replay(here)
            gate.wait_until_held()
            update(here, 6)
            here.kept["graph"].graph_dispatch_mode.update_stream.synchronize()
        first = output(here)
        replay(here)
        reason = _reason_to_wait(simulator, "value wait")
        update(here, 7)
        return {"first": first, "reason": reason, "second": output(here)}


def _reason_to_wait(simulator: Simulator, task: str) -> str:
    """Why a task of that name stands still, as soon as one does."""
    deadline = time.monotonic() + LIMIT_S
    while time.monotonic() < deadline:
        for stream in simulator.listing().streams:
            running = stream.running
            if running is not None and running.name == task and running.waiting is not None:
                return running.waiting.reason
        time.sleep(0.005)
    raise AssertionError(f"no {task} stands still:\n{simulator.listing()}")


def without_an_update(here: Here) -> None:
    """A replay whose external event nothing records; the host waits for it."""
    capture_scale(here)
    replay(here)
    npu().synchronize()


def other_tasks(here: Here) -> dict[str, str]:
    """Updates of a task group with other tasks than it has, by torch_npu's functions."""
    from torch_npu.npu import graphs

    capture_scale(here)
    x, graph = here.kept["x"], here.kept["graph"]
    (record,) = graph.graph_dispatch_mode.graph_dispatch_records
    stream, out = npu().Stream(), torch.empty(2, device="npu")
    ways: dict[str, Callable[[], Any]] = {
        "none": lambda: None,
        "another one": lambda: torch.add(x, 1, out=out),
        "too many": lambda: [torch.mul(x, 1, out=out) for _ in range(2)],
    }
    found = {}
    for name, work in ways.items():
        with npu().stream(stream):
            graphs.graph_task_update_begin(stream, record.handle)
            work()
            try:
                graphs.graph_task_update_end(stream)
            except RuntimeError as error:
                found[name] = str(error)
    update(here, 4)
    replay(here)
    return {**found, "afterwards": str(output(here))}


def many_groups(here: Here) -> list[float]:
    """Three operators in one graph: one update for all of them, and one for each."""
    define_scale(here)
    x, graph = torch.ones(2, device="npu"), npu().NPUGraph()
    outs = [torch.zeros(2, device="npu") for _ in range(3)]
    with npu().graph(graph, auto_dispatch_capture=True):
        for out in outs:
            torch.ops.graph_tests.scale.out(x, [3], out=out)
        y = outs[0] + outs[1] * 10 + outs[2] * 100
    found = []
    for numbers in ([2], [4, 5, 6]):
        graph.update(cpu_update_input=[{"numbers": [number]} for number in numbers])
        graph.replay()
        found.append(y[0].item())
    return found


def values_by_flag(here: Here) -> dict[str, list[str]]:
    """For each flag of aclrtValueWait: which of some written values let the stream go on."""
    cann = ctypes.CDLL("libascendcl.so")
    streams = [npu().Stream(), npu().Stream()]
    writing, waiting = (ctypes.c_void_p(stream.npu_stream) for stream in streams)
    word = torch.zeros(4, dtype=torch.int64, device="npu")
    npu().synchronize()
    address = ctypes.c_void_p(word.data_ptr())
    found: dict[str, list[str]] = {}
    for flag, name in enumerate(("at least", "equal", "and", "nor")):
        found[name] = []
        for value in (2, 3, 4, -1):
            assert cann.aclrtValueWrite(address, ctypes.c_uint64(value), 0, writing) == 0
            streams[0].synchronize()
            assert cann.aclrtValueWait(address, ctypes.c_uint64(3), flag, waiting) == 0
            if cann.aclrtSynchronizeStreamWithTimeout(waiting, 60) == 0:
                found[name].append(str(value))
                continue
            assert cann.aclrtValueWrite(address, ctypes.c_uint64(3 if flag < 3 else 0), 0, writing) == 0
            assert cann.aclrtSynchronizeStreamWithTimeout(waiting, 5000) == 0
    return found


# --- tests ---------------------------------------------------------------------------------------


def test_lengths_of_attention(rank: Rank) -> None:
    changes = [[7, 9, 4], [1, 2, 3], [9, 0, 8]]
    assert max(rank.call(attention, changes)) < 1e-5


def test_one_update_for_all_operators_or_one_for_each(rank: Rank) -> None:
    assert rank.call(many_groups) == [222.0, 654.0]


def test_a_replay_waits_for_its_update(rank: Rank) -> None:
    assert rank.call(update_behind_the_task) == [110.0, 112.0]


def test_an_update_changes_a_replay_that_has_not_come_to_the_task(rank: Rank) -> None:
    """What upstream's fence prevents (issues 38971 and 40446 of SGLang)."""
    assert rank.call(update_in_front_of_the_task) == {"this replay": 112.0}


def test_two_updates_before_one_wait_are_one_for_the_event(rank: Rank) -> None:
    """The other thing that the fence prevents: the event is a flag, and not a count."""
    found = rank.call(two_updates_for_one_wait)
    assert found["first"] == 112.0
    assert found["reason"].endswith("which no queued task writes")
    assert found["second"] == 114.0


def test_an_update_has_the_tasks_of_the_group(rank: Rank) -> None:
    found = rank.call(other_tasks)
    assert "has 1 task (aten::mul.out), and its update has 0 tasks" in found["none"]
    assert "and its update has 1 task (aten::add.out)" in found["another one"]
    assert "and its update has 2 tasks (aten::mul.out, aten::mul.out)" in found["too many"]
    assert found["afterwards"] == "108.0"


def test_flags_of_a_value(rank: Rank) -> None:
    assert rank.call(values_by_flag) == {
        "at least": ["3", "4"],
        "equal": ["3"],
        "and": ["2", "3", "-1"],
        "nor": ["2", "3", "4"],
    }


def test_a_replay_without_its_update_is_a_deadlock_with_the_host(rank: Rank) -> None:
    rank.start(without_an_update)
    rank.failed = True
    deadlock = deadlock_among([rank.pid], LIMIT_S)
    assert deadlock is not None
    assert any(task.startswith("value wait in graph") for task in deadlock.tasks), str(deadlock)
    assert any("synchronising" in task for task in deadlock.tasks), str(deadlock)
