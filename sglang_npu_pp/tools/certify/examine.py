"""What one server answers and does, recorded as plain values; `checks` compares them."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace

import requests

from ...observe.trace import SUFFIX, Event, read_trace
from ...settings import load_settings
from .aborts import abort, wait_idle
from .asking import ANSWER_LIMIT_S
from .battery import Battery, Run, run
from .launch import LaunchedServer, LaunchError
from .results import Side
from .served import Served
from .startup_log import likely_cause

CONCURRENCY = 16
IDLE_LIMIT_S = 60.0

Traces = Mapping[int, Sequence[Event]]
"""Stage -> what its rank did, of one rank and replica."""
OnStep = Callable[[str], None]

_IN_FORCE = re.compile(r"patches in force for SGLang .*?((?:replica \d+ )?stage \d+ rank \d+)\b")


@dataclass(frozen=True)
class Observed:
    """One server in one turn."""

    side: Side
    round: int  # from 1
    stages: int  # of the whole server
    asked: Sequence[str]  # cases of the battery
    asked_together: Sequence[str]  # those of them that may share a batch
    one_by_one: Sequence[Run] = ()
    concurrent: Run | None = None
    schedulers: int = 0  # on this node
    in_force: Sequence[str] = ()  # "stage S rank R" of each that says so in the log
    traces: Mapping[str, Traces] = field(default_factory=dict)  # "rank 0" -> traces, of a patched server
    no_traces: str = ""  # why there are none
    early_send: bool = True  # by its settings
    early_receive: bool = True
    left_out: Mapping[str, str] = field(default_factory=dict)  # case -> why it was not asked
    after_aborts: Run | None = None
    abort_problems: Sequence[str] | None = None  # None: not tried
    lost_peer_problems: Sequence[str] | None = None  # None: not tried
    ended: str = ""  # why the server could not be observed to the end, as a sentence

    @property
    def refused(self) -> dict[str, str]:
        """Case -> error, of all runs."""
        runs = [*self.one_by_one, *([self.concurrent] if self.concurrent else [])]
        return {name: error for one in runs for name, error in one.refused.items()}


@dataclass(frozen=True)
class Examination:
    """What is done with each server."""

    served: Served
    battery: Battery
    concurrency: int = CONCURRENCY
    limit_s: float = ANSWER_LIMIT_S  # for one answer
    on_step: OnStep = lambda step: None

    def without(self, reasons: Mapping[str, str]) -> Examination:
        """For the patched server: without the cases that the unpatched one refuses."""
        return replace(self, battery=self.battery.without(reasons))


def observe(
    server: LaunchedServer,
    side: Side,
    round: int,
    examination: Examination,
    *,
    times: int = 1,
    aborts: bool = False,
) -> Observed:
    """Ask a server that is ready: `times` times one by one, once together; abort requests if wanted.

    Never raises for what the server does: an end of it is in `Observed.ended`.
    """
    battery, began_ns = examination.battery, time.monotonic_ns()
    settings = load_settings(server.variables)
    found = Observed(
        side,
        round,
        examination.served.stages,
        battery.names,
        battery.names_in_company,
        left_out=battery.left_out,
        schedulers=len(server.scheduler_pids()),
        in_force=announcements(server.log_text()),
        early_send=settings.early_send == "1",
        early_receive=settings.early_receive == "1",
    )
    steps = [_one_by_one] * times + [_together] + ([_traces, _aborts] if aborts else [_traces])
    for step in steps:
        try:
            found = step(server, examination, found, began_ns)
            if not found.ended:
                server.check_alive("while it was examined")
        except (LaunchError, requests.RequestException) as error:
            reason = error.reason if isinstance(error, LaunchError) else f"{type(error).__name__}"
            found = replace(found, ended=found.ended or reason)
        if found.ended:
            return replace(found, ended=_with_cause(server, found.ended))
    return found


def announcements(log: str) -> list[str]:
    """Stage and rank of each scheduler that says in the log that the patches are in force."""
    return sorted(_IN_FORCE.findall(log))  # replicas say the same


# --- steps: each adds to what was observed -----------------------------------------------------------


def _one_by_one(server: LaunchedServer, what: Examination, found: Observed, _: int) -> Observed:
    what.on_step("one by one")
    answered = _run(server, what, 1)
    return replace(found, one_by_one=[*found.one_by_one, answered], ended=answered.ended)


def _together(server: LaunchedServer, what: Examination, found: Observed, _: int) -> Observed:
    what.on_step(f"{what.concurrency} at a time")
    answered = _run(server, what, what.concurrency)
    return replace(found, concurrent=answered, ended=answered.ended)


def _traces(server: LaunchedServer, what: Examination, found: Observed, began_ns: int) -> Observed:
    """While no request is there: then all stages have launched the same."""
    if found.side is Side.UNPATCHED:
        return found
    what.on_step("traces")
    if problems := wait_idle(server, IDLE_LIMIT_S):
        return replace(found, no_traces=problems[0])
    try:
        files = server.dump()
    except LaunchError as error:
        return replace(found, no_traces=error.reason)
    ranks: dict[str, dict[int, list[Event]]] = {}
    for file in files:
        if file.name.endswith(SUFFIX):
            trace = read_trace(file)
            name = f"rank {trace.rank}"
            if trace.replica is not None:
                name = f"replica {trace.replica} {name}"
            events = [event for event in trace.events if event.time_ns >= began_ns]
            ranks.setdefault(name, {})[trace.stage] = events
    return replace(found, traces=ranks, no_traces="" if ranks else "no trace was written")


def _aborts(server: LaunchedServer, what: Examination, found: Observed, _: int) -> Observed:
    what.on_step("aborts")
    try:
        problems = abort(server, what.served, what.limit_s)
    except requests.RequestException as error:
        problems = [f"a request failed: {type(error).__name__}"]
    what.on_step("one by one, behind the aborts")
    answered = _run(server, what, 1)
    return replace(found, abort_problems=problems, after_aborts=answered, ended=answered.ended)


def _run(server: LaunchedServer, what: Examination, concurrency: int) -> Run:
    """From an empty cache of prefixes, where the server lets it be emptied: the same work every time."""

    def empty() -> None:
        with suppress(requests.RequestException):  # what is asked next says so
            wait_idle(server, IDLE_LIMIT_S)

    empty()
    return run(server, what.battery, concurrency=concurrency, limit_s=what.limit_s, on_fresh=empty)


def _with_cause(server: LaunchedServer, reason: str) -> str:
    cause = likely_cause(server.log_text())
    return f"{reason}: {cause}" if cause and cause not in reason else reason
