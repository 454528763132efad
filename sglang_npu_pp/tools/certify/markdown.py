"""The report as Markdown, readable as it is in an issue."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence

from .ab import COLUMNS, rows
from .comparing import Compared, Spread, compare_resources, compare_speeds, number
from .results import Check, Difference, Report, Resources, Side, Verdict

_MARKS = {Verdict.PASSED: "passed", Verdict.FAILED: "**FAILED**", Verdict.LEFT_OUT: "left out"}
_SIMULATED = "simulated"


def markdown(report: Report) -> str:
    """The whole report; it must have been redacted."""
    parts = (_head(report), _checks(report), _speed(report), _switches(report), _resources(report))
    more = (_doctor(report), _differences(report), _installed(report))
    return "\n\n".join(part for part in (*parts, *more) if part) + "\n"


def _head(report: Report) -> str:
    verdict = (
        "certified" if report.certified else "nothing differs" if report.passed else "not the same server"
    )
    rows = [
        ("SGLang", report.build),
        ("digest of its functions", report.digest),
        ("in force", report.decision),
        ("device", report.device or "not known"),
        ("took", f"{report.seconds / 60:.1f} minutes"),
    ]
    lines = [f"# sglang-npu-pp on SGLang {plain(report.build)}: {verdict}", "", plain(report.conclusion), ""]
    lines.append(table(("", ""), rows))
    if _SIMULATED in report.device:
        lines += ["", f"The device is {_SIMULATED}: results of the checks are of the same code, but times "]
        lines[-1] += "and shares say nothing about real hardware."
    return "\n".join(lines)


def _checks(report: Report) -> str:
    return "\n".join(["## Checks", "", *_check_table(report.checks, "Nothing was checked.")])


def _doctor(report: Report) -> str:
    return "\n".join(["## Doctor", "", *_check_table(report.doctor, "The doctor was not asked.")])


def _check_table(checks: Sequence[Check], nothing: str) -> Iterator[str]:
    if not checks:
        yield nothing
        return
    yield _table_of_words(
        ("check", "", "result"),
        [(plain(check.name), _MARKS[check.verdict], plain(check.text)) for check in checks],
    )
    for check in checks:
        if check.details:
            yield f"\n<details><summary>{plain(check.name)}: {_count(check.details)}</summary>\n"
            yield f"{block(chr(10).join(check.details))}\n\n</details>"


def _count(details: Sequence[str]) -> str:
    return "1 detail" if len(details) == 1 else f"{len(details)} details"


# --- numbers -----------------------------------------------------------------------------------------


def _speed(report: Report) -> str:
    lines = ["## Speed", ""]
    if not report.speeds:
        return "\n".join([*lines, "Not measured."])
    lines.append(
        "By SGLang's load generator. Median over rounds (least to most); the ratio is patched / unpatched "
        "of the same round."
    )
    for load, measures in compare_speeds(report.speeds).items():
        lines += ["", f"Load: {plain(load)}" if load else "", "", *_compared(measures), "", _rounds(measures)]
    return "\n".join([*lines, "", _picture(report)])


def _switches(report: Report) -> str:
    if not report.variants:
        return ""
    lines = ["## Switches", "", "Each one off / all on, of the same round: median (least to most)."]
    return "\n".join([*lines, "", table(COLUMNS, rows(report.variants))])


def _picture(report: Report) -> str:
    is_file = re.fullmatch(r"[\w.-]+\.png", report.picture)
    return (
        f"![throughput and latencies of both servers]({report.picture})" if is_file else plain(report.picture)
    )


def _compared(measures: Sequence[Compared]) -> Iterator[str]:
    rows = []
    for measure in measures:
        ratio = Spread(tuple(measure.ratios.values()))
        sides = [str(measure.spread(side)) or "not measured" for side in Side]
        rows.append((measure.name, *sides, str(ratio) or "no pair"))
    yield table(("", *Side, "ratio"), rows)


def _rounds(measures: Sequence[Compared]) -> str:
    """Each round of each server, folded."""
    rounds = sorted({turn for measure in measures for turn in measure.rounds})
    rows = []
    for measure in measures:
        for side in Side:
            values = measure.values[side]
            cells = [number(values[turn]) if turn in values else "" for turn in rounds]
            rows.append((measure.name, side.value, *cells))
        ratios = measure.ratios
        rows.append(
            (measure.name, "ratio", *(number(ratios[turn]) if turn in ratios else "" for turn in rounds))
        )
    shown = table(("", "", *(f"round {turn}" for turn in rounds)), rows)
    return f"<details><summary>Each round</summary>\n\n{shown}\n\n</details>"


def _resources(report: Report) -> str:
    lines = ["## Resources", ""]
    if not report.resources:
        return "\n".join([*lines, "Not measured."])
    lines += _compared(compare_resources(report.resources))
    return "\n".join([*lines, "", _exposed(report.resources)])


def _exposed(resources: Sequence[Resources]) -> str:
    found = [each for each in resources if each.exposed]
    if not found:
        return "Exposed communication: no traces of all stages."
    stages = sorted({stage for each in found for stage in each.exposed})
    rows = [
        (
            f"{each.side.value}, round {each.round}",
            *(f"{100 * each.exposed[stage]:.1f} %" if stage in each.exposed else "" for stage in stages),
        )
        for each in found
    ]
    heads = ("", *(f"stage {stage}" for stage in stages))
    return f"Exposed communication, share of the busy time:\n\n{table(heads, rows)}"


# --- what was compared -------------------------------------------------------------------------------


def _differences(report: Report) -> str:
    if not report.differences:
        return "## Functions that differ\n\nNone: all are as in a known release."
    count = len(report.differences)
    keep = "function keeps" if count == 1 else "functions keep"
    lines = ["## Functions that differ", "", f"{count} {keep} this build from being a known one."]
    return "\n".join([*lines, *map(_difference, report.differences)])


def _difference(difference: Difference) -> str:
    kind = "diff" if re.search(r"^@@ ", difference.diff, re.M) else ""
    release = plain(difference.release)
    return f"\n### `{difference.target}`\n\nAgainst SGLang {release}:\n\n{block(difference.diff, kind)}"


def _installed(report: Report) -> str:
    versions = table(("", "version"), report.versions.items())
    arguments = block(" ".join(map(_quoted, report.arguments)) or "none")
    return f"## Versions\n\n{versions}\n\n## Arguments of launch_server\n\n{arguments}"


def _quoted(argument: str) -> str:
    return argument if re.fullmatch(r"[^\s'\"]+", argument) else f"'{argument}'"


# --- Markdown ----------------------------------------------------------------------------------------


def table(heads: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """Of plain text."""
    return _table_of_words(tuple(heads), [tuple(map(plain, row)) for row in rows])


def _table_of_words(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Of cells that are Markdown already."""
    lines = [_row(heads), _row(["---"] * len(heads)), *map(_row, rows)]
    return "\n".join(lines)


def _row(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


_SPECIAL: Mapping[str, str] = {
    "&": "&amp;",
    "<": "&lt;",
    ">": "&gt;",
    "\n": " ",
    "\r": " ",
    **{character: f"\\{character}" for character in "\\`*|[]~"},
}
_EMPHASIS = re.compile(r"(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])")  # others are within a word


def plain(text: str) -> str:
    """Shown as it is, in one line, whatever is in it."""
    return _EMPHASIS.sub(r"\_", "".join(_SPECIAL.get(character, character) for character in text))


def block(text: str, kind: str = "") -> str:
    """Verbatim; the fence is longer than any in the text."""
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{kind}\n{text.rstrip()}\n{fence}"
