"""Made-up observations of two servers that are alike."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

from sglang_npu_pp.observe.trace import Event
from sglang_npu_pp.tools.certify.battery import Run
from sglang_npu_pp.tools.certify.examine import Observed
from sglang_npu_pp.tools.certify.results import Side

CASES = ("length 1", "length 7", "text", "stream")
ITERATIONS = 30


def answer(token: int = 5) -> dict[str, Any]:
    return {"ids": [token, 6], "output_token_logprobs": [-0.5, -1.0]}


def run(**changed: dict[str, Any]) -> Run:
    """All cases; a keyword has "_" where a name has a space."""
    given = {name.replace("_", " "): value for name, value in changed.items()}
    return Run({name: given.get(name, answer()) for name in CASES})


def first_stage(iterations: Iterable[int]) -> list[Event]:
    """What stage 0 of two does, one microbatch at a time."""
    steps = (
        ("iteration", ""),
        ("push", "requests"),
        ("launch", ""),
        ("launched", ""),
        ("push", "proxy"),
        ("post", "output"),
        ("wait", "output"),
        ("arrive", "output"),
        ("ready", "output"),
    )
    return events(steps, iterations)


def last_stage(iterations: Iterable[int]) -> list[Event]:
    steps = (
        ("iteration", ""),
        ("ready", "requests"),
        ("post", "proxy"),
        ("wait", "proxy"),
        ("arrive", "proxy"),
        ("ready", "proxy"),
        ("launch", ""),
        ("launched", ""),
        ("push", "output"),
    )
    return events(steps, iterations)


def events(steps: Sequence[tuple[str, str]], iterations: Iterable[int]) -> list[Event]:
    return [
        Event(0, name, kind, iteration % 2, iteration) for iteration in iterations for name, kind in steps
    ]


def traces() -> dict[int, list[Event]]:
    return {0: first_stage(range(ITERATIONS)), 1: last_stage(range(ITERATIONS))}


def unpatched(**changed: Any) -> Observed:
    found = Observed(
        Side.UNPATCHED, 1, 2, CASES, CASES, one_by_one=[run(), run()], concurrent=run(), schedulers=2
    )
    return replace(found, **changed)


def patched(**changed: Any) -> Observed:
    found = Observed(
        Side.PATCHED,
        1,
        2,
        CASES,
        CASES,
        one_by_one=[run(), run()],
        concurrent=run(),
        schedulers=2,
        in_force=["stage 0 rank 0", "stage 1 rank 0"],
        traces={"rank 0": traces()},
        after_aborts=run(),
        abort_problems=[],
        lost_peer_problems=[],
    )
    return replace(found, **changed)
