"""Telemetry: counters per message kind and per phase of the scheduler.

One `Telemetry` per rank. Counters are plain additions on the working thread; a reader may see a count one
message ahead of its bytes, never a torn value.
"""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..text import number_table
from .whole_file import write_whole


@dataclass
class ChannelCounters:
    """Messages of one kind in one direction."""

    messages: int = 0
    bytes: int = 0  # header, frames, and tensors of the device lane
    waits: int = 0  # receives by the scheduler thread
    wait_s: float = 0.0  # time blocked until the message was there
    backpressure: int = 0  # sends that found their window or slots full
    backpressure_s: float = 0.0  # time blocked for that


@dataclass
class Telemetry:
    """Counters of one rank since its start; `snapshot()` is thread-safe."""

    stage: int
    rank: int
    sent: dict[str, ChannelCounters] = field(default_factory=dict)
    received: dict[str, ChannelCounters] = field(default_factory=dict)
    phases_s: dict[str, float] = field(default_factory=dict)
    refused: int = 0  # frames from unauthenticated clients and messages that could not be read
    refused_connections: int = 0  # from the network, without a key of this server
    prepared: int = 0  # decodes that were launched as they were prepared ahead
    taken_back: int = 0  # decodes that were prepared ahead in vain
    started: float = field(default_factory=time.monotonic)
    replica: int | None = None  # where data-parallel replicas each have a stage 0 and a rank 0

    def sending(self, kind: str) -> ChannelCounters:
        return self.sent.setdefault(kind, ChannelCounters())

    def receiving(self, kind: str) -> ChannelCounters:
        return self.received.setdefault(kind, ChannelCounters())

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Add the wall time of the block, in seconds, to the phase `name`."""
        begin = time.monotonic()
        try:
            yield
        finally:
            self.phases_s[name] = self.phases_s.get(name, 0.0) + time.monotonic() - begin

    def snapshot(self) -> Snapshot:
        return Snapshot(
            stage=self.stage,
            rank=self.rank,
            pid=os.getpid(),
            uptime_s=time.monotonic() - self.started,
            refused=self.refused,
            refused_connections=self.refused_connections,
            prepared=self.prepared,
            taken_back=self.taken_back,
            phases_s=dict(self.phases_s),
            sent={kind: asdict(counters) for kind, counters in list(self.sent.items())},
            received={kind: asdict(counters) for kind, counters in list(self.received.items())},
            replica=self.replica,
        )


@dataclass(frozen=True)
class Snapshot:
    """`Telemetry` at one moment, as plain values."""

    stage: int
    rank: int
    pid: int
    uptime_s: float
    refused: int
    refused_connections: int
    phases_s: dict[str, float]
    sent: dict[str, dict[str, Any]]
    received: dict[str, dict[str, Any]]
    prepared: int = 0
    taken_back: int = 0
    replica: int | None = None

    @property
    def place(self) -> tuple[int, int, int]:
        """Replica (-1 without replicas), stage, rank."""
        return -1 if self.replica is None else self.replica, self.stage, self.rank

    def write(self, directory: Path) -> Path:
        """Write `file_name(...).json` atomically; return its path."""
        path = directory / f"{file_name(self.stage, self.rank, self.replica)}.json"
        write_whole(path, json.dumps(asdict(self), indent=1).encode())
        return path


def file_name(stage: int | str, rank: int, replica: int | None) -> str:
    """File name of a rank, unique in the server, without suffix."""
    name = f"stage{stage}-rank{rank}"
    return name if replica is None else f"replica{replica}-{name}"


_A_SNAPSHOT = re.compile(r"(replica\d+-)?stage\d+-rank\d+\.json")


def read_snapshots(directory: Path) -> list[Snapshot]:
    """Snapshots of all ranks in `directory`, by replica, stage and rank."""
    paths = [path for path in directory.iterdir() if _A_SNAPSHOT.fullmatch(path.name)]
    return sorted((Snapshot(**json.loads(path.read_text())) for path in paths), key=lambda one: one.place)


def render_table(snapshots: Sequence[Snapshot]) -> str:
    """Plain-text table: time of each stage's scheduler thread in ms, and its messages; with a column for
    data-parallel replicas, if any."""
    replicas = any(snapshot.replica is not None for snapshot in snapshots)
    kinds = ("requests", "proxy", "output")
    head = [
        *(["replica"] if replicas else []),
        "stage",
        "rank",
        "forward",
        *(f"wait {kind}" for kind in kinds),
        "back-pressure",
    ]
    rows = [[*head, "messages", "MiB"]]
    for snapshot in snapshots:
        channels = [*snapshot.sent.values(), *snapshot.received.values()]
        waits = [snapshot.received.get(kind, {}).get("wait_s", 0.0) for kind in kinds]
        seconds = [
            snapshot.phases_s.get("forward", 0.0),
            *waits,
            sum(channel["backpressure_s"] for channel in channels),
        ]
        rows.append(
            [
                *map(str, snapshot.place[0 if replicas else 1 :]),
                *(f"{1e3 * value:.1f} ms" for value in seconds),
                str(sum(channel["messages"] for channel in channels)),
                f"{sum(channel['bytes'] for channel in channels) / 2**20:.2f}",
            ]
        )
    return number_table(rows)
