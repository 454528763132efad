"""What a real server says about its depth after its first busy batches."""

from __future__ import annotations

import math
import re
from concurrent.futures import ThreadPoolExecutor

import pytest

from rig import battery
from rig.server import Server

pytestmark = pytest.mark.thorough

CLIENTS = 32
ROUNDS = 4
LINE = re.compile(
    r"PP0.* sglang-npu-pp: 2 stages, hops of (?P<hop>\S+) (?:to \S+ )?ms one way, "
    r"forwards of (?P<prefill>\S+) (?:to \S+ )?ms \(prefill\) and "
    r"(?P<decode>\S+) (?:to \S+ )?ms \(decode\): .*--pp-async-batch-depth \d"
)


def load(server: Server, seed: int) -> None:
    """Enough requests at once that both microbatch slots have some, in prefill and in decoding."""

    def ask(number: int) -> None:
        prompt = battery.prompt(150 + 7 * number, seed=CLIENTS * seed + number)
        sampling = {"ignore_eos": True, "max_new_tokens": 40}
        battery.generate(server, input_ids=prompt, sampling_params=sampling)

    with ThreadPoolExecutor(CLIENTS) as pool:
        list(pool.map(ask, range(CLIENTS)))


def test_stage_0_says_once_what_depth_would_hide_the_link(patched: Server) -> None:
    for seed in range(ROUNDS):
        load(patched, seed)
        if said := LINE.findall(patched.log_text()):
            break
    else:
        pytest.fail(f"after {ROUNDS * CLIENTS} requests nothing is said about the depth")
    load(patched, ROUNDS)
    lines = [line for line in patched.log_text().splitlines() if "ms one way" in line]
    assert len(lines) == 1, lines
    values = [float(value) for value in said[0]]
    assert all(math.isfinite(value) and value > 0 for value in values), lines
