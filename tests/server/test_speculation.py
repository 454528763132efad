"""Speculative decoding on one server of two stages (SGLANG_ENABLE_PP_SPEC), unpatched against patched.

On CPU, with plain torch in the place of SGLang's kernels for it (`scripts/cpu_compat`), a tiny target and a
draft that is right about half of the time. Trees of eight nodes, four branches wide.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import pytest

from rig import battery
from rig.agreement import assert_stages_agree
from rig.launcher import Launcher, traces
from rig.mixtures import KINDS, Mixture
from rig.server import Server
from rig.speculation import CONCURRENCY, TOKENS, Models, ask_all, essence, requests
from sglang_npu_pp.tools.certify import order

pytestmark = pytest.mark.thorough

STAGES = 2
SEED, MANY = 19, 60
LONG = {"ignore_eos": True, "max_new_tokens": 2000}


@dataclass(frozen=True)
class Served:
    models: Models
    upstream: Mapping[str, dict[str, Any]]  # answers of an unpatched server, which has ended
    patched: Server


@pytest.fixture(scope="module")
def served(
    make_launcher: Callable[[str], Launcher], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Served]:
    models = Models.written(tmp_path_factory.mktemp("models"))
    launcher = make_launcher("speculation")

    def start(patched: bool) -> Server:
        return launcher.servers.enter_context(models.configure(launcher, STAGES, patched=patched))

    try:
        answers = ask_all(start(patched=False), CONCURRENCY)
        launcher.stop_all()
        yield Served(models, answers, start(patched=True))
    finally:
        launcher.stop_all()


@pytest.mark.parametrize("concurrency", [1, CONCURRENCY])
def test_answers_and_accepted_drafts_are_upstreams(served: Served, concurrency: int) -> None:
    found = essence(ask_all(served.patched, concurrency))
    assert not battery.differences(essence(served.upstream), found)
    accepted = [answer["spec_accept_length"] for answer in found.values()]
    assert min(accepted) > 1.2, "the draft is never right: nothing is compared here"
    assert max(accepted) < 4.0, "the draft is always right: nothing is rejected here"


def test_greedy_answers_are_those_without_speculation(served: Served) -> None:
    """Those of the same weights in transformers, one token after another."""
    chosen = {
        name: body for name, body in requests().items() if name.startswith(("1 ", "17 ", "257 ", "777 "))
    }
    found = [battery.generate(served.patched, **body)["output_ids"] for body in chosen.values()]
    expected = served.models.without_speculation(list(chosen.values()))
    assert dict(zip(chosen, found, strict=True)) == dict(zip(chosen, expected, strict=True))


def test_a_stop_in_the_middle_of_what_was_accepted(served: Served) -> None:
    """At each token of an answer, so that some are inside of an accepted path."""
    body = requests()["60 tokens, 1"]
    ids = battery.generate(served.patched, **body)["output_ids"]

    def stopped(token: int) -> list[int]:
        sampling = {"max_new_tokens": TOKENS, "stop_token_ids": [token]}
        return battery.generate(served.patched, **{**body, "sampling_params": sampling})["output_ids"]

    with ThreadPoolExecutor(CONCURRENCY) as pool:
        found = list(pool.map(stopped, ids))
    assert found == [ids[: ids.index(token) + 1] for token in ids]


def test_requests_that_end_in_the_middle_change_no_others(served: Served) -> None:
    """Aborted while others of their batch go on: the rows of the tree move up."""
    doomed = [f"doomed{number}" for number in range(6)]
    with ThreadPoolExecutor(CONCURRENCY + len(doomed)) as pool:
        running = [
            pool.submit(
                battery.generate,
                served.patched,
                input_ids=battery.prompt(20 + number),
                sampling_params=LONG,
                rid=name,
            )
            for number, name in enumerate(doomed)
        ]
        answers = pool.submit(ask_all, served.patched, CONCURRENCY)
        for name, each in zip(doomed, running, strict=True):
            while not each.done():  # until it has begun, there is nothing to abort
                assert served.patched.post("/abort_request", {"rid": name}).ok
        reasons = {each.result(timeout=60)["meta_info"]["finish_reason"]["type"] for each in running}
        found = answers.result(timeout=120)
    assert reasons == {"abort"}
    assert not battery.differences(essence(served.upstream), essence(found))
    assert_stages_agree(served.patched)


def test_random_requests_get_the_answers_that_they_get_alone(served: Served) -> None:
    """A few of those of test_speculation_load.py, three of each kind."""
    mixture = Mixture.asked_alone(served.patched, 3 * KINDS, SEED)
    ended, wrong = mixture.ask_many(served.patched, MANY, SEED)
    assert not wrong, f"seed {SEED}"
    assert 0 < ended < MANY / 2
    assert_stages_agree(served.patched)


def test_outputs_leave_behind_the_launch_and_are_waited_for_behind_the_next(served: Served) -> None:
    recorded = traces(served.patched)
    assert min(len(order.launches(trace)) for trace in recorded.values()) > 100
    assert not order.outputs_come_from_the_last_stage(recorded)
    assert not order.outputs_leave_right_behind_the_launch(recorded[1])
    assert not order.proxies_leave_right_behind_the_launch(recorded[0])
    assert not order.proxies_are_waited_for_last(recorded[1])
    for trace in recorded.values():
        assert not order.tokens_are_waited_for_behind_the_launch(trace)
    assert order.launches(recorded[0]) == order.launches(recorded[1])


def test_it_is_in_force(served: Served) -> None:
    log = served.patched.log_text()
    assert log.count("speculative decoding, preparing ahead, end of a server") == STAGES
    assert "stays on upstream's path" not in log
