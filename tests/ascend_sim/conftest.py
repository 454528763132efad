"""Fixtures that tests of several modules of this folder share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from rig.harness import Team, TeamKeeper
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
