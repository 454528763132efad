"""What a person and a program get to see of an accuracy run."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from scripts.output import number_table

from .checks import LOGPROB_TOLERANCE, Difference, Finding, compare, pairs
from .results import Result, Side

TITLES = (
    "task",
    "layout",
    "server",
    "accuracy",
    "samples",
    "answers differ",
    "largest logprob diff",
    "failed",
)
GREEN, RED = "GREEN", "RED"


@dataclass(frozen=True)
class Report:
    """One run: what was measured, on what, and what the gate says."""

    model: str
    results: Sequence[Result]
    findings: Sequence[Finding]
    floor: float | None
    seconds: float
    notes: Sequence[str] = ()

    @property
    def green(self) -> bool:
        return bool(self.results) and not self.findings


def show(report: Report, console: Console) -> None:
    """Print the table, the reasons and the verdict."""
    console.print(results_table(report))
    for note in report.notes:
        console.print(note)
    for finding in report.findings:
        console.print(f"- {finding.sentence}", style="red", markup=False, soft_wrap=True)
    verdict = GREEN if report.green else RED
    style = "bold green" if report.green else "bold red"
    floor = "no floor for the accuracy" if report.floor is None else f"floor {report.floor:g}"
    console.print(
        f"[{style}]{verdict}[/]: {report.model}, {floor}, tolerance {LOGPROB_TOLERANCE:g}, "
        f"{report.seconds:.0f} s, load {os.getloadavg()[0]:.1f}",
        soft_wrap=True,
    )


def results_table(report: Report) -> Table:
    table = number_table(None, *TITLES, left=3)
    for row in rows(report.results):
        table.add_row(*row)
    return table


def rows(results: Sequence[Result]) -> list[list[str]]:
    """The cells of the table, a result a row; the differences stand in the row of the patched server."""
    found = []
    for pair in pairs(results):
        unpatched = next((result for result in pair if result.side is Side.UNPATCHED), None)
        for result in pair:
            difference = _difference(unpatched, result)
            found.append(
                [
                    result.task,
                    result.layout,
                    result.side.value,
                    "" if result.accuracy is None else f"{result.accuracy:.4f}",
                    f"{result.ran}/{result.asked}",
                    "" if difference is None else f"{len(difference.answers)}",
                    "" if difference is None else _largest(difference),
                    f"{result.failed}",
                ]
            )
    return found


def to_json(report: Report) -> dict[str, Any]:
    """Plain values; a difference that is not a number becomes a string, for JSON has none."""
    entries = []
    for pair in pairs(report.results):
        unpatched = next((result for result in pair if result.side is Side.UNPATCHED), None)
        entries += [_entry(result, _difference(unpatched, result)) for result in pair]
    return {
        "model": report.model,
        "verdict": RED if not report.green else GREEN,
        "floor": report.floor,
        "logprob_tolerance": LOGPROB_TOLERANCE,
        "seconds": round(report.seconds, 1),
        "cores": os.cpu_count(),
        "load": os.getloadavg(),
        "notes": list(report.notes),
        "findings": [
            {"check": one.check.value, "task": one.task, "layout": one.layout, "sentence": one.sentence}
            for one in report.findings
        ],
        "results": entries,
    }


def write_json(content: Mapping[str, Any], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2, allow_nan=False) + "\n")


def _entry(result: Result, difference: Difference | None) -> dict[str, Any]:
    entry: dict[str, Any] = {
        "task": result.task,
        "layout": result.layout,
        "server": result.side.value,
        "accuracy": result.accuracy,
        "samples_asked": result.asked,
        "samples_ran": result.ran,
        "requests_failed": result.failed,
        "seconds": round(result.seconds, 1),
        "errors": list(result.errors),
    }
    if difference is not None:
        largest = difference.largest
        finite = largest is None or math.isfinite(largest)
        entry["answers_differ"] = list(difference.answers)
        entry["largest_logprob_difference"] = largest if finite else str(largest)
        entry["requests_without_logprob_pair"] = difference.uncompared
    return entry


def _difference(unpatched: Result | None, result: Result) -> Difference | None:
    if unpatched is None or result.side is not Side.PATCHED:
        return None
    return compare(unpatched, result)


def _largest(difference: Difference) -> str:
    shown = "none compared" if difference.largest is None else f"{difference.largest:.1e}"
    return shown if not difference.uncompared else f"{shown}, {difference.uncompared} without a pair"
