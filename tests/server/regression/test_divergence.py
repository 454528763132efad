"""Stages that decide differently all the same: the server ends with a sentence, it does not compute on.

Planted by the probe plugin on the stages after the first. This is what the releases did in which the field
cases of test_aborts.py and test_grammars.py happened.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import requests

from rig import battery
from rig.launcher import Launcher
from rig.loads import ask, greedy
from rig.server import Server, ServerError
from tests.field_cases import field_case

from .test_grammars import GRAMMARS, constrained

pytestmark = pytest.mark.thorough

LIMIT_S = 90.0
# Which of the two comes first depends on what stage 0 has sent by then.
SENTENCE = re.compile(
    r"SequenceError: stage 1 rank 0: .*microbatch slot \d, iteration \d+.*: the stages "
    r"(decided differently which requests to run|run different batches)"
)


def meet_aborts(server: Server) -> None:
    """Two requests run; one of them is aborted."""
    body = greedy(battery.prompt(20), 3000)
    with ThreadPoolExecutor(2) as threads:
        ends = [threads.submit(ask, server, body, name) for name in ("stays", "goes")]
        while not ends[0].done():
            server.post("/abort_request", {"rid": "goes"}, timeout_s=10)
        ends[0].result()


def meet_a_flush(server: Server) -> None:
    """The second time, the prompt is in the prefix cache of the stage that was not flushed."""
    body = {"input_ids": battery.prompt(300), "sampling_params": {"temperature": 0, "max_new_tokens": 2}}
    ask(server, body)
    assert server.post("/flush_cache").ok
    ask(server, body)


def meet_grammars(server: Server) -> None:
    with ThreadPoolExecutor(len(GRAMMARS)) as threads:
        list(threads.map(lambda grammar: battery.generate(server, **constrained(grammar)), GRAMMARS))


@field_case("sglang-25887", "sglang-28424")
@pytest.mark.parametrize(
    ("planted", "meet"),
    [
        ("ABORTS", meet_aborts),
        pytest.param("FLUSHES", meet_a_flush, marks=pytest.mark.release),
        pytest.param("GRAMMARS", meet_grammars, marks=pytest.mark.release),
    ],
)
def test_stages_that_differ_end_with_a_sentence(
    make_launcher: Callable[[str], Launcher], planted: str, meet: Callable[[Server], None]
) -> None:
    launcher = make_launcher("divergence")
    env = {"PP_PROBE_DIVERGE": planted, "PP_PROBE_SLOW_GRAMMARS": "0.1,0.6"}
    server = launcher.start(1, 2, patched=True, env=env)
    try:
        with pytest.raises((requests.RequestException, ServerError)):
            meet(server)
        server.wait_end(LIMIT_S)
        assert SENTENCE.search(server.log_text()), server.log_tail()
    finally:
        launcher.stop_all()
