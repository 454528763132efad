"""Releases before the one in .venv, on which a change is tried first: they serve, and prepare ahead.

One of each kind that is not served elsewhere in the suite (`make matrix` compares all with themselves).
"""

from __future__ import annotations

from collections.abc import Callable

import pytest

from rig import battery
from rig.launcher import Launcher
from rig.loads import ask_together, greedy
from rig.releases import MIDDLE, OLDEST, RELEASES
from sglang_npu_pp.observe.telemetry import read_snapshots

pytestmark = pytest.mark.thorough

REQUESTS = [greedy(battery.prompt(length, seed=length), 24) for length in (1, 5, 60, 130, 255, 256, 257, 700)]


@pytest.fixture(scope="module")
def expected(make_launcher: Callable[[str], Launcher]) -> list[object]:
    with make_launcher("unpatched").configure(1, 1, patched=False) as server:
        return list(ask_together(server, REQUESTS))


@pytest.mark.parametrize("release", [OLDEST, MIDDLE])
def test_it_answers_as_a_server_without_stages(
    make_launcher: Callable[[str], Launcher], release: str, expected: list[object]
) -> None:
    launcher = make_launcher(release)
    server = launcher.start(1, 2, patched=True, release=RELEASES[release])
    try:
        assert ask_together(server, REQUESTS) == expected
        server.dump_telemetry()
        first, last = sorted(read_snapshots(server.log.parent), key=lambda each: each.stage)
        assert first.prepared > 0 == last.prepared
    finally:
        launcher.stop_all()
