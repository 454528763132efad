"""The host lane between two stages: round trips, throughput, integrity."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass

import torch

from ...errors import MessageError
from ...observe.depth import StageTimes, needed_depth
from ...transport.host_lane import HostLane
from ...transport.message import Kind, Message

ROUND_TRIPS = 100
CHUNK_BYTES = 256 << 10
AIM_S = 0.5  # how long a direction is to take
MOST_CHUNKS = 1024
FORWARDS_MS = (5, 10, 20, 50, 100)
"""Forwards of one stage for which a depth is suggested when the user names none."""


@dataclass(frozen=True)
class LinkReport:
    """One link, as seen by the reporting side."""

    shortest_round_trip_s: float  # of a small message; a server measures it at its start, too
    median_round_trip_s: float
    sent_mib_per_s: float  # of messages of CHUNK_BYTES, while they follow each other
    received_mib_per_s: float

    @property
    def one_way_s(self) -> float:
        return self.shortest_round_trip_s / 2

    def depth(self, forward_ms: float, stages: int) -> int:
        """The --pp-async-batch-depth that would hide the link (depth.py), with every hop like this one,
        forwards of `forward_ms` and no host work."""
        stage = StageTimes(forward_ms / 1e3, 0.0, self.one_way_s, asynchronous=True)
        return needed_depth([stage] * stages)

    def __str__(self) -> str:
        return (
            f"one way {1e3 * self.one_way_s:.3f} ms (half of the shortest round trip; median "
            f"{1e3 * self.median_round_trip_s / 2:.3f} ms), {self.sent_mib_per_s:.0f} MiB/s there, "
            f"{self.received_mib_per_s:.0f} MiB/s back"
        )


def measure(lane: HostLane, limit_s: float) -> LinkReport:
    """Called by both sides of a two-stage lane at the same time; takes some seconds.

    Raises PeerLostError, WaitLimitError for a message slower than `limit_s` seconds, MessageError for changed
    bytes.
    """
    link_test = _LinkTest(lane, limit_s)
    shortest_s, median_s = link_test.ping() if lane.stage == 0 else link_test.answer_pings()
    rates = [0.0, 0.0]  # MiB/s that each stage could send
    for sender in (0, 1):
        rates[sender] = (
            link_test.send_chunks(shortest_s) if lane.stage == sender else link_test.receive_chunks()
        )
    return LinkReport(shortest_s, median_s, rates[lane.stage], rates[link_test.peer])


class _LinkTest:
    """Messages to and from the other stage, numbered per kind."""

    def __init__(self, lane: HostLane, limit_s: float) -> None:
        self.peer = 1 - lane.stage
        self._lane, self._limit_s = lane, limit_s
        self._chunk = (torch.arange(CHUNK_BYTES) % 251).to(torch.uint8)

    def _send(self, kind: Kind, value: float | tuple[float, float] | None = None) -> None:
        self._lane.send(self.peer, Message(kind, values=value))

    def _receive(self, kind: Kind) -> Message:
        return self._lane.receive(self.peer, kind, self._limit_s)

    def ping(self) -> tuple[float, float]:
        """Shortest and median round trip in seconds, sent to the other side too."""
        took = []
        for _ in range(ROUND_TRIPS):
            began = time.monotonic()
            self._send(Kind.REQUESTS)
            self._receive(Kind.REQUESTS)
            took.append(time.monotonic() - began)
        found = min(took), statistics.median(took)
        self._send(Kind.OBJECT, found)
        return found

    def answer_pings(self) -> tuple[float, float]:
        for _ in range(ROUND_TRIPS):
            self._receive(Kind.REQUESTS)
            self._send(Kind.REQUESTS)
        shortest_s, median_s = self._receive(Kind.OBJECT).values
        return shortest_s, median_s

    def send_chunks(self, round_trip_s: float) -> float:
        """MiB/s, sent to the other side too; a first chunk sets how many fit into the time."""
        took = self._send_chunks(1, round_trip_s)
        count = min(MOST_CHUNKS, max(1, int(AIM_S / took)))
        took = self._send_chunks(count, round_trip_s)
        rate = count * CHUNK_BYTES / took / (1 << 20)
        self._send(Kind.OBJECT, 0)
        self._send(Kind.OBJECT, rate)
        return rate

    def _send_chunks(self, count: int, round_trip_s: float) -> float:
        """Seconds until the last of `count` chunks has arrived."""
        self._send(Kind.OBJECT, count)
        began = time.monotonic()
        for _ in range(count):
            self._lane.send(self.peer, Message(Kind.PROXY, tensors={"chunk": self._chunk}))
        self._receive(Kind.OUTPUT)
        return max(1e-6, time.monotonic() - began - round_trip_s / 2)

    def receive_chunks(self) -> float:
        while count := int(self._receive(Kind.OBJECT).values):
            for _ in range(count):
                chunk = self._receive(Kind.PROXY).tensors["chunk"]
                if not torch.equal(chunk, self._chunk):
                    raise MessageError(
                        f"stage {self._lane.stage} rank 0: bytes of stage {self.peer} did not arrive as they "
                        "left; look at the network, and set SGLANG_NPU_PP_CHECKSUM=full until it is repaired."
                    )
            self._send(Kind.OUTPUT)
        return float(self._receive(Kind.OBJECT).values)
