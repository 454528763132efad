"""lmms_eval 0.7.3 as it is, against a real patched server, and against servers that are dead or die."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from rig.server import Server, ServerError
from scripts.environment.parts import provide
from scripts.evaluation import gate, lmms
from scripts.evaluation.checks import Check, check_result
from scripts.evaluation.pictures import OWN_TASKS, pictures
from scripts.evaluation.results import Layout, Result, Side
from scripts.evaluation.servers import configure, running
from sglang_npu_pp.tools.certify.ports import HOST, free_ports

from .samples import fake_server

pytestmark = pytest.mark.server

SAMPLES = 20
LIMIT_S = 240.0


def accuracy(logs: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "scripts/accuracy.py", "--logs", str(logs), *arguments]
    return subprocess.run(
        command, cwd=gate.ROOT, capture_output=True, text=True, timeout=LIMIT_S, check=False
    )


@pytest.fixture(scope="module")
def patched(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Server, lmms.Target]]:
    """The trained model, tp 1 pp 2."""
    provide(lmms.PART.name)
    layout, folder = Layout(1, 2), tmp_path_factory.mktemp("patched")
    server = configure(gate.SHIPPED_MODEL, layout, Side.PATCHED, folder / "log")
    try:
        with running(server, layout, Side.PATCHED, 16) as target:
            yield server, target
    except ServerError as error:
        if "while it was answering questions" not in error.reason:  # the last test here kills it
            raise


@pytest.mark.thorough
def test_both_tasks_are_answered_as_the_model_was_trained(
    patched: tuple[Server, lmms.Target], tmp_path: Path
) -> None:
    """Digits as digits, and as letters through lmms_eval's own MMMU prompt."""
    _, target = patched
    plain, lettered = lmms.run_tasks(OWN_TASKS, target, tmp_path, limit=SAMPLES, limit_s=LIMIT_S)
    digits = {str(number): picture.answer for number, picture in enumerate(pictures(SAMPLES))}
    for result, right in (
        (plain, digits),
        (lettered, {number: "ABCDEFGHIJ"[int(digit)] for number, digit in digits.items()}),
    ):
        assert check_result(result, gate.SHIPPED_FLOOR) == []
        assert (result.asked, result.ran, result.failed) == (SAMPLES, SAMPLES, 0)
        assert len(result.tokens) == SAMPLES
        assert all(len(token.top) == 2 for tokens in result.tokens.values() for token in tokens)
        share = sum(result.answers[number] == answer for number, answer in right.items()) / SAMPLES
        assert result.accuracy == pytest.approx(share)


@pytest.mark.thorough
def test_the_command_measures_one_server_as_it_is(tmp_path: Path) -> None:
    """A server that says 4 to everything: as many right as there are fours, and that is below the floor."""
    with fake_server("4") as server:
        done = accuracy(
            tmp_path,
            *("--base-url", f"{server.url}/v1", "--tasks", "digits_plain", "--samples", "10"),
            *("--floor", "0.97", "--json", str(tmp_path / "report.json")),
        )
    assert done.returncode == 1, done.stdout + done.stderr
    assert "nothing was compared with an unpatched one" in done.stdout
    report = json.loads((tmp_path / "report.json").read_text())
    (result,) = report["results"]
    fours = sum(picture.answer == "4" for picture in pictures(10))
    assert result["accuracy"] == pytest.approx(fours / 10)
    assert result["server"] == "as given"
    assert [finding["check"] for finding in report["findings"]] == [Check.FLOOR.value]


@pytest.mark.thorough
def test_a_server_that_dies_in_the_middle_is_red(tmp_path: Path) -> None:
    """lmms_eval itself ends with exit code 0 and a score."""
    with fake_server("4", lives=4) as server:
        done = accuracy(
            tmp_path,
            *("--base-url", server.url, "--tasks", "digits_plain", "--samples", "10"),
            *("--json", str(tmp_path / "report.json")),
        )
    assert done.returncode == 1, done.stdout + done.stderr
    report = json.loads((tmp_path / "report.json").read_text())
    found = [finding["check"] for finding in report["findings"]]
    assert found == [Check.REQUESTS.value, Check.SAMPLES.value]
    (result,) = report["results"]
    assert (result["samples_asked"], result["samples_ran"]) == (10, 4)


def test_a_dead_server_is_one_sentence_and_no_score(tmp_path: Path) -> None:
    done = accuracy(tmp_path, "--base-url", f"http://{HOST}:{free_ports(1)[0]}")
    assert done.returncode == 2
    (sentence,) = done.stderr.splitlines()
    assert sentence.startswith("accuracy: no OpenAI-compatible server answers at http://127.0.0.1:")
    assert "connection refused" in sentence
    assert "correct --base-url" in sentence


@pytest.mark.thorough
def test_a_server_of_ours_that_dies_in_the_middle_is_noticed(
    patched: tuple[Server, lmms.Target], tmp_path: Path
) -> None:
    """Either it is seen that the process ended, or its requests failed; never a score. The last test here."""
    server, target = patched
    victims = server.scheduler_pids()

    def kill(answered: int) -> None:
        while answered and victims:
            os.kill(victims.pop(), signal.SIGKILL)

    results: list[Result] = []
    try:
        results += lmms.run_tasks(OWN_TASKS, target, tmp_path, limit=None, limit_s=LIMIT_S, on_progress=kill)
    except ServerError as error:
        assert "ended with exit code" in error.reason
    assert not victims, "no request had been answered"
    for result in results:
        assert Check.REQUESTS in [finding.check for finding in check_result(result, None)]
