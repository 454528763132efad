"""Ten thousand microbatches over three stages of simulated Ascend: slow links, poisoned memory."""

from __future__ import annotations

import pytest
import torch

from ascend_sim.controls import Simulator
from rig.harness import Here, Rank, Team, results
from sglang_npu_pp.transport.message import Kind

from . import ranks

MICROBATCHES = 10_000
SLOTS = 3
LINK_US = 100  # about as long as the host takes for a message, so that the stages take turns in waiting
SIZES = (16, 1000, 4096, 1)  # elements, by microbatch
LIMIT_S = 240.0


def run_stage(here: Here, microbatches: int) -> int:
    """A stage's forwards, each on what the last stage made of it; how many got wrong proxies.

    Nothing is kept for longer than SGLang does, so all memory is freed, overwritten and used again.
    """
    link, device = here.link, here.device
    last = link.stages - 1
    with ranks.on_forward_stream(here):
        wrong = torch.zeros((), dtype=torch.int64, device=device)
        for number in range(microbatches):
            if link.stage == 0:
                hidden = torch.full((SIZES[number % len(SIZES)],), number, dtype=torch.int32, device=device)
                residual = hidden * 2
            else:
                proxies = link.post(Kind.PROXY, link.stage - 1, iteration=number).wait()
                hidden, residual = proxies["hidden_states"], proxies["residual"]
                expected = number + link.stage - 1
                wrong += (hidden != expected).any() | (residual != 2 * expected).any()
            if link.stage < last:
                output = {
                    "hidden_states": hidden + (link.stage > 0),
                    "residual": residual + 2 * (link.stage > 0),
                }
                link.push_tensors(Kind.PROXY, link.stage + 1, output, iteration=number)
            link.release(ranks.event(here))
        return int(wrong.item())


def slow_down(rank: Rank) -> None:
    with Simulator(rank.pid) as simulator:
        simulator.links(us_per_message=LINK_US)


@pytest.mark.thorough
@pytest.mark.timeout(2 * LIMIT_S)
def test_proxies_arrive_intact_over_many_microbatches(npu_team: Team) -> None:
    chosen = npu_team.open_links(3, slots=SLOTS)
    for rank in chosen:
        slow_down(rank)
    counts = results([rank.start(run_stage, MICROBATCHES) for rank in chosen], LIMIT_S)
    assert counts == [0, 0, 0]
