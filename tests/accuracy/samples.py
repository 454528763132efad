"""Results and a server made for tests."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from scripts.evaluation.results import Result, Side, Token
from sglang_npu_pp.tools.certify.ports import HOST, free_ports

LAYOUT = "tp1 pp2 cpu"
TOKENS = (Token("4", -0.25, (-0.25, -1.5)), Token("<|im_end|>", -0.01, (-0.01, -5.0)))


def result(side: Side = Side.UNPATCHED, **changed: Any) -> Result:
    """Three samples, all answered, two right."""
    values: dict[str, Any] = {
        "task": "digits",
        "layout": LAYOUT,
        "side": side,
        "asked": 3,
        "ran": 3,
        "failed": 0,
        "accuracy": 0.98,
        "answers": {"0": "4", "1": "7", "2": "1"},
        "tokens": {"a#1": TOKENS, "b#1": TOKENS, "c#1": TOKENS},
    }
    return Result(**{**values, **changed})


def completion(text: str, tokens: Sequence[Token] = TOKENS) -> dict[str, Any]:
    """The body of an answer as an OpenAI-compatible server sends it."""
    content = [
        {"token": one.text, "logprob": one.logprob, "top_logprobs": [{"logprob": top} for top in one.top]}
        for one in tokens
    ]
    return {
        "id": "1",
        "object": "chat.completion",
        "created": 0,
        "model": "fake",
        "choices": [
            {
                "index": 0,
                "finish_reason": "stop",
                "message": {"role": "assistant", "content": text},
                "logprobs": {"content": content},
            }
        ],
        "usage": {"prompt_tokens": 1, "completion_tokens": len(tokens), "total_tokens": 1 + len(tokens)},
    }


class FakeServer(ThreadingHTTPServer):
    """Answers every question with `text`, the first `lives` of them; then it answers no more."""

    daemon_threads = True

    def __init__(self, text: str, lives: int) -> None:
        super().__init__((HOST, free_ports(1)[0]), _Handler)
        self.text, self.lives = text, lives
        self.bodies: list[dict[str, Any]] = []
        self.lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://{HOST}:{self.server_address[1]}"


class _Handler(BaseHTTPRequestHandler):
    server: FakeServer

    def do_GET(self) -> None:
        self._send({"data": [{"id": "fake"}]})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            self.server.bodies.append(body)
            alive = len(self.server.bodies) <= self.server.lives
        if alive:
            self._send(completion(self.server.text))
        else:
            self.close_connection = True  # and no answer, as of a process that has ended

    def _send(self, body: dict[str, Any]) -> None:
        content = json.dumps(body).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: Any) -> None:
        """Silent."""


@contextmanager
def fake_server(text: str = "4", lives: int = 10**9) -> Iterator[FakeServer]:
    with FakeServer(text, lives) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join(timeout=10)
