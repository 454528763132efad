"""The picture of the host: which part of a turn time is counted for, and which turns count."""

from __future__ import annotations

import itertools
from types import SimpleNamespace
from typing import Any

import pytest

from rig.probes import host_picture_probe
from rig.probes.host_picture_probe import OTHER, Picture, Turn
from scripts.bench.host_picture import means


@pytest.fixture(autouse=True)
def ticks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a clock that goes on by one whenever it is looked at."""
    count = itertools.count()
    monkeypatch.setattr(host_picture_probe.time, "thread_time_ns", lambda: next(count))


def test_time_is_that_of_the_innermost_part() -> None:
    turn = Turn()
    turn.begin()
    for part in ("outer", "inner"):
        turn.enter(part)
    turn.leave()
    turn.leave()
    assert turn.end() == {OTHER: 2, "outer": 2, "inner": 1}


def test_a_turn_begins_inside_of_parts_that_are_running() -> None:
    """Tokens arrive inside of the functions that wait for them."""
    turn = Turn()
    turn.begin()
    turn.enter("waiting")
    turn.begin()
    turn.leave()
    assert turn.end() == {"waiting": 1, OTHER: 1}


def test_only_decodes_that_follow_an_arrival_are_turns(tmp_path: Any) -> None:
    picture = Picture(tmp_path)
    model = picture.model(lambda: None)
    receive = picture.arrival("OUTPUT")(lambda link, pending: None)

    def launch(kind: str, rows: int, decode: bool) -> None:
        receive(None, SimpleNamespace(kind=SimpleNamespace(name=kind)))
        batch = SimpleNamespace(reqs=[None] * rows, forward_mode=SimpleNamespace(is_decode=lambda: decode))
        picture.run_batch(lambda *_: model(), None, batch)

    launch("OUTPUT", 3, decode=True)
    launch("OUTPUT", 4, decode=False)
    launch("PROXY", 5, decode=True)
    assert {rows: len(turns) for rows, turns in picture._turns.items()} == {3: 1}


def test_means_are_of_decodes_of_a_usual_size() -> None:
    turns = {"2": [{"results": 9000}], "16": [{"results": 1000, "launch": 500}, {"results": 3000}]}
    assert means(turns) == (2, {"results": 2.0, "launch": 0.25})
    assert means({}) == (0, {})
