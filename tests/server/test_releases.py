"""The other supported release: SGLang 0.5.23, patched and unpatched."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from . import battery, order
from .conftest import RELEASE_0_5_23, Launcher, traces

pytestmark = pytest.mark.server


def test_0_5_23_answers_equal_its_own(make_launcher: Callable[[str], Launcher]) -> None:
    launcher = make_launcher("release")
    server = launcher.start(1, 2, patched=False, release=RELEASE_0_5_23)
    (expected,) = battery.run(server)
    launcher.stop_all()
    server = launcher.start(1, 2, patched=True, release=RELEASE_0_5_23)
    try:
        (one_by_one,) = battery.run(server)
        (concurrent,) = battery.run(server, concurrency=16)
        assert "patches in force for SGLang 0.5.23; stage 0" in server.log_text()
        assert not battery.differences(expected, one_by_one)
        assert not battery.differences(expected, concurrent)
        recorded = traces(server)
        assert not order.proxies_leave_right_behind_the_launch(recorded[0])
        assert not order.proxies_are_waited_for_last(recorded[1])
        assert not order.tokens_are_waited_for_behind_the_launch(recorded[0])
    finally:
        launcher.stop_all()
