"""What a server does while the proxies of one microbatch do not arrive, on simulated Ascend."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import psutil

from ascend_sim.controls import Simulator, Stream
from rig import battery
from rig.server import Server
from tests.ascend.rest import at_rest

REQUESTS = 4  # two microbatches of two
TOKENS = 128
IN_FULL_SWING = 20  # receives
LIMIT_S = 60.0
LAUNCH_LIMIT_S = 10.0  # for a host that launches without waiting
PROMPT = 200  # tokens, less than a chunk
SAMPLING = "aten::argmax"  # once a forward, on the last stage


@dataclass
class Held:
    """The last stage when it has come to rest behind a receive that does not end."""

    launched: int  # forwards that stand behind the receive, as far as their sampling
    described: str


def hold_a_receive(server: Server) -> Held:
    """Hold one receive of the last stage in the middle of decoding, and look; all requests end well."""
    first, last = (psutil.Process(pid) for pid in server.scheduler_pids())
    with Simulator(last.pid) as simulator, ThreadPoolExecutor(REQUESTS) as pool:
        start = simulator.history().next
        answers = [pool.submit(decode, server, number) for number in range(REQUESTS)]
        await_receives(simulator, start)
        with simulator.hold("HcclRecv", count=1) as gate:
            gate.wait_until_held()
            at_rest(first, last)
            listing = simulator.listing()
        for answer in answers:
            assert answer.result(LIMIT_S) == TOKENS
    return Held(sum(map(launched_on, listing.streams)), str(listing))


def hold_a_prefill(server: Server) -> Held:
    """Hold the proxies of a prefill, and look when it is launched, or the limit has passed."""
    first, last = (psutil.Process(pid) for pid in server.scheduler_pids())
    with Simulator(last.pid) as simulator, ThreadPoolExecutor(1) as pool:
        with simulator.hold("HcclRecv", count=1) as gate:
            answer = pool.submit(decode, server, number=97, prompt=PROMPT)
            gate.wait_until_held()
            deadline = time.monotonic() + LAUNCH_LIMIT_S
            while not sum(map(launched_on, simulator.listing().streams)) and time.monotonic() < deadline:
                time.sleep(0.01)
            at_rest(first, last)
            listing = simulator.listing()
        assert answer.result(LIMIT_S) == TOKENS
    return Held(sum(map(launched_on, listing.streams)), str(listing))


def decode(server: Server, number: int, prompt: int = 20) -> int:
    answer = battery.generate(
        server,
        input_ids=battery.prompt(prompt, seed=number),
        sampling_params={"max_new_tokens": TOKENS, "ignore_eos": True},
    )
    return len(answer["output_ids"])


def await_receives(simulator: Simulator, start: int) -> None:
    deadline, received = time.monotonic() + LIMIT_S, 0
    while True:
        history = simulator.history(start)
        start = history.next
        received += sum(entry.event == "ended" and entry.task == "HcclRecv" for entry in history.entries)
        if received >= IN_FULL_SWING:
            return
        assert time.monotonic() < deadline, f"no {IN_FULL_SWING} receives:\n{simulator.listing()}"
        time.sleep(0.01)


def launched_on(stream: Stream) -> int:
    return sum(task.name.startswith(SAMPLING) for task in stream.queued)
