"""Fixtures that tests of several modules share."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported, here and in every child

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings

from tests.ascend_sim import build
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

ASCEND = {Path(__file__).parent / name for name in ("ascend", "ascend_sim", "server/test_ascend.py")}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Let `-k` find field cases by their names, and see to what needs the simulated Ascend."""
    for item in items:
        for mark in item.iter_markers("field_case"):
            item.extra_keyword_matches.update(mark.args)
    _require_ascend_sim(items)


def _require_ascend_sim(items: list[pytest.Item]) -> None:
    """Skip what needs the simulated Ascend where it cannot be built; with REQUIRE_ASCEND_SIM end instead."""
    concerned = [item for item in items if ASCEND.intersection([item.path, *item.path.parents])]
    reason = build.unavailable() if concerned else None
    if reason is None:
        return
    if os.environ.get("REQUIRE_ASCEND_SIM"):
        pytest.exit(f"REQUIRE_ASCEND_SIM is set, but {reason}", returncode=1)
    for item in concerned:
        item.add_marker(pytest.mark.skip(reason=reason))


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
