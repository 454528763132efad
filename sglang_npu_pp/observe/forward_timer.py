"""When forwards ran on the device, in times of the host; only while a trace is recorded.

A launch says when the host handed a forward over. A pair of timing events around it says when the device
began and ended it, once both have passed: nobody waits for them, they are looked at once an iteration.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, NamedTuple

from ..streams import DeviceStreams
from .trace import Trace

_NEW_ANCHOR_MS = 60_000.0  # elapsed times are 32-bit floats: a minute is good to 4 us


class _Forward(NamedTuple):
    begin: Any
    end: Any
    slot: int
    iteration: int


class ForwardTimer:
    """Records "run" and "ran" in the trace of a rank. Owned by the scheduler thread."""

    def __init__(
        self, streams: DeviceStreams, trace: Trace, now_ns: Callable[[], int] = time.monotonic_ns
    ) -> None:
        """Waits for the device once, to learn what its time is on the host's clock."""
        self._streams, self._trace = streams, trace
        self._pending: deque[_Forward] = deque()
        self._anchor: Any = streams.record_time()
        self._anchor.synchronize()
        self._anchor_ns = now_ns()

    @contextmanager
    def around(self, stream: AbstractContextManager[Any], slot: int, iteration: int) -> Iterator[None]:
        """Time what is launched inside the block; `stream` makes the stream that it runs on current."""
        with stream:
            begin = self._streams.record_time()
        yield
        with stream:
            self._pending.append(_Forward(begin, self._streams.record_time(), slot, iteration))

    def collect(self) -> None:
        """Record the forwards that have ended since. Does not wait."""
        while self._pending and self._pending[0].end.query():
            forward = self._pending.popleft()
            for name, event in (("run", forward.begin), ("ran", forward.end)):
                self._trace.record_at(self._host_ns(event), name, forward.slot, forward.iteration)
            if self._anchor.elapsed_time(forward.end) > _NEW_ANCHOR_MS:
                self._anchor_ns = self._host_ns(forward.end)
                self._anchor = forward.end

    def _host_ns(self, event: Any) -> int:
        return self._anchor_ns + round(1e6 * self._anchor.elapsed_time(event))
