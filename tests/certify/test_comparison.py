"""Answers compared: what repeats exactly, what has a spread, what cannot be compared."""

from __future__ import annotations

import math
from typing import Any

import pytest

from sglang_npu_pp.tools.certify.comparison import compare, differences

EXACT = {"ids": [5, 6, 7], "output_token_logprobs": [-0.5, -1.0, -1.5], "finish": {"type": "length"}}


def spread_answer(shift: float, ids: tuple[int, ...] = (5, 6, 7), gap: float = 1.0) -> dict[str, Any]:
    """Log-probabilities shifted; `gap` is between the best token and the next."""
    return {
        "ids": list(ids),
        "text": str(ids),
        "output_token_logprobs": [-0.5 + shift, -1.0 + shift, -1.5 + shift],
        "output_top_logprobs": [[-0.5 + shift, -0.5 + shift - gap]] * 3,
    }


def compared(reference: list[Any], found: list[Any]) -> Any:
    return compare([{"case": one} for one in reference], [{"case": one} for one in found], ["case"])


def test_equal_answers_are_compared_exactly() -> None:
    result = compared([EXACT, EXACT], [EXACT])
    assert (result.exact, result.within, result.differences) == (1, 0, [])


@pytest.mark.parametrize(
    "change",
    [{"ids": [5, 6, 8]}, {"output_token_logprobs": [-0.5, -1.0, -1.5 - 1e-7]}, {"finish": {"type": "stop"}}],
)
def test_the_least_change_of_an_answer_that_repeats_is_a_difference(change: dict[str, Any]) -> None:
    result = compared([EXACT, EXACT], [EXACT, {**EXACT, **change}])
    assert len(result.differences) == 1
    assert result.differences[0].startswith(f"case: /{next(iter(change))}")


def test_an_answer_with_a_key_more_is_a_difference() -> None:
    assert compared([EXACT], [{**EXACT, "more": 1}]).differences


def test_numbers_that_do_not_repeat_are_compared_by_their_spread() -> None:
    reference = [spread_answer(0.0), spread_answer(0.01)]
    assert compared(reference, [spread_answer(0.035)]).differences == []
    assert compared(reference, [spread_answer(0.035)]).within == 1
    assert compared(reference, [spread_answer(0.0)]).spread == pytest.approx(0.01)
    assert compared(reference, [spread_answer(0.05)]).differences


def test_a_token_that_repeats_must_be_the_same_although_numbers_do_not() -> None:
    reference = [spread_answer(0.0), spread_answer(0.01)]
    assert compared(reference, [spread_answer(0.0, ids=(5, 9, 7))]).differences


def test_where_two_tokens_are_as_likely_either_may_come() -> None:
    reference = [spread_answer(0.0, gap=0.001), spread_answer(0.01, gap=0.001)]
    result = compared(reference, [spread_answer(0.0, ids=(5, 9, 7), gap=0.001)])
    assert result.differences == []
    assert result.within == 1


def test_nothing_is_compared_where_the_first_token_may_be_one_of_two() -> None:
    reference = [spread_answer(0.0, gap=0.001), spread_answer(0.01, gap=0.001)]
    result = compared(reference, [spread_answer(0.0, ids=(9, 9, 7), gap=0.001)])
    assert result.compared == 0
    assert "may be one of two" in result.left_out["case"]


def test_tokens_behind_the_first_that_does_not_repeat_are_not_compared() -> None:
    reference = [spread_answer(0.0), spread_answer(0.01, ids=(5, 6, 1))]
    assert compared(reference, [spread_answer(0.0, ids=(5, 6, 2))]).differences == []
    assert compared(reference, [spread_answer(0.0, ids=(5, 2, 2))]).differences


@pytest.mark.parametrize(
    "reference",
    [
        [{"text": "one"}, {"text": "two"}],
        [{"ids": [1], "text": "one"}, {"ids": [2], "text": "two"}],
        [spread_answer(math.nan), spread_answer(math.nan)],
    ],
    ids=["texts only", "other first tokens", "no numbers"],
)
def test_what_does_not_repeat_is_left_out_and_counts_for_nothing(reference: list[Any]) -> None:
    result = compared(reference, [reference[0]])
    assert result.compared == 0
    assert "case" in result.left_out


def test_a_case_without_an_answer_is_a_difference_or_left_out() -> None:
    both = compare([{"case": EXACT}], [{"case": EXACT}, {}], ["case"])
    assert both.differences == ["case: the patched server has not answered it"]
    assert compare([{}], [{"case": EXACT}], ["case"]).compared == 0


def test_values_of_any_shape_are_walked() -> None:
    assert differences({"a": [1, 2.0]}, {"a": [1, 2.5]}, 0.1) == ["/a/1 is 2.5, expected 2.0"]
    assert differences([1], [1, 2], 0.1) == [" is [1, 2], expected [1]"]
    assert not differences([math.nan, None, "x"], [math.nan, None, "x"], 0.0)
    assert differences([1.0], [math.nan], 10.0)
