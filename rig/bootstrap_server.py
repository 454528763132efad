"""A bootstrap server that can be well, slow, wrong or dead, on a real socket."""

from __future__ import annotations

import gzip
import json
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

import requests

from sglang_npu_pp.tools.certify.ports import HOST, free_ports

LIMIT_S = 30.0
MUCH = 256 << 20  # bytes
PACKED = gzip.compress(b" " * (16 << 20))


class BootstrapServer:
    """Answers as SGLang's own does for a prefill server of `stages` x 1 ranks, until told otherwise.

    `behind`: the address of a real one, whose answers it hands on instead. `behaviour`: "well"; "slow": no
    answer until `release`; "error": HTTP 500; "refuse": HTTP 404; "garbage": 200 and no JSON; "starting":
    HTTP 503; "endless": an answer of any length, and `sent_bytes` says how much of it was taken; "packed": a
    short answer that becomes a long one. `seen` are the paths that were asked for, `registered` the rooms.
    """

    def __init__(
        self, stages: int = 2, page_size: int = 1, port: int | None = None, behind: str | None = None
    ) -> None:
        self.stages, self.page_size, self.behind = stages, page_size, behind
        self.behaviour = "well"
        self.seen: list[str] = []
        self.sent_bytes = 0
        self.registered: dict[int, int] = {}
        self.more: dict[str, Any] = {}  # what else stands in the description of the prefill server
        self._released = threading.Event()
        self._arrived = threading.Condition()
        self._connections: list[socket.socket] = []
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def setup(self) -> None:
                super().setup()
                server._connections.append(self.connection)

            def do_GET(self) -> None:
                server._handle(self, None)

            def do_POST(self) -> None:
                length = int(self.headers["Content-Length"])
                server._handle(self, json.loads(self.rfile.read(length)))

            def log_message(self, format: str, *args: Any) -> None:
                return

        # Not one of the kernel's: a test kills a server and starts another in its place.
        self.port = free_ports(1)[0] if port is None else port
        self._http = ThreadingHTTPServer((HOST, self.port), Handler)
        self._http.daemon_threads = True
        self._thread = threading.Thread(target=self._http.serve_forever, args=(0.01,), daemon=True)
        self._thread.start()

    @property
    def address(self) -> str:
        return f"{HOST}:{self.port}"

    def release(self) -> None:
        """Slow answers come now."""
        self._released.set()

    def wait_seen(self, count: int) -> None:
        """Until so many requests have arrived."""
        with self._arrived:
            arrived = self._arrived.wait_for(lambda: len(self.seen) >= count, LIMIT_S)
        assert arrived, f"{len(self.seen)} of {count} requests arrived in {LIMIT_S:.0f} s"

    def kill(self) -> None:
        """Connections that a client keeps for its next question end too."""
        self.release()
        self._http.shutdown()
        for connection in self._connections:
            with suppress(OSError):  # it has ended already
                connection.shutdown(socket.SHUT_RDWR)
        self._http.server_close()
        self._thread.join(LIMIT_S)

    def _handle(self, handler: BaseHTTPRequestHandler, body: Any) -> None:
        with self._arrived:
            self.seen.append(handler.path)
            self._arrived.notify_all()
        behaviour = self.behaviour
        if behaviour == "slow":
            self._released.wait(LIMIT_S)
        if behaviour in ("endless", "packed"):
            self._answer_too_much(handler, behaviour)
            return
        status = {"error": 500, "refuse": 404, "starting": 503}.get(behaviour, 200)
        text = "{" if behaviour == "garbage" else json.dumps(self._answer(handler.path, body))
        data = text.encode() if status == 200 else behaviour.encode()
        try:
            handler.send_response(status)
            handler.send_header("Content-Length", str(len(data)))
            handler.end_headers()
            handler.wfile.write(data)
        except OSError:
            return  # who asked is gone

    def _answer_too_much(self, handler: BaseHTTPRequestHandler, behaviour: str) -> None:
        packed = behaviour == "packed"
        part = PACKED if packed else b" " * (64 << 10)
        length = len(part) if packed else MUCH
        with suppress(OSError):  # who asked has enough
            handler.send_response(200)
            if packed:
                handler.send_header("Content-Encoding", "gzip")
            handler.send_header("Content-Length", str(length))
            handler.end_headers()
            for _ in range(length // len(part)):
                handler.wfile.write(part)
                self.sent_bytes += len(part)

    def _answer(self, path: str, body: Any) -> Any:
        parts = urlsplit(path)
        if parts.path == "/health":
            return "OK"
        if self.behind is not None:
            method = "GET" if body is None else "POST"
            return requests.request(method, f"http://{self.behind}{path}", json=body, timeout=LIMIT_S).json()
        if parts.path == "/query_dp_ranks":
            rooms = [room for room in body["bootstrap_rooms"] if room in self.registered]
            return {str(room): self.registered[room] for room in rooms}
        if parts.path == "/register_dp_rank":
            self.registered[body["bootstrap_room"]] = body["dp_rank"]
            return "OK"
        stage = int(parse_qs(parts.query)["target_pp_rank"][0])
        if stage >= 0:
            return {"rank_ip": HOST, "rank_port": 1000 + stage}
        return {
            "attn_tp_size": 1,
            "attn_cp_size": 1,
            "dp_size": 1,
            "pp_size": self.stages,
            "page_size": self.page_size,
            "kv_cache_dtype": None,
            "follow_bootstrap_room": True,
            **self.more,
        }


@contextmanager
def bootstrap_server(**options: Any) -> Iterator[BootstrapServer]:
    server = BootstrapServer(**options)
    try:
        yield server
    finally:
        server.kill()


def dead_address() -> str:
    """An address of this machine at which nobody listens."""
    return f"{HOST}:{free_ports(1)[0]}"
