"""`make matrix` without servers: verdicts, exit status, and what an interrupted run leaves."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from rig.releases import Release
from rig.server import ServerError
from scripts import matrix
from scripts.environment.installer import InstallerError


@pytest.fixture
def run(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Iterator[Callable[[Callable[[str], Any]], tuple[int, Any, str]]]:
    """Run 0.5.15 and 0.5.23 at two layouts, where `outcome(release)` takes the place of two servers.

    Returns the exit status, the JSON file, and what was printed.
    """
    report = tmp_path / "report.json"
    console = Console(record=True, width=200, quiet=False)
    arguments = ["matrix", "--releases", "0.5.15", "0.5.23", "--layouts", "tp1-pp2", "tp1-pp4"]
    monkeypatch.setattr("sys.argv", [*arguments, "--json", str(report)])
    monkeypatch.setattr(matrix, "console", console)
    monkeypatch.setattr(matrix, "install", lambda releases: None)
    monkeypatch.setattr(Release, "pin", lambda self, package: "any")  # that of a release needs it installed
    monkeypatch.setattr(matrix, "complaints", lambda outcome: outcome)
    monkeypatch.setattr(matrix.tempfile, "mkdtemp", lambda prefix: str(make(tmp_path / prefix)))
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}

    def start(outcome: Callable[[str], Any]) -> tuple[int, Any, str]:
        monkeypatch.setattr(matrix, "compare", lambda launcher, layout, release: outcome(release.name))
        status = matrix.main()
        return status, json.loads(report.read_text()), console.export_text()

    yield start
    for number, handler in handlers.items():
        signal.signal(number, handler)


def make(folder: Path) -> Path:
    folder.mkdir()
    return folder


def test_all_is_well(run: Any, tmp_path: Path) -> None:
    status, report, text = run(lambda release: {})
    assert status == 0
    order = [("0.5.15", "tp1-pp2"), ("0.5.23", "tp1-pp2"), ("0.5.15", "tp1-pp4"), ("0.5.23", "tp1-pp4")]
    assert [(cell["release"], cell["layout"]) for cell in report] == order
    assert text.count("same") == 8  # once when the cell ends, once in the table
    assert "not in company: token ids logprob" in text
    assert not list(tmp_path.glob("matrix-*")), "logs of good cells are removed"


def test_what_differed_is_shown_and_the_run_fails(run: Any, tmp_path: Path) -> None:
    wrong = {"answers one by one differ": ["length 7: /ids/3 is 5, expected 4"]}
    status, report, text = run(lambda release: wrong if release == "0.5.15" else {})
    assert status == 1
    assert [bool(cell["wrong"]) for cell in report] == [True, False, True, False]
    assert "answers one by one differ (1): length 7: /ids/3 is 5, expected 4" in text
    assert len(list(tmp_path.glob("matrix-0.5.15-*"))) == 2, "logs of bad cells stay"


def test_a_server_that_fails_is_a_bad_cell_and_the_others_run(run: Any) -> None:
    def outcome(release: str) -> dict[str, Any]:
        if release == "0.5.15":
            raise ServerError("SGLang ended with exit code 1")
        return {}

    status, report, text = run(outcome)
    assert status == 1
    assert len(report) == 4
    assert "SGLang ended with exit code 1" in text


def test_an_interrupted_run_shows_what_it_has(run: Any) -> None:
    def outcome(release: str) -> dict[str, Any]:
        if release == "0.5.23":
            signal.raise_signal(signal.SIGTERM)
        return {}

    status, report, text = run(outcome)
    assert status == 130
    assert len(report) == 1
    assert "Interrupted" in text


def test_a_torch_npu_that_cannot_be_installed_ends_it_with_a_sentence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(version: str) -> None:
        raise InstallerError(f"torch=={version}+cpu could not be installed")

    monkeypatch.setattr("sys.argv", ["matrix", "--torch-npu", "2.10.0"])
    monkeypatch.setattr(matrix.torch_npu, "environment", fail)
    assert matrix.main() == 1
    assert capsys.readouterr().out == "matrix: torch==2.10.0+cpu could not be installed\n"
