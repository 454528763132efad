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
from .loads import Body, ask, ask_together, greedy, pieces

pytestmark = pytest.mark.server

# Two microbatch slots of four requests each, all of which may become much longer than they do.
ROOM = ("--max-running-requests", "8", "--pp-max-micro-batch-size", "4", "--max-total-tokens", "6144")
MAY_GIVE, ARE_READ = 1500, 120  # tokens of a request
URGENT = (3300, 3450, 3600, 3350, 3500)  # tokens of prompts for which two and more have to give way
# All ranks of all stages meet in every iteration; a stage that stayed away would hold the others up for ever.
BARRIER = {"SGLANG_ENABLE_COLOCATED_BATCH_GEN": "1"}
LOW, HIGH = 0, 1000


@pytest.fixture(scope="module")
def server(make_launcher: Callable[[str], Launcher]) -> Iterator[Server]:
    launcher = make_launcher("preemption")
    arguments = (*ROOM, "--enable-priority-scheduling")
    env = {"PP_PROBE_STATES": "1", **BARRIER}
    yield launcher.start(1, 2, patched=True, args=arguments, env=env)
    launcher.stop_all()


def read(stream: Iterator[dict[str, Any]]) -> dict[str, Any]:
    """The answer when it has as many tokens as are read of it."""
    return next(answer for answer in stream if len(answer["output_ids"]) >= ARE_READ)


def meet_an_urgent_one(server: Server, bodies: list[Body], urgent: Body) -> list[dict[str, Any]]:
    """The answers of requests that ran, all of them, when the urgent one came. They are left in the end."""
    with ExitStack() as stack:
        streams = []
        for body in bodies:
            request = {**body, "priority": LOW, "stream": True}
            response = stack.enter_context(server.post("/generate", request, stream=True))
            streams.append(pieces(response))
            next(streams[-1])
        ask(server, {**urgent, "priority": HIGH})
        return [read(stream) for stream in streams]


def test_those_that_give_way_together_go_on_in_one_order(server: Server) -> None:
    prompts = [battery.prompt(20, seed=8000 + i) for i in range(8)]
    expected = ask_together(server, [greedy(prompt, ARE_READ) for prompt in prompts])
    gave_way: Counter[int] = Counter()
    for length in URGENT:
        bodies = [greedy(prompt, MAY_GIVE) for prompt in prompts]
        answers = meet_an_urgent_one(server, bodies, greedy(battery.prompt(length, seed=length), 1))
        assert [answer["output_ids"][:ARE_READ] for answer in answers] == expected
        gave_way[sum(answer["meta_info"]["num_retractions"] for answer in answers)] += 1
    assert_stages_agree(server)
    assert any(count >= 2 for count in gave_way), gave_way
