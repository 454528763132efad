"""Fixtures that tests of several modules share."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported, here and in every child

from collections.abc import Generator, Iterator
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from hypothesis import HealthCheck, settings

from ascend_sim import build
from rig.folders import short_directory
from rig.server import REFUSED_VARIABLE

if TYPE_CHECKING:
    from rig.harness import Team, TeamKeeper

with suppress(ModuleNotFoundError):  # of a Python without torch (tests/test_pythons.py)
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

HERE = Path(__file__).parent
# Where tests start a server, and where they use the simulated Ascend. A test elsewhere that starts a server
# has the marker by hand: without it `Server.start` refuses.
SERVERS = {HERE / "server"}
SIMULATOR = {
    HERE / name for name in ("ascend", "ascend_sim", "server/test_ascend.py", "server/test_old_releases.py")
}
REFUSED = "a test that starts a server needs the marker `server`, so that `make quick` leaves it out"

COLLECTED = pytest.StashKey[list[pytest.Item]]()  # before any test is deselected


@pytest.hookimpl(tryfirst=True)  # before tests are deselected by their markers
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Mark what a test needs by where it lies, and let `-k` find cases by their names."""
    for item in items:
        places = {item.path, *item.path.parents}
        if SERVERS & places:
            item.add_marker(pytest.mark.server)
        if SIMULATOR & places:
            item.add_marker(pytest.mark.simulator)
        for kind in ("field_case", "upstream_case"):
            for mark in item.iter_markers(kind):
                item.extra_keyword_matches.update(mark.args)
    config.stash[COLLECTED] = list(items)


def pytest_collection_finish(session: pytest.Session) -> None:
    """Skip what needs the simulated Ascend where it cannot be built; with REQUIRE_ASCEND_SIM end instead."""
    concerned = [item for item in session.items if item.get_closest_marker("simulator")]
    reason = build.unavailable() if concerned else None
    if reason is None:
        return
    if os.environ.get("REQUIRE_ASCEND_SIM"):
        pytest.exit(f"REQUIRE_ASCEND_SIM is set, but {reason}", returncode=1)
    for item in concerned:
        item.add_marker(pytest.mark.skip(reason=reason))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, bool, bool]:
    """Without the marker a test cannot start a server: not itself, not by a fixture, not in a child."""
    if item.get_closest_marker("server"):
        return (yield)
    os.environ[REFUSED_VARIABLE] = REFUSED
    try:
        return (yield)
    finally:
        del os.environ[REFUSED_VARIABLE]


@pytest.fixture
def collected(pytestconfig: pytest.Config) -> list[pytest.Item]:
    """Every test that was found, those included that were then deselected."""
    return pytestconfig.stash[COLLECTED]


@pytest.fixture(scope="session")
def _keeper() -> Iterator[TeamKeeper]:
    from rig.harness import Team, TeamKeeper  # with tensors, which a Python without torch has none of

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
