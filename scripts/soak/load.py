"""The load of a soak: random requests whose answers are known, and random delays of the link."""

from __future__ import annotations

import random
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import requests

from rig import battery
from rig.loads import ABORTED, Pool, ask, ask_in_pieces, greedy, make_pool
from rig.server import Server
from scripts.bench.link import Link

PLAIN, STREAMED, ABORTS, LEAVES, PICTURE = "plain", "streamed", "aborted", "left by its client", "picture"
_SHARES = {PLAIN: 50, STREAMED: 30, ABORTS: 10, LEAVES: 7, PICTURE: 3}
_SHORT, _LONG = 52, 8  # requests in the pool
_LONG_ANSWER = (60, 200)  # tokens
_DELAYS_MS = (0.0, 1.0, 2.0, 5.0, 10.0, 20.0)
_LARGE_DELAY_MS, _LARGE_SHARE = 100.0, 0.1
_WEATHER_S = (2.0, 6.0)  # how long one delay lasts
_MOST_AT_ONCE = 24


@dataclass
class Known:
    """Requests and what each of them is answered when it is alone."""

    pool: Pool
    pictures: list[dict[str, Any]]

    @classmethod
    def asked_alone(cls, server: Server) -> Known:
        """Ask all of them, one at a time."""
        pool = Pool.asked_alone(server, _bodies())
        pictures = [battery.ask_about(server, picture) for picture in battery.DIGITS]
        return cls(pool, pictures)


def _bodies() -> list[dict[str, Any]]:
    generator = random.Random(1)
    long = [
        greedy(
            battery.prompt(generator.randrange(1, 600), seed=5000 + index), generator.randrange(*_LONG_ANSWER)
        )
        for index in range(_LONG)
    ]
    return make_pool(_SHORT) + long


@dataclass
class Tally:
    """What was asked, and what is wrong with the answers. Written by all clients."""

    asked: Counter[str] = field(default_factory=Counter)  # by way
    ended_early: int = 0  # of those that were aborted or left, the ones that had not ended before
    wrong: list[str] = field(default_factory=list)
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def add(self, way: str, ended_early: bool, wrong: Sequence[str]) -> None:
        with self._lock:
            self.asked[way] += 1
            self.ended_early += ended_early
            self.wrong.extend(wrong)


class Clients:
    """Clients that ask for a while, in one style, and are then all answered."""

    STYLES = ("steady", "bursts", "trickle")

    def __init__(self, server: Server, known: Known, tally: Tally, seed: int) -> None:
        self._server, self._known, self._tally = server, known, tally
        self._generator = random.Random(f"clients {seed}")
        self._asked = 0

    def run(self, seconds: float) -> str:
        """Returns what was done, in words. Every request has ended when this returns."""
        style = self._generator.choice(self.STYLES)
        abort_all = self._generator.random() < 0.2
        clients = 2 if style == "trickle" else self._generator.randrange(4, _MOST_AT_ONCE)
        deadline = time.monotonic() + seconds
        with ThreadPoolExecutor(clients) as threads:
            seeds = [self._generator.random() for _ in range(clients)]
            working = [threads.submit(self._work, style, seed, deadline, abort_all) for seed in seeds]
            if abort_all:
                time.sleep(seconds)
                self._server.post("/abort_request", {"abort_all": True}).raise_for_status()
            for one in working:
                one.result()
        return f"{style}, {clients} clients" + (", all aborted in the end" if abort_all else "")

    def _work(self, style: str, seed: float, deadline: float, may_be_aborted: bool) -> None:
        generator = random.Random(seed)
        while time.monotonic() < deadline:
            self._ask(generator, may_be_aborted)
            if style == "trickle":
                time.sleep(generator.uniform(0, 1))
            elif style == "bursts":  # all clients come back at the same time
                time.sleep(3 - time.monotonic() % 3)

    def _ask(self, generator: random.Random, may_be_aborted: bool) -> None:
        way = generator.choices(list(_SHARES), list(_SHARES.values()))[0]
        if way == PICTURE and may_be_aborted:
            way = PLAIN  # of a picture that is aborted there is no answer to look at
        early, wrong = False, []
        try:
            if way == PICTURE:
                wrong = self._ask_about_a_picture(generator)
            else:
                index = generator.randrange(len(self._known.pool.bodies))
                answer = self._answer(way, self._known.pool.bodies[index], generator)
                early = answer == ABORTED and (may_be_aborted or way in (ABORTS, LEAVES))
                wrong = [] if early else self._known.pool.wrong([(index, answer)])
        except requests.RequestException as error:
            self._server.check_alive("during the soak")
            wrong = [f"a request ({way}) failed: {error}"]
        self._tally.add(way, early, wrong)

    def _answer(self, way: str, body: dict[str, Any], generator: random.Random) -> Any:
        if way == LEAVES:
            return ask_in_pieces(self._server, body, leave_after=generator.randrange(8))
        if way == STREAMED:
            return ask_in_pieces(self._server, body)
        if way == PLAIN:
            return ask(self._server, body)
        name = f"soak-{generator.random()}"
        with ThreadPoolExecutor(1) as thread:
            answer = thread.submit(ask, self._server, body, name)
            time.sleep(generator.uniform(0, 0.5))
            self._server.post("/abort_request", {"rid": name}).raise_for_status()
            return answer.result()

    def _ask_about_a_picture(self, generator: random.Random) -> list[str]:
        index = generator.randrange(len(battery.DIGITS))
        answer = battery.ask_about(self._server, battery.DIGITS[index])
        return battery.differences({"picture": self._known.pictures[index]}, {"picture": answer})


class Weather:
    """Changes the delay of a link every few seconds."""

    def __init__(self, link: Link, seed: int) -> None:
        self.delays_ms: Counter[float] = Counter()
        self._link, self._generator = link, random.Random(f"weather {seed}")
        self._end = threading.Event()

    @contextmanager
    def changing(self) -> Iterator[None]:
        thread = threading.Thread(target=self._run, name="weather", daemon=True)
        thread.start()
        try:
            yield
        finally:
            self._end.set()
            thread.join(60)

    def _run(self) -> None:
        while not self._end.wait(self._generator.uniform(*_WEATHER_S)):
            large = self._generator.random() < _LARGE_SHARE
            delay = _LARGE_DELAY_MS if large else self._generator.choice(_DELAYS_MS)
            self._link.set(delay, 0)
            self.delays_ms[delay] += 1
