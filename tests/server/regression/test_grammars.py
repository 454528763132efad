"""Requests with grammars that take some time to compile, and are ready on one stage before another.

Field cases: sglang #28424, #30747. Readiness was decided by each stage, so one had moved a request to its
waiting queue that its neighbour had not, and they ran different batches.
"""

from __future__ import annotations

import re
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from rig import battery
from rig.agreement import assert_stages_agree
from rig.loads import Pool, ask
from rig.server import Server
from tests.field_cases import field_case

pytestmark = pytest.mark.thorough

GRAMMARS = [rf"x[0-{index}]{{2,{index + 3}}}y" for index in range(1, 9)]


def constrained(grammar: str) -> dict[str, Any]:
    return {
        "text": f"match {grammar}",
        "return_logprob": True,
        "sampling_params": {"temperature": 0, "max_new_tokens": 16, "regex": grammar},
    }


@field_case("sglang-28424")
@pytest.mark.parametrize("name", ["crowded", pytest.param("four_stages", marks=pytest.mark.release)])
def test_grammars_that_are_ready_at_different_times(
    request: pytest.FixtureRequest, patched: Server, pool: Pool, name: str
) -> None:
    """Stage 0 needs 0.2 s for each, the others 0.5 s; requests without a grammar go on meanwhile."""
    server: Server = request.getfixturevalue(name)
    expected = [battery.generate(patched, **constrained(grammar)) for grammar in GRAMMARS]
    with ThreadPoolExecutor(2 * len(GRAMMARS)) as threads:
        answers = [threads.submit(battery.generate, server, **constrained(grammar)) for grammar in GRAMMARS]
        others = [threads.submit(ask, server, body) for body in pool.bodies[:40]]
        found = [answer.result() for answer in answers]
        assert not pool.wrong(enumerate(other.result() for other in others))
    for grammar, alone, answer in zip(GRAMMARS, expected, found, strict=True):
        assert not battery.differences({grammar: battery.summary(alone)}, {grammar: battery.summary(answer)})
        whole = answer["meta_info"]["finish_reason"]["type"] == "stop"
        assert not whole or re.fullmatch(grammar, answer["text"])
    assert_stages_agree(server)


@field_case("sglang-28424")
def test_the_oldest_release_waits_for_the_first_stage(oldest: Server) -> None:
    """Its stages did not tell each other which grammars are ready: an unpatched server hung."""
    with ThreadPoolExecutor(len(GRAMMARS)) as threads:
        answers = list(
            threads.map(lambda grammar: battery.generate(oldest, **constrained(grammar)), GRAMMARS)
        )
    for grammar, answer in zip(GRAMMARS, answers, strict=True):
        assert answer["text"].startswith("x"), answer["text"]
        whole = answer["meta_info"]["finish_reason"]["type"] == "stop"
        assert not whole or re.fullmatch(grammar, answer["text"])
    assert_stages_agree(oldest)
