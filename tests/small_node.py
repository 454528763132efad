"""A launcher with two children that hold shared memory, for tests that end it. Lines tell it what to do."""

from __future__ import annotations

import json
import multiprocessing
import sys
import time
from multiprocessing.connection import Connection
from multiprocessing.shared_memory import SharedMemory
from pathlib import Path

import psutil

from sglang_npu_pp.ending import Node, Watch, best_effort, end_node, is_resource_tracker
from sglang_npu_pp.errors import PeerLostError

LIMIT_S = 1.0


def child(orders: Connection) -> None:
    segment = SharedMemory(create=True, size=16)
    orders.send(segment.name)
    order = orders.recv()
    if order == "end unheard":  # a log that is closed, one whose reader is stopped
        best_effort(lambda: json.loads(""), lambda: time.sleep(3600))
    if order.startswith("end"):
        node = Node.of_this_process()
        assert node is not None
        end_node(node)


def end_as_sglang_does() -> None:
    """Everything but this process is killed, then waited for; who started it may still ask how it ended."""
    children = psutil.Process().children(recursive=True)
    for process in children:
        process.kill()
    while any(process.status() != psutil.STATUS_ZOMBIE for process in children):
        time.sleep(0.01)


def main() -> None:
    node = Node(psutil.Process(), (Path(sys.argv[1]),))
    node.files[0].touch()
    node.export_to_children()
    context = multiprocessing.get_context("spawn")
    pipes = [context.Pipe() for _ in range(2)]
    children = [context.Process(target=child, args=(theirs,)) for _, theirs in pipes]
    for process in children:
        process.start()
    segments = [ours.recv() for ours, _ in pipes]
    pids = [process.pid for process in children if process.pid is not None]
    tracker = [process.pid for process in psutil.Process().children() if is_resource_tracker(process)]
    watch = Watch(children, pids, limit_s=LIMIT_S, name=lambda process: f"child {process.pid}")
    print(json.dumps({"pids": pids, "trackers": tracker, "segments": segments}), flush=True)

    def on_lost(pid: int, error: PeerLostError) -> None:
        print(error, flush=True)
        end_node(node)

    for line in sys.stdin:
        match line.strip():
            case "end" | "end unheard" as order:
                pipes[0][0].send(order)
            case "watch":
                watch.start(on_lost)
            case "end as SGLang does":
                end_as_sglang_does()
                print("done", flush=True)
            case "look":
                lost = watch.look()
                print("nothing" if lost is None else lost[1], flush=True)


if __name__ == "__main__":
    main()
