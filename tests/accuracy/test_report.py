"""The table and the JSON of an accuracy run."""

from __future__ import annotations

import io
import json
from pathlib import Path

from rich.console import Console

from scripts.evaluation.checks import check_all
from scripts.evaluation.report import Report, rows, show, to_json, write_json
from scripts.evaluation.results import Result, Side

from .samples import TOKENS, result

FLOOR = 0.97


def report(*results: Result) -> Report:
    return Report("digits_vl", results, check_all(results, FLOOR), FLOOR, 12.0, ["neither is MMMU."])


def printed(shown: Report) -> str:
    console = Console(file=io.StringIO(), width=140)
    show(shown, console)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_a_row_says_what_ran_and_what_differs() -> None:
    patched = result(Side.PATCHED, answers={"0": "4", "1": "9", "2": "1"}, ran=2, failed=1)
    unpatched_row, patched_row = rows([result(), patched])
    assert unpatched_row == ["digits", "tp1 pp2 cpu", "unpatched", "0.9800", "3/3", "", "", "0"]
    assert patched_row == ["digits", "tp1 pp2 cpu", "patched", "0.9800", "2/3", "1", "0.0e+00", "1"]


def test_requests_that_were_not_compared_are_named_in_the_row() -> None:
    *_, row = rows([result(), result(Side.PATCHED, tokens={"a#1": TOKENS})])
    assert row[-2] == "0.0e+00, 2 without a pair"
    *_, row = rows([result(tokens={}), result(Side.PATCHED, tokens={})])
    assert row[-2] == "none compared"


def test_the_verdict_and_its_reasons_are_printed() -> None:
    good = printed(report(result(), result(Side.PATCHED)))
    assert "GREEN" in good
    assert "neither is MMMU." in good
    bad = printed(report(result(), result(Side.PATCHED, failed=2, errors=("connection refused",))))
    assert "RED" in bad
    assert "GREEN" not in bad
    assert "2 requests failed (connection refused)" in bad


def test_a_report_without_results_is_red() -> None:
    assert not report().green


def test_the_json_holds_the_same(tmp_path: Path) -> None:
    patched = result(Side.PATCHED, answers={"0": "4", "1": "9", "2": "1"})
    path = tmp_path / "deeper" / "report.json"
    write_json(to_json(report(result(), patched)), path)
    read = json.loads(path.read_text())
    assert read["verdict"] == "RED"
    assert [finding["check"] for finding in read["findings"]] == ["answers"]
    assert read["results"][1]["answers_differ"] == ["1"]
    assert read["results"][1]["samples_asked"] == read["results"][1]["samples_ran"] == 3
    assert "answers_differ" not in read["results"][0]


def test_a_difference_that_is_not_a_number_can_be_written(tmp_path: Path) -> None:
    broken = {"a#1": (TOKENS[0].__class__("4", float("nan")), TOKENS[1])}
    shown = report(result(tokens={"a#1": TOKENS}), result(Side.PATCHED, tokens=broken))
    write_json(to_json(shown), tmp_path / "report.json")
    entry = json.loads((tmp_path / "report.json").read_text())["results"][1]
    assert entry["largest_logprob_difference"] == "inf"
