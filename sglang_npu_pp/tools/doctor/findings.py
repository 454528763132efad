"""Findings of the doctor, and their output."""

from __future__ import annotations

import enum
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ...text import table


class Level(enum.Enum):
    """Severity."""

    OK = "ok"
    NOTE = "note"  # good to know
    WARNING = "warning"  # the server starts, but something is lost
    WRONG = "WRONG"  # the server does not start, or stays on upstream's path


@dataclass(frozen=True)
class Finding:
    """One line: subject and sentence."""

    level: Level
    subject: str
    text: str


@dataclass(frozen=True)
class Section:
    """Findings of one subject; `data`: measurements for `--json`."""

    title: str
    findings: Sequence[Finding]
    data: Mapping[str, Any] = field(default_factory=dict)


def render(section: Section) -> str:
    """A table for the terminal."""
    rows = [(finding.level.value, finding.subject, finding.text) for finding in section.findings]
    return f"{section.title}\n{table(rows, indent='  ')}"


def as_json(section: Section) -> dict[str, Any]:
    findings = [
        {"level": finding.level.value.lower(), "subject": finding.subject, "text": finding.text}
        for finding in section.findings
    ]
    return {"title": section.title, "findings": findings, "data": dict(section.data)}


def count(sections: Sequence[Section], level: Level) -> int:
    return sum(finding.level is level for section in sections for finding in section.findings)
