"""Whether all stages of an idle server are in the same state."""

from __future__ import annotations

import json
import time
from typing import Any

from rig import battery
from rig.server import Server

LIMIT_S = 60.0
POLL_S = 0.05
MARKER = 42
BUSY = ("running", "waiting", "grammars", "chunked", "protected")


def states(server: Server) -> list[dict[str, Any]]:
    """What each scheduler held when it was last idle."""
    found = []
    for pid in server.scheduler_pids():
        path = server.log.parent / f"{pid}.state"
        found.append(json.loads(path.read_text()) if path.exists() else {})
    return found


def disagreement(found: list[dict[str, Any]], old_forwards: list[Any]) -> str:
    """What is not as it must be once nothing is left to do; empty when all is well."""
    if any(not state for state in found):
        return "a scheduler has never been idle"
    if any(state["forwards"] == old for state, old in zip(found, old_forwards, strict=True)):
        return "a scheduler has not been idle since"
    if complaint := held(found):
        return complaint
    if any(state != found[0] for state in found):
        return "the stages differ"
    return ""


def held(found: list[dict[str, Any]]) -> str:
    """What schedulers must not hold once nothing is left to do; empty when all is well."""
    if any(state[name] for state in found for name in BUSY):
        return "a scheduler still holds requests"
    if any(state["free"] + state["cached"] != state["capacity"] for state in found):
        return "KV pages are lost"
    return ""


def assert_stages_agree(server: Server) -> dict[str, Any]:
    """Wait until every scheduler is idle and all of them hold the same; returns what.

    A request of one token comes first, so that what they held before the last load is not taken for news.
    """
    old = [state.get("forwards") for state in states(server)]
    battery.generate(server, input_ids=[MARKER], sampling_params={"max_new_tokens": 1})
    deadline = time.monotonic() + LIMIT_S
    while complaint := disagreement(found := states(server), old):
        server.check_alive("while its stages were compared")
        assert time.monotonic() < deadline, f"after {LIMIT_S:.0f} s {complaint}: {found}"
        time.sleep(POLL_S)
    return found[0]
