"""Stands between lmms_eval and the server: forwards requests, asks for log-probabilities, keeps answers.

lmms_eval keeps no log-probabilities, and counts a request that failed as a wrong answer. Here every request
of any task passes as lmms_eval made it, so nothing has to be asked twice, and a failure is seen as one.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any, Self

import requests

from sglang_npu_pp.tools.certify.ports import HOST, free_ports

from .results import Token

COMPLETIONS = "/v1/chat/completions"
TOP_LOGPROBS = 2
REQUEST_LIMIT_S = 600.0


@dataclass(frozen=True)
class Exchange:
    """One request and what came of it. `error` is empty when the server answered."""

    request: str  # equal for equal requests, whatever the server
    question: str = ""  # the text of the request, without its pictures
    text: str = ""
    tokens: tuple[Token, ...] = ()
    error: str = ""


class Recorder:
    """A forwarder on a free loopback port, to use as a context manager.

    `server` is the URL of the server, without `/v1`; `model` is what requests shall name as their model.
    """

    def __init__(self, server: str, model: str, headers: Mapping[str, str] | None = None) -> None:
        self._server, self._model, self._headers = server, model, dict(headers or {})
        self._lock = threading.Lock()
        self._exchanges: list[Exchange] = []
        recorder = self

        class Handler(_Handler):
            def do_POST(self) -> None:
                recorder.handle(self)

        self._http = _Listener((HOST, free_ports(1)[0]), Handler)
        self._thread = threading.Thread(target=self._http.serve_forever, name="recorder", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._http.shutdown()
        self._http.server_close()
        self._thread.join(timeout=10)

    @property
    def url(self) -> str:
        return f"http://{HOST}:{self._http.server_address[1]}"

    @property
    def exchanges(self) -> list[Exchange]:
        """What was exchanged so far."""
        with self._lock:
            return list(self._exchanges)

    def handle(self, incoming: _Handler) -> None:
        """Forward one request and answer it as the server does; 502 when the server does not answer."""
        body = json.loads(incoming.rfile.read(int(incoming.headers.get("Content-Length", 0))))
        exchange, status, content = self._forward(incoming.path, body)
        with self._lock:
            self._exchanges.append(exchange)
        with suppress(ConnectionError):  # lmms_eval has gone: nobody waits for this answer
            incoming.answer(status, content)

    def _forward(self, path: str, body: dict[str, Any]) -> tuple[Exchange, int, bytes]:
        name, question = request_name(body), text_of(body)
        asked = {**body, "model": self._model, "logprobs": True, "top_logprobs": TOP_LOGPROBS}
        try:
            response = post(self._server + path, asked, self._headers)
            exchange = Exchange(name, question, *read_answer(response))
        except (requests.RequestException, ValueError) as error:
            message = {"error": {"message": one_line(error)}}
            return Exchange(name, question, error=one_line(error)), 502, json.dumps(message).encode()
        return exchange, response.status_code, response.content


class _Listener(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that goes away in the middle is no news."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def answer(self, status: int, content: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: Any) -> None:
        """Silent: the report says how many requests there were."""


def post(
    url: str,
    body: Mapping[str, Any],
    headers: Mapping[str, str] | None = None,
    limit_s: float = REQUEST_LIMIT_S,
) -> requests.Response:
    """POST JSON; safe from several threads. Raises requests.RequestException for anything but success."""
    with requests.Session() as session:
        session.trust_env = False  # a proxy of the environment must not see loopback requests
        response = session.post(url, json=body, headers=headers, timeout=limit_s)
    if response.status_code != requests.codes.ok:
        raise requests.HTTPError(f"HTTP {response.status_code}: {one_line(response.text)}")
    return response


def read_answer(response: requests.Response) -> tuple[str, tuple[Token, ...]]:
    """Text and tokens of a chat completion. Raises ValueError for anything else."""
    try:
        choice = response.json()["choices"][0]
        text = choice["message"]["content"] or ""
        tokens = (choice.get("logprobs") or {}).get("content") or []
        return text, tuple(
            Token(
                token["token"], token["logprob"], tuple(other["logprob"] for other in token["top_logprobs"])
            )
            for token in tokens
        )
    except (KeyError, IndexError, TypeError) as error:
        raise ValueError(f"the server sent something that is not a chat completion: {error!r}") from None


def request_name(body: Mapping[str, Any]) -> str:
    """The same name for the same request: a digest of all but the name of the model."""
    asked = {key: value for key, value in body.items() if key != "model"}
    return hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()[:16]


def text_of(body: Mapping[str, Any]) -> str:
    """The text in the messages of a request."""
    texts = []
    for message in body["messages"]:
        content = message["content"]
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
        texts += [part["text"] for part in parts if part["type"] == "text"]
    return " ".join(texts)


def one_line(error: object, longest: int = 160) -> str:
    """What an error says in few words: the reason of a lost connection, else its beginning."""
    text = " ".join(str(error).split())
    if isinstance(error, requests.ConnectionError):
        reason = re.search(r"Connection refused|Connection reset|Remote end closed|Connection aborted", text)
        return f"the server does not answer: {(reason[0] if reason else text[:longest]).lower()}"
    return text if len(text) <= longest else text[:longest] + "..."
