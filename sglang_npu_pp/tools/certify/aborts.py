"""Requests that end before their end: by name, by a client that leaves, and all at once."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from typing import Any

import requests

from .asking import Server, greedy
from .battery import prompt
from .processes import POLL_S
from .served import Served

_NEVER = (requests.codes.unauthorized, requests.codes.forbidden, requests.codes.not_found)
LONG_ANSWER = 2000  # tokens; less where the context has less
TOGETHER = 8
_ENDS = (requests.codes.bad_request, requests.codes.service_unavailable)  # of requests that had no batch yet


def abort(server: Server, served: Served, limit_s: float) -> list[str]:
    """Abort in three ways; what was wrong, a line each.

    Raises requests.RequestException for a server that is gone.
    """
    steps: tuple[Callable[[Server, Served, float], list[str]], ...] = (_by_name, _by_leaving, _all_at_once)
    problems = [line for step in steps for line in step(server, served, limit_s)]
    return problems + wait_idle(server, limit_s)


def wait_idle(server: Server, limit_s: float) -> list[str]:
    """Wait until no request is left, and empty the cache of prefixes; a line if that does not come.

    At once for a server that does not let us (401, 403, 404).
    """
    deadline = time.monotonic() + limit_s
    while True:  # a server with requests refuses
        response = server.post("/flush_cache", timeout_s=limit_s)
        if response.status_code == requests.codes.ok:
            return []
        if response.status_code in _NEVER:
            return [f"the server answers {response.status_code} to /flush_cache"]
        if time.monotonic() > deadline:
            said = response.text.splitlines()[0][:120] if response.text else ""
            return [f"the server is not idle after {limit_s:g} s ({response.status_code}: {said})"]
        time.sleep(POLL_S)


def long_request(served: Served, number: int, **more: Any) -> dict[str, Any]:
    """A request that runs until it is aborted."""
    tokens = max(64, min(LONG_ANSWER, served.longest - 40))
    sampling = {"max_new_tokens": tokens, "ignore_eos": True}
    ids = prompt(served, min(30, served.longest), seed=900 + number)
    return greedy({"input_ids": ids, "sampling_params": sampling, **more})


def pieces(response: requests.Response) -> Iterator[dict[str, Any]]:
    """The parts of a streamed answer. Raises HTTPError."""
    response.raise_for_status()
    for line in response.iter_lines():
        if line.startswith(b"data: {"):
            yield json.loads(line.removeprefix(b"data: "))


def _by_name(server: Server, served: Served, limit_s: float) -> list[str]:
    name = f"certify-abort-{time.monotonic_ns()}"  # a name is given once in the life of a server
    body = long_request(served, 0, rid=name, stream=True)
    with server.post("/generate", body, timeout_s=limit_s, stream=True) as response:
        last: dict[str, Any] = {}
        for piece in pieces(response):
            if not last:
                server.post("/abort_request", {"rid": name}, timeout_s=limit_s).raise_for_status()
            last = piece
    reason = (last.get("meta_info", {}).get("finish_reason") or {}).get("type")
    return [] if reason == "abort" else [f"a request aborted by its name ended with {reason!r}"]


def _by_leaving(server: Server, served: Served, limit_s: float) -> list[str]:
    body = long_request(served, 1, stream=True)
    with server.post("/generate", body, timeout_s=limit_s, stream=True) as response:
        next(pieces(response), None)  # it runs
    return []


def _all_at_once(server: Server, served: Served, limit_s: float) -> list[str]:
    """Some are decoding, some in the middle of their prompts, some wait."""
    with ThreadPoolExecutor(TOGETHER) as threads:
        asked = [threads.submit(_ask, server, served, number, limit_s) for number in range(TOGETHER)]
        deadline = time.monotonic() + limit_s
        while not all(answer.done() for answer in asked) and time.monotonic() < deadline:
            server.post("/abort_request", {"abort_all": True}, timeout_s=limit_s).raise_for_status()
            wait(asked, timeout=POLL_S)
        return [line for answer in asked for line in answer.result()]


def _ask(server: Server, served: Served, number: int, limit_s: float) -> list[str]:
    length = 1 + number * min(served.longest, 2 * (served.chunk or 500)) // TOGETHER
    body = {**long_request(served, number), "input_ids": prompt(served, length, seed=950 + number)}
    tokens = max(64, min(LONG_ANSWER, served.longest - length))
    body["sampling_params"] = {**body["sampling_params"], "max_new_tokens": tokens}
    response = server.post("/generate", body, timeout_s=limit_s)
    if response.status_code in _ENDS:
        return []
    response.raise_for_status()
    reason = response.json()["meta_info"]["finish_reason"]["type"]
    return [] if reason == "abort" else [f"one of {TOGETHER} requests aborted together ended with {reason!r}"]
