"""One-way time of a message on the host lane between two processes of this machine.

    make bench-host-lane ARGS='--messages 3000 --json result.json'

The sender writes its clock (CLOCK_MONOTONIC, one for all processes) into the message, the receiver reads
its own when the program has the message in its hands; the next message is sent when the receiver has
answered, so nothing queues. ipc is what ranks of one node use, TCP with CURVE what ranks of two nodes
use; here over loopback. Nothing is asserted: machines differ.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # as a script, only its own folder would be on the path

from scripts.output import number_table, plain_console  # noqa: E402
from sglang_npu_pp.settings import Settings  # noqa: E402
from sglang_npu_pp.transport.context import RankContext  # noqa: E402
from sglang_npu_pp.transport.endpoints import process_group_exchange  # noqa: E402
from sglang_npu_pp.transport.host_lane import HostLane  # noqa: E402
from sglang_npu_pp.transport.message import Kind, Message  # noqa: E402

SIZES = (256, 64 << 10, 1 << 20)
WARM_UP = 50
TRANSPORTS = {"ipc": "ipc", "tcp": "TCP + CURVE"}


def open_lane(stage: int, transport: str, store: str) -> HostLane:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=stage, world_size=2, timeout=timedelta(seconds=60)
    )
    lane = HostLane(RankContext.begin(stage, 2, Settings(host_transport=transport)))
    world = dist.group.WORLD
    assert world is not None
    lane.open(process_group_exchange(world))
    return lane


def send(transport: str, store: str, messages: int) -> None:
    lane = open_lane(0, transport, store)
    for size in SIZES:
        payload = torch.zeros(size, dtype=torch.uint8)
        for _ in range(messages + WARM_UP):
            message = Message(Kind.PROXY, iteration=time.monotonic_ns(), tensors={"payload": payload})
            lane.send(1, message)
            lane.receive(1, Kind.OUTPUT)
    lane.close()


def receive(transport: str, store: str, messages: int, results: Any) -> None:
    lane = open_lane(1, transport, store)
    for size in SIZES:
        times_us = []
        for _ in range(messages + WARM_UP):
            message = lane.receive(0, Kind.PROXY)
            times_us.append((time.monotonic_ns() - message.iteration) / 1000)
            lane.send(0, Message(Kind.OUTPUT))
        results.put((transport, size, sorted(times_us[WARM_UP:])))
    lane.close()


def measure(transport: str, messages: int) -> list[dict[str, Any]]:
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    with tempfile.TemporaryDirectory() as directory:
        store = str(Path(directory) / "store")
        processes = [
            context.Process(target=receive, args=(transport, store, messages, results)),
            context.Process(target=send, args=(transport, store, messages)),
        ]
        for process in processes:
            process.start()
        rows = [row(*results.get(timeout=120)) for _ in SIZES]
        for process in processes:
            process.join(timeout=30)
    return rows


def row(transport: str, size: int, times_us: list[float]) -> dict[str, Any]:
    return {
        "transport": TRANSPORTS[transport],
        "bytes": size,
        "messages": len(times_us),
        "p50_us": round(statistics.median(times_us), 1),
        "p90_us": round(times_us[len(times_us) * 9 // 10], 1),
        "p99_us": round(times_us[len(times_us) * 99 // 100], 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--messages", type=int, default=2000, help="messages of each size")
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    arguments = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    rows = [each for transport in TRANSPORTS for each in measure(transport, arguments.messages)]
    print(f"load of the machine: {os.getloadavg()[0]:.2f} on {os.cpu_count()} cores")
    table = number_table("us one way", "transport", "bytes", "p50", "p90", "p99", "messages")
    for each in rows:
        times = (each[f"{name}_us"] for name in ("p50", "p90", "p99"))
        table.add_row(each["transport"], *map(str, (each["bytes"], *times, each["messages"])))
    plain_console().print(table)
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
