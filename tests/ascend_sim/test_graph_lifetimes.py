"""Memory of NPU graphs on the simulated Ascend: a graph keeps addresses, and what is freed shows as poison.

-1 is what a freed integer reads as (0xff in every byte), and every operator here is on integers.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from ascend_sim import kernels
from ascend_sim.controls import Simulator
from rig.harness import Here, TeamKeeper
from rig.npu_ranks import start_team

from .graph_operators import define_scale

pytestmark = pytest.mark.thorough

LIMIT_S = 20.0
ELEMENTS = 1000
POISON = -1


@pytest.fixture(scope="module")
def _rank_keeper() -> Iterator[TeamKeeper]:
    keeper = TeamKeeper(lambda: start_team(1, memory_mb=512, kernels=True, poison=1))
    yield keeper
    keeper.close()


# --- in the rank's process -----------------------------------------------------------------------


def npu() -> Any:
    return torch.get_device_module("npu")


def filled(value: int, elements: int = ELEMENTS) -> torch.Tensor:
    return torch.full((elements,), value, device="npu")


def without_owner(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor at the same address, which does not keep the memory."""
    import torch_npu

    alias: torch.Tensor = torch_npu._C._weak_ref_tensor(tensor)
    return alias


def value_of(tensor: torch.Tensor) -> int:
    (value,) = tensor.cpu().unique().tolist()
    return int(value)


def freed_input(here: Here, *, give_back: bool) -> tuple[int, int]:
    """The output before and after the input is freed, by Python, or also by the allocator."""
    npu().empty_cache()
    x = filled(3, 5_000_000)  # a segment of its own
    y = filled(0, 5_000_000)
    graph = npu().NPUGraph()
    with npu().graph(graph):
        torch.add(x, 1, out=y)
    graph.replay()
    before = value_of(y)
    del x
    if give_back:
        npu().empty_cache()
    graph.replay()
    return before, value_of(y) - 1


def memory_of_a_capture(here: Here) -> tuple[int, int]:
    """Bytes that a capture has allocated and Python still owns: with the output, and without."""
    x = filled(1)
    npu().synchronize()
    before = npu().memory_allocated()
    graph = npu().NPUGraph()
    with npu().graph(graph):
        y = ((x + 1) * 2 - 3) * 4
    with_output = npu().memory_allocated() - before
    size = y.numel() * y.element_size()
    del y
    return with_output - _rounded(size), npu().memory_allocated() - before


def _rounded(size: int) -> int:
    """As the allocator does it: 32 bytes of padding, and blocks of 512."""
    return -(-(size + 32) // 512) * 512


def intermediate(here: Here) -> dict[str, int]:
    """What is read at the address of a tensor that was freed in the capture, and what the output is."""
    x = filled(3)
    graph = npu().NPUGraph()
    with npu().graph(graph):
        hidden = x + 1
        kept = without_owner(hidden)
        y = hidden * 2
        del hidden
    kept.fill_(9)
    graph.replay()
    return {"intermediate": value_of(kept), "output": value_of(y)}


def used_on_another_stream(here: Here, *, recorded: bool) -> int:
    """A tensor of a side stream is read on the first one and freed, all in the capture."""
    x, side, graph = filled(3), npu().Stream(), npu().NPUGraph()
    with npu().graph(graph):
        current = npu().current_stream()
        side.wait_stream(current)
        with npu().stream(side):
            hidden = x + 1
        current.wait_stream(side)
        kernels.occupy(5)
        if recorded:
            hidden.record_stream(current)
        y = hidden * 2
        del hidden
    graph.replay()
    return value_of(y)


def freed_output(here: Here) -> dict[str, int]:
    """Of an output that is freed while its replay is queued, and a copy of it behind that."""
    x = filled(3)
    graph = npu().NPUGraph()
    with npu().graph(graph):
        y = x + 1
    kept = without_owner(y)
    kernels.occupy(30)
    graph.replay()
    copy = y.clone()
    del y
    npu().synchronize()
    return {"copy": value_of(copy), "output": value_of(kept)}


def freed_while_it_replays(here: Here) -> int:
    """The output of a graph, an intermediate of which is freed between its write and its read."""
    x = filled(3)
    graph = npu().NPUGraph()
    with npu().graph(graph):
        hidden = x + 1
        kernels.occupy(1)
        y = hidden * 2
    with Simulator() as simulator, simulator.hold("occupy", 1) as gate:
        graph.replay()
        gate.wait_until_held()
        del hidden
    npu().synchronize()
    return value_of(y)


def replayed_after_the_free(here: Here) -> int:
    """An intermediate is freed while another stream is held, so its poison is late: a replay has begun."""
    x, graph, side = filled(3), npu().NPUGraph(), npu().Stream()
    with npu().graph(graph):
        hidden = x + 1
        kernels.occupy(1)
        y = hidden * 2
    with Simulator() as simulator, simulator.hold("begin stretch", 1) as other:
        with npu().stream(side):
            kernels.begin_stretch()
        other.wait_until_held()
        start = simulator.history().next
        del hidden
        with simulator.hold("occupy", 1) as gate:
            graph.replay()
            gate.wait_until_held()
            other.release()
            _until_poison_waits_or_has_come(simulator, start)
    npu().synchronize()
    return value_of(y)


def _until_poison_waits_or_has_come(simulator: Simulator, start: int) -> None:
    """It has passed the stream that was held."""
    deadline = time.monotonic() + LIMIT_S
    while time.monotonic() < deadline:
        entries = simulator.history(start).entries
        if any(entry.task == "poison" and entry.event == "ended" for entry in entries):
            return
        running = [stream.running for stream in simulator.listing().streams]
        if any(task and task.waiting and task.waiting.reason == "no replay may run" for task in running):
            return
        time.sleep(0.005)
    raise AssertionError(f"poison has not come:\n{simulator.listing()}")


def given_out_again(here: Here) -> dict[str, int]:
    """An output is freed behind a stream that is held, and a second graph of the pool gets its memory."""
    x, pool, side, capturing = filled(3), npu().graph_pool_handle(), npu().Stream(), npu().Stream()
    first, second = npu().NPUGraph(), npu().NPUGraph()
    with npu().graph(first, pool=pool, stream=capturing):
        y = x + 1
    address = y.data_ptr()
    with Simulator() as simulator, simulator.hold("occupy", 1) as gate:
        with npu().stream(side):
            kernels.occupy(1)
        gate.wait_until_held()
        del y
        with npu().stream(capturing):  # torch.npu.graph() would wait for the device
            second.capture_begin(pool=pool)
            z = x + 2
            second.capture_end()
        second.replay()
        before = value_of(z)
    npu().synchronize()
    return {"same memory": int(z.data_ptr() == address), "before": before, "after": value_of(z)}


def ordinary_block_freed_in_a_capture(here: Here) -> dict[str, int]:
    """A tensor from outside is freed in a capture, and another one gets its memory before the replay."""
    stream = npu().Stream()
    with npu().stream(stream):
        outside = filled(1)
    npu().synchronize()
    x, address = filled(3), outside.data_ptr()
    graph = npu().NPUGraph()
    with npu().graph(graph, stream=stream):
        y = x + 1
        del outside
    with npu().stream(stream):
        heir = torch.empty(ELEMENTS, dtype=torch.int64, device="npu")
        heir.fill_(7)
    npu().synchronize()
    graph.replay()
    return {"same memory": int(heir.data_ptr() == address), "heir": value_of(heir), "output": value_of(y)}


def destroyed_while_it_replays(here: Here) -> dict[str, Any]:
    """A graph is reset while its replay is held at a gate."""
    x, y = filled(3), filled(0)
    graph = npu().NPUGraph()
    with npu().graph(graph):
        kernels.occupy(1)
        torch.add(x, 1, out=y)
    with Simulator() as simulator:
        with simulator.hold("occupy", 1) as gate:
            graph.replay()
            gate.wait_until_held()
            thread = threading.Thread(target=graph.reset, daemon=True)
            thread.start()
            reason = _reason_of_host_wait(simulator, "aclmdlRIDestroy")
            alive = thread.is_alive()
        thread.join(LIMIT_S)
        return {"reason": reason, "waited": alive, "ended": not thread.is_alive(), "output": value_of(y)}


def _reason_of_host_wait(simulator: Simulator, call: str) -> str:
    deadline = time.monotonic() + LIMIT_S
    while time.monotonic() < deadline:
        for wait in simulator.listing().host:
            if call in wait.reason:
                return wait.reason
        time.sleep(0.005)
    return f"no host thread waits in {call}"


def temporary_of_an_update(here: Here) -> dict[str, int]:
    """An update calls an operator with a temporary; another tensor gets its memory before the replay."""
    define_scale(here, by_way_of_a_temporary=True)
    x, scaled = filled(2), filled(0)
    graph = npu().NPUGraph()
    with npu().graph(graph, auto_dispatch_capture=True):
        torch.ops.graph_tests_temporary.scale.out(x, [3], out=scaled)
    graph.update(cpu_update_input=[{"numbers": [5]}])
    with npu().stream(graph.graph_dispatch_mode.update_stream):
        heir = filled(7)
    npu().synchronize()
    graph.replay()
    return {"output": value_of(scaled), "heir": value_of(heir)}


# --- tests ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("give_back", [False, True], ids=["freed", "given back"])
def test_a_graph_does_not_keep_its_input(rank: Callable[..., Any], give_back: bool) -> None:
    assert rank(freed_input, give_back=give_back) == (4, POISON)


def test_a_capture_keeps_no_tensor(rank: Callable[..., Any]) -> None:
    assert rank(memory_of_a_capture) == (0, 0)


def test_what_is_freed_in_a_capture_is_poisoned_in_every_replay(rank: Callable[..., Any]) -> None:
    assert rank(intermediate) == {"intermediate": POISON, "output": 8}


def test_what_another_stream_reads_is_recorded_for_it(rank: Callable[..., Any]) -> None:
    """Else its memory is free when the stream that owns it gets there, in a graph as without one."""
    assert rank(used_on_another_stream, recorded=True) == 8
    assert rank(used_on_another_stream, recorded=False) == 2 * POISON


def test_a_freed_output_is_poisoned_behind_what_was_launched(rank: Callable[..., Any]) -> None:
    assert rank(freed_output) == {"copy": 4, "output": POISON}


def test_a_replay_may_use_what_the_program_has_freed(rank: Callable[..., Any]) -> None:
    """It writes its intermediate results before it reads them; no tensor has to be kept for that."""
    assert rank(freed_while_it_replays) == 8


def test_poison_that_is_late_waits_for_the_replays_that_have_begun(rank: Callable[..., Any]) -> None:
    assert rank(replayed_after_the_free) == 8


def test_memory_that_the_pool_gives_out_again_is_not_poisoned(rank: Callable[..., Any]) -> None:
    assert rank(given_out_again) == {"same memory": 1, "before": 5, "after": 5}


def test_a_graph_does_not_poison_what_it_does_not_own(rank: Callable[..., Any]) -> None:
    found = rank(ordinary_block_freed_in_a_capture)
    assert found == {"same memory": 1, "heir": 7, "output": 4}


def test_destroying_a_graph_waits_for_its_replay(rank: Callable[..., Any]) -> None:
    found = rank(destroyed_while_it_replays)
    assert found["reason"].endswith("a replay has not ended")
    assert found["waited"]
    assert found["ended"]
    assert found["output"] == 4


def test_temporaries_of_an_updated_operator_are_freed(rank: Callable[..., Any]) -> None:
    """The graph has their addresses: such an operator has to have its workspace from its caller."""
    assert rank(temporary_of_an_update) == {"output": 10, "heir": 10}
