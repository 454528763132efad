"""Requests of higher priority take the place of several that run, which go on later, on all stages alike."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest

from scripts.lib.server import Server
from tests.server import battery
from tests.server.conftest import Launcher

from .agreement import assert_stages_agree
from .loads import Body, ask, ask_together, greedy, outcome, pieces

pytestmark = pytest.mark.server

# Two microbatch slots of four requests each.
ROOM = ("--max-running-requests", "8", "--pp-max-micro-batch-size", "4", "--max-total-tokens", "4096")
# All ranks of all stages meet in every iteration; a stage that stayed away would hold the others up for ever.
BARRIER = {"SGLANG_ENABLE_COLOCATED_BATCH_GEN": "1"}
LOW, HIGH = 0, 1000
URGENT = range(3400, 3850, 75)  # tokens of the urgent prompts; two and more give way


@pytest.fixture(scope="module")
def server(make_launcher: Callable[[str], Launcher]) -> Iterator[Server]:
    launcher = make_launcher("preemption")
    arguments = (*ROOM, "--enable-priority-scheduling")
    env = {"PP_PROBE_STATES": "1", **BARRIER}
    yield launcher.start(1, 2, patched=True, args=arguments, env=env)
    launcher.stop_all()


def meet_an_urgent_one(server: Server, bodies: list[Body], urgent: Body) -> list[dict[str, Any]]:
    """The answers of requests that ran, all of them, when the urgent one came."""
    with ExitStack() as stack:
        streams = []
        for body in bodies:
            request = {**body, "priority": LOW, "stream": True}
            response = stack.enter_context(server.post("/generate", request, stream=True))
            streams.append(pieces(response))
            next(streams[-1])
        ask(server, {**urgent, "priority": HIGH})
        return [list(stream)[-1] for stream in streams]


def test_those_that_give_way_together_go_on_in_one_order(server: Server) -> None:
    """The longer the urgent prompt, the more of the four in its slot have to give way."""
    bodies = [greedy(battery.prompt(20, seed=8000 + i), 300) for i in range(8)]
    expected = ask_together(server, bodies)
    gave_way: Counter[int] = Counter()
    for length in URGENT:
        answers = meet_an_urgent_one(server, bodies, greedy(battery.prompt(length, seed=length), 1))
        assert [outcome(answer) for answer in answers] == expected
        gave_way[sum(answer["meta_info"]["num_retractions"] for answer in answers)] += 1
    assert_stages_agree(server)
    assert any(count >= 2 for count in gave_way), gave_way
