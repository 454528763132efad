"""A rank crashes: SGLang dumps the others by default, and then nothing of the server is left."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import requests

from rig.launcher import Launcher
from rig.server import Server

BIN = Path(sys.executable).parent
END_LIMIT_S = 60.0
REQUEST = {"input_ids": [5, 6, 7, 8], "sampling_params": {"max_new_tokens": 20, "ignore_eos": True}}

pytestmark = [
    pytest.mark.thorough,
    pytest.mark.skipif(shutil.which("py-spy", path=BIN) is None, reason="py-spy is not installed"),
]


@pytest.fixture
def fault(tmp_path: Path) -> Path:
    return tmp_path / "fault"


@pytest.fixture
def server(make_launcher: Callable[[str], Launcher], fault: Path) -> Iterator[Server]:
    launcher = make_launcher("crash")
    path = os.pathsep.join([str(BIN), os.environ["PATH"]])
    env = {"PATH": path, "PP_PROBE_FAULT_FILE": str(fault)}
    yield launcher.start(2, 2, patched=True, env=env)
    launcher.stop_all()


def test_who_is_alive_is_dumped_before_the_node_ends(server: Server, fault: Path) -> None:
    """Those of stage 0 have lost a peer; upstream's would be ending, or wait in a collective."""
    first, second, *_ = server.scheduler_pids()
    assert len(server.post("/generate", REQUEST).json()["output_ids"]) == 20
    fault.write_text("crash of sglang::scheduler_PP1_TP0 once")
    with suppress(requests.RequestException):
        server.post("/generate", REQUEST, timeout_s=END_LIMIT_S)
    server.wait_end(END_LIMIT_S)
    log = server.log_text()
    said = [
        "RuntimeError: crash of sglang::scheduler_PP1_TP0",
        "Sleeping 5 seconds before crash diagnostics",
        f"Pyspy dump for PID {first} ",
        f"Pyspy dump for PID {second} ",
    ]
    places = [log.find(line) for line in said]
    assert -1 not in places, log[-5000:]
    assert places[:2] == sorted(places[:2])
    assert places[1] < min(places[2:])
    assert "stage 0 rank 0: stage 1 has shut down" in log
    assert "Waiting 60.0 seconds for CUDA coredumps" not in log, "nothing writes one here"
    assert not [path.name for path in server._shared_memory if path.exists()]
