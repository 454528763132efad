"""What can befall a pipeline that spans two nodes. Each of them can be undone."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

from scripts.bench.link import EmulatedLink

SLOW_MS = 200.0


@dataclass(frozen=True)
class Target:
    """The link of a running server, tensor-parallel size 1, and the stage that is struck."""

    link: EmulatedLink
    pid: int  # of that stage's scheduler


def _signal(number: signal.Signals) -> Callable[[Target], None]:
    def send(target: Target) -> None:
        with suppress(ProcessLookupError):  # to be undone, but it has ended
            os.kill(target.pid, number)

    return send


def _lose(*nodes: int) -> Callable[[Target], None]:
    return lambda target: target.link.set(0, 0, lost_from=nodes)


def _slow(target: Target) -> None:
    target.link.set(SLOW_MS, 0)


def _join(target: Target) -> None:
    target.link.set(0, 0)


@dataclass(frozen=True)
class Fault:
    """`strike` and `undo` it. What is `harmless` as long as it is undone in time loses nothing."""

    name: str
    strike: Callable[[Target], None]
    undo: Callable[[Target], None]
    harmless: bool = False
    on_link: bool = False  # strikes the link, whatever the stage


KILL = Fault("killed", _signal(signal.SIGKILL), lambda target: None)
STOP = Fault("stopped", _signal(signal.SIGSTOP), _signal(signal.SIGCONT))
CUT = Fault("link cut", _lose(0, 1), _join, on_link=True)
CUT_FORWARD = Fault("link cut from node 0 to 1", _lose(0), _join, on_link=True)
CUT_BACKWARD = Fault("link cut from node 1 to 0", _lose(1), _join, on_link=True)
PAUSE = Fault("paused", _signal(signal.SIGSTOP), _signal(signal.SIGCONT), harmless=True)
SLOW = Fault("slow link", _slow, _join, harmless=True, on_link=True)

FAULTS = {fault.name: fault for fault in (KILL, STOP, CUT, CUT_FORWARD, CUT_BACKWARD, PAUSE, SLOW)}
