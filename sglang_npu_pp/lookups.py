"""HTTP requests from a thread of their own, for questions to a bootstrap server.

`Lookups.ask` sends the HTTP request and returns its state: pending, the answer, or a failure. Attempts have a
time limit and a check of the status; retries back off with jitter, under one total limit.

Idea from vllm-ascend #5303 (ask when a request is scheduled), with what its review found missing: status
codes, time limits, backoff, closed clients.
"""

from __future__ import annotations

import asyncio
import random
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import aiohttp
import msgspec

CONNECTIONS_PER_HOST = 8
LONGEST_ANSWER = 4 << 20  # bytes; of thousands of rooms some 100 KiB
LONGEST_REASON = 200  # characters of an answer that are worth repeating
TOO_EARLY = (408, 425, 429)  # the only 4xx worth a retry
CLOSE_LIMIT_S = 5.0


class LookupFailedError(Exception):
    """Final failure; the text is the reason in one sentence."""


@dataclass(frozen=True)
class HttpRequest:
    """A GET, or a POST of `body` (JSON). `expects`: a required key of the answer."""

    url: str
    body: str | None = None
    expects: str | None = None

    @property
    def method(self) -> str:
        return "GET" if self.body is None else "POST"


@dataclass(frozen=True)
class RetryPolicy:
    """Limits of one HTTP request, in seconds."""

    total_s: float = 60.0  # all attempts and the pauses between them
    attempt_s: float = 5.0  # one attempt, from connecting to the last byte
    first_pause_s: float = 0.1
    longest_pause_s: float = 2.0

    def pause_s(self, attempt: int, draw: float) -> float:
        """Backoff after attempt number `attempt` (from 0); `draw`: random, 0 to 1."""
        longest = min(self.longest_pause_s, self.first_pause_s * 2.0 ** min(attempt, 30))
        return longest * (0.5 + 0.5 * draw)


@dataclass
class _State:
    """State of an HTTP request; the I/O thread assigns the outcome once."""

    outcome: _Outcome | None = None


@dataclass(frozen=True)
class _Outcome:
    value: Any
    failure: str | None
    known_since: float = field(default_factory=time.monotonic)


class _RepeatableError(Exception):
    """A failed attempt worth a retry."""


class Lookups:
    """HTTP requests on an I/O thread. All methods are thread-safe and non-blocking.

    `counters`: "requests", "attempts", "answers" and "failures".
    """

    def __init__(self, policy: RetryPolicy | None = None) -> None:
        self._policy = policy or RetryPolicy()
        self._states: dict[HttpRequest, _State] = {}
        self._lock = (
            threading.Lock()
        )  # for the state that several threads change; an outcome is assigned at once
        self.counters: Counter[str] = Counter()
        self._client: aiohttp.ClientSession | None = None
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="lookups", daemon=True)
        self._thread.start()

    def ask(self, request: HttpRequest) -> Any | None:
        """The answer (decoded JSON), or None while pending; the first call sends the HTTP request.

        An answer older than the limit of a whole request is asked for again, so answers asked for together
        are all fresh when the last arrives. Raises LookupFailedError until `forget`.
        """
        state = self._states.get(request)
        if state is None or self._is_old(state):
            self._start(request, known=state)
            return None
        outcome = state.outcome
        if outcome is None:
            return None
        if outcome.failure is not None:
            raise LookupFailedError(outcome.failure)
        return outcome.value

    def send(self, request: HttpRequest, on_failure: Callable[[str], None]) -> None:
        """Send without an answer. `on_failure` gets the reason, on the I/O thread."""

        async def run() -> None:
            outcome = await self._find_out(request)
            if outcome.failure is not None:
                on_failure(outcome.failure)

        self._submit(run())

    def failed(self) -> list[HttpRequest]:
        """Finally failed requests."""
        with self._lock:
            known = [(request, state.outcome) for request, state in self._states.items()]
        return [request for request, outcome in known if outcome is not None and outcome.failure]

    def forget(self, request: HttpRequest) -> None:
        """Drop the state; an attempt in flight goes on."""
        with self._lock:
            self._states.pop(request, None)

    def close(self) -> None:
        """Cancel what is in flight, close connections, end the thread. Idempotent."""
        if self._loop.is_closed():
            return
        asyncio.run_coroutine_threadsafe(self._shut_down(), self._loop).result(CLOSE_LIMIT_S)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(CLOSE_LIMIT_S)
        self._loop.close()

    def _is_old(self, state: _State) -> bool:
        outcome = state.outcome
        return outcome is not None and time.monotonic() - outcome.known_since > self._policy.total_s

    def _start(self, request: HttpRequest, known: _State | None) -> None:
        state = _State()
        with self._lock:
            if self._states.get(request) is not known:
                return  # another thread was faster
            self._states[request] = state

        async def run() -> None:
            state.outcome = await self._find_out(request)

        self._submit(run())

    def _submit(self, work: Any) -> None:
        with self._lock:
            self.counters["requests"] += 1
        asyncio.run_coroutine_threadsafe(work, self._loop)

    async def _find_out(self, request: HttpRequest) -> _Outcome:
        begin, attempt, elapsed = time.monotonic(), 0, 0.0
        while True:
            self.counters["attempts"] += 1
            limit_s = min(self._policy.attempt_s, self._policy.total_s - elapsed)
            try:
                value = await self._attempt(request, limit_s)
            except _RepeatableError as error:
                problem, final = str(error), False
            except Exception as error:
                problem, final = str(error) or type(error).__name__, True
            else:
                self.counters["answers"] += 1
                return _Outcome(value, None)
            pause = self._policy.pause_s(attempt, random.random())
            attempt += 1
            elapsed = time.monotonic() - begin
            if final or elapsed + pause > self._policy.total_s:
                self.counters["failures"] += 1
                times = "one attempt" if attempt == 1 else f"{attempt} attempts"
                where = f"{request.method} {request.url}"
                return _Outcome(None, f"{where} had no answer in {times} and {elapsed:.1f} s: {problem}")
            await asyncio.sleep(pause)

    async def _attempt(self, request: HttpRequest, limit_s: float) -> Any:
        client = self._connected_client()
        headers = {"Accept-Encoding": "identity"}
        if request.body is not None:
            headers["Content-Type"] = "application/json"
        limit = aiohttp.ClientTimeout(total=limit_s)
        try:
            async with client.request(
                request.method, request.url, data=request.body, headers=headers, timeout=limit
            ) as response:
                text = await _read(response)
        except TimeoutError:
            raise _RepeatableError(f"it took longer than {limit_s:.1f} s") from None
        except (aiohttp.ClientConnectionError, aiohttp.ClientPayloadError, OSError) as error:
            raise _RepeatableError(str(error) or type(error).__name__) from None
        if response.status != 200:
            problem = f"HTTP status {response.status} ({text[:LONGEST_REASON].strip()})"
            if response.status >= 500 or response.status in TOO_EARLY:
                raise _RepeatableError(problem)
            raise LookupFailedError(problem)
        return _decode(text, request.expects)

    def _connected_client(self) -> aiohttp.ClientSession:
        """Belongs to the I/O thread's loop; ignores proxies of the environment."""
        if self._client is None:
            connector = aiohttp.TCPConnector(limit=0, limit_per_host=CONNECTIONS_PER_HOST)
            # What was packed may become a thousand times as long.
            self._client = aiohttp.ClientSession(connector=connector, auto_decompress=False)
        return self._client

    async def _shut_down(self) -> None:
        others = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)
        if self._client is not None:
            await self._client.close()
        await self._loop.shutdown_default_executor()  # it looks host names up


async def _read(response: aiohttp.ClientResponse) -> str:
    """Text of a response, up to LONGEST_ANSWER."""
    body = b""
    async for part in response.content.iter_any():
        body += part
        if len(body) > LONGEST_ANSWER:
            raise LookupFailedError(f"the answer is longer than {LONGEST_ANSWER >> 20} MiB")
    return body.decode("utf-8", errors="replace")


def _decode(text: str, expects: str | None) -> Any:
    """A starting server may send garbage, or not yet the expected key."""
    if expects is None:
        return text
    try:
        value = msgspec.json.decode(text)
    except msgspec.DecodeError as error:
        raise _RepeatableError(f"the answer is not JSON ({error}): {text[:LONGEST_REASON]}") from None
    if not isinstance(value, dict) or expects not in value:
        raise _RepeatableError(f"the answer has no {expects!r}: {text[:LONGEST_REASON]}")
    return value
