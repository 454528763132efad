"""2,000 requests of random lengths, streamed or not, some of them aborted or left: every answer that is given
is the one that the same request gets alone.

Field cases: sglang #25887 and #34572 needed hours of such load to show, vllm #54962 corrupted one answer in
many and froze it into the prefix cache.
"""

from __future__ import annotations

import random
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from rig import battery
from rig.agreement import assert_stages_agree
from rig.loads import ABORTED, CONCURRENCY, Pool, ask, ask_in_pieces
from rig.server import Server
from tests.field_cases import field_case

pytestmark = pytest.mark.release

REQUESTS = 2000
ABORT_SHARE, LEAVE_SHARE, STREAM_SHARE = 0.1, 0.05, 0.3
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
        body, name, kind = pool.bodies[index], f"soak-{seed}-{number}", generator.random()
        answer = _ask_in_a_way(server, body, name, kind, generator)
        return (True, []) if answer == ABORTED else (False, pool.wrong([(index, answer)]))

    with ThreadPoolExecutor(CONCURRENCY) as threads:
        found = list(threads.map(ask_one, range(count)))
    return sum(ended for ended, _ in found), [line for _, lines in found for line in lines]


def _ask_in_a_way(server: Server, body: Any, name: str, kind: float, generator: random.Random) -> Any:
    if kind < ABORT_SHARE:
        with ThreadPoolExecutor(1) as thread:
            answer = thread.submit(ask, server, body, name)
            for _ in range(generator.randrange(4)):
                server.get("/v1/models")  # some time passes, by what the server does meanwhile
            assert server.post("/abort_request", {"rid": name}).ok
            return answer.result()
    if kind < ABORT_SHARE + LEAVE_SHARE:
        return ask_in_pieces(server, body, name, leave_after=generator.randrange(3))
    if kind < ABORT_SHARE + LEAVE_SHARE + STREAM_SHARE:
        return ask_in_pieces(server, body, name)
    return ask(server, body, name)


@field_case("sglang-25887", "vllm-54962")
@pytest.mark.timeout(900)
def test_every_answer_under_load_is_the_one_that_the_request_gets_alone(patched: Server, pool: Pool) -> None:
    ended, wrong = soak(patched, pool, REQUESTS)
    assert not wrong
    assert REQUESTS * LEAVE_SHARE / 2 < ended < REQUESTS * 2 * (ABORT_SHARE + LEAVE_SHARE)
    assert_stages_agree(patched)
