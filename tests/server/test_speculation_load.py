"""Servers that speculate, at two and four stages with chains and trees, patched against unpatched: the same
answers, and as many drafts accepted.

And 500 random requests on two of them, with a KV pool that is too small for these: each answer is the one
that the same request gets alone, and all stages agree in the end. Random lengths, log-probabilities, stop
tokens and strings, grammars; streamed or not, some aborted or left.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import pytest

from rig import battery
from rig.agreement import assert_stages_agree
from rig.launcher import Launcher
from rig.mixtures import DIGITS, KINDS, PLAIN, WAYS, Mixture
from rig.server import Server
from rig.speculation import Models, ask_all, essence

pytestmark = pytest.mark.release

SEED = 18
REQUESTS = 500
PLACES = 3072  # tokens of the KV pool: some 12 of the requests, of which up to 32 come at a time
# Without white space a random model comes to the end of a JSON object.
ARGUMENTS = ("--max-total-tokens", str(PLACES), "--constrained-json-disable-any-whitespace")


@dataclass(frozen=True)
class Case:
    stages: int
    branches: int  # of the tree; one: a chain
    bodies: int = 0  # of which the 500 requests are, each asked alone, too; 0: there are none

    def __str__(self) -> str:
        return f"pp {self.stages}, topk {self.branches}"


@dataclass(frozen=True)
class Served:
    case: Case
    models: Models
    patched: Server
    upstream: Mapping[str, Any]  # what an unpatched server said to other requests


TREES, CHAINS = Case(2, 4, bodies=80), Case(4, 1, bodies=40)
COMPARED = (TREES, CHAINS, Case(2, 1), Case(4, 4))
with_trees = pytest.mark.parametrize("served", [TREES], ids=str, indirect=True)
with_both = pytest.mark.parametrize("served", [TREES, CHAINS], ids=str, indirect=True)
with_all = pytest.mark.parametrize("served", COMPARED, ids=str, indirect=True)


@pytest.fixture(scope="module")
def served(
    request: pytest.FixtureRequest,
    make_launcher: Callable[[str], Launcher],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Served]:
    case: Case = request.param
    launcher = make_launcher(f"speculation-load-{case.stages}-{case.branches}")
    models = Models.written(tmp_path_factory.mktemp("models"))
    options: dict[str, Any] = {"branches": case.branches, "args": ARGUMENTS}
    with models.configure(launcher, case.stages, patched=False, **options) as server:
        upstream = essence(ask_all(server, 1))
    with models.configure(launcher, case.stages, patched=True, **options) as server:
        yield Served(case, models, server, upstream)


@pytest.fixture(scope="module")
def mixture(served: Served) -> Mixture:
    return Mixture.asked_alone(served.patched, served.case.bodies, SEED)


# --- tests ---------------------------------------------------------------------------------------------


@with_trees
def test_alone_they_are_what_they_are_without_speculation(served: Served, mixture: Mixture) -> None:
    """Those of the same weights in transformers; and stops and grammars did what they are for."""
    bodies, alone = mixture.bodies, mixture.alone
    plain = [index for index in range(served.case.bodies) if index % KINDS in PLAIN][:12]
    expected = served.models.without_speculation([bodies[index] for index in plain])
    assert [alone[index]["output_ids"] for index in plain] == expected
    reasons = [answer["meta_info"]["finish_reason"] for answer in alone]
    assert {type(reason["matched"]) for reason in reasons if reason["type"] == "stop"} >= {int, str}
    for body, answer, reason in zip(bodies, alone, reasons, strict=True):
        if "json_schema" in body["sampling_params"]:
            assert json.loads(answer["text"])["digit"] in DIGITS
        elif regex := body["sampling_params"].get("regex"):
            assert re.fullmatch(regex, answer["text"]) or reason["type"] == "length"


@with_all
def test_answers_and_accepted_drafts_are_upstreams(served: Served) -> None:
    assert not battery.differences(served.upstream, essence(ask_all(served.patched, 1)))


@with_both
@pytest.mark.timeout(1200)
def test_every_answer_under_load_is_the_one_that_the_request_gets_alone(
    served: Served, mixture: Mixture
) -> None:
    before = served.patched.log_text().count("Retract requests")
    ended, wrong = mixture.ask_many(served.patched, REQUESTS, SEED)
    print(f"seed {SEED}: {REQUESTS} requests, {ended} ended early")
    assert not wrong, f"seed {SEED}"
    assert REQUESTS * WAYS.leave / 2 < ended < REQUESTS * 2 * (WAYS.abort + WAYS.leave)
    retractions = served.patched.log_text().count("Retract requests") - before
    assert retractions >= 2 * served.patched.pp
    assert retractions % served.patched.pp == 0, "a stage retracted by itself"
    assert_stages_agree(served.patched)


@with_both
def test_afterwards_no_memory_is_lost(served: Served) -> None:
    assert_stages_agree(served.patched)
    assert served.patched.post("/flush_cache").ok
    state = assert_stages_agree(served.patched)
    assert state["free"] >= state["capacity"] - 2, state  # the request of one token is cached
