"""Servers of the regression cases, and a pool of requests whose answers are known."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from rig.launcher import Launcher
from rig.loads import Pool, make_pool
from rig.releases import EARLY, LLGUIDANCE, RELEASES
from rig.server import Server
from tests.server.clocks import HOUR_S

# Depth 2 and mixed chunks are the settings in which most of the cases were reported.
SMALL_POOL = ("--pp-async-batch-depth", "2", "--enable-mixed-chunk", "--max-total-tokens", "6144")
SLOW_GRAMMARS = {"PP_PROBE_SLOW_GRAMMARS": "0.2,0.5"}  # the second stage is ready later than the first
LIMIT_HOURS = 1000  # far beyond what the tests of sessions let pass
TIME_LIMITS = dict.fromkeys(
    ("SGLANG_REQ_WAITING_TIMEOUT", "SGLANG_REQ_RUNNING_TIMEOUT"), str(LIMIT_HOURS * HOUR_S)
)
CLOCKS_APART = TIME_LIMITS | {"PP_PROBE_STATES": "1", "PP_PROBE_CLOCKS": "1"}
PROBES = {"PP_PROBE_PHASES": "1", "PP_PROBE_STATES": "1"}


@pytest.fixture(scope="session")
def pool(patched: Server) -> Pool:
    """Asked alone on the patched tp 1 pp 2 server, which answers as upstream does (test_differential)."""
    return Pool.asked_alone(patched, make_pool())


@pytest.fixture(scope="package")
def crowded(make_launcher: Callable[[str], Launcher], pool: Pool) -> Iterator[Server]:
    """pp 2, depth 2, prefill chunks mixed with decoding, and a KV pool that is too small for its load."""
    launcher = make_launcher("crowded")
    yield launcher.start(1, 2, patched=True, args=SMALL_POOL, env=PROBES | SLOW_GRAMMARS)
    launcher.stop_all()


@pytest.fixture(scope="package")
def four_stages(make_launcher: Callable[[str], Launcher], pool: Pool) -> Iterator[Server]:
    launcher = make_launcher("four-stages")
    yield launcher.start(1, 4, patched=True, env=PROBES | SLOW_GRAMMARS)
    launcher.stop_all()


@pytest.fixture(scope="package")
def oldest(make_launcher: Callable[[str], Launcher]) -> Iterator[Server]:
    """An early release, in which stages decided more alone than in later ones."""
    launcher = make_launcher("oldest")
    env = CLOCKS_APART | SLOW_GRAMMARS
    yield launcher.start(1, 2, patched=True, release=RELEASES[EARLY], args=LLGUIDANCE, env=env)
    launcher.stop_all()
