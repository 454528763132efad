"""`make demo`, as a new user runs it."""

from __future__ import annotations

import subprocess
import sys

import pytest

from rig.launcher import RANDOM_MODEL, ROOT
from sglang_npu_pp.tools.certify.ports import free_ports


def demo(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "scripts/serve.py", "--demo", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)


@pytest.mark.release  # tests/test_newcomer.py runs `make demo`
def test_demo_answers_and_shows_where_the_time_went() -> None:
    """Of this server; one that failed at the same port has left what cannot be read."""
    (port,) = free_ports(1)
    left = ROOT / ".run" / str(port) / "telemetry"
    left.mkdir(parents=True)
    (left / "stage7-rank0.json").write_text("{}")
    result = demo("--port", str(port))
    assert result.returncode == 0, result.stdout + result.stderr
    assert "wait proxy" in result.stdout
    assert "stage" in result.stdout


@pytest.mark.release
def test_demo_fails_when_the_answer_is_wrong() -> None:
    result = demo("--model", str(RANDOM_MODEL), "--pp", "2", "--tp", "1")
    assert result.returncode == 1, result.stdout + result.stderr
