"""Every planted fault turns the gate red, on real servers; without one it is green before and after."""

from __future__ import annotations

from pathlib import Path

import pytest
from rich.console import Console

from rig.probes.sglang_pp_faults import FAULTS
from scripts.evaluation import selftest
from scripts.evaluation.checks import Check, by_check
from scripts.evaluation.direct import TWIN

# Of the trained model; the twin is asked everything.
TRAINED_PICTURES = 32


def test_the_self_test_plants_every_fault_that_there_is() -> None:
    assert sorted(selftest.FAULTS) == sorted(FAULTS)
    assert selftest.ROUNDS[0] == selftest.ROUNDS[-1] == selftest.NO_FAULT


@pytest.fixture(scope="module")
def outcome(tmp_path_factory: pytest.TempPathFactory) -> selftest.Outcome:
    folder = tmp_path_factory.mktemp("selftest")
    return selftest.run(folder, Console(width=140), TRAINED_PICTURES)


@pytest.mark.server
@pytest.mark.release
@pytest.mark.parametrize("number", range(len(selftest.ROUNDS)), ids=lambda number: selftest.ROUNDS[number])
def test_a_fault_that_struck_is_noticed(outcome: selftest.Outcome, number: int) -> None:
    played = outcome.rounds[number]
    assert played.fault == selftest.ROUNDS[number]
    if played.fault == selftest.NO_FAULT:
        assert not played.findings, played.findings
    else:
        assert played.struck > 0, "the fault never took effect"
        assert played.findings
    assert played.as_it_should


@pytest.mark.server
@pytest.mark.release
def test_no_fault_is_noticed_because_a_request_failed(outcome: selftest.Outcome) -> None:
    """They are silent faults: every request is answered, only not as it should be."""
    for played in outcome.rounds:
        assert not {Check.REQUESTS, Check.SAMPLES} & by_check(played.findings).keys(), played.findings


@pytest.mark.server
@pytest.mark.release
def test_the_texts_of_random_weights_show_what_the_accuracy_does_not(outcome: selftest.Outcome) -> None:
    """Rounding to fp8 leaves every digit right."""
    (rounded,) = [played for played in outcome.rounds if played.fault == "fp8 rounding"]
    red = [finding.task for finding in by_check(rounded.findings)[Check.ANSWERS]]
    assert TWIN in red
    assert Check.FLOOR not in by_check(rounded.findings)


def test_a_round_that_is_not_as_it_should_be_fails_the_self_test() -> None:
    """A fault that nothing noticed, one that never struck, and a green gate that was red."""
    unnoticed = selftest.Round("x 1.01", struck=9, results=(), reference=(), findings=())
    finding = selftest.Finding(Check.ANSWERS, TWIN, "tp1 pp2 cpu", "one answer differs.")
    harmless = selftest.Round("x 1.01", struck=0, results=(), reference=(), findings=[finding])
    alarmed = selftest.Round(selftest.NO_FAULT, struck=0, results=(), reference=(), findings=[finding])
    for played in (unnoticed, harmless, alarmed):
        assert not played.as_it_should
        assert not selftest.Outcome([played], 1.0).passed
    assert not selftest.Outcome([], 1.0).passed


def test_a_fault_is_armed_whole(tmp_path: Path) -> None:
    selftest.arm(tmp_path / "fault", "fp8 rounding", 3)
    assert (tmp_path / "fault").read_text() == "fp8 rounding 3"
    assert list(tmp_path.iterdir()) == [tmp_path / "fault"]
