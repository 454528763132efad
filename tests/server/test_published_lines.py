"""Two of the published command lines, served on the simulated Ascend at two stages of two ranks, which share
the tokens of a prompt (context parallelism); the other lines, and four stages: `make topologies`.

A decode server answers, so the caches of all layers were written and transferred as they should be; behind a
prefill server that drafts it verifies three drafts a round, the first those that have travelled.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from statistics import mean

import pytest

from rig.launcher import Launcher
from rig.published_lines import RELEASE, serve
from rig.sparse_reference import Answer, Reference, differences
from sglang_npu_pp.tools.published import PUBLISHED, Published

from .installed import if_installed

pytestmark = [pytest.mark.release, if_installed(RELEASE)]

STAGES = 2
LOW = 1.2  # tokens a round; without drafts it is 1
LINES = {line.drafts: line for line in reversed(PUBLISHED)}  # the first of each model


Served = tuple[Mapping[int, Answer], Reference]


@pytest.fixture(
    scope="module",
    params=[pytest.param(drafts, id=line.name) for drafts, line in LINES.items()],
)
def line(request: pytest.FixtureRequest) -> Published:
    return LINES[request.param]


@pytest.fixture(scope="module")
def served(make_launcher: Callable[[str], Launcher], line: Published) -> Served:
    return serve(make_launcher("published"), line, STAGES)


def test_answers_are_those_of_a_plain_forward(served: Served) -> None:
    answers, reference = served
    assert not differences(reference, answers)


def test_drafts_are_accepted(line: Published, served: Served) -> None:
    if not line.drafts:
        pytest.skip("this line does not draft")
    answers, _ = served
    accepted = [answer.acceptance["spec_accept_length"] for answer in answers.values()]
    assert mean(accepted) > LOW, "drafts are never right: nothing is shown here"


def test_answers_are_upstreams(
    make_launcher: Callable[[str], Launcher], line: Published, served: Served
) -> None:
    answers, _ = serve(make_launcher("upstreams-published"), line, STAGES, patched=False)
    assert answers == served[0]
