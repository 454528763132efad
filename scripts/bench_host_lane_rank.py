"""One of the two processes of `scripts/bench_host_lane.py`; takes the package from PYTHONPATH.

A line of standard input is a job: way, bytes, messages. Rank 0 times each round trip and prints them as JSON,
in ns; rank 1 answers each message with one of the same size.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Protocol

import torch
import torch.distributed as dist
import zmq

from sglang_npu_pp.settings import Settings
from sglang_npu_pp.transport.context import RankContext
from sglang_npu_pp.transport.endpoints import Exchange, process_group_exchange
from sglang_npu_pp.transport.host_lane import HostLane
from sglang_npu_pp.transport.message import INLINE_BYTES, Kind, Message, decode, encode, read_header
from sglang_npu_pp.transport.stage_link import StageLink

LIMIT_S = 60


class Way(Protocol):
    """A way to exchange messages with the other rank."""

    def prepare(self, nbytes: int) -> None: ...

    def send(self) -> None: ...

    def receive(self) -> None: ...


class Lane:
    """`HostLane`, with one tensor a message."""

    def __init__(self, lane: HostLane) -> None:
        self._lane, self._peer = lane, 1 - lane.stage

    def prepare(self, nbytes: int) -> None:
        self._payload = torch.zeros(nbytes, dtype=torch.uint8)

    def send(self) -> None:
        self._lane.send(self._peer, Message(Kind.PROXY, 0, 7, tensors={"payload": self._payload}))

    def receive(self) -> None:
        self._lane.receive(self._peer, Kind.PROXY)


class Link:
    """`StageLink`: a tensor dict, composed, expected and compared as by the schedulers."""

    def __init__(self, lane: HostLane) -> None:
        self._link, self._peer = StageLink(lane, None), 1 - lane.stage

    def prepare(self, nbytes: int) -> None:
        self._tensors = {"payload": torch.zeros(nbytes, dtype=torch.uint8)}

    def send(self) -> None:
        self._link.push_tensors(
            Kind.OUTPUT, self._peer, self._tensors, slot=0, iteration=7, batch="decode", owned=True
        )

    def receive(self) -> None:
        pending = self._link.post(Kind.OUTPUT, self._peer, slot=0, iteration=7)
        pending.batch = "decode"
        pending.wait()


class Bare:
    """pyzmq with the lane's socket types, transport, encryption and frame sizes, and nothing else."""

    def __init__(self, rank: int, transport: str, directory: Path, exchange: Exchange) -> None:
        context = zmq.Context()
        self._router, self._dealer = context.socket(zmq.ROUTER), context.socket(zmq.DEALER)
        self._router.linger = self._dealer.linger = 0
        if transport == "ipc":
            endpoint = f"ipc://{directory}-{rank}"
            self._router.bind(endpoint)
        else:
            public, secret = zmq.curve_keypair()
            self._router.curve_server, self._router.curve_secretkey = True, secret
            self._dealer.curve_publickey, self._dealer.curve_secretkey = public, secret
            self._dealer.curve_serverkey = exchange(public)[1 - rank]
            endpoint = f"tcp://127.0.0.1:{self._router.bind_to_random_port('tcp://127.0.0.1')}"
        self._dealer.connect(exchange(endpoint.encode())[1 - rank].decode())

    def prepare(self, nbytes: int) -> None:
        header = 64  # about what the lane's header takes
        sizes = [header + nbytes] if nbytes < INLINE_BYTES else [header, nbytes]
        self._frames = [bytes(size) for size in sizes]
        self._copy = len(sizes) == 1

    def send(self) -> None:
        if self._copy:
            self._dealer.send(self._frames[0])
        else:
            self._dealer.send_multipart(self._frames, copy=False)

    def receive(self) -> None:
        self._router.recv_multipart(0, self._copy)


class Format(Bare):
    """The same sockets with the lane's messages: encoded, checked, decoded, and nothing around that."""

    def prepare(self, nbytes: int) -> None:
        self._payload = torch.zeros(nbytes, dtype=torch.uint8)

    def send(self) -> None:
        message = Message(Kind.PROXY, 0, 7, tensors={"payload": self._payload})
        frames = encode(message, source=0, number=0, check_all=False)
        if len(frames) == 1:
            self._dealer.send(frames[0])
        else:
            self._dealer.send_multipart(frames, copy=False)

    def receive(self) -> None:
        self._router.recv()
        frame = self._router.recv(copy=False)
        buffers = [frame.buffer]
        while frame.more:
            frame = self._router.recv(copy=False)
            buffers.append(frame.buffer)
        decode(read_header(buffers[0]), buffers, check_all=False)


def lead(way: Way, messages: int) -> list[int]:
    times_ns = []
    for _ in range(messages):
        began = time.perf_counter_ns()
        way.send()
        way.receive()
        times_ns.append(time.perf_counter_ns() - began)
    return times_ns


def follow(way: Way, messages: int) -> None:
    for _ in range(messages):
        way.receive()
        way.send()


def work(rank: int, ways: dict[str, Callable[[], Way]]) -> None:
    made: dict[str, Way] = {name: make() for name, make in ways.items()}
    print("ready", flush=True)
    for line in sys.stdin:
        name, nbytes, messages = line.split()
        made[name].prepare(int(nbytes))
        if rank == 0:
            print(json.dumps(lead(made[name], int(messages))), flush=True)
        else:
            follow(made[name], int(messages))


def main() -> None:
    rank, transport, directory = int(sys.argv[1]), sys.argv[2], Path(sys.argv[3])
    torch.set_num_threads(1)
    store, limit = f"file://{directory}/store", timedelta(seconds=LIMIT_S)
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=2, timeout=limit)
    world = dist.group.WORLD
    assert world is not None
    exchange = process_group_exchange(world)
    lane = HostLane(RankContext.begin(rank, 2, Settings(host_transport=transport)))
    lane.open(exchange)
    work(
        rank,
        {
            "bare": lambda: Bare(rank, transport, directory / "bare", exchange),
            "format": lambda: Format(rank, transport, directory / "format", exchange),
            "lane": lambda: Lane(lane),
            "link": lambda: Link(lane),
        },
    )
    lane.close()


if __name__ == "__main__":
    main()
