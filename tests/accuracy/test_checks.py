"""The gate's checks: green for equal results, and red for every single thing that is not as it should be."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from scripts.evaluation.checks import Check, check_all, check_pair, check_result, compare
from scripts.evaluation.results import Side, Token

from .samples import LAYOUT, TOKENS, result

FLOOR = 0.97


def checks(*results: Any) -> list[Check]:
    return [finding.check for finding in check_all(results, FLOOR)]


def with_tokens(*tokens: Token) -> dict[str, Any]:
    return {"tokens": {"a#1": tokens, "b#1": TOKENS, "c#1": TOKENS}}


def test_equal_results_are_green() -> None:
    assert checks(result(), result(Side.PATCHED)) == []


def test_a_difference_within_the_tolerance_is_green() -> None:
    almost = replace(TOKENS[0], logprob=TOKENS[0].logprob + 0.9e-3)
    patched = result(Side.PATCHED, **with_tokens(almost, TOKENS[1]))
    assert checks(result(), patched) == []
    assert compare(result(), patched).largest == pytest.approx(0.9e-3)


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({"failed": 1}, Check.REQUESTS),
        ({"ran": 2}, Check.SAMPLES),
        ({"asked": 0, "ran": 0}, Check.SAMPLES),
        ({"accuracy": 0.9699}, Check.FLOOR),
        ({"accuracy": float("nan")}, Check.FLOOR),
        ({"answers": {"0": "4", "1": "7", "2": "7"}}, Check.ANSWERS),
        ({"answers": {"0": "4", "1": "7"}}, Check.ANSWERS),
        ({"answers": {"0": "4", "1": "7", "2": "1", "3": "5"}}, Check.ANSWERS),
        ({"tokens": {"a#1": TOKENS, "b#1": TOKENS}}, Check.LOGPROBS),
        ({"tokens": {"a#1": TOKENS, "b#1": TOKENS, "c#1": ()}}, Check.LOGPROBS),
        ({"tokens": {}}, Check.LOGPROBS),
        (with_tokens(replace(TOKENS[0], logprob=-0.2489), TOKENS[1]), Check.LOGPROBS),
        (with_tokens(replace(TOKENS[0], logprob=float("nan")), TOKENS[1]), Check.LOGPROBS),
        (with_tokens(replace(TOKENS[0], top=(-0.25, -1.502)), TOKENS[1]), Check.LOGPROBS),
        (with_tokens(replace(TOKENS[0], top=(-0.25,)), TOKENS[1]), Check.LOGPROBS),
    ],
)
def test_one_thing_wrong_in_the_patched_server_is_red(changed: dict[str, Any], expected: Check) -> None:
    found = check_all([result(), result(Side.PATCHED, **changed)], FLOOR)
    assert [finding.check for finding in found] == [expected]
    assert LAYOUT in found[0].sentence
    assert found[0].sentence.endswith(".")
    assert "\n" not in found[0].sentence


def test_nothing_compared_is_not_green() -> None:
    """Two servers without log-probabilities agree in nothing."""
    empty: dict[str, Any] = {"tokens": {}}
    assert checks(result(**empty), result(Side.PATCHED, **empty)) == [Check.LOGPROBS]


def test_a_side_that_is_missing_is_red() -> None:
    assert checks(result()) == [Check.SAMPLES]
    assert checks(result(Side.PATCHED)) == [Check.SAMPLES]
    other = result(Side.PATCHED, layout="tp2 pp2 cpu")
    assert checks(result(), other) == [Check.SAMPLES, Check.SAMPLES]


def test_a_server_of_somebody_else_has_no_pair() -> None:
    assert checks(result(Side.GIVEN)) == []
    assert checks(result(Side.GIVEN, failed=2)) == [Check.REQUESTS]


def test_without_a_floor_any_accuracy_will_do() -> None:
    assert check_result(result(accuracy=0.1), None) == []
    assert check_result(result(accuracy=None), FLOOR) == []


def test_tokens_behind_the_first_other_one_are_not_compared() -> None:
    """The texts go on differently there; that they differ is for the other check to say."""
    other = replace(TOKENS[0], text="9")
    far = replace(TOKENS[1], logprob=-9.0)
    difference = compare(result(), result(Side.PATCHED, **with_tokens(other, far)))
    assert difference.largest == 0.0


def test_a_difference_that_is_not_a_number_is_not_lost_among_others() -> None:
    nan = (replace(TOKENS[0], logprob=float("nan")), TOKENS[1])
    for name in ("a#1", "b#1", "c#1"):
        tokens = {**result().tokens, name: nan}
        found = check_pair(result(), result(Side.PATCHED, tokens=tokens))
        assert [finding.check for finding in found] == [Check.LOGPROBS], name


def test_the_sentence_names_the_sample_and_both_answers() -> None:
    (finding,) = check_pair(result(), result(Side.PATCHED, answers={"0": "4", "1": "9", "2": "1"}))
    assert "sample 1: '9' instead of '7'" in finding.sentence
