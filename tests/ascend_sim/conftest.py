"""Fixtures that tests of several modules of this folder share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from rig.harness import Rank, Team, TeamKeeper
from rig.npu_ranks import start_team


@pytest.fixture(scope="package")
def _hccl_keeper() -> Iterator[TeamKeeper]:
    keeper = TeamKeeper(lambda: start_team(3, process_group=True, kernels=True))
    yield keeper
    keeper.close()


@pytest.fixture
def hccl_team(_hccl_keeper: TeamKeeper) -> Iterator[Team]:
    """Three rank processes, each with a simulated NPU, in one process group over the simulated HCCL."""
    yield _hccl_keeper.team()
    _hccl_keeper.after_test()


@pytest.fixture(scope="module")
def _rank_keeper() -> Iterator[TeamKeeper]:
    keeper = TeamKeeper(lambda: start_team(1, memory_mb=256, kernels=True, poison=1))
    yield keeper
    keeper.close()


@pytest.fixture
def rank_process(_rank_keeper: TeamKeeper) -> Iterator[Rank]:
    """A process with one device, whose freed memory is poisoned; the same for a module."""
    yield _rank_keeper.team().ranks[0]
    _rank_keeper.after_test()


@pytest.fixture
def rank(rank_process: Rank) -> Callable[..., Any]:
    """Calls a function in that process."""
    return rank_process.call
