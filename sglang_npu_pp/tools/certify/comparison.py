"""Answers to the same requests, compared: exactly where the reference repeats itself, else by its spread."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from .asking import Answer

Answers = Mapping[str, Answer]
"""Name of a case -> its answer."""

# Lists of an answer with one entry for each token of the output, and those with one for each of the input.
_BY_OUTPUT = ("ids", "output_token_logprobs", "output_top_logprobs", "output_token_ids_logprobs")
_BY_INPUT = ("input_token_logprobs", "input_top_logprobs")
_TOP = "output_top_logprobs"
MARGIN = 4.0
"""Times the largest difference between answers of the reference, which are of a few runs only."""


@dataclass
class Comparison:
    """Of several sets of answers with a reference."""

    exact: int = 0  # cases that were compared exactly
    within: int = 0  # cases that were compared by the spread
    spread: float = 0.0  # largest difference of log-probabilities between answers of the reference
    left_out: dict[str, str] = field(default_factory=dict)  # case -> why it was not compared
    differences: list[str] = field(default_factory=list)  # a line each

    @property
    def compared(self) -> int:
        return self.exact + self.within


def compare(reference: Sequence[Answers], found: Sequence[Answers], names: Collection[str]) -> Comparison:
    """Each of `found` with the `reference`, both of them runs of the same requests.

    A case whose answers in the reference are all equal must be answered exactly so. Otherwise what does
    repeat is compared: tokens up to the first that differs, and log-probabilities by the spread that the
    reference has. Where two tokens are as likely as each other within that, either may come.
    """
    result = Comparison(spread=_spread(reference, names))
    for name in names:
        known = [answers[name] for answers in reference if name in answers]
        given = [answers[name] for answers in found if name in answers]
        if not known:
            result.left_out[name] = "the unpatched server has not answered it"
        elif _lacks_numbers(known):
            result.left_out[name] = "its log-probabilities are not numbers"
        elif len(given) < len(found) or not given:
            result.differences.append(f"{name}: the patched server has not answered it")
        elif all(equal(known[0], other) for other in known[1:]):
            result.exact += 1
            found_lines = (differences(known[0], one, 0.0) for one in given)
            result.differences += _of_the_first(name, found_lines)
        else:
            _compare_loosely(result, name, known, given)
    return result


def _compare_loosely(result: Comparison, name: str, known: Sequence[Answer], given: Sequence[Answer]) -> None:
    tokens = _common_tokens(known)
    if tokens == 0 or any(_TOP not in one for one in known):
        result.left_out[name] = "the unpatched server answers it differently from time to time"
        return
    tolerance = MARGIN * result.spread
    lengths = [_until_a_tie(known[0], one, tokens, tolerance) for one in given]
    if 0 in lengths:
        result.left_out[name] = "its first token may be one of two"
        return
    result.within += 1
    pairs = zip(given, lengths, strict=True)
    found = (differences(_head(known[0], length), _head(one, length), tolerance) for one, length in pairs)
    result.differences += _of_the_first(name, found)


def _of_the_first(name: str, found: Iterable[list[str]]) -> list[str]:
    """The lines of the first answer that differs."""
    return [f"{name}: {line}" for line in next(filter(None, found), [])]


# --- values ------------------------------------------------------------------------------------------


def equal(expected: Any, found: Any) -> bool:
    return not differences(expected, found, 0.0)


def differences(expected: Any, found: Any, tolerance: float) -> list[str]:
    """A line for everything that is not as expected; numbers may differ by `tolerance`."""
    return list(_walk(expected, found, tolerance, ""))


def _walk(expected: Any, found: Any, tolerance: float, where: str) -> Iterator[str]:
    if isinstance(expected, Mapping) and isinstance(found, Mapping) and expected.keys() == found.keys():
        for key in expected:
            yield from _walk(expected[key], found[key], tolerance, f"{where}/{key}")
    elif _is_list(expected) and _is_list(found) and len(expected) == len(found):
        for index, (left, right) in enumerate(zip(expected, found, strict=True)):
            yield from _walk(left, right, tolerance, f"{where}/{index}")
    elif isinstance(expected, float) and isinstance(found, float):
        if not (abs(expected - found) <= tolerance or _same_number(expected, found)):
            yield f"{where} is {found}, expected {expected}"
    elif expected != found:
        yield f"{where} is {found!r}, expected {expected!r}"


def _same_number(left: float, right: float) -> bool:
    return left == right or (math.isnan(left) and math.isnan(right))


def _is_list(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str)


# --- what repeats ------------------------------------------------------------------------------------


def _lacks_numbers(known: Sequence[Answer]) -> bool:
    numbers = [number for one in known for number in one.get("output_token_logprobs", ())]
    return any(number is None or not math.isfinite(number) for number in numbers)


def _common_tokens(known: Sequence[Answer]) -> int:
    """How many tokens of the outputs are the same in all of them, from the first on."""
    count = 0
    for tokens in zip(*(one.get("ids", ()) for one in known), strict=False):
        if len(set(tokens)) > 1:
            break
        count += 1
    return count


def _head(answer: Answer, tokens: int) -> dict[str, Any]:
    """An answer as far as its first so many tokens."""
    head = {key: answer[key][:tokens] for key in _BY_OUTPUT if key in answer}
    return head | {key: answer[key] for key in _BY_INPUT if key in answer}


def _spread(reference: Sequence[Answers], names: Collection[str]) -> float:
    """The largest difference of two log-probabilities that should be one."""
    largest = 0.0
    for name in names:
        known = [answers[name] for answers in reference if name in answers]
        if len(known) > 1 and not _lacks_numbers(known):
            tokens = _common_tokens(known)
            first, *others = (list(_numbers(_head(one, tokens))) for one in known)
            for other in others:
                if len(first) == len(other):
                    pairs = zip(first, other, strict=True)
                    largest = max([largest, *(abs(left - right) for left, right in pairs)])
    return largest


def _numbers(value: Any) -> Iterator[float]:
    if isinstance(value, float):
        yield value
    elif isinstance(value, Mapping):
        for each in value.values():
            yield from _numbers(each)
    elif _is_list(value):
        for each in value:
            yield from _numbers(each)


def _until_a_tie(expected: Answer, found: Answer, tokens: int, tolerance: float) -> int:
    """How many tokens to compare: up to the first difference that the numbers leave open."""
    pairs = zip(expected["ids"][:tokens], found.get("ids", ()), strict=False)
    for index, (left, right) in enumerate(pairs):
        if left != right:
            best = sorted(expected[_TOP][index] or (), reverse=True)
            return index if len(best) > 1 and best[0] - best[1] <= tolerance else tokens
    return tokens
