"""Servers that tests share. A start costs 20 to 30 s, so each server is started once a session."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from rig.launcher import Launcher
from rig.server import Server


@pytest.fixture(scope="session")
def make_launcher(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Launcher]:
    return lambda name: Launcher(tmp_path_factory.mktemp(name))


@pytest.fixture(scope="session")
def patched(make_launcher: Callable[[str], Launcher]) -> Iterator[Server]:
    """The patched tp 1 pp 2 server that most tests use."""
    launcher = make_launcher("patched")
    env = {"PP_PROBE_STATES": "1", "PP_PROBE_SLEEPS": "1"}
    yield launcher.start(1, 2, patched=True, args=("--enable-metrics",), env=env)
    launcher.stop_all()
