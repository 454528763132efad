"""An early and the newest supported release, each patched against itself; `make matrix` runs them all."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from rig.comparison import Layout, compare, complaints
from rig.launcher import Launcher
from rig.releases import EARLY, NEWEST, RELEASES

pytestmark = pytest.mark.release


@pytest.mark.parametrize("release", [EARLY, NEWEST])
def test_nothing_is_wrong(make_launcher: Callable[[str], Launcher], release: str) -> None:
    pair = compare(make_launcher("release"), Layout("tp1-pp2", 1, 2), RELEASES[release])
    assert not complaints(pair)
