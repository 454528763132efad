"""A KV pool that is too small: requests are retracted, wait, and start again; mixed prefill and decode.

Field cases: sglang #15527, #15545 (wrong output with more microbatches in flight than stages), vllm #54962
(what was computed from a rewritten buffer stayed in the prefix cache).
"""

from __future__ import annotations

import pytest

from rig import battery
from rig.agreement import assert_stages_agree
from rig.loads import Pool, ask, ask_together, greedy
from rig.server import Server
from tests.field_cases import field_case

pytestmark = pytest.mark.thorough

# 36 x (20 + 250) tokens, for 6144 places.
GROWING = [greedy(battery.prompt(20, seed=8000 + index), 250) for index in range(36)]


@pytest.fixture(scope="module")
def unhurried(patched: Server) -> Pool:
    """The same requests on a server that has room for all of them."""
    return Pool(GROWING, ask_together(patched, GROWING))  # type: ignore[arg-type]


@field_case("sglang-15545")
def test_retracted_requests_get_the_answers_that_they_get_alone(crowded: Server, unhurried: Pool) -> None:
    before = crowded.log_text().count("Retract requests")
    answers = ask_together(crowded, GROWING)
    assert not unhurried.wrong(enumerate(answers))
    retractions = crowded.log_text().count("Retract requests") - before
    assert retractions >= 2
    assert retractions % crowded.pp == 0, "a stage retracted by itself"
    assert_stages_agree(crowded)


def test_prompts_are_prefilled_while_others_decode(crowded: Server, pool: Pool) -> None:
    """In one batch (`--enable-mixed-chunk`): a chunk of a prompt, and a token of every running request."""
    before = assert_stages_agree(crowded)["forwards"].get("mixed", 0)
    assert not pool.ask_many(crowded, 150, seed=5)
    assert assert_stages_agree(crowded)["forwards"].get("mixed", 0) > before + 10


@field_case("vllm-54962")
def test_a_cached_prefix_is_as_good_as_a_computed_one(crowded: Server, pool: Pool) -> None:
    """What was cached under load is read back: every request of the pool once more, alone."""
    again = [ask(crowded, body) for body in pool.bodies]
    assert not pool.wrong(enumerate(again))
