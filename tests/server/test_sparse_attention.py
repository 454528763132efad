"""A server of two stages with sparse attention (DSA), SGLang 0.5.21's path for NPUs, on the simulated Ascend.

Of the second stage's layers the first takes the tokens that were chosen in the stage before: their positions
travel with the hidden states. Prompts go one by one, so that sums are made in one order.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from rig import battery
from rig.devices import EAGER
from rig.launcher import RANDOM_MODEL, Launcher
from rig.published_twin import GLM_5_2, write_twin
from rig.server import LAYER_PARTITION_VARIABLE
from rig.sparse_reference import LENGTHS, REQUEST, Answer, Reference, differences

pytestmark = pytest.mark.thorough

STAGES, PARTITION = 2, "4,4"

Answers = Mapping[int, Answer]


@pytest.fixture(scope="module")
def twin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_twin(tmp_path_factory.mktemp("twin") / "model", RANDOM_MODEL, GLM_5_2)


@pytest.fixture(scope="module")
def answers(make_launcher: Callable[[str], Launcher], twin: Path) -> Answers:
    return ask(make_launcher("sparse"), twin, patched=True)


def ask(launcher: Launcher, twin: Path, *, patched: bool) -> Answers:
    variables = {
        LAYER_PARTITION_VARIABLE: PARTITION,
        "ASCEND_SIM_POISON": "1",
        "PP_PROBE_KEEP_FREE_PAGES": "0" if patched else "1",  # a patch does that
    }
    with launcher.configure(
        1, STAGES, patched=patched, device="npu-sim", model=twin, args=EAGER, env=variables
    ) as server:
        found = {}
        for length in LENGTHS:
            prompt = battery.prompt(length)
            answer = battery.generate(server, input_ids=prompt, **REQUEST)
            found[length] = Answer.of(prompt, answer, answer)
        return found


def test_answers_are_those_of_a_plain_forward(answers: Answers, twin: Path) -> None:
    assert not differences(Reference(twin), answers)


def test_a_token_does_not_attend_to_all_before_it(answers: Answers, twin: Path) -> None:
    """The indexers do choose here: with all tokens the model says otherwise."""
    assert differences(Reference(twin, index_topk=max(LENGTHS)), answers)


@pytest.mark.release
def test_answers_are_upstreams(
    make_launcher: Callable[[str], Launcher], twin: Path, answers: Answers
) -> None:
    assert ask(make_launcher("upstreams-sparse"), twin, patched=False) == answers
