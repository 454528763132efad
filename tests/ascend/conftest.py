"""Rank processes on the simulated Ascend that the tests of this folder share."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest

from ascend_sim import sglang_on_sim
from rig.harness import Rank, Team, TeamKeeper
from rig.npu_ranks import start_team


def start_npu_team(size: int, task_queue: str = "1") -> Team:
    """So many ranks, each with an NPU, in one HCCL process group; memory that is freed is overwritten."""
    variables = {"TASK_QUEUE_ENABLE": task_queue}
    return start_team(size, process_group=True, kernels=True, variables=variables, poison=1)


@pytest.fixture(
    scope="package",
    params=["1", pytest.param("2", marks=pytest.mark.release)],
    ids=["task-queue-1", "task-queue-2"],
)
def _npu_keeper(request: pytest.FixtureRequest) -> Iterator[TeamKeeper]:
    """Not for the whole session: torch_npu's threads use a tenth of a core in every idle process."""
    keeper = TeamKeeper(lambda: start_npu_team(3, request.param))
    yield keeper
    keeper.close()


@pytest.fixture
def npu_team(_npu_keeper: TeamKeeper) -> Iterator[Team]:
    """Three rank processes, each with a simulated NPU, with no lane open."""
    yield _npu_keeper.team()
    _npu_keeper.after_test()


@pytest.fixture(scope="module")
def _keeper_of_module() -> Iterator[TeamKeeper]:
    keeper = TeamKeeper(lambda: start_npu_team(3))
    yield keeper
    keeper.close()


@pytest.fixture
def young_npu_team(_keeper_of_module: TeamKeeper) -> Iterator[Team]:
    """As `npu_team`, but with no groups of other modules' tests: each has taken streams of torch's pool."""
    yield _keeper_of_module.team()
    _keeper_of_module.after_test()


def start_sglang_team(*paths: str, **options: Any) -> Team:
    """One rank that can import SGLang's NPU modules, and `paths`; `options` are those of `start_team`."""
    path = os.pathsep.join([str(sglang_on_sim.STARTUP), *paths, os.environ.get("PYTHONPATH", "")])
    return start_team(1, variables={"PYTHONPATH": path}, poison=1, **options)


@pytest.fixture(scope="module")
def _sglang_keeper() -> Iterator[TeamKeeper]:
    keeper = TeamKeeper(start_sglang_team)
    yield keeper
    keeper.close()


@pytest.fixture
def rank(_sglang_keeper: TeamKeeper) -> Iterator[Rank]:
    """A process of `start_sglang_team`, the same for a module."""
    (rank,) = _sglang_keeper.team().ranks
    yield rank
    _sglang_keeper.after_test()
