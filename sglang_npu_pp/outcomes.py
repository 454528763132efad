"""What became of a control request on each rank, and the sentence that tells its client."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Outcome:
    """One rank's. `failure`: what went wrong in words, None where nothing did. `raised`: it was an exception,
    so nothing is known of what was done before. `value`: what this rank has to answer, where that is more
    than yes or no."""

    stage: int
    rank: int
    failure: str | None = None
    raised: bool = False
    value: Any = None


def failures(outcomes: Sequence[Outcome]) -> str:
    """What failed, naming stage and rank; empty where nothing did.

    A failure that all ranks had alike is said once and names none: it is about the request.
    """
    failed = [outcome for outcome in outcomes if outcome.failure is not None]
    said = {outcome.failure for outcome in failed}
    if len(failed) == len(outcomes) and len(said) == 1:
        return said.pop() or ""
    return "; ".join(f"stage {each.stage} rank {each.rank}: {each.failure}" for each in failed)


def may_have_changed(outcomes: Sequence[Outcome]) -> bool:
    """Whether a request that failed may have changed something on some rank."""
    return any(outcome.failure is None or outcome.raised for outcome in outcomes)


def first_value(outcomes: Sequence[Outcome]) -> Any:
    """The answer of the first stage that has one."""
    return next((outcome.value for outcome in outcomes if outcome.value is not None), None)
