"""A scheduler of the last stage is killed while requests run: what the others make of it."""

from __future__ import annotations

import os
import re
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager

import requests

from .aborts import long_request, pieces
from .launch import LaunchedServer
from .served import Served

REQUESTS = 4
_TITLE = re.compile(r"sglang::scheduler.*?PP(\d+)(?:_TP(\d+))?")


def lose_peer(server: LaunchedServer, served: Served, limit_s: float) -> list[str]:
    """Kill it; what was wrong, a line each. Afterwards the server has no process.

    Each of three waits takes `limit_s` at most: for the first tokens, for the end of the server, and for the
    end of the requests.
    """
    pid, title = list(server.scheduler_titles().items())[-1]
    with _requests_running(server, served, limit_s) as (asked, problem):
        if problem:
            return [problem]
        os.kill(pid, signal.SIGKILL)
        problems = [
            f"process {left} is still there after {limit_s:g} s" for left in server.wait_gone(limit_s)
        ]
        _, waiting = wait(asked, timeout=limit_s)
        if waiting:
            problems.append(f"{len(waiting)} of {REQUESTS} clients still wait after {limit_s:g} s")
            server.stop()  # lets them go
    return problems + _unnamed(title, server.log_text())


@contextmanager
def _requests_running(
    server: LaunchedServer, served: Served, limit_s: float
) -> Iterator[tuple[list[Future[None]], str]]:
    """Streamed requests, of which one has its first token; or why none has."""
    begun = threading.Event()

    def ask(number: int) -> None:
        body = long_request(served, 20 + number, stream=True)
        try:
            with server.post("/generate", body, timeout_s=3 * limit_s, stream=True) as response:
                for _ in pieces(response):
                    begun.set()
        except requests.RequestException:
            pass  # the server ends: that is what is wanted

    with ThreadPoolExecutor(REQUESTS) as threads:
        asked = [threads.submit(ask, number) for number in range(REQUESTS)]
        came = begun.wait(limit_s)
        yield asked, "" if came else f"no request had its first token within {limit_s:g} s"


def _unnamed(title: str, log: str) -> list[str]:
    """A line if the log does not say which stage and rank has gone."""
    found = _TITLE.match(title)
    if found is None:
        return [f"the process {title!r} names no stage"]
    stage, rank = int(found[1]), int(found[2] or 0)
    killed = rf"stage {stage} rank {rank}: process \d+ was killed"
    gone = rf"stage \d+ rank {rank}: stage {stage} (is gone|has shut down)"
    if re.search(f"{killed}|{gone}", log):
        return []
    return [f"the log does not say that stage {stage} rank {rank} is gone"]
