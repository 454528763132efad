"""Clocks of ranks that are apart (PP_PROBE_CLOCKS), and conversations that end when one of them says so."""

from __future__ import annotations

import itertools
import json
from typing import Any

import requests

from rig import battery
from rig.server import Server

HOUR_S = 3600
LEADERS, OTHERS = "leaders", "others"  # the ranks that decide, and those that are told

_seeds = itertools.count(5300)


def advance(server: Server, whose: str, hours: int = 2) -> None:
    """Clocks jump ahead, and every stage has iterations afterwards."""
    clocks = server.log.parent / "clocks"
    ahead = json.loads(clocks.read_text()) if clocks.exists() else {}
    ahead[whose] = ahead.get(whose, 0) + hours * HOUR_S
    clocks.with_suffix(".part").write_text(json.dumps(ahead))
    clocks.with_suffix(".part").replace(clocks)
    for _ in range(2):
        battery.generate(server, input_ids=battery.prompt(5), sampling_params={"max_new_tokens": 1})


class Conversation:
    """A session that the server keeps for an hour."""

    def __init__(self, server: Server, **options: Any) -> None:
        """`options`: of every request."""
        body = {"capacity_of_str_len": 10_000, "timeout": HOUR_S}
        self._server, self._options = server, options
        self._last: str | None = None
        self._history: list[int] = []
        self.id: str = server.post("/open_session", body).json()

    def say(self, ids: list[int]) -> requests.Response:
        session = {"id": self.id, **({"rid": self._last} if self._last else {})}
        return self._server.post(
            "/generate", {**greedy(ids), "session_params": session, **self._options}, timeout_s=300
        )

    def turn(self) -> tuple[list[int], list[int]]:
        """Says something new; returns the whole conversation before the answer, and the answer."""
        ids = battery.prompt(20, seed=next(_seeds))
        response = self.say(ids)
        response.raise_for_status()
        asked, answer = self._history + ids, response.json()["output_ids"]
        self._last, self._history = response.json()["meta_info"]["id"], asked + answer
        return asked, answer


def greedy(ids: list[int]) -> dict[str, Any]:
    """A request for eight tokens."""
    return {"input_ids": ids, "sampling_params": {"temperature": 0, "max_new_tokens": 8, "ignore_eos": True}}
