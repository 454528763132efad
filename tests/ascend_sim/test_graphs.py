"""NPU graphs on the simulated Ascend: capture, replay and update, with the real torch_npu API."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from rig.harness import Here
from rig.npu_ranks import run_program

from .graph_operators import define_scale

# --- in the rank's process -----------------------------------------------------------------------


def npu() -> Any:
    return torch.get_device_module("npu")


def model(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Operators of several kinds: products, reductions, views, indices, in place."""
    hidden = torch.relu(x @ weight) + x
    hidden = hidden.view(2, -1).softmax(dim=-1).reshape(x.shape)
    hidden[:, 0] += 1
    chosen = hidden[torch.arange(x.shape[0], device=x.device), hidden.argmax(dim=-1)]
    return hidden * chosen.unsqueeze(-1)


def replays_and_eager(here: Here) -> list[tuple[list[Any], list[Any]]]:
    """What a graph writes for several inputs, and what the same operators return without one."""
    weight = torch.randn(8, 8, device="npu")
    x = torch.zeros(4, 8, device="npu")
    graph = npu().NPUGraph()
    with npu().graph(graph):
        y = model(x, weight)
    found = []
    for seed in range(3):
        values = torch.randn(4, 8, generator=torch.Generator().manual_seed(seed))
        x.copy_(values)
        graph.replay()
        found.append((y.tolist(), model(values.to("npu"), weight).tolist()))
    return found


def before_any_replay(here: Here) -> list[float]:
    """A tensor that a graph writes, after the capture; it held 7 before."""
    x = torch.ones(3, device="npu")
    y = torch.full((3,), 7.0, device="npu")
    graph = npu().NPUGraph()
    with npu().graph(graph):
        torch.add(x, 1, out=y)
    npu().synchronize()
    found: list[float] = y.tolist()
    return found


def replays_in_stream_order(here: Here) -> list[float]:
    """Each replay between a write of its input and a read of its output, all queued before the first runs."""
    x, y = torch.zeros(1, device="npu"), torch.empty(1, device="npu")
    graph = npu().NPUGraph()
    with npu().graph(graph):
        torch.mul(x, 10, out=y)
    from ascend_sim import kernels

    kernels.occupy(20)
    outputs = []
    for number in range(5):
        x.fill_(number)
        graph.replay()
        outputs.append(y.clone())
    return [output.item() for output in outputs]


def random_numbers(here: Here) -> dict[str, list[list[float]]]:
    """Draws of two replays, and of two eager calls from the same seed."""
    graph = npu().NPUGraph()
    with npu().graph(graph):
        drawn = torch.rand(4, device="npu")
    torch.manual_seed(3)
    replayed = []
    for _ in range(2):
        graph.replay()
        replayed.append(drawn.tolist())
    torch.manual_seed(3)
    return {"replayed": replayed, "eager": [torch.rand(4, device="npu").tolist() for _ in range(2)]}


def updates(here: Here) -> list[list[float]]:
    """An operator between two others gets another number before each replay."""
    define_scale(here)
    x, scaled = torch.ones(2, device="npu"), torch.zeros(2, device="npu")
    graph = npu().NPUGraph()
    with npu().graph(graph, auto_dispatch_capture=True):
        y = x + 1
        torch.ops.graph_tests.scale.out(y, [3], out=scaled)
        z = scaled + 100
    found = []
    for number in (5, 6, 7):
        graph.update(cpu_update_input=[{"numbers": [number]}])
        graph.replay()
        found.append(z.tolist())
    return found


def capturing(here: Here) -> list[bool]:
    """What torch_npu says of the current stream before, in and after a capture."""
    graph, found = npu().NPUGraph(), [npu().is_current_stream_capturing()]
    with npu().graph(graph):
        torch.ones(1, device="npu")
        found.append(npu().is_current_stream_capturing())
    return [*found, npu().is_current_stream_capturing()]


def graphed_module(here: Here) -> list[float]:
    """How far a module with graphs, forward and backward, is from the same module on the host."""

    def layers() -> torch.nn.Module:
        torch.manual_seed(0)
        return torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))

    on_host, sample = layers(), torch.randn(4, 8, device="npu", requires_grad=True)
    graphed = npu().make_graphed_callables(layers().to("npu"), (sample,))
    errors = []
    for _ in range(3):
        values = torch.randn(4, 8)
        x, expected_x = values.to("npu").requires_grad_(), values.clone().requires_grad_()
        y, expected_y = graphed(x), on_host(expected_x)
        y.sum().backward()
        expected_y.sum().backward()
        assert x.grad is not None
        assert expected_x.grad is not None
        for found, expected in ((y, expected_y), (x.grad, expected_x.grad)):
            errors.append((found.detach().cpu() - expected.detach()).abs().max().item())
    return errors


PROGRAM_WITH_A_BLOCKED_REPLAY = """
import torch, torch_npu
from ascend_sim import kernels

kernels.install()
x, event, graph = torch.ones(4, device="npu"), torch.npu.ExternalEvent(), torch.npu.NPUGraph()
with torch.npu.graph(graph):
    stream = torch.npu.current_stream()
    event.wait(stream)
    event.reset(stream)
    y = x + 1
graph.replay()
print("replayed", flush=True)
"""


# --- tests ---------------------------------------------------------------------------------------


def test_a_replay_computes_what_the_operators_compute(rank: Callable[..., Any]) -> None:
    for replayed, eager in rank(replays_and_eager):
        assert replayed == eager


def test_a_capture_runs_nothing(rank: Callable[..., Any]) -> None:
    assert rank(before_any_replay) == [7.0] * 3


def test_replays_keep_their_place_on_the_stream(rank: Callable[..., Any]) -> None:
    assert rank(replays_in_stream_order) == [0.0, 10.0, 20.0, 30.0, 40.0]


def test_random_numbers_go_on_with_each_replay(rank: Callable[..., Any]) -> None:
    found = rank(random_numbers)
    assert found["replayed"] == found["eager"]
    assert found["replayed"][0] != found["replayed"][1]


def test_an_update_changes_what_a_recorded_operator_is_called_with(rank: Callable[..., Any]) -> None:
    assert rank(updates) == [[110.0] * 2, [112.0] * 2, [114.0] * 2]


def test_torch_npu_knows_of_a_capture(rank: Callable[..., Any]) -> None:
    assert rank(capturing) == [False, True, False]


def test_a_module_with_gradients(rank: Callable[..., Any]) -> None:
    assert max(rank(graphed_module)) < 1e-5


def test_a_process_ends_although_a_replay_does_not() -> None:
    ended = run_program(PROGRAM_WITH_A_BLOCKED_REPLAY)
    assert ended.stdout == "replayed\n"
    assert ended.returncode == 0, ended.stderr
