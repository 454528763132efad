"""Many requests at a time, drawn from a pool whose answers are known, and how they end.

Every request of the pool is asked alone once; whatever else a server is doing, the same request must get the
same tokens.
"""

from __future__ import annotations

import json
import random
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import requests

from rig import battery
from rig.server import Server

Body = dict[str, Any]
Tokens = list[int]

ABORTED = "aborted"
# How upstream answers for a request that was aborted with its grammar, or by a time limit.
REFUSED = (requests.codes.bad_request, requests.codes.service_unavailable)
ABORT_REASONS = ("Aborted by AbortReq", "timeout reached")
# And for one that had a microbatch for itself while the others filled the KV pool: which requests share a
# microbatch depends on how fast they come.
GIVEN_UP = "Out of memory even after retracting all other requests"
TRIES = 5
POOL_SIZE = 100
CONCURRENCY = 32


def greedy(ids: Tokens, new_tokens: int) -> Body:
    """A request for exactly so many tokens, which are always the same."""
    sampling = {"temperature": 0, "max_new_tokens": new_tokens, "ignore_eos": True}
    return {"input_ids": ids, "sampling_params": sampling}


def make_pool(size: int = POOL_SIZE, seed: int = 0) -> list[Body]:
    """Prompts of 1 to 900 tokens, most of them short, some that begin alike, some with a grammar."""
    generator = random.Random(seed)
    pool = []
    for index in range(size):
        length = generator.choice((1, 5, 20, 60, 130, 255, 256, 257, 400, 900))
        ids = battery.prompt(length, seed=1000 + index)
        if index % 5 == 0:
            ids = battery.prompt(200, seed=77) + ids[:50]
        body = greedy(ids, generator.randrange(1, 25))
        if index % 10 == 3:
            body["sampling_params"] |= {"regex": f"[0-{index % 9 + 1}]{{3,9}}", "ignore_eos": False}
        pool.append(body)
    return pool


def answer(server: Server, body: Body, name: str | None = None) -> dict[str, Any] | str:
    """What the server says, or how it ended instead. Asked again where the server had no room for it."""
    for _ in range(TRIES):
        response = server.post("/generate", {**body, **({"rid": name} if name else {})})
        if response.status_code != requests.codes.server_error or GIVEN_UP not in response.text:
            break
    if response.status_code in REFUSED and any(reason in response.text for reason in ABORT_REASONS):
        return ABORTED
    response.raise_for_status()
    found: dict[str, Any] = response.json()
    return found if outcome(found) != ABORTED else ABORTED


def ask(server: Server, body: Body, name: str | None = None) -> Tokens | str:
    """The tokens of one answer, or how it ended instead."""
    found = answer(server, body, name)
    return found if isinstance(found, str) else outcome(found)


def ask_together(server: Server, bodies: Sequence[Body]) -> list[Tokens | str]:
    """All of them at the same time."""
    with ThreadPoolExecutor(len(bodies)) as threads:
        return list(threads.map(lambda body: ask(server, body), bodies))


def given(indices: Iterable[int], answers: Iterable[Any]) -> list[tuple[int, Any]]:
    """Those that were not aborted, each with the index of its request in the pool."""
    return [(index, answer) for index, answer in zip(indices, answers, strict=True) if answer != ABORTED]


def outcome(answer: dict[str, Any]) -> Tokens | str:
    if answer["meta_info"]["finish_reason"]["type"] == "abort":
        return ABORTED
    ids: Tokens = answer["output_ids"]
    return ids


def ask_in_pieces(server: Server, body: Body, name: str | None = None, leave_after: int | None = None) -> Any:
    """As `ask`, streamed. `leave_after`: disconnect after so many pieces; the answer is then `ABORTED`."""
    request = {**body, "stream": True, **({"rid": name} if name else {})}
    with server.post("/generate", request, stream=True) as response:
        last: dict[str, Any] = {}
        for count, piece in enumerate(_pieces(response)):
            if leave_after is not None and count >= leave_after:
                return ABORTED
            last = piece
    return outcome(last)


@dataclass(frozen=True)
class Ways:
    """How requests of a load are asked: shares of those that are aborted, left, and streamed to their end."""

    abort: float = 0.1
    leave: float = 0.05
    stream: float = 0.3
    looks: int = 4  # of a client at the server before it aborts, less one at most
    pieces: int = 3  # before it leaves, less one at most

    def ask(
        self,
        server: Server,
        body: Body,
        name: str,
        generator: random.Random,
        whole: Callable[[Server, Body, str], Any] = ask,
    ) -> Any:
        """What `whole` gives, the tokens of a streamed answer, or `ABORTED`."""
        kind = generator.random()
        if kind < self.abort:
            with ThreadPoolExecutor(1) as thread:
                asked = thread.submit(whole, server, body, name)
                for _ in range(generator.randrange(self.looks)):
                    server.get("/v1/models")  # some time passes, by what the server does meanwhile
                assert server.post("/abort_request", {"rid": name}).ok
                return asked.result()
        if kind < self.abort + self.leave:
            return ask_in_pieces(server, body, name, leave_after=generator.randrange(self.pieces))
        if kind < self.abort + self.leave + self.stream:
            return ask_in_pieces(server, body, name)
        return whole(server, body, name)


def load(ask_one: Callable[[int], tuple[bool, list[str]]], count: int) -> tuple[int, list[str]]:
    """How many of `count` requests were ended early, and what is wrong with the answers to all others."""
    with ThreadPoolExecutor(CONCURRENCY) as threads:
        found = list(threads.map(ask_one, range(count)))
    return sum(ended for ended, _ in found), [line for _, lines in found for line in lines]


@contextmanager
def running(server: Server, body: Body) -> Iterator[Callable[[], Tokens | str]]:
    """A request that has given its first token; calling the value waits for its whole answer."""
    with server.post("/generate", {**body, "stream": True}, stream=True) as response:
        pieces = _pieces(response)
        answers = deque([next(pieces)], maxlen=1)

        def finish() -> Tokens | str:
            answers.extend(pieces)
            return outcome(answers[-1])

        yield finish


def _pieces(response: requests.Response) -> Iterator[dict[str, Any]]:
    """The answer so far, each time that there is more of it."""
    response.raise_for_status()
    for line in response.iter_lines():
        if line.startswith(b"data: {"):
            yield json.loads(line.removeprefix(b"data: "))


@dataclass
class Pool:
    """Requests, and their answers when each was asked alone."""

    bodies: Sequence[Body]
    alone: list[Tokens]

    @classmethod
    def asked_alone(cls, server: Server, bodies: Sequence[Body]) -> Pool:
        alone = [ask(server, body) for body in bodies]
        assert ABORTED not in alone
        return cls(bodies, alone)  # type: ignore[arg-type]

    def wrong(self, answers: Iterable[tuple[int, Any]]) -> list[str]:
        """A line for each answer (by index in the pool) that is not the one it gets alone."""
        return [
            f"request {index}: {answer}, alone {self.alone[index]}"
            for index, answer in answers
            if answer != self.alone[index]
        ]

    def ask_many(self, server: Server, count: int, *, seed: int = 0) -> list[str]:
        """`count` requests, `CONCURRENCY` at a time; what is wrong with their answers."""
        chosen = random.Random(seed).choices(range(len(self.bodies)), k=count)
        with ThreadPoolExecutor(CONCURRENCY) as threads:
            answers = threads.map(lambda index: (index, ask(server, self.bodies[index])), chosen)
            return self.wrong(answers)
