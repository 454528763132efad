"""An idle server sleeps while only clients can give it something to do, and not while it has to poll.

The probe counts, on the rank that listens to clients, how often an idle iteration met something to be polled
before its sleep, and how often it slept in spite of it.
"""

from __future__ import annotations

import struct
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from rig import battery
from rig.launcher import Launcher
from rig.server import Server
from sglang_npu_pp.tools.certify.ports import HOST

LIMIT_S = 30.0
KINDS = ("embeddings", "flush", "sessions", "health checks")  # as the probe has them
LANGUAGE_ONLY = ("--language-only", "--encoder-transfer-backend", "zmq_to_scheduler")
ENCODER_ONLY = ("--encoder-only", "--encoder-transfer-backend", "zmq_to_scheduler")
PICTURES = 3


class Counts:
    """Of the one rank of a server that may sleep."""

    def __init__(self, server: Server) -> None:
        found: list[tuple[int, ...]] = []
        for pid in server.scheduler_pids():
            data = (server.log.parent / f"{pid}.sleeps").read_bytes()
            found.append(struct.unpack(f"<{1 + 2 * len(KINDS)}Q", data))
        self.sleeps, *rest = (sum(column) for column in zip(*found, strict=True))
        self.met = dict(zip(KINDS, rest[::2], strict=True))
        self.slept = dict(zip(KINDS, rest[1::2], strict=True))


def wait_until(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + LIMIT_S
    while not condition():
        assert time.monotonic() < deadline, f"after {LIMIT_S:g} s {what}"
        time.sleep(0.05)


def wait_until_it_sleeps(server: Server) -> None:
    before = Counts(server).sleeps
    wait_until(lambda: Counts(server).sleeps > before + 1, "the idle server has not slept")


def run_for_long(server: Server) -> None:
    battery.generate(
        server, input_ids=battery.prompt(30), sampling_params={"ignore_eos": True, "max_new_tokens": 400}
    )


def test_a_server_with_nothing_to_poll_sleeps(patched: Server) -> None:
    wait_until_it_sleeps(patched)


def test_a_session_that_ends_by_itself_keeps_the_server_awake(patched: Server) -> None:
    opened = {"capacity_of_str_len": 1000, "session_id": "idle", "timeout": 600.0}
    before = Counts(patched)
    assert patched.post("/open_session", opened).json() == "idle"
    wait_until(
        lambda: Counts(patched).met["sessions"] > before.met["sessions"] + 10,
        "no ten idle iterations have met the session",
    )
    assert patched.post("/close_session", {"session_id": "idle"}).ok
    assert Counts(patched).slept["sessions"] == 0
    wait_until_it_sleeps(patched)


def test_what_a_busy_server_has_put_off_is_done_before_it_sleeps(patched: Server) -> None:
    """A flush that waits for idleness, and health checks, which a busy server answers by the way."""
    with ThreadPoolExecutor(8) as pool:
        busy = [pool.submit(run_for_long, patched) for _ in range(2)]
        checks = [pool.submit(patched.get, "/health_generate") for _ in range(4)]
        flush = pool.submit(patched.post, "/flush_cache?timeout=60", {})
        for call in busy:
            call.result(LIMIT_S * 4)
        assert all(check.result(LIMIT_S).ok for check in checks)
        assert flush.result(LIMIT_S).ok
    counts = Counts(patched)
    assert (counts.slept["flush"], counts.slept["health checks"]) == (0, 0)
    wait_until_it_sleeps(patched)


# --- an encoder of its own -----------------------------------------------------------------------


@pytest.fixture
def launcher(make_launcher: Callable[[str], Launcher]) -> Iterator[Launcher]:
    launcher = make_launcher("encoder")
    yield launcher
    launcher.stop_all()


def start_encoder(launcher: Launcher) -> Server:
    """It has no warm-up that the log would tell of, so its health is asked for."""
    env = {"SGLANG_HOST_IP": HOST}
    encoder = launcher.configure(1, 1, patched=False, args=ENCODER_ONLY, env=env)
    encoder.start()
    launcher.servers.callback(encoder.stop)
    wait_until_healthy(encoder)
    return encoder


def wait_until_healthy(server: Server) -> None:
    deadline = time.monotonic() + 4 * LIMIT_S
    while not is_healthy(server):
        assert time.monotonic() < deadline, f"not healthy after {4 * LIMIT_S:g} s:\n{server.log_text()}"
        server.check_alive("start")
        time.sleep(0.2)


def is_healthy(server: Server) -> bool:
    try:
        return bool(server.get("/health", timeout_s=5).ok)
    except OSError:
        return False


@pytest.mark.release  # tests/patches/test_idle.py shows it without a server
def test_embeddings_that_are_on_their_way_are_asked_for_without_a_sleep(launcher: Launcher) -> None:
    encoder = start_encoder(launcher)
    env = {"SGLANG_HOST_IP": HOST, "PP_PROBE_SLEEPS": "1"}
    server = launcher.configure(
        1, 2, patched=True, args=(*LANGUAGE_ONLY, "--encoder-urls", encoder.url), env=env
    )
    server.start()
    launcher.servers.callback(server.stop)
    wait_until_healthy(server)
    for picture in battery.DIGITS[:PICTURES]:
        assert battery.ask_about(server, picture)
        wait_until_it_sleeps(server)  # so that the next picture finds it idle
    counts = Counts(server)
    assert counts.met["embeddings"] >= PICTURES
    assert counts.slept["embeddings"] == 0
