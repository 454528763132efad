"""A server is examined: over real HTTP and with real processes, of a program that takes SGLang's place.

Real servers: tests/server/test_certify_examine.py.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from sglang_npu_pp.tools.certify.aborts import abort, wait_idle
from sglang_npu_pp.tools.certify.battery import choose
from sglang_npu_pp.tools.certify.checks import ABORTS, ALIVE, IN_FORCE, ONE_BY_ONE, TOGETHER, checks
from sglang_npu_pp.tools.certify.examine import Examination, observe
from sglang_npu_pp.tools.certify.launch import LaunchedServer
from sglang_npu_pp.tools.certify.lost_peer import lose_peer
from sglang_npu_pp.tools.certify.results import Side, Verdict
from sglang_npu_pp.tools.certify.served import ask_served

pytestmark = pytest.mark.slow

STAND_IN = Path(__file__).with_name("stand_in.py")
LIMIT_S = 20.0
Start = Callable[..., LaunchedServer]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    program = tmp_path / "program"
    program.write_text(f"#!{sys.executable}\n{STAND_IN.read_text()}")
    program.chmod(0o755)
    with ExitStack() as stack:

        def started(mistake: str = "") -> LaunchedServer:
            server = LaunchedServer(
                [], tmp_path / f"server {mistake}", python=str(program), environment={"MISTAKE": mistake}
            )
            return stack.enter_context(server)

        yield started


def examination(server: LaunchedServer) -> Examination:
    served = ask_served(server)
    return Examination(served, choose(served), concurrency=4, limit_s=LIMIT_S)


def test_a_server_is_observed(start: Start) -> None:
    server = start()
    steps: list[str] = []
    served = ask_served(server)
    what = Examination(served, choose(served), 4, LIMIT_S, steps.append)
    found = observe(server, Side.PATCHED, 1, what, times=2, aborts=True)
    assert found.ended == ""
    assert found.schedulers == 2
    assert found.in_force == ["stage 0 rank 0", "stage 1 rank 0"]
    assert len(found.one_by_one) == 2
    assert found.one_by_one[0].answers == found.one_by_one[1].answers
    assert found.concurrent
    assert set(found.concurrent.answers) == set(what.battery.names_in_company) - {"regex", "another regex"}
    assert found.refused == {
        "regex": 'HTTP 400: "no grammars here"',
        "another regex": 'HTTP 400: "no grammars here"',
    }
    assert found.left_out["picture 64 x 64"] == "the model takes no pictures"
    assert found.no_traces == "This server was started without SGLANG_NPU_PP_TELEMETRY_DIR."
    assert found.abort_problems == []
    assert found.after_aborts
    assert found.after_aborts.answers == found.one_by_one[0].answers
    assert steps == [
        "one by one",
        "one by one",
        "4 at a time",
        "traces",
        "aborts",
        "one by one, behind the aborts",
    ]


def test_answers_by_chance_are_seen(start: Start) -> None:
    server, other = start(), start("answers by chance")
    what = examination(server)
    reference = observe(server, Side.UNPATCHED, 1, what, times=2)
    found = checks([reference, observe(other, Side.PATCHED, 1, what.without(reference.refused))])
    red = {check.name for check in found if check.verdict is Verdict.FAILED}
    assert red == {ONE_BY_ONE, TOGETHER, IN_FORCE}  # the stand-in is patched on either side


def test_a_server_that_ends_is_a_red_check(start: Start) -> None:
    server = start()
    what = examination(server)
    reference = observe(server, Side.UNPATCHED, 1, what)
    other = start("does not end")
    for process in other.processes():
        os.kill(process.pid, signal.SIGKILL)
    found = observe(other, Side.PATCHED, 1, what)
    assert "connection" in found.ended.lower() or "exit code -9" in found.ended
    assert next(c for c in checks([reference, found]) if c.name == ALIVE).verdict is Verdict.FAILED


@pytest.mark.parametrize(
    ("mistake", "words"),
    [
        ("", ""),
        ("never aborts", "a request aborted by its name ended with 'length'"),
        ("never idle", "the server is not idle after"),
    ],
)
def test_requests_are_aborted(start: Start, mistake: str, words: str) -> None:
    server = start(mistake)
    limit_s = LIMIT_S if mistake != "never idle" else 2.0
    problems = abort(server, ask_served(server), limit_s)
    assert any(words in line for line in problems) if words else problems == []


def test_a_problem_with_aborts_turns_their_check_red(start: Start) -> None:
    server = start("never aborts")
    what = examination(server)
    found = observe(server, Side.PATCHED, 1, what, aborts=True)
    assert next(c for c in checks([found]) if c.name == ABORTS).verdict is Verdict.FAILED


def test_an_idle_server_is_told_from_a_busy_one(start: Start) -> None:
    assert wait_idle(start(), LIMIT_S) == []


@pytest.mark.parametrize(
    ("mistake", "words"),
    [
        ("", []),
        ("says nothing", ["the log does not say that stage 1 rank 0 is gone"]),
    ],
)
def test_a_scheduler_is_killed(start: Start, mistake: str, words: list[str]) -> None:
    server = start(mistake)
    assert lose_peer(server, ask_served(server), LIMIT_S) == words
    assert server.processes() == []


def test_a_server_that_stays_without_its_scheduler_is_a_problem(start: Start) -> None:
    server = start("does not end")
    problems = lose_peer(server, ask_served(server), 1.0)
    assert any("is still there after 1 s" in line for line in problems)
    assert "4 of 4 clients still wait after 1 s" in problems
