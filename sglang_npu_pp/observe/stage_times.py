"""Times of forwards: when they ran, for the trace; work per iteration, for the depth advice.

Timing events around a launch, polled once an iteration, give begin and end on the device.

The advice is from the first busy batches, sent to stage 0, logged once. A launch counts behind as many of its
kind (prefill, decode) in a row as there are slots: all taken, and host time since the last launch known.
Measured: device time; wall time on CPU.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from statistics import median
from typing import Any, NamedTuple

from ..streams import DeviceStreams
from ..transport.message import Kind
from ..transport.stage_link import StageLink
from .depth import StageTimes, advise
from .telemetry import Telemetry
from .trace import Trace

_NEW_ANCHOR_MS = 60_000.0  # elapsed times are 32-bit floats: a minute is good to 4 us

KINDS = ("prefill", "decode")
WARM_UP = 4  # busy launches of a kind that are not counted: first use of memory, kernels, caches
SAMPLES = 16
LAUNCH_LIMIT = 1000  # busy launches after which a kind that did not come is not waited for


class _Forward(NamedTuple):
    begin: Any
    end: Any
    slot: int
    iteration: int


class ForwardTimer:
    """Records "run" and "ran", in host time, while tracing. Owned by the scheduler thread."""

    def __init__(
        self, streams: DeviceStreams, trace: Trace, now_ns: Callable[[], int] = time.monotonic_ns
    ) -> None:
        """Waits for the device once, to anchor its clock."""
        self._streams, self._trace = streams, trace
        self._pending: deque[_Forward] = deque()
        self._anchor: Any = streams.record_time()
        self._anchor.synchronize()
        self._anchor_ns = now_ns()

    @contextmanager
    def around(self, stream: AbstractContextManager[Any], slot: int, iteration: int) -> Iterator[None]:
        """Time launches in the block, on the stream of `stream`."""
        with stream:
            begin = self._streams.record_time()
        yield
        with stream:
            self._pending.append(_Forward(begin, self._streams.record_time(), slot, iteration))

    def collect(self) -> None:
        """Record ended forwards, without waiting."""
        while self._pending and self._pending[0].end.query():
            forward = self._pending.popleft()
            for name, event in (("run", forward.begin), ("ran", forward.end)):
                self._trace.record_at(self._host_ns(event), name, forward.slot, forward.iteration)
            if self._anchor.elapsed_time(forward.end) > _NEW_ANCHOR_MS:
                self._anchor_ns = self._host_ns(forward.end)
                self._anchor = forward.end

    def _host_ns(self, event: Any) -> int:
        return self._anchor_ns + round(1e6 * self._anchor.elapsed_time(event))


class _Launch(NamedTuple):
    kind: str
    began: Any
    ended: Any
    host_s: float
    turn_s: float  # of it, behind the arrival of outputs


class StageTimer:
    """Times the launches of one rank (microseconds each); drop it after reading."""

    def __init__(self, streams: DeviceStreams, telemetry: Telemetry, slots: int) -> None:
        self._streams, self._telemetry, self._slots = streams, telemetry, slots
        self._samples: dict[str, list[tuple[float, float, float]]] = {kind: [] for kind in KINDS}
        self._unfinished: deque[_Launch] = deque()
        self._kind, self._iteration, self._in_a_row = "", -1, 0
        self._began: Any = None
        self._host_s = self._turn_s = self._ended_s = self._waited_s = 0.0
        # Outputs, since the last launch: when, and waits until then.
        self._arrived: tuple[float, float] | None = None
        self.busy_launches = 0

    def arrived(self) -> None:
        """Outputs are there, which the next launch waited for."""
        self._arrived = time.monotonic(), self._waits_so_far()

    def begin(self, kind: str, iteration: int) -> None:
        """Just before a launch, behind all waits. `kind`: of `KINDS`, else not counted."""
        follows = iteration == self._iteration + 1 and kind == self._kind
        self._in_a_row = self._in_a_row + 1 if follows else 1
        self._kind, self._iteration = kind, iteration
        self._host_s = self._since(self._ended_s, self._waited_s)
        self._turn_s = self._host_s if self._arrived is None else self._since(*self._arrived)
        self._arrived = None
        self._began = self._mark()

    def end(self) -> None:
        """Just behind the launch."""
        ended = self._mark()
        self._ended_s, self._waited_s = time.monotonic(), self._waits_so_far()
        if self._kind in KINDS and self._in_a_row > self._slots:
            self.busy_launches += 1
            launch = _Launch(self._kind, self._began, ended, self._host_s, self._turn_s)
            self._unfinished.append(launch)
        while self._unfinished and (seconds := self._seconds(self._unfinished[0])) is not None:
            launch = self._unfinished.popleft()
            self._samples[launch.kind].append((seconds, launch.host_s, launch.turn_s))

    def read(self, kind: str, hop_s: float) -> StageTimes | None:
        """Medians of `SAMPLES` launches after the warm-up, or None."""
        samples = self._samples[kind][WARM_UP : WARM_UP + SAMPLES]
        if len(samples) < SAMPLES:
            return None
        forward_s, host_s, turn_s = (median(each) for each in zip(*samples, strict=True))
        return StageTimes(forward_s, host_s, hop_s, self._streams.asynchronous, turn_s)

    def _since(self, moment_s: float, waited_s: float) -> float:
        """Work since then, without waits for messages."""
        return max(0.0, time.monotonic() - moment_s - (self._waits_so_far() - waited_s))

    def _mark(self) -> Any:
        return self._streams.record_time() if self._streams.asynchronous else time.monotonic()

    def _seconds(self, launch: _Launch) -> float | None:
        """None while the device is busy."""
        if not self._streams.asynchronous:
            return float(launch.ended - launch.began)
        return launch.began.elapsed_time(launch.ended) / 1e3 if launch.ended.query() else None

    def _waits_so_far(self) -> float:
        return sum(counters.wait_s for counters in self._telemetry.received.values())


class DepthAdviser:
    """Times of one rank a stage, and stage 0's advice."""

    def __init__(self, link: StageLink, streams: DeviceStreams, depth: int) -> None:
        self._link, self._depth = link, depth
        self._timer = StageTimer(streams, link.telemetry, link.stages + depth)
        following = (link.stage + 1) % link.stages
        self._hop_s = link.clock.round_trip_s[following] / 2
        self._known: dict[str, dict[int, StageTimes]] = {kind: {} for kind in KINDS}
        self._proxy_bytes = 0
        self._bytes_before = 0

    def arrived(self) -> None:
        """See `StageTimer.arrived`."""
        self._timer.arrived()

    def begin(self, kind: str, iteration: int) -> None:
        """See `StageTimer.begin`."""
        self._timer.begin(kind, iteration)

    def end(self) -> None:
        """See `StageTimer.end`; sends new times."""
        self._timer.end()
        for kind in KINDS:
            if self._link.stage not in self._known[kind]:
                times = self._timer.read(kind, self._hop_s)
                if times is not None:
                    self._known[kind][self._link.stage] = times
                    if self._link.stage > 0:
                        self._link.push(Kind.STAGE_TIMES, 0, (kind, vars(times)))
        if self._link.stage == 0:
            self._note_proxy()
            self._receive_times()

    @property
    def finished(self) -> bool:
        """Nothing left to measure: `advice` is ready (stage 0), all is sent (others)."""
        known = [kind for kind in KINDS if self._is_known(kind)]
        return len(known) == len(KINDS) or (bool(known) and self._timer.busy_launches >= LAUNCH_LIMIT)

    def advice(self, max_requests: int, limit: int | None) -> str:
        """See `advise`; on stage 0, once `finished`."""
        measured = {
            kind: [times for _, times in sorted(self._known[kind].items())]
            for kind in KINDS
            if self._is_known(kind)
        }
        return advise(
            measured,
            depth=self._depth,
            max_requests=max_requests,
            limit=limit,
            proxy_bytes=self._proxy_bytes,
        )

    def _is_known(self, kind: str) -> bool:
        stages = self._link.stages if self._link.stage == 0 else 1
        return len(self._known[kind]) == stages

    def _receive_times(self) -> None:
        for source in range(1, self._link.stages):
            while self._link.has_arrived(Kind.STAGE_TIMES, source):
                kind, times = self._link.post(Kind.STAGE_TIMES, source).wait_values()
                self._known[kind][source] = StageTimes(**times)

    def _note_proxy(self) -> None:
        sent = self._link.telemetry.sending(Kind.PROXY.label).bytes
        self._proxy_bytes = max(self._proxy_bytes, sent - self._bytes_before)
        self._bytes_before = sent
