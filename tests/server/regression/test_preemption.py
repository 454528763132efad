"""Requests of higher priority take the place of several that run, which go on later, on all stages alike."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest

from scripts.lib.server import Server
from tests.server import battery
from tests.server.conftest import Launcher

from .agreement import assert_stages_agree
from .loads import ask, greedy, running

pytestmark = pytest.mark.server

# Two microbatch slots of four requests, and hardly more tokens than those need.
ROOM = ("--max-running-requests", "8", "--pp-max-micro-batch-size", "4", "--max-total-tokens", "1600")
LOW, HIGH = 0, 1000
ROUNDS = 4


@pytest.fixture(scope="module")
def server(make_launcher: Callable[[str], Launcher]) -> Iterator[Server]:
    launcher = make_launcher("preemption")
    arguments = (*ROOM, "--enable-priority-scheduling")
    yield launcher.start(1, 2, patched=True, args=arguments, env={"PP_PROBE_STATES": "1"})
    launcher.stop_all()


@pytest.mark.parametrize("turn", range(ROUNDS))
def test_those_that_give_way_together_go_on_in_one_order(server: Server, turn: int) -> None:
    """Eight run, and one comes that needs the room of several in its slot."""
    bodies = [greedy(battery.prompt(60, seed=8000 + 10 * turn + i), 100) for i in range(8)]
    alone = [ask(server, body) for body in bodies]
    with ExitStack() as stack:
        answers = [stack.enter_context(running(server, {**body, "priority": LOW})) for body in bodies]
        urgent = greedy(battery.prompt(700, seed=8500 + turn), 40)
        assert len(ask(server, {**urgent, "priority": HIGH})) == 40
        assert [finish() for finish in answers] == alone
    assert_stages_agree(server)
