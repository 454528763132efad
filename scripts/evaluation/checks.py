"""The gate: what must hold of one result, and of an unpatched and a patched one of the same layout.

Accuracy alone is a weak gate. Faults at the boundary of two stages (a row lost, a transfer in fp8) leave
the score of a trained model as it was; so answers are compared one by one, and their log-probabilities.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum

from .results import Result, Side, Token

LOGPROB_TOLERANCE = 1e-3


class Check(Enum):
    """Why the gate is red; the value is the word that reports show."""

    REQUESTS = "requests failed"
    SAMPLES = "samples missing"
    FLOOR = "accuracy"
    ANSWERS = "answers"
    LOGPROBS = "logprobs"


@dataclass(frozen=True)
class Finding:
    """One reason why the gate is red, and a sentence for a person."""

    check: Check
    task: str
    layout: str
    sentence: str


@dataclass(frozen=True)
class Difference:
    """How a patched result differs from the unpatched one.

    `largest` is None where nothing could be compared. `uncompared` counts requests of which only one
    side has log-probabilities, or not as many of them.
    """

    answers: Sequence[str]
    """Samples whose texts differ, or that only one side has."""
    largest: float | None
    uncompared: int


def check_result(result: Result, floor: float | None) -> list[Finding]:
    """The checks that need no second server. `floor` is the lowest good accuracy, None for none."""
    found = []
    if result.failed:
        said = f" ({result.errors[0]})" if result.errors else ""
        found.append((Check.REQUESTS, f"{count(result.failed, 'request')} failed{said}"))
    if result.ran < result.asked:
        found.append((Check.SAMPLES, f"{result.ran} of {count(result.asked, 'sample')} ran"))
    if result.asked == 0:
        found.append((Check.SAMPLES, "no sample was asked for, so nothing was measured"))
    # Written so that an accuracy that is not a number is below every floor.
    if floor is not None and result.accuracy is not None and not result.accuracy >= floor:
        found.append((Check.FLOOR, f"the accuracy {result.accuracy:.4f} is below the floor {floor:g}"))
    return [_finding(check, result, sentence) for check, sentence in found]


def check_pair(unpatched: Result, patched: Result) -> list[Finding]:
    """What must not differ between the two sides of one layout."""
    difference = compare(unpatched, patched)
    found = []
    if difference.answers:
        first = difference.answers[0]
        found.append(
            (
                Check.ANSWERS,
                f"{count(len(difference.answers), 'answer')} of {len(unpatched.answers)} differ from "
                f"unpatched, first sample {first}: {_shown(patched.answers.get(first))} instead of "
                f"{_shown(unpatched.answers.get(first))}",
            )
        )
    if difference.uncompared:
        found.append(
            (Check.LOGPROBS, f"log-probabilities of {count(difference.uncompared, 'request')} have no pair")
        )
    elif difference.largest is None:
        found.append((Check.LOGPROBS, "no log-probabilities came, so none could be compared"))
    if difference.largest is not None and not difference.largest <= LOGPROB_TOLERANCE:
        found.append(
            (
                Check.LOGPROBS,
                f"a log-probability differs by {difference.largest:.3g} from unpatched, more than "
                f"{LOGPROB_TOLERANCE:g}",
            )
        )
    return [_finding(check, patched, sentence) for check, sentence in found]


def check_all(results: Sequence[Result], floor: float | None) -> list[Finding]:
    """Every check of every result and of every pair.

    A result whose other side is missing is a pair that was not compared: that is a finding too.
    """
    found = [finding for result in results for finding in check_result(result, floor)]
    for pair in pairs(results):
        sides = {result.side: result for result in pair}
        if Side.GIVEN in sides:
            continue
        if len(sides) == 2:
            found += check_pair(sides[Side.UNPATCHED], sides[Side.PATCHED])
        else:
            missing = "patched" if Side.UNPATCHED in sides else "unpatched"
            found.append(_finding(Check.SAMPLES, pair[0], f"the {missing} server gave no result"))
    return found


def pairs(results: Sequence[Result]) -> list[list[Result]]:
    """Results of one task and layout, together."""
    grouped: dict[tuple[str, str], list[Result]] = {}
    for result in results:
        grouped.setdefault((result.task, result.layout), []).append(result)
    return list(grouped.values())


def compare(unpatched: Result, patched: Result) -> Difference:
    """Compare every sample's text, and every request's log-probabilities as far as its tokens agree."""
    samples = {**unpatched.answers, **patched.answers}
    differing = [name for name in samples if unpatched.answers.get(name) != patched.answers.get(name)]
    largest: float | None = None
    uncompared = 0
    for name in {**unpatched.tokens, **patched.tokens}:
        left, right = unpatched.tokens.get(name, ()), patched.tokens.get(name, ())
        distances = list(_distances(left, right))
        if not distances:
            uncompared += 1
        for distance in distances:
            largest = distance if largest is None else max(largest, distance)
    return Difference(differing, largest, uncompared)


def count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def by_check(findings: Sequence[Finding]) -> Mapping[Check, list[Finding]]:
    """Findings grouped by check, in the order of `Check`."""
    return {
        check: matching for check in Check if (matching := [one for one in findings if one.check is check])
    }


def _distances(left: Sequence[Token], right: Sequence[Token]) -> Iterator[float]:
    """Distances of the log-probabilities, up to and including the first token that is not the same.

    Behind it the two sides continue different texts, and their numbers have nothing to do with each other.
    """
    for one, other in zip(left, right, strict=False):
        yield _distance(one.logprob, other.logprob)
        yield from (_distance(a, b) for a, b in zip(one.top, other.top, strict=False))
        if len(one.top) != len(other.top):
            yield math.inf
        if one.text != other.text:
            return


def _distance(one: float, other: float) -> float:
    """Infinite where it is not a number, so that it never passes for a small one."""
    distance = abs(one - other)
    return math.inf if math.isnan(distance) else distance


def _shown(answer: str | None, longest: int = 60) -> str:
    if answer is None:
        return "no answer"
    return repr(answer if len(answer) <= longest else answer[:longest] + "...")


def _finding(check: Check, result: Result, sentence: str) -> Finding:
    where = f"{result.task}, {result.layout}, {result.side.value}"
    return Finding(check, result.task, result.layout, f"{where}: {sentence}.")
