"""The benchmark as a user runs it, on real servers; times are not looked at."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from scripts.bench.competitors import OURS, PULL_REQUEST, UPSTREAM
from scripts.bench.link import reason_for_loopback
from scripts.bench.report import read_rows

ROOT = Path(__file__).parents[2]
LIMIT_S = 500.0


def bench(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run it in a session of its own, which is ended if the limit passes."""
    command = [sys.executable, "-m", "scripts.bench", "--logs", str(folder / "logs"), *arguments]
    with subprocess.Popen(
        command,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    ) as process:
        try:
            output, _ = process.communicate(timeout=LIMIT_S)
        except BaseException:
            os.killpg(process.pid, signal.SIGTERM)
            raise
    return subprocess.CompletedProcess(command, process.returncode, output)


@pytest.mark.server
@pytest.mark.release
def test_the_pull_requests_design_gives_upstreams_tokens_over_a_link(tmp_path: Path) -> None:
    """That ours does is tested in tests/server."""
    json_path, figure = tmp_path / "bench.json", tmp_path / "bench.png"
    arguments = ["--model-path", str(ROOT / "sglang_npu_pp/tools/certify/model"), "--repetitions", "1"]
    arguments += [
        "--quick",
        "--skip-idle",
        "--competitors",
        PULL_REQUEST,
        "--depths",
        "0",
        "--loads",
        "decode",
        "--pads",
        "0",
        "--delays",
        "0,2",
    ]
    done = bench(tmp_path, *arguments, "--json", str(json_path), "--figure", str(figure))
    assert done.returncode == 0, done.stdout
    rows = read_rows(json_path)
    delays = [0.0] if reason_for_loopback() else [0.0, 2.0]
    wanted = {(name, delay) for name in (UPSTREAM, PULL_REQUEST) for delay in delays}
    assert {(row.competitor, row.delay_ms) for row in rows} == wanted
    assert all(row.tokens_equal and row.n == 1 for row in rows)
    written = json.loads(json_path.read_text())
    assert written["conditions"]["versions"]["sglang"] == "0.5.21"
    assert figure.read_bytes().startswith(b"\x89PNG")
    assert not list((tmp_path / "logs").iterdir())  # nothing is left when all went well


@pytest.mark.server
@pytest.mark.release
def test_servers_that_speculate_give_equal_tokens_with_drafts_and_without(tmp_path: Path) -> None:
    json_path = tmp_path / "bench.json"
    arguments = ["--speculation", "--skip-idle", "--repetitions", "1", "--json", str(json_path)]
    done = bench(tmp_path, *arguments, "--loads", "decode", "--pads", "0", "--delays", "0")
    assert done.returncode == 0, done.stdout
    rows = read_rows(json_path)
    wanted = [(UPSTREAM, True), (OURS, True), (OURS, False)]
    assert [(row.competitor, row.drafts) for row in rows] == wanted
    assert all(row.tokens_equal for row in rows)
    assert [row.by_drafts is not None for row in rows] == [False, True, False]


@pytest.mark.server
@pytest.mark.release
def test_pairs_that_draft_give_equal_tokens(tmp_path: Path) -> None:
    json_path = tmp_path / "bench.json"
    arguments = ["--pairs", "--skip-idle", "--repetitions", "1", "--json", str(json_path)]
    done = bench(tmp_path, *arguments, "--pads", "0", "--delays", "0")
    assert done.returncode == 0, done.stdout
    rows = read_rows(json_path)
    assert [(row.competitor, row.drafts, row.load) for row in rows] == [
        (UPSTREAM, True, "prefill"),
        (OURS, True, "prefill"),
    ]
    assert all(row.tokens_equal for row in rows)


def test_a_model_that_does_not_exist_is_one_sentence(tmp_path: Path) -> None:
    done = bench(tmp_path, "--quick", "--link", "none", "--model-path", str(tmp_path / "nothing"))
    assert done.returncode == 2
    assert "is not a model directory" in done.stdout
    assert "Traceback" not in done.stdout
