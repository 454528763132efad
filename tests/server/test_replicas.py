"""Two data-parallel replicas of two stages, in a temporary directory with a long name."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from rig.folders import short_directory
from rig.launcher import Launcher
from rig.server import Server
from sglang_npu_pp.observe.telemetry import read_snapshots
from sglang_npu_pp.observe.trace import read_traces
from sglang_npu_pp.tools.timeline.states import analyse

pytestmark = pytest.mark.release  # tests/test_reporting.py and test_startup.py show it without a server

LENGTH = 86  # of a TMPDIR that serves upstream
LIMIT_S = 120.0


@pytest.fixture(scope="module")
def server(make_launcher: Callable[[str], Launcher]) -> Iterator[Server]:
    launcher = make_launcher("replicas")
    with short_directory() as base:
        tmpdir = base / ("d" * (LENGTH - len(os.fsencode(base)) - 1))
        tmpdir.mkdir()
        with launcher.configure(
            1,
            2,
            patched=True,
            args=("--dp-size", "2"),
            env={"SGLANG_CPU_OMP_THREADS_BIND": "0|1|0|1"},
            node_env={0: {"TMPDIR": str(tmpdir)}},
        ) as server:
            yield server


def test_every_replica_has_files_of_its_own(server: Server) -> None:
    body = {"input_ids": [5, 6, 7, 8], "sampling_params": {"max_new_tokens": 8, "ignore_eos": True}}
    for replica in (0, 1):
        answer = server.post("/generate", {**body, "routed_dp_rank": replica}, timeout_s=LIMIT_S).json()
        assert len(answer["output_ids"]) == 8
    folder = server.log.parent
    assert len(server.dump_telemetry()) == 8
    places = [(replica, stage, 0) for replica in (0, 1) for stage in (0, 1)]
    snapshots = read_snapshots(folder)
    assert [snapshot.place for snapshot in snapshots] == places
    assert sorted(snapshot.pid for snapshot in snapshots) == sorted(server.scheduler_pids())
    for replica in (0, 1):
        assert [stage.launches > 0 for stage in analyse(read_traces(folder, replica=replica)).stages] == [
            True,
            True,
        ]


def test_a_report_that_cannot_be_written_ends_no_scheduler(server: Server) -> None:
    folder = Path(server.environment["SGLANG_NPU_PP_TELEMETRY_DIR"])
    hidden = folder.with_name("hidden")
    folder.rename(hidden)
    folder.touch()
    try:
        schedulers = server.scheduler_pids()
        for pid in schedulers:
            os.kill(pid, signal.SIGUSR2)
        body = {"input_ids": [5, 6, 7], "sampling_params": {"max_new_tokens": 4, "ignore_eos": True}}
        assert len(server.post("/generate", body, timeout_s=LIMIT_S).json()["output_ids"]) == 4
        assert server.scheduler_pids() == schedulers
    finally:
        folder.unlink()
        hidden.rename(folder)
