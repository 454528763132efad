"""Round trip of a message on the host lane, beside one of bare pyzmq, between two processes of this machine.

    make bench-host-lane ARGS='--rounds 40 --json result.json'
    make bench-host-lane ARGS='--beside /path/to/another/tree'

Ways: bare (pyzmq with the lane's socket types, transport, encryption and frame sizes), format (the same with
messages encoded, checked and decoded), lane (`HostLane`), link (`StageLink`, a tensor dict as the schedulers
exchange it). ipc is between ranks of one node, TCP with CURVE between two nodes; here over loopback.

The ways take turns, a round each, in the same two processes; a ratio is the median of the rounds' ratios to
bare pyzmq. Each process has one core, unless `--any-core`: a scheduler that puts both on one core shortens
bare round trips threefold, now and then. `--beside` measures the package of another tree in the same turns.
Nothing is asserted: machines differ.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # as a script, only its own folder would be on the path

from scripts.output import number_table, plain_console  # noqa: E402

SIZES = (256, 64 << 10, 1 << 20)
WAYS = ("bare", "format", "lane", "link")
TRANSPORTS = {"ipc": "ipc", "tcp": "TCP + CURVE"}
A_ROUND = {256: 200, 64 << 10: 60, 1 << 20: 10}  # messages
RANK = ROOT / "scripts" / "bench_host_lane_rank.py"
LIMIT_S = 60


class Pair:
    """Two processes with the package of one tree, joined over one transport."""

    def __init__(self, tree: Path, transport: str, cores: Sequence[set[int]], stack: ExitStack) -> None:
        self.tree, self.transport = tree, transport
        directory = stack.enter_context(tempfile.TemporaryDirectory())
        environment = {**os.environ, "PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1"}
        self._processes = [
            subprocess.Popen(
                [sys.executable, RANK, str(rank), transport, directory],
                env=environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
            for rank in range(2)
        ]
        for process, allowed in zip(self._processes, cores, strict=True):
            os.sched_setaffinity(process.pid, allowed)  # before it has threads, which get the same
        stack.callback(self._end)
        for process in self._processes:
            _line(process.stdout)

    def round_trips_us(self, way: str, nbytes: int, messages: int) -> list[float]:
        for process in reversed(self._processes):
            assert process.stdin is not None
            process.stdin.write(f"{way} {nbytes} {messages}\n")
            process.stdin.flush()
        return [time_ns / 1000 for time_ns in json.loads(_line(self._processes[0].stdout))]

    def _end(self) -> None:
        for process in self._processes:
            assert process.stdin is not None
            process.stdin.close()
        for process in self._processes:
            try:
                process.wait(LIMIT_S)
            except subprocess.TimeoutExpired:
                process.kill()


def _line(stream: IO[str] | None) -> str:
    assert stream is not None
    line = stream.readline()
    if not line:
        raise SystemExit("A process of the benchmark ended; its error is above.")
    return line


@dataclass
class Cell:
    """What was measured of one way."""

    tree: str
    transport: str
    nbytes: int
    way: str
    times_us: list[float] = field(default_factory=list)
    medians_us: list[float] = field(default_factory=list)  # of each round

    def add(self, times_us: list[float]) -> None:
        self.times_us += times_us
        self.medians_us.append(statistics.median(times_us))

    def row(self, bare: Cell) -> dict[str, Any]:
        times = sorted(self.times_us)
        ratios = sorted(ours / theirs for ours, theirs in zip(self.medians_us, bare.medians_us, strict=True))
        return {
            "tree": self.tree,
            "transport": TRANSPORTS[self.transport],
            "bytes": self.nbytes,
            "way": self.way,
            "messages": len(times),
            "p50_us": round(statistics.median(times), 1),
            "p90_us": round(times[len(times) * 9 // 10], 1),
            "ratio": round(statistics.median(ratios), 2),
            "ratio_p90": round(ratios[len(ratios) * 9 // 10], 2),
        }


def measure(pairs: list[Pair], nbytes: int, rounds: int) -> Iterator[dict[str, Any]]:
    """Rows of one transport and size."""
    cells = {(pair, way): Cell(str(pair.tree), pair.transport, nbytes, way) for pair in pairs for way in WAYS}
    for count in range(-1, rounds):  # the first one warms up
        order = list(cells) if count % 2 else list(reversed(cells))
        for pair, way in order:
            times_us = pair.round_trips_us(way, nbytes, A_ROUND[nbytes])
            if count >= 0:
                cells[pair, way].add(times_us)
    for (pair, _), cell in cells.items():
        yield cell.row(bare=cells[pair, "bare"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20, help="of each way, for each size")
    parser.add_argument("--bytes", type=int, choices=SIZES, nargs="+", default=SIZES, help="sizes")
    parser.add_argument("--beside", type=Path, nargs="+", default=[], help="trees with another version")
    parser.add_argument("--any-core", action="store_true", help="processes that may change cores")
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    arguments = parser.parse_args()
    allowed = sorted(os.sched_getaffinity(0))
    cores = [set(allowed)] * 2 if arguments.any_core else [{allowed[0]}, {allowed[-1]}]
    trees = [ROOT, *(tree.resolve() for tree in arguments.beside)]
    rows: list[dict[str, Any]] = []
    for transport in TRANSPORTS:
        with ExitStack() as stack:
            pairs = [Pair(tree, transport, cores, stack) for tree in trees]
            for nbytes in arguments.bytes:
                rows += measure(pairs, nbytes, arguments.rounds)
    print(f"load of the machine: {os.getloadavg()[0]:.2f} on {os.cpu_count()} cores")
    columns = ("p50_us", "p90_us", "ratio", "ratio_p90", "messages")
    heads = ("p50", "p90", "times bare", "its p90", "messages")
    table = number_table("round trip, us", "tree", "transport", "way", "bytes", *heads, left=3)
    for row in rows:
        texts = (Path(row["tree"]).name, row["transport"], row["way"])
        table.add_row(*texts, *(str(row[column]) for column in ("bytes", *columns)))
    plain_console().print(table)
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
