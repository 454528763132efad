"""Does the gate notice? Faults planted between the stages of a patched server, one after another.

The unpatched server's answers are recorded once. Then one patched server gets every fault in turn, with empty
caches, and its answers go through the gate's own checks: without a fault they must be green, before and
after, and with each fault red.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from rig.probes import probe_variables

from .checks import Check, Finding, by_check, check_all, compare
from .direct import TWIN, TWIN_PICTURES, TWIN_TOKENS, ask_pictures, load_weights
from .gate import RANDOM_MODEL, SHIPPED_FLOOR, SHIPPED_MODEL
from .lmms import Target
from .pictures import PLAIN, pictures
from .results import Layout, Result, Side
from .servers import configure, running

FAULT_FILE_VARIABLE = "PP_PROBE_FAULT_FILE"
LAYOUT = Layout(1, 2)
CONCURRENCY = 16
NO_FAULT = "none"
FAULTS = (
    "stale every 10th",
    "stale every 50th",
    "last row zeroed",
    "residual dropped",
    "fp8 rounding",
    "x 1.01",
    "deepstack dropped",
    "tokens swapped",
    "one delayed",
)
ROUNDS = (NO_FAULT, *FAULTS, NO_FAULT)
TRAINED_PICTURES = 100


@dataclass(frozen=True)
class Round:
    """What the gate said while one fault was in force; `struck` is how often it took effect."""

    fault: str
    struck: int
    results: Sequence[Result]
    reference: Sequence[Result]
    findings: Sequence[Finding]

    @property
    def as_it_should(self) -> bool:
        """Green without a fault; with one, red, and because of the fault: it did strike."""
        if self.fault == NO_FAULT:
            return not self.findings
        return bool(self.findings) and self.struck > 0


@dataclass(frozen=True)
class Outcome:
    """A whole self-test."""

    rounds: Sequence[Round]
    seconds: float

    @property
    def passed(self) -> bool:
        return len(self.rounds) == len(ROUNDS) and all(one.as_it_should for one in self.rounds)


def run(folder: Path, console: Console, trained_pictures: int = TRAINED_PICTURES) -> Outcome:
    """Plant every fault; show a table.

    Raises:
        ServerError, EvaluationError: a server failed.
    """
    began = time.monotonic()
    fault_file = folder / "fault"
    with console.status(f"{LAYOUT}, unpatched: recording") as status:
        server = configure(SHIPPED_MODEL, LAYOUT, Side.UNPATCHED, folder / "unpatched.log")
        with running(server, LAYOUT, Side.UNPATCHED, CONCURRENCY) as target:
            reference = ask(target, trained_pictures)
        env = {FAULT_FILE_VARIABLE: str(fault_file), **probe_variables("sglang_pp_probe")}
        server = configure(SHIPPED_MODEL, LAYOUT, Side.PATCHED, folder / "patched.log", env=env)
        rounds = []
        status.update(f"{LAYOUT}, patched: starting")
        with running(server, LAYOUT, Side.PATCHED, CONCURRENCY) as target:
            for number, fault in enumerate(ROUNDS):
                status.update(f"{LAYOUT}, patched, fault: {fault}")
                rounds.append(play(fault, number, target, reference, fault_file, trained_pictures))
    outcome = Outcome(rounds, time.monotonic() - began)
    show(outcome, console)
    return outcome


def play(
    fault: str,
    number: int,
    target: Target,
    reference: Sequence[Result],
    fault_file: Path,
    trained_pictures: int,
) -> Round:
    """One round: arm the fault, ask, and let the gate judge. Loading weights empties the caches."""
    struck_file = fault_file.with_name(f"{fault_file.name}.struck")
    struck_file.unlink(missing_ok=True)
    arm(fault_file, fault, number)
    results = ask(target, trained_pictures)
    struck = int(struck_file.read_text()) if struck_file.exists() else 0
    return Round(fault, struck, results, reference, check_all([*reference, *results], SHIPPED_FLOOR))


def arm(fault_file: Path, fault: str, number: int) -> None:
    """Put a fault in force, at once: a half-written name is never read."""
    part = fault_file.with_name(f"{fault_file.name}.part")
    part.write_text(f"{fault} {number}")
    part.rename(fault_file)


def ask(target: Target, trained_pictures: int) -> list[Result]:
    """The trained model's digits, then the random one's texts, on one server."""
    load_weights(target, SHIPPED_MODEL)
    trained = ask_pictures(PLAIN, target, pictures(trained_pictures), tokens=8)
    load_weights(target, RANDOM_MODEL)
    twin = ask_pictures(TWIN, target, pictures(TWIN_PICTURES), tokens=TWIN_TOKENS, whole=True)
    return [trained, twin]


def caught_by(one: Round) -> list[str]:
    """The checks that were red, each with the task it looked at."""
    return [
        f"{check.value} ({task})"
        for check, findings in by_check(one.findings).items()
        for task in dict.fromkeys(finding.task for finding in findings)
    ]


def show(outcome: Outcome, console: Console) -> None:
    """A row a fault: how often it struck, what the trained model scored, and what caught it."""
    table = Table(title=f"planted faults, {LAYOUT}, patched against unpatched")
    for title in ("fault", "struck", "accuracy", "answers differ", "logprob diff", "caught by", ""):
        table.add_column(title, overflow="fold")
    for one in outcome.rounds:
        trained, twin = (compare(a, b) for a, b in zip(one.reference, one.results, strict=True))
        table.add_row(
            one.fault,
            str(one.struck),
            f"{one.results[0].accuracy:.4f}",
            f"{len(trained.answers)}/{one.results[0].asked}, twin {len(twin.answers)}/{one.results[1].asked}",
            f"{_number(trained.largest)}, twin {_number(twin.largest)}",
            "\n".join(caught_by(one)) or "nothing: green",
            "as it should" if one.as_it_should else "WRONG",
        )
    console.print(table)
    alone = sum(any(finding.check is Check.FLOOR for finding in one.findings) for one in outcome.rounds)
    console.print(
        f"{'PASSED' if outcome.passed else 'FAILED'}: {len(FAULTS)} faults, {alone} of them noticed by the "
        f"accuracy too; {outcome.seconds:.0f} s."
    )


def to_json(outcome: Outcome) -> Mapping[str, Any]:
    return {
        "passed": outcome.passed,
        "seconds": round(outcome.seconds, 1),
        "rounds": [
            {
                "fault": one.fault,
                "struck": one.struck,
                "accuracy": one.results[0].accuracy,
                "caught_by": caught_by(one),
                "as_it_should": one.as_it_should,
            }
            for one in outcome.rounds
        ],
    }


def _number(value: float | None) -> str:
    return "-" if value is None or not math.isfinite(value) else f"{value:.1e}"
