"""The loads: requests that clients send at the same time, and what came back."""

from __future__ import annotations

import asyncio
import json
import random
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import aiohttp

LIMIT_S = 600.0
_TOKENS = range(10, 500)  # ids of the small tokenizer that stand for text


class LoadError(RuntimeError):
    """A request failed or its answer has another length; the message is one sentence."""


class NoAnswerError(LoadError):
    """An answer did not come in time."""


@dataclass(frozen=True)
class Request:
    """One prompt of `length` random tokens, answered with `answer` tokens."""

    length: int
    answer: int


@dataclass(frozen=True)
class Load:
    """Requests that are all sent at once."""

    name: str
    requests: Sequence[Request]

    @property
    def answer_tokens(self) -> int:
        return sum(request.answer for request in self.requests)

    @property
    def prompt_tokens(self) -> int:
        return sum(request.length for request in self.requests)


DECODE = Load("decode", [Request(32, 33)] * 32)
PREFILL = Load("prefill", [Request(1024, 1)] * 8)
# Long prompts arrive among requests that are being decoded.
MIXED = Load("mixed", [Request(32, 33)] * 24 + [Request(768, 9)] * 4)
SETTLE = Load("settle", [Request(16, 4)] * 4)  # wakes a server that was frozen
LOADS = {load.name: load for load in (DECODE, PREFILL, MIXED)}


class Dialect(Protocol):
    """How a server is asked for greedy tokens, and where they stand in what it streams.

    `told`: address of another server that gets each request, too.
    """

    path: str
    told: str | None

    def body(self, prompt: list[int], length: int) -> dict[str, Any]: ...

    def tokens(self, event: dict[str, Any], earlier: list[int]) -> list[int]:
        """All tokens so far."""


class SGLang:
    path = "/generate"
    told: str | None = None

    def body(self, prompt: list[int], length: int) -> dict[str, Any]:
        sampling = {"temperature": 0, "max_new_tokens": length, "ignore_eos": True}
        return {"input_ids": prompt, "stream": True, "sampling_params": sampling}

    def tokens(self, event: dict[str, Any], earlier: list[int]) -> list[int]:
        return list(event["output_ids"])  # SGLang repeats what came before


@dataclass(frozen=True)
class Answers:
    """What one run of a load gave. Times in seconds."""

    duration_s: float
    first_token_s: float  # median over the requests, from sending to the first token
    per_token_s: float  # median, between tokens behind the first; 0 where there are none
    tokens: tuple[tuple[int, ...], ...]  # the answers, in the order of the requests


SGLANG = SGLang()


@dataclass(frozen=True)
class _Answer:
    first_token_s: float
    last_token_s: float
    tokens: tuple[int, ...]


def run(url: str, load: Load, seed: int, dialect: Dialect = SGLANG, limit_s: float = LIMIT_S) -> Answers:
    """Send all requests of `load` at once. Equal seeds give equal prompts. Raises LoadError."""
    try:
        return asyncio.run(_run(url, load, seed, dialect, limit_s))
    except TimeoutError as error:
        raise NoAnswerError(f"the load {load.name} was not answered within {limit_s:g} s") from error
    except (aiohttp.ClientError, ValueError, LookupError) as error:
        raise LoadError(f"the load {load.name} failed: {type(error).__name__}: {error}") from error


async def _run(url: str, load: Load, seed: int, dialect: Dialect, limit_s: float) -> Answers:
    generator = random.Random(seed)
    prompts = [[generator.choice(_TOKENS) for _ in range(request.length)] for request in load.requests]
    limit = aiohttp.ClientTimeout(total=limit_s)
    connections = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(url, timeout=limit, connector=connections) as session:
        began = time.perf_counter()
        answers = await asyncio.gather(
            *(
                _ask(session, dialect, prompt, request.answer)
                for prompt, request in zip(prompts, load.requests, strict=True)
            )
        )
        duration_s = time.perf_counter() - began
    gaps = [
        (answer.last_token_s - answer.first_token_s) / (len(answer.tokens) - 1)
        for answer in answers
        if len(answer.tokens) > 1
    ]
    return Answers(
        duration_s=duration_s,
        first_token_s=statistics.median(answer.first_token_s for answer in answers),
        per_token_s=statistics.median(gaps) if gaps else 0.0,
        tokens=tuple(answer.tokens for answer in answers),
    )


async def _ask(session: aiohttp.ClientSession, dialect: Dialect, prompt: list[int], length: int) -> _Answer:
    began = time.perf_counter()
    times: list[float] = []
    tokens: list[int] = []
    event: dict[str, Any] = {}
    body = dialect.body(prompt, length)
    told = asyncio.create_task(_tell(session, dialect.told, body)) if dialect.told else None
    async with session.post(dialect.path, json=body) as response:
        response.raise_for_status()
        async for line in response.content:
            if line.startswith(b"data: {"):
                times.append(time.perf_counter() - began)
                event = json.loads(line[len(b"data: ") :])
                tokens = dialect.tokens(event, tokens)
    if told:
        await told
    if len(tokens) != length:
        raise LoadError(f"an answer should have {length} tokens, not {len(tokens)}: {str(event)[:200]}")
    return _Answer(times[0], times[-1], tuple(tokens))


async def _tell(session: aiohttp.ClientSession, url: str, body: dict[str, Any]) -> None:
    async with session.post(url, json=body) as response:
        response.raise_for_status()
        await response.read()
