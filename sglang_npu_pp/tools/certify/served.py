"""What a running server says of itself, over the releases."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import requests

from .asking import Server

ROOM = 80  # tokens of a context that are left for an answer
SMALL_VOCABULARY = 1000  # of a model whose configuration cannot be read: no model has less
SHORT_CONTEXT = 1024  # likewise


class ServedError(RuntimeError):
    """The server cannot be examined; one sentence."""


@dataclass(frozen=True)
class Served:
    """A model as it is served."""

    release: str  # what its SGLang calls itself
    stages: int
    vocabulary: int  # tokens, or fewer
    chunk: int  # tokens of a prompt that are computed at a time; 0 where prompts are not divided
    longest: int  # tokens of a prompt that leaves room for an answer
    text: bool  # it has a tokenizer
    grammars: str  # backend, "none", or "" for SGLang's default
    pictures: bool
    device: str


def ask_served(server: Server) -> Served:
    """Ask a server that is ready.

    Raises ServedError for one that does not generate, or is a part of a disaggregated one.
    """
    info = _ask(server, "/server_info", "/get_server_info")
    model = _ask(server, "/model_info", "/get_model_info")
    if not model.get("is_generation", True):
        raise ServedError("The model does not generate text: there are no answers to compare.")
    if (mode := info.get("disaggregation_mode") or "null") != "null":
        raise ServedError(
            f"A {mode} server answers nothing alone: certify cannot compare disaggregated ones."
        )
    path = str(info.get("model_path") or model.get("model_path") or "")
    return Served(
        release=str(info.get("version") or ""),
        stages=_number(info.get("pp_size"), 1),
        vocabulary=vocabulary(path),
        chunk=max(0, _number(info.get("chunked_prefill_size"), 0)),
        longest=_longest(info),
        text=not info.get("skip_tokenizer_init"),
        grammars=str(info.get("grammar_backend") or ""),
        pictures=bool(model.get("has_image_understanding")),
        device=str(info.get("device") or ""),
    )


def vocabulary(model: str) -> int:
    """The smallest vocabulary that the model's configuration names; its folder or its name on the hub."""
    for path in _configurations(model):
        with suppress(OSError, ValueError):
            if sizes := [size for size in _sizes(json.loads(path.read_text())) if size > 0]:
                return min(sizes)
    return SMALL_VOCABULARY


def _configurations(model: str) -> Iterator[Path]:
    yield Path(model) / "config.json"
    with suppress(ImportError, ValueError):
        from huggingface_hub import try_to_load_from_cache

        if isinstance(found := try_to_load_from_cache(model, "config.json"), str):
            yield Path(found)


def _sizes(configuration: Any) -> Iterator[int]:
    """Of the text model, wherever it stands."""
    if isinstance(configuration, Mapping):
        for name, value in configuration.items():
            if name == "vocab_size" and isinstance(value, int):
                yield value
            elif isinstance(value, Mapping) and "vision" not in name and "audio" not in name:
                yield from _sizes(value)


def _longest(info: Mapping[str, Any]) -> int:
    limits = [info.get(name) for name in ("max_req_input_len", "max_total_num_tokens", "context_length")]
    known = [limit for limit in limits if isinstance(limit, int) and limit > 0]
    return max(1, min(known, default=SHORT_CONTEXT) - ROOM)


def _ask(server: Server, *paths: str) -> dict[str, Any]:
    """The answer at the first of the paths that this release has."""
    for path in paths:
        response = server.get(path)
        if response.status_code == requests.codes.ok:
            found: dict[str, Any] = response.json()
            return found
    raise ServedError(
        f"The server answers {response.status_code} to {' and '.join(paths)}: {response.text[:200]}"
    )


def _number(value: Any, default: int) -> int:
    return value if isinstance(value, int) else default
