"""Kernels of the simulated Ascend: their results, their order, and what a freed block reads as.

Each way of launching (TASK_QUEUE_ENABLE) is one process that runs all scenarios, with freed memory poisoned.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from typing import Any

import pytest

from ascend_sim import kernels
from ascend_sim.build import REPOSITORY
from ascend_sim.environment import environment

from . import kernel_scenarios, operator_cases

LIMIT_S = 180.0

SCENARIOS = (
    kernel_scenarios.operators,
    kernel_scenarios.random_numbers,
    kernel_scenarios.gradients,
    kernel_scenarios.host_numbers_are_read_at_once,
    kernel_scenarios.another_device,
    kernel_scenarios.errors,
    kernel_scenarios.host_waits,
    kernel_scenarios.values_are_waited_for,
    kernel_scenarios.kernels_keep_their_place,
    kernel_scenarios.occupation,
    kernel_scenarios.padded,
    kernel_scenarios.threads,
    kernel_scenarios.reads_of_freed_memory,
    kernel_scenarios.reads_in_stream_order,
    kernel_scenarios.poison_is_a_task,
    kernel_scenarios.tensors_left_at_the_end,
)


def start(*names: str, **variables: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", kernel_scenarios.__name__, *names]
    settings = environment(devices=2, poison=1)
    variables = {**os.environ, **settings, **variables}
    return subprocess.run(
        command, cwd=REPOSITORY, env=variables, capture_output=True, text=True, timeout=LIMIT_S, check=False
    )


def run(*names: str, **variables: str) -> dict[str, Any]:
    ended = start(*names, **variables)
    assert ended.returncode == 0, f"exit code {ended.returncode}\n{ended.stderr[-4000:]}"
    results: dict[str, Any] = json.loads(ended.stdout.splitlines()[-1])
    return results


@pytest.fixture(
    scope="module",
    params=["1", *(pytest.param(value, marks=pytest.mark.thorough) for value in ("0", "2"))],
    ids=lambda value: f"task_queue_{value}",
)
def seen(request: pytest.FixtureRequest) -> dict[str, Any]:
    """What every scenario returned, in one process."""
    return run(*(scenario.__name__ for scenario in SCENARIOS), TASK_QUEUE_ENABLE=request.param)


# --- values --------------------------------------------------------------------------------------


def test_results_are_the_cpus(seen: dict[str, Any]) -> None:
    assert seen["operators"].keys() == set(operator_cases.names())
    assert {name: problem for name, problem in seen["operators"].items() if problem} == {}


def test_random_numbers_follow_their_generator(seen: dict[str, Any]) -> None:
    found = seen["random_numbers"]
    assert not any(found["next draw"])
    assert not any(found["other generator"])
    assert all(found["same seed"])
    assert all(found["same state"])
    assert found["mean of uniform"] == pytest.approx(0.5, abs=0.01)
    assert found["dropped"] == pytest.approx(0.25, abs=0.03)
    assert found["rest of dropout"] == pytest.approx([0, 4 / 3])


def test_gradients_are_the_cpus(seen: dict[str, Any]) -> None:
    on_cpu, on_device = seen["gradients"]
    assert on_device == on_cpu


def test_a_number_on_the_host_is_read_when_the_operator_is_called(seen: dict[str, Any]) -> None:
    assert seen["host_numbers_are_read_at_once"] == 20.0


def test_an_operator_runs_on_the_device_of_its_tensors(seen: dict[str, Any]) -> None:
    found = seen["another_device"]
    assert found["device"] == "npu:1"
    assert found["sum"] == [2.0, 2.0]
    assert found["current device"] == 0
    assert found["both"].startswith("Expected all tensors to be on the same device")


def test_wrong_arguments_are_reported_to_the_caller(seen: dict[str, Any]) -> None:
    found = seen["errors"]
    for case in ("sizes", "sizes in place", "sizes of a mask"):
        assert "must match the size of tensor b" in found[case], case
    assert found["host tensor"].startswith("Expected all tensors to be on the same device")
    assert found["host generator"] == "Expected a 'npu' device type for generator but found 'cpu'"


def test_an_operator_that_fails_on_its_stream_ends_the_process() -> None:
    ended = start("index_out_of_range")
    assert ended.returncode == -signal.SIGABRT
    message = "aten::index.Tensor failed on its stream: index 5 is out of bounds for dimension 0 with size 3"
    assert message in ended.stderr


@pytest.mark.parametrize(
    "task_queue", ["1", *(pytest.param(value, marks=pytest.mark.thorough) for value in ("0", "2"))]
)
def test_torch_npu_can_fill_cast_copy_and_pad_without_our_kernels(task_queue: str) -> None:
    found = run("torch_npus_own_kernels", TASK_QUEUE_ENABLE=task_queue)["torch_npus_own_kernels"]
    assert len(found) > 10
    assert all(found.values()), found


# --- order ---------------------------------------------------------------------------------------


def test_only_values_and_sizes_that_depend_on_them_make_the_host_wait(seen: dict[str, Any]) -> None:
    found = seen["host_waits"]
    assert {name: (enqueued > 0, waited) for name, (enqueued, waited) in found.items()} == {
        "add": (True, 0),
        "out": (True, 0),
        "matmul": (True, 0),
        "nonzero": (False, 1),
        "equal": (False, 1),
    }


def test_what_the_host_asks_for_has_been_made_by_then(seen: dict[str, Any]) -> None:
    assert seen["values_are_waited_for"] == {
        "item": 3.0,
        "tolist": [3.0, 3.0, 3.0, 3.0],
        "nonzero": [4, 1],
        "equal": True,
    }


def test_kernels_and_occupation_run_in_the_order_of_the_calls(seen: dict[str, Any]) -> None:
    ours = [name for name in seen["kernels_keep_their_place"] if name.startswith(("aten::", "occupy"))]
    assert ours[-3:] == ["aten::add_.Tensor", "occupy", "aten::mul_.Tensor"]


def test_occupy_takes_time_of_the_stream_and_none_of_a_core(seen: dict[str, Any]) -> None:
    found = seen["occupation"]
    assert not found["idle"]
    assert found["seconds"] >= 0.3
    assert found["core"] < 0.15


def test_a_stretch_is_padded_on_the_device_while_the_host_goes_on(seen: dict[str, Any]) -> None:
    found = seen["padded"]
    assert not found["idle"]
    assert found["value"] == [2.0] * 3
    first, second, behind = (kernels.Stretch(*numbers) for numbers in found["stretches"])
    least = 1000 * kernel_scenarios.STRETCH_US
    assert first.end - first.begin >= least
    assert second.begin >= first.end
    # What pads is a task, and by far the longest; between tasks there is time that is nobody's.
    assert second.tasks_before - first.tasks_before >= least // 2
    assert first.tasks_before < first.tasks_by_end <= second.tasks_before
    assert first.waited_by_end <= second.waited_before
    assert second.end - second.begin >= least
    assert found["left"] == 0
    # A stream that waited for the others says how long.
    assert behind.begin >= second.end
    assert 0 < behind.waited_before <= behind.tasks_before


def test_what_the_host_waited_for_is_counted(seen: dict[str, Any]) -> None:
    count, nanoseconds = seen["padded"]["host"]
    assert count > 0
    assert nanoseconds > 0


def test_host_threads_may_use_kernels_at_once(seen: dict[str, Any]) -> None:
    assert seen["threads"] == [sum(range(200))] * 4


# --- memory that is freed too early --------------------------------------------------------------


def test_a_freed_block_is_poisoned_where_a_later_allocation_could_write(seen: dict[str, Any]) -> None:
    found = seen["reads_of_freed_memory"]
    for size in kernel_scenarios.SIZES:
        assert found[f"dropped, {size}"] == "poison"
        assert found[f"kept, {size}"] == "-7.0"
        assert found[f"recorded, {size}"] == "-7.0"
    assert found["dropped, on the other device"] == "poison"
    assert found["dropped, then allocated again"] != "-7.0"


def test_poison_harms_nothing_that_streams_order(seen: dict[str, Any]) -> None:
    for size in kernel_scenarios.SIZES:
        assert seen["reads_in_stream_order"][str(size)] == ["7.0", "8.0"]


def test_a_process_with_tensors_left_ends_well(seen: dict[str, Any]) -> None:
    assert seen["tensors_left_at_the_end"] == 4  # and `run` has seen its exit code


def test_poison_has_its_place_among_the_tasks_of_the_stream(seen: dict[str, Any]) -> None:
    ours = [name for name in seen["poison_is_a_task"] if name in ("aten::neg_", "poison", "aten::abs_")]
    assert ours == ["aten::neg_", "poison", "aten::abs_", "poison"]
