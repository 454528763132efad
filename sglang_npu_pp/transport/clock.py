"""Round-trip times and clock offsets between stages, measured once at start over the host lane.

Pairs of stages play ping-pong in the same order on all stages: no circular wait, no disturbance within a
stage. The shortest round trip counts, the peer's clock reading in its middle: the offset error is half a
round trip at most.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from .host_lane import HostLane
from .message import Kind, Message

ROUNDS = 12


@dataclass(frozen=True)
class LinkClock:
    """Round trips and clock offset between one rank and the same rank of other stages."""

    round_trip_s: Mapping[int, float]
    """By stage: the shortest time, in seconds, from the push of a small message until its answer was in hand.
    It includes what both programs spend on sending and receiving."""

    offset_ns: int
    """Add it to a `time.monotonic_ns()` of this rank to get stage 0's. At the start it is good to half the
    round trip to stage 0; clocks of two machines then drift apart by some milliseconds an hour."""


UNMEASURED = LinkClock({}, 0)


def measure_clock(lane: HostLane, limit_s: float, now_ns: Callable[[], int] = time.monotonic_ns) -> LinkClock:
    """Measure against all other stages; every stage calls it once, after `HostLane.open`.

    `ROUNDS` round trips a pair; disjoint pairs run at the same time. Raises WaitLimitError, naming stage and
    rank, after `limit_s` seconds without an answer; PeerLostError for a lost peer.
    """
    round_trip_s: dict[int, float] = {}
    offset_ns = 0
    for first, second in itertools.combinations(range(lane.stages), 2):
        if lane.stage == first:
            round_trip_s[second] = _lead(lane, second, limit_s, now_ns) / 1e9
        elif lane.stage == second:
            round_trip_ns, to_first_ns = _follow(lane, first, limit_s, now_ns)
            round_trip_s[first] = round_trip_ns / 1e9
            if first == 0:
                offset_ns = to_first_ns
    return LinkClock(round_trip_s, offset_ns)


def _lead(lane: HostLane, peer: int, limit_s: float, now_ns: Callable[[], int]) -> int:
    """Ping `peer` and send it the result. Returns the shortest round trip in ns."""
    samples = []
    for _ in range(ROUNDS):
        began = now_ns()
        lane.send(peer, Message(Kind.CLOCK))
        theirs = lane.receive(peer, Kind.CLOCK, limit_s).values
        ended = now_ns()
        samples.append((ended - began, (began + ended) // 2 - theirs))
    best = min(samples)
    lane.send(peer, Message(Kind.CLOCK, values=best))
    return best[0]


def _follow(lane: HostLane, peer: int, limit_s: float, now_ns: Callable[[], int]) -> tuple[int, int]:
    """Answer the pings. Returns the shortest round trip and the offset to add to our time, in ns."""
    for _ in range(ROUNDS):
        lane.receive(peer, Kind.CLOCK, limit_s)
        lane.send(peer, Message(Kind.CLOCK, values=now_ns()))
    round_trip_ns, offset_ns = lane.receive(peer, Kind.CLOCK, limit_s).values
    return round_trip_ns, offset_ns
