"""The recording of upstream's pipeline, by the order in which upstream's loop calls; and of two servers."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from scripts.bench.link import Loopback
from scripts.bench.pipelines import Setting
from scripts.bench.upstream_trace import Recorder
from sglang_npu_pp.observe.trace import read_traces
from sglang_npu_pp.tools.timeline.states import COMPUTE, analyse

ROOT = Path(__file__).parents[2]
DEPTH_0, STAGES = 2, 2  # slots


class Receiver:
    __slots__ = ()  # as upstream's, nothing can be set on it

    def _pull_raw_reqs(self) -> list[Any]:
        return ["request"]


class Scheduler:
    """What upstream's loop calls, without a network: sends leave one piece of work to wait for."""

    def __init__(self, stage: int) -> None:
        self.pp_group = SimpleNamespace(rank_in_group=stage, is_last_rank=stage == STAGES - 1)
        self.pp_loop_size = DEPTH_0
        self.request_receiver = type("OwnReceiver", (Receiver,), {"__slots__": ()})()
        self.send_req_work: list[Any] = []
        self.send_proxy_work: list[Any] = []
        self.send_output_work: list[Any] = []
        self.outputs = False  # whether there are some to pass on

    def ingest_requests(self) -> Any:
        return self.request_receiver._pull_raw_reqs()

    def _pp_send_pyobj_to_next_stage(self, data: Any, async_send: bool = False) -> list[Any]:
        return [data]

    def _pp_launch_batch(self, *arguments: Any) -> str:
        return "result"

    def _pp_send_proxy_to_next_stage(self, result: Any) -> None:
        self.send_proxy_work = [result]

    def _pp_send_output_to_next_stage(self, slot: int) -> list[Any]:
        return ["outputs"] if self.pp_group.is_last_rank or self.outputs else []

    def _pp_recv_dict_from_prev_stage(self) -> str:
        self.outputs = True
        return "outputs"

    def _pp_recv_proxy_tensors(self) -> str:
        return "proxies"

    def _pp_commit_comm_work(self, work: list[Any], fence_next_forward: bool = False) -> None:
        work.clear()

    def iteration(self, slot: int, receives_outputs: bool) -> None:
        """The calls of `event_loop_pp`, in its order."""
        first, last = self.pp_group.rank_in_group == 0, self.pp_group.is_last_rank
        requests = self.ingest_requests()
        if not last:
            self._pp_commit_comm_work(self.send_req_work)
            self.send_req_work = self._pp_send_pyobj_to_next_stage(requests, async_send=True)
        if not first:
            self._pp_recv_proxy_tensors()
        self._pp_commit_comm_work(self.send_proxy_work, fence_next_forward=False)
        self._pp_launch_batch(slot)
        self._pp_commit_comm_work(work=self.send_output_work)
        self.send_output_work = self._pp_send_output_to_next_stage(slot)
        if receives_outputs:
            self._pp_recv_dict_from_prev_stage()
        if not last:
            self._pp_send_proxy_to_next_stage("result")


@pytest.fixture
def recorders(tmp_path: Path) -> Iterator[list[Recorder]]:
    """Both stages after three iterations, which they took in turns."""
    handler = signal.getsignal(signal.SIGUSR2)
    schedulers = [Scheduler(stage) for stage in range(STAGES)]
    made = [Recorder(scheduler, tmp_path) for scheduler in schedulers]
    for recorder in made:
        recorder.install()
    for number in range(3):
        for scheduler in schedulers:
            scheduler.iteration(number % DEPTH_0, receives_outputs=number > 0)
    yield made
    signal.signal(signal.SIGUSR2, handler)


def events(recorder: Recorder, iteration: int) -> list[str]:
    """Of one iteration, by name, kind, and the iteration of the message where it is another."""
    names: list[str] = []
    current = -1
    for event in recorder.trace.events():
        current += event.name == "iteration"
        if current == iteration:
            words = [event.name, event.kind, *([str(event.iteration)] if event.iteration != current else [])]
            names.append(" ".join(filter(None, words)))
    return names


def test_the_first_stage_passes_on_outputs_of_two_iterations_before(recorders: list[Recorder]) -> None:
    assert events(recorders[0], 2) == [
        "iteration",
        "full requests",
        "post_send requests",
        "push requests",
        "full proxy",
        "post_send proxy",
        "launch",
        "launched",
        "push output 0",
        "wait output 1",
        "ready output 1",
        "push proxy",
    ]


def test_the_last_stage_waits_for_everything_and_sends_its_outputs(recorders: list[Recorder]) -> None:
    assert events(recorders[1], 2) == [
        "iteration",
        "wait requests",
        "ready requests",
        "wait proxy",
        "ready proxy",
        "launch",
        "launched",
        "full output",
        "post_send output",
        "push output",
        "wait output 1",
        "ready output 1",
    ]


def test_the_timeline_reads_what_was_recorded(recorders: list[Recorder], tmp_path: Path) -> None:
    for recorder in recorders:
        assert recorder.write().parent == tmp_path
    traces = read_traces(tmp_path)
    assert [trace.offset_ns for trace in traces] == [0, 0]
    stages = analyse(traces).stages
    assert [stage.launches for stage in stages] == [2, 3]  # from where both have recorded something
    assert all(stage.seconds(COMPUTE) > 0 for stage in stages)


def test_the_heading_says_what_ran() -> None:
    sentence = Setting(delay_ms=0.0, pad_ms=20.0, depth=1).sentence(Loopback())
    assert "link: loopback, no delay; decode, forwards padded to 20 ms; depth 1" in sentence


@pytest.mark.server
@pytest.mark.release
def test_two_servers_are_recorded_and_drawn(tmp_path: Path) -> None:
    picture = tmp_path / "pipelines.svg"
    command = [sys.executable, "-m", "scripts.bench.pipelines", "--link", "none", "--pad", "5"]
    command += ["--model-path", str(ROOT / "sglang_npu_pp/tools/certify/model")]
    command += ["--folder", str(tmp_path), "--output", str(picture)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    text = picture.read_text()
    assert "upstream: " in text
    assert "sglang-npu-pp: " in text
    assert "forwards padded to 5 ms" in text
    for design in ("upstream", "sglang-npu-pp"):
        assert all(stage.launches >= 60 for stage in analyse(read_traces(tmp_path / design)).stages)
