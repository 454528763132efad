"""Outcome of a control request on each rank, and the sentence for its client."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Outcome:
    """On one rank. `failure`: reason, None for success. `raised`: an exception, so earlier effects are
    unknown. `value`: an answer beyond success or failure."""

    stage: int
    rank: int
    failure: str | None = None
    raised: bool = False
    value: Any = None


def failures(outcomes: Sequence[Outcome]) -> str:
    """Failures with stage and rank, "" for none; one shared by all ranks appears once, without them."""
    failed = [outcome for outcome in outcomes if outcome.failure is not None]
    said = {outcome.failure for outcome in failed}
    if len(failed) == len(outcomes) and len(said) == 1:
        return said.pop() or ""
    return "; ".join(f"stage {each.stage} rank {each.rank}: {each.failure}" for each in failed)


def may_have_changed(outcomes: Sequence[Outcome]) -> bool:
    """Whether a failed request may have had an effect."""
    return any(outcome.failure is None or outcome.raised for outcome in outcomes)


def first_value(outcomes: Sequence[Outcome]) -> Any:
    """The answer of the first stage with one."""
    return next((outcome.value for outcome in outcomes if outcome.value is not None), None)
