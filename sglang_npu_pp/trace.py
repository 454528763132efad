"""The recorded order of posts, waits and launches, for tests and timelines.

Off by default: `Trace.record` then costs one attribute test. What is recorded is order and time, never
payload. Asynchrony is a claim about order, so order is what the tests assert.
"""

from __future__ import annotations

import json
import time
from collections import deque
from pathlib import Path
from typing import NamedTuple


class Event(NamedTuple):
    """One thing that a rank did."""

    time_ns: int  # time.monotonic_ns of this node
    name: str  # "push", "arrive", "post_receive", "wait", "ready", "launch", "launched", ...
    kind: str  # message kind, or "" where there is none
    slot: int  # microbatch slot, -1 where there is none
    iteration: int  # scheduler iteration, -1 where there is none


class Trace:
    """A bounded list of events of one rank, the oldest dropped first."""

    def __init__(self, enabled: bool = False, capacity: int = 1 << 18) -> None:
        self.enabled = enabled
        self._events: deque[Event] = deque(maxlen=capacity)

    def record(self, name: str, kind: str = "", slot: int = -1, iteration: int = -1) -> None:
        if self.enabled:
            self._events.append(Event(time.monotonic_ns(), name, kind, slot, iteration))

    def events(self) -> list[Event]:
        return list(self._events)

    def write(self, path: Path) -> None:
        """One JSON array a line; written beside and renamed, so a reader never sees half a file."""
        partial = path.with_suffix(".partial")
        with partial.open("w") as file:
            file.writelines(json.dumps(event) + "\n" for event in self.events())
        partial.replace(path)


def read_trace(path: Path) -> list[Event]:
    """The events that `Trace.write` wrote."""
    return [Event(*json.loads(line)) for line in path.read_text().splitlines()]
