"""When a node may be ended in our way, and how its processes are named.

That it ends is shown in tests/server/test_lost_peers.py.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from sglang_npu_pp.ending import LAUNCHER
from sglang_npu_pp.patches.ending import launch_scheduler_processes, name_of


def server_args(**changed: Any) -> SimpleNamespace:
    """Those that matter here, with SGLang's defaults, of a server with two stages."""
    ours = {"pp_size": 2, "speculative_algorithm": None}
    return SimpleNamespace(**{**ours, "crash_dump_folder": None, "custom_sigquit_handler": None, **changed})


def launch(arguments: SimpleNamespace) -> str | None:
    """What the schedulers of such a server find in their environment. They are not started, as with Ray."""
    found = []

    def original(cls: Any, arguments: Any, ports: Any) -> tuple[None, None]:
        found.append(os.environ.get(LAUNCHER))
        return None, None

    launch_scheduler_processes(original, None, arguments, SimpleNamespace(instance_id="ipc:///tmp/x"))
    return found[0]


def test_schedulers_may_end_their_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(LAUNCHER, raising=False)
    pid, file = json.loads(launch(server_args()) or "")
    assert pid == os.getpid()
    assert file.startswith("/dev/shm/sglang_loads_x_")


@pytest.mark.parametrize(
    "changed",
    [
        {"pp_size": 1},
        {"speculative_algorithm": "EAGLE"},
        {"crash_dump_folder": "/tmp/dumps"},
        {"custom_sigquit_handler": print},
    ],
    ids=lambda changed: next(iter(changed)),
)
def test_they_may_not_where_sglang_has_more_to_do(
    changed: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(LAUNCHER, "[1]")  # another server of this process
    assert launch(server_args(**changed)) is None


@pytest.mark.parametrize(("value", "own"), [("1", True), ("true", True), ("0", False), ("", False)])
def test_a_dump_that_was_asked_for_is_made(value: str, own: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(LAUNCHER, raising=False)
    monkeypatch.setenv("SGLANG_PYSPY_DUMP_BEFORE_CRASH", value)
    assert (launch(server_args()) is None) == own


@pytest.mark.parametrize(
    ("title", "name"),
    [
        ("sglang::scheduler_PP1", "stage 1 rank 0"),
        ("sglang::scheduler_DP1_PP3_TP2_EP2", "stage 3 rank 2"),
        ("sglang::detokenizer", "sglang::detokenizer"),
    ],
)
def test_a_process_is_named_by_its_title(title: str, name: str) -> None:
    program = "import setproctitle, sys; setproctitle.setproctitle(sys.argv[1]); print(flush=True); input()"
    with subprocess.Popen(
        [sys.executable, "-c", program, title], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        process.stdout.readline()
        assert name_of(psutil.Process(process.pid)) == name
        process.kill()
