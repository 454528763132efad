"""Requests to a server, and what of an answer must be equal, as plain values."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from typing import Any, Protocol

import requests

OUTPUT_TOKENS = 16
ANSWER_LIMIT_S = 300.0
Answer = Mapping[str, Any]


class Server(Protocol):
    """What can be asked: `LaunchedServer`, or the tests' own."""

    def get(self, path: str, *, timeout_s: float = 60.0) -> requests.Response: ...

    def post(
        self, path: str, body: Any = None, *, timeout_s: float = 300.0, stream: bool = False
    ) -> requests.Response: ...


def greedy(request: dict[str, Any]) -> dict[str, Any]:
    """A body of /generate with temperature 0, unless its `sampling_params` say otherwise."""
    sampling = {"temperature": 0, "max_new_tokens": OUTPUT_TOKENS, **request.get("sampling_params", {})}
    return {**request, "sampling_params": sampling}


def generate(server: Server, *, timeout_s: float = ANSWER_LIMIT_S, **request: Any) -> dict[str, Any]:
    """POST /generate; raises for an HTTP error."""
    response = server.post("/generate", greedy(request), timeout_s=timeout_s)
    response.raise_for_status()
    return response.json()


def stream(server: Server, *, timeout_s: float = ANSWER_LIMIT_S, **request: Any) -> list[str]:
    """The texts of a streamed generation, one a chunk."""
    body = {**greedy(request), "stream": True}
    with server.post("/generate", body, timeout_s=timeout_s, stream=True) as response:
        response.raise_for_status()
        lines = [line for line in response.iter_lines() if line.startswith(b"data: ")]
    if not lines or lines[-1] != b"data: [DONE]":
        raise requests.exceptions.ChunkedEncodingError("the stream ended before its end")
    return [json.loads(line[6:])["text"] for line in lines[:-1]]


def ask_about(
    server: Server,
    png: bytes,
    question: str,
    *,
    timeout_s: float = ANSWER_LIMIT_S,
    **more: Any,
) -> dict[str, Any]:
    """A question about a picture, by /v1/chat/completions, with log-probabilities."""
    url = "data:image/png;base64," + base64.b64encode(png).decode()
    content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": question}]
    body = {
        "model": "default",
        "max_tokens": 12,
        "temperature": 0,
        "logprobs": True,
        "top_logprobs": 2,
        "messages": [{"role": "user", "content": content}],
        **more,
    }
    response = server.post("/v1/chat/completions", body, timeout_s=timeout_s)
    response.raise_for_status()
    choice = response.json()["choices"][0]
    tokens = choice["logprobs"]["content"]
    return {
        "text": choice["message"]["content"],
        "finish": choice["finish_reason"],
        "ids": [token["token"] for token in tokens],  # texts: the endpoint has no ids
        "output_token_logprobs": [token["logprob"] for token in tokens],
        "output_top_logprobs": [[other["logprob"] for other in token["top_logprobs"]] for token in tokens],
    }


def summary(answer: Answer) -> dict[str, Any]:
    """What of an answer of /generate must be equal."""
    meta = answer["meta_info"]
    kept = {"ids": answer["output_ids"], "text": answer.get("text"), "finish": meta["finish_reason"]}
    for name in ("output_token_logprobs", "input_token_logprobs"):
        if meta.get(name):
            kept[name] = [entry[0] for entry in meta[name]]
    for name in ("output_top_logprobs", "input_top_logprobs", "output_token_ids_logprobs"):
        if meta.get(name):
            kept[name] = [None if row is None else [entry[0] for entry in row] for row in meta[name]]
    return kept
