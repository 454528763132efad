"""A program that speaks as a server does, for tests of what is asked of one: called as python is.

Answers depend on the prompt alone. Its schedulers are processes that only sleep; when one is killed, it says
so and ends. MISTAKE names something that it does wrong.
"""

import http.server
import itertools
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
import zlib
from typing import Any

signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job of a shell has it ignored

MISTAKE = os.environ.get("MISTAKE", "")
TITLES = ("sglang::scheduler_PP0_TP0", "sglang::scheduler_PP1_TP0")
INFO = {
    "version": "0.5.21",
    "pp_size": 2,
    "chunked_prefill_size": 32,
    "max_req_input_len": 500,
    "device": "cpu",
}
MODEL = {"is_generation": True, "has_image_understanding": False}

running: dict[str, bool] = {}  # name -> whether it is to be aborted
names = itertools.count()
lock = threading.Lock()


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        page = {"/server_info": INFO, "/model_info": MODEL}.get(self.path)
        self.reply(200 if page else 404, page or {})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers.get("Content-Length", 0))) or b"null") or {}
        if self.path == "/flush_cache":
            with lock:
                busy = bool(running)
            self.reply(400 if busy else 200, "busy" if busy else "flushed")
        elif self.path == "/abort_request":
            with lock:
                for name in running:
                    if MISTAKE != "never aborts":
                        running[name] |= bool(body.get("abort_all")) or body.get("rid") == name
            self.reply(200, "")
        elif "regex" in body["sampling_params"]:
            self.reply(400, "no grammars here")
        else:
            self.generate(body)

    def generate(self, body: dict[str, Any]) -> None:
        name = body.get("rid") or str(next(names))
        with lock:
            running[name] = False
        try:
            self.pieces(name, body)
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True
        finally:
            if MISTAKE != "never idle":
                with lock:
                    del running[name]

    def pieces(self, name: str, body: dict[str, Any]) -> None:
        seed = zlib.crc32(json.dumps(body.get("input_ids") or body.get("text")).encode())
        wanted = body["sampling_params"]["max_new_tokens"]
        if body.get("stream"):
            self.send_response(200)
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
        ids: list[int] = []
        generator, reason = random.Random(seed), {"type": "length"}
        if MISTAKE == "answers by chance":
            generator = random.Random()
        while len(ids) < wanted:
            ids.append(generator.randrange(1000))
            if wanted > 100:
                time.sleep(0.01)  # a forward; else long requests would be over before they are aborted
            if running[name]:
                reason = {"type": "abort"}
                break
            if body.get("stream"):
                self.chunk(json.dumps(answer(ids, None)))
        if body.get("stream"):
            self.chunk(json.dumps(answer(ids, reason)))
            self.chunk("[DONE]")
            self.wfile.write(b"0\r\n\r\n")
        else:
            self.reply(200, answer(ids, reason))

    def chunk(self, text: str) -> None:
        data = f"data: {text}\n\n".encode()
        self.wfile.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")
        self.wfile.flush()

    def reply(self, status: int, content: Any) -> None:
        data = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


def answer(ids: list[int], reason: dict[str, str] | None) -> dict[str, Any]:
    logprobs = [[-token / 1000, token, None] for token in ids]
    meta = {"finish_reason": reason, "output_token_logprobs": logprobs}
    return {"output_ids": ids, "text": " ".join(map(str, ids)), "meta_info": meta}


def watch(schedulers: list[subprocess.Popen[bytes]]) -> None:
    """Until one of them has ended."""
    while all(process.poll() is None for process in schedulers):
        time.sleep(0.05)
    if MISTAKE == "does not end":
        return
    if MISTAKE != "says nothing":
        print("PeerLostError: stage 0 rank 0: stage 1 is gone: its connection broke", flush=True)
    for process in schedulers:
        process.kill()
        process.wait()
    os._exit(1)


if __name__ == "__main__":
    sleep = "import time; time.sleep(600)"
    children = [subprocess.Popen([title, "-c", sleep], executable=sys.executable) for title in TITLES]
    threading.Thread(target=watch, args=(children,), daemon=True).start()
    port = int(sys.argv[sys.argv.index("--port") + 1])
    server = http.server.ThreadingHTTPServer(("127.0.0.1", port), Handler)
    for stage in range(2):
        print(
            f"sglang-npu-pp: 40 patches in force for SGLang 0.5.21, all features; stage {stage} rank 0 of 2"
        )
    print("The server is fired up and ready to roll!", flush=True)
    try:
        server.serve_forever()
    finally:  # asked to end
        for child in children:
            child.kill()
        os._exit(0)
