"""The clients of `scripts.soak` on a real server: they notice a wrong answer, and only that."""

from __future__ import annotations

import pytest

from rig import battery
from rig.agreement import assert_stages_agree
from rig.loads import Pool, make_pool
from rig.server import Server
from scripts.soak.load import Clients, Known, Tally

pytestmark = pytest.mark.release

SECONDS = 4.0


@pytest.mark.parametrize("planted", [False, True], ids=["all are right", "one is wrong"])
def test_a_wrong_answer_is_noticed(patched: Server, planted: bool) -> None:
    pool = Pool.asked_alone(patched, make_pool(2))
    if planted:
        pool.alone[1] = [*pool.alone[1][:-1], pool.alone[1][-1] + 1]
    pictures = [battery.ask_about(patched, picture) for picture in battery.DIGITS]
    tally = Tally()
    clients = Clients(patched, Known(pool, pictures), tally, seed=0)
    for _ in range(2):
        clients.run(SECONDS)
    assert tally.asked.total() > 10
    assert bool(tally.wrong) is planted
    assert all(line.startswith("request 1: ") for line in tally.wrong)
    assert_stages_agree(patched)
