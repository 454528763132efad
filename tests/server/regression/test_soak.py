"""2,000 requests of random lengths, streamed or not, some of them aborted or left: every answer that is given
is the one that the same request gets alone.

Field cases: sglang #25887 and #34572 needed hours of such load to show, vllm #54962 corrupted one answer in
many and froze it into the prefix cache.
"""

from __future__ import annotations

import random

import pytest

from rig import battery
from rig.agreement import assert_stages_agree
from rig.loads import ABORTED, Pool, Ways, load
from rig.server import Server
from tests.field_cases import field_case

pytestmark = pytest.mark.release

REQUESTS = 2000
WAYS = Ways()
PICTURE_EVERY = 40


def soak(server: Server, pool: Pool, count: int, seed: int = 0) -> tuple[int, list[str]]:
    """How many requests were ended early, and what is wrong with the answers of all others."""
    pictures = [battery.ask_about(server, picture) for picture in battery.DIGITS]

    def ask_one(number: int) -> tuple[bool, list[str]]:
        generator = random.Random(f"{seed}/{number}")
        if number % PICTURE_EVERY == 0:
            index = generator.randrange(len(pictures))
            answer = battery.ask_about(server, battery.DIGITS[index])
            return False, battery.differences({"picture": pictures[index]}, {"picture": answer})
        index = generator.randrange(len(pool.bodies))
        answer = WAYS.ask(server, pool.bodies[index], f"soak-{seed}-{number}", generator)
        return (True, []) if answer == ABORTED else (False, pool.wrong([(index, answer)]))

    return load(ask_one, count)


@field_case("sglang-25887", "vllm-54962")
@pytest.mark.timeout(900)
def test_every_answer_under_load_is_the_one_that_the_request_gets_alone(patched: Server, pool: Pool) -> None:
    ended, wrong = soak(patched, pool, REQUESTS)
    assert not wrong
    assert REQUESTS * WAYS.leave / 2 < ended < REQUESTS * 2 * (WAYS.abort + WAYS.leave)
    assert_stages_agree(patched)
