"""What the client of a control request is told, from what became of it on every rank."""

from __future__ import annotations

from sglang_npu_pp.outcomes import Outcome, failures, first_value, may_have_changed

WELL = [Outcome(0, 0), Outcome(1, 0)]


def test_nothing_failed() -> None:
    assert failures(WELL) == ""


def test_a_failure_of_some_ranks_names_them() -> None:
    outcomes = [Outcome(0, 0), Outcome(1, 0, "no such file"), Outcome(1, 1, "no memory")]
    assert failures(outcomes) == "stage 1 rank 0: no such file; stage 1 rank 1: no memory"


def test_a_failure_that_all_ranks_share_names_none() -> None:
    assert failures([Outcome(stage, 0, "no such format") for stage in range(3)]) == "no such format"


def test_different_failures_of_all_ranks_are_all_said() -> None:
    outcomes = [Outcome(0, 0, "one"), Outcome(1, 0, "another")]
    assert failures(outcomes) == "stage 0 rank 0: one; stage 1 rank 0: another"


def test_only_a_refusal_by_all_ranks_changes_nothing() -> None:
    refused, raised = Outcome(0, 0, "no"), Outcome(1, 0, "no", raised=True)
    assert not may_have_changed([refused, refused])
    assert may_have_changed([refused, Outcome(1, 0)])
    assert may_have_changed([refused, raised])


def test_the_answer_of_the_first_stage_that_has_one() -> None:
    assert first_value(WELL) is None
    assert first_value([Outcome(0, 0), Outcome(1, 0, value=[1.0]), Outcome(2, 0, value=[2.0])]) == [1.0]
