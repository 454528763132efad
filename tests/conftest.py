"""Fixtures that tests of several modules share."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported, here and in every child

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings

from tests.transport.harness import Team, TeamKeeper, short_directory

torch.set_num_threads(1)

# Examples talk to other processes, so how long one takes says nothing; what is tested is order and values.
settings.register_profile(
    "project",
    deadline=None,
    max_examples=60,
    print_blob=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
settings.load_profile("project")


@pytest.fixture(scope="session")
def _keeper() -> Iterator[TeamKeeper]:
    keeper = TeamKeeper(lambda: Team(3, process_group=True))
    yield keeper
    keeper.close()


@pytest.fixture
def team(_keeper: TeamKeeper) -> Iterator[Team]:
    """Three rank processes in one gloo process group, with no lane open."""
    yield _keeper.team()
    _keeper.after_test()


@pytest.fixture
def ipc_dir() -> Iterator[Path]:
    """An empty directory for ipc sockets."""
    with short_directory() as path:
        yield path
