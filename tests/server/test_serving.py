"""Aborts, disconnects, streams and counters on one patched server, tp 1 pp 2."""

from __future__ import annotations

import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from rig import battery
from rig.launcher import traces
from rig.server import Server
from sglang_npu_pp.__main__ import main
from sglang_npu_pp.observe.telemetry import read_snapshots, render_table
from sglang_npu_pp.observe.trace import read_traces
from sglang_npu_pp.settings import Settings
from sglang_npu_pp.tools.timeline.states import EXPOSED, analyse
from sglang_npu_pp.transport.clock import ROUNDS

LONG = {"ignore_eos": True, "max_new_tokens": 2000}


def reference(server: Server) -> dict[str, Any]:
    return battery.summary(
        battery.generate(
            server, input_ids=battery.prompt(70), return_logprob=True, sampling_params={"ignore_eos": True}
        )
    )


@pytest.fixture(autouse=True)
def unharmed(patched: Server) -> Any:
    """Whatever a test does, a request behind it is answered as one before it."""
    before = reference(patched)
    yield
    assert not battery.differences({"reference": before}, {"reference": reference(patched)})


def test_abort_of_a_running_request_ends_it(patched: Server) -> None:
    with patched.post(
        "/generate",
        {"input_ids": battery.prompt(20), "sampling_params": LONG, "stream": True, "rid": "victim"},
        stream=True,
    ) as response:
        lines = response.iter_lines()
        next(line for line in lines if line.startswith(b"data: {"))  # it runs
        assert patched.post("/abort_request", {"rid": "victim"}).ok
        last = [line for line in lines if line.startswith(b"data: {")][-1]
    assert json.loads(last[6:])["meta_info"]["finish_reason"]["type"] == "abort"


def test_abort_of_everything_under_load(patched: Server) -> None:
    """Some are decoding, some are in the middle of chunked prefill, some wait."""
    started = threading.Barrier(13)

    def ask(index: int) -> dict[str, Any]:
        started.wait(timeout=60)
        return battery.generate(
            patched, input_ids=battery.prompt(100 * index + 5, seed=index), sampling_params=LONG
        )

    with ThreadPoolExecutor(12) as pool:
        answers = [pool.submit(ask, index) for index in range(12)]
        started.wait(timeout=60)
        while not all(answer.done() for answer in answers):
            assert patched.post("/abort_request", {"abort_all": True}).ok
        reasons = [answer.result()["meta_info"]["finish_reason"]["type"] for answer in answers]
    assert set(reasons) == {"abort"}


def test_a_client_that_disconnects_ends_its_request(patched: Server) -> None:
    for _ in range(3):
        body = {"input_ids": battery.prompt(30), "sampling_params": LONG, "stream": True}
        with patched.post("/generate", body, stream=True) as response:
            next(response.iter_lines())
    for _ in range(2000):  # looks, not seconds: an aborted request is gone after a few
        loads = patched.get("/v1/loads").json()["loads"]
        if not any(load["num_running_reqs"] + load["num_waiting_reqs"] for load in loads):
            return
    pytest.fail("the requests of disconnected clients are still running")


@pytest.mark.parametrize(
    "busy", [pytest.param(False, marks=pytest.mark.thorough), True], ids=["idle", "busy"]
)
def test_a_server_that_was_suspended_for_longer_than_the_time_out_goes_on(
    patched: Server, busy: bool
) -> None:
    """A suspended machine, a paused container, Ctrl-Z: all of its processes stop, and go on together."""
    request: dict[str, Any] = {
        "input_ids": battery.prompt(40),
        "sampling_params": {"ignore_eos": True, "max_new_tokens": 300, "temperature": 0},
        "stream": True,
    }
    whole = battery.stream(patched, **request)[-1]
    with ExitStack() as stack:
        if busy:
            response = stack.enter_context(patched.post("/generate", request, stream=True))
            lines = (line for line in response.iter_lines() if line.startswith(b"data: {"))
            next(lines)
        patched.freeze()
        try:
            stopped = time.monotonic()
            while time.monotonic() - stopped < Settings().peer_timeout_s + 1:
                time.sleep(0.1)
        finally:
            patched.thaw()
        if busy:
            assert json.loads(list(lines)[-1][6:])["text"] == whole
    assert battery.stream(patched, **request)[-1] == whole


def test_a_prompt_that_is_too_long_is_refused(patched: Server) -> None:
    response = patched.post("/generate", {"input_ids": battery.prompt(9000)})
    assert response.status_code == 400
    assert "longer than the model's context length" in response.text


def test_stream_comes_in_pieces(patched: Server) -> None:
    chunks = battery.stream(patched, input_ids=battery.prompt(25), sampling_params={"ignore_eos": True})
    assert len(chunks) > 2


def test_an_idle_server_sends_next_to_nothing(patched: Server) -> None:
    """Upstream's stages exchange empty lists without pause. Here the first stage waits for clients, at
    most a second at a time: the requests pushed between two looks are counted."""
    before = len(traces(patched)[0])
    after = len(traces(patched)[0])
    assert after - before < 50


def test_counters_of_both_ends_agree(patched: Server) -> None:
    patched.dump_telemetry()
    first, second = read_snapshots(patched.log.parent)
    assert (first.stage, second.stage) == (0, 1)
    for kind in ("requests", "proxy"):
        # The dump of the two ranks is not one moment: an idle iteration may lie between.
        assert abs(first.sent[kind]["messages"] - second.received[kind]["messages"]) <= 2
    assert first.sent["proxy"]["messages"] == first.received["output"]["messages"]
    assert second.sent["output"]["messages"] == second.received["proxy"]["messages"]
    assert first.sent["proxy"]["bytes"] > 100_000
    assert first.phases_s["forward"] > 0
    assert "wait proxy" in render_table([first, second])


def test_the_timeline_of_a_server_says_where_its_time_went(
    patched: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    patched.dump_telemetry()
    folder = patched.log.parent
    assert main(["timeline", str(folder), "--output", str(tmp_path / "picture.svg")]) == 0
    assert "exposed communication" in capsys.readouterr().out
    assert "stage 1" in (tmp_path / "picture.svg").read_text()
    first, second = analyse(read_traces(folder)).stages
    assert abs(first.launches - second.launches) <= 2  # the dump of the two ranks is not one moment
    # The server is shared. Requests of other tests on it may make either stage wait: for the outcomes
    # of control requests on the other one, for objects that tell whether a grammar is ready.
    of_others = {"outcome", "object"}
    assert {span.kind for span in first.spans if span.state == EXPOSED} - of_others <= {"output"}
    assert {span.kind for span in second.spans if span.state == EXPOSED} - of_others <= {"requests", "proxy"}


def test_stages_measure_how_far_they_are_from_each_other(patched: Server) -> None:
    """Every rank pings the same rank of every other stage at its start; the last message is the result."""
    patched.dump_telemetry()
    first, second = read_snapshots(patched.log.parent)
    assert first.received["clock"]["messages"] == second.sent["clock"]["messages"] == ROUNDS
    assert second.received["clock"]["messages"] == first.sent["clock"]["messages"] == ROUNDS + 1


def test_each_process_says_once_what_was_activated(patched: Server) -> None:
    lines = [line for line in patched.log_text().splitlines() if "patches in force" in line]
    assert len(lines) == 3  # engine, two schedulers
    assert all("SGLang 0.5.21" in line for line in lines)
    assert any("stage 0 rank 0 of 2 stages" in line for line in lines)
