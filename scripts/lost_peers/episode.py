"""One server on two nodes, one fault, and what is left of it."""

from __future__ import annotations

import json
import re
import socket
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import requests

from rig.server import Server, ServerError
from scripts.bench.link import EmulatedLink
from sglang_npu_pp.tools.certify.ports import HOST
from sglang_npu_pp.transport.endpoints import DIRECTORY_PREFIX

from .faults import Fault, Target

ANSWER_LIMIT_S = 120.0
_REQUESTS = 8
_SAMPLING = {"temperature": 0, "ignore_eos": True, "max_new_tokens": 150}
# One error names who is gone, what was last sent to it, and what to do; or what became of an own process.
SENTENCE = re.compile(
    r"stage \d+ rank \d+: (?:"
    r"stage \d+ is gone: its connection .*\(last sent to it: .*\); look at that stage's log"
    r"|process \d+ (?:has been stopped|was killed) \(.*, so .*this node ends"
    r").*restart the server"
)


@dataclass
class Outcome:
    """What a fault did."""

    ended: bool = False  # every process, the one that was struck among them
    ended_s: float = 0.0  # from the fault until then, or the limit
    sentences: list[list[str]] = field(default_factory=list)  # in the log of each node
    clients: Counter[str] = field(default_factory=Counter)  # "answer", "other answer", "error", "silence"
    left: list[str] = field(default_factory=list)  # processes, ports, sockets and shared memory, in words
    restarted: bool | None = None  # on the same ports, where it was tried


@contextmanager
def on_two_nodes(
    model: Path, pp: int, folder: Path, link: EmulatedLink, env: dict[str, str]
) -> Iterator[Server]:
    """A server whose first half of stages is node 0."""
    server = Server(
        model,
        1,
        pp,
        log=folder / "log",
        env=env,
        args=("--skip-server-warmup", "--dtype", "float32", "--max-total-tokens", "16384"),
        nnodes=2,
        node_prefix={node: link.prefix(node) for node in range(2)},
        node_env={node: link.variables(node) for node in range(2)},
        master=link.master,
    )
    with server:
        yield server


class Episode:
    """Faults on a server that runs. `answers` are what the requests get when nothing happens."""

    def __init__(self, server: Server, link: EmulatedLink) -> None:
        self.server, self.link = server, link
        self.answers = [self._ask(number) for number in range(_REQUESTS)]
        self._stages = server.scheduler_pids()

    def target(self, stage: int) -> Target:
        return Target(self.link, self._stages[stage])

    def survive(self, fault: Fault, stage: int, *, seconds: float) -> Outcome:
        """Strike while requests are under way, and undo it after `seconds`: nothing may be lost."""
        target = self.target(stage)
        with ThreadPoolExecutor(_REQUESTS) as threads:
            asked = self._ask_all(threads)
            fault.strike(target)
            wait(asked, timeout=seconds)  # the fault's duration; slow links are undone when all is answered
            fault.undo(target)
            wait(asked, timeout=ANSWER_LIMIT_S)
            clients = self._outcomes(asked)
        return Outcome(clients=clients, left=self._gone_schedulers())

    def lose(self, fault: Fault, stage: int, *, busy: bool, limit_s: float) -> Outcome:
        """Strike and wait until every process has ended, `limit_s` at most.

        Afterwards the server has no process and the fault is undone, so that it can be started again.
        """
        target = self.target(stage)
        processes = self.server._track()
        with ThreadPoolExecutor(_REQUESTS) as threads:
            asked = self._ask_all(threads) if busy else []
            began = time.monotonic()
            fault.strike(target)
            _, alive = psutil.wait_procs(processes, timeout=limit_s)
            ended_s = time.monotonic() - began
            left = [f"process {process.pid}: {_title(process)}" for process in alive]
            if not alive:
                left += self._ports() + self._sockets() + self._segments()
            wait(asked, timeout=1.0 if alive else limit_s)
            clients = self._outcomes(asked)
            fault.undo(target)
            self.server.stop()  # what is left; clients that still wait are let go by it
        return Outcome(not alive, ended_s, self._sentences(), clients, left)

    def restart(self) -> bool:
        """Start the server again on its ports at once, and ask."""
        try:
            self.server.start()
            self.server.wait_ready()
            self._stages = self.server.scheduler_pids()
            return self._ask(0) == self.answers[0]
        except (ServerError, requests.RequestException):
            return False

    # --- requests ------------------------------------------------------------------------------

    def _ask(self, number: int, begun: threading.Event | None = None) -> list[int]:
        """Streamed, so that `begun` is set by the first token. An answer without its end is an error."""
        prompt = [10 + (7 * number + position) % 400 for position in range(40 + 30 * number)]
        body = {"input_ids": prompt, "sampling_params": _SAMPLING, "stream": True}
        tokens: list[int] = []
        with self.server.post("/generate", body, timeout_s=ANSWER_LIMIT_S, stream=True) as response:
            response.raise_for_status()
            for event in response.iter_lines():
                if event.startswith(b"data: {"):
                    tokens = json.loads(event[len(b"data: ") :])["output_ids"]
                    if begun is not None:
                        begun.set()
        if len(tokens) != _SAMPLING["max_new_tokens"]:
            raise ServerError(f"an answer ended after {len(tokens)} tokens")
        return tokens

    def _ask_all(self, threads: ThreadPoolExecutor) -> list[Future[list[int]]]:
        """All requests at once; returns when the first token of one of them is here."""
        begun = threading.Event()
        asked = [threads.submit(self._ask, number, begun) for number in range(_REQUESTS)]
        if not begun.wait(ANSWER_LIMIT_S):
            raise ServerError(f"the server answered none of its requests within {ANSWER_LIMIT_S:.0f} s")
        return asked

    def _outcomes(self, asked: Sequence[Future[list[int]]]) -> Counter[str]:
        counted: Counter[str] = Counter()
        for one, expected in zip(asked, self.answers, strict=False):
            if not one.done():
                counted["silence"] += 1
            elif one.exception() is not None:
                counted["error"] += 1
            else:
                counted["answer" if one.result() == expected else "other answer"] += 1
        return counted

    # --- what is left --------------------------------------------------------------------------

    def _sentences(self) -> list[list[str]]:
        nodes = range(self.server.nnodes)
        return [sorted(set(SENTENCE.findall(self.server.log_text(node)))) for node in nodes]

    def _gone_schedulers(self) -> list[str]:
        return [f"the scheduler {pid} is gone" for pid in self._stages if not psutil.pid_exists(pid)]

    def _ports(self) -> list[str]:
        found = []
        for port in (self.server.port, self.server._nccl_port, self.server._init_port):
            with socket.socket() as probe:
                if probe.connect_ex((HOST, port)) == 0:
                    found.append(f"port {port} answers")
        return found

    def _sockets(self) -> list[str]:
        scratch = self.server._scratch
        return (
            [f"socket {path}" for path in scratch.glob(f"{DIRECTORY_PREFIX}*")] if scratch is not None else []
        )

    def _segments(self) -> list[str]:
        return [f"shared memory {path.name}" for path in self.server._shared_memory if path.exists()]


def _title(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())[:60]
    except psutil.Error:
        return "?"


def describe(outcome: Outcome) -> dict[str, Any]:
    """For a JSON file."""
    return {**vars(outcome), "clients": dict(outcome.clients)}
