"""The requests that patched and unpatched servers are compared on.

Every case is deterministic (temperature 0) and returns plain values: token ids, texts, finish reasons, and
log-probabilities, which `differences` compares with a tolerance.
"""

from __future__ import annotations

import base64
import itertools
import json
import random
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from rig.server import Server

LOGPROB_TOLERANCE = 1e-3
LENGTHS = (1, 2, 7, 31, 64, 129, 255, 256, 257, 511, 1000, 1500)  # tokens; chunks are 256
OUTPUT_TOKENS = 16
DIGITS = sorted((Path(__file__).parents[1] / "scripts/assets/digits").glob("*.png"))
QUESTION = "which digit is shown in the image?\nanswer with a single digit."

Case = Callable[[Server], dict[str, Any]]


def prompt(length: int, seed: int = 0) -> list[int]:
    """Token ids of the tiny tokenizer, none of them special."""
    generator = random.Random(1000 * seed + length)
    return [generator.randrange(10, 500) for _ in range(length)]


def generate(server: Server, *, timeout_s: float = 300, **request: Any) -> dict[str, Any]:
    """POST /generate, greedy unless `sampling_params` says otherwise; raises for an HTTP error."""
    sampling = {"temperature": 0, "max_new_tokens": OUTPUT_TOKENS, **request.pop("sampling_params", {})}
    response = server.post("/generate", {**request, "sampling_params": sampling}, timeout_s=timeout_s)
    response.raise_for_status()
    return response.json()


def ask_about(server: Server, picture: Path) -> dict[str, Any]:
    """Ask which digit a picture shows, with log-probabilities."""
    url = "data:image/png;base64," + base64.b64encode(picture.read_bytes()).decode()
    content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": QUESTION}]
    body = {
        "model": "default",
        "max_tokens": 12,
        "temperature": 0,
        "logprobs": True,
        "top_logprobs": 2,
        "messages": [{"role": "user", "content": content}],
    }
    response = server.post("/v1/chat/completions", body)
    response.raise_for_status()
    choice = response.json()["choices"][0]
    tokens = choice["logprobs"]["content"]
    return {
        "text": choice["message"]["content"],
        "finish": choice["finish_reason"],
        "logprobs": [token["logprob"] for token in tokens],
        "top": [[other["logprob"] for other in token["top_logprobs"]] for token in tokens],
    }


def summary(answer: Mapping[str, Any]) -> dict[str, Any]:
    """What of an answer of /generate must be equal."""
    meta = answer["meta_info"]
    kept = {"ids": answer["output_ids"], "text": answer["text"], "finish": meta["finish_reason"]}
    for name, column in (("output_token_logprobs", 0), ("input_token_logprobs", 0)):
        if meta.get(name):
            kept[name] = [entry[column] for entry in meta[name]]
    for name in ("output_top_logprobs", "input_top_logprobs", "output_token_ids_logprobs"):
        if meta.get(name):
            kept[name] = [None if row is None else [entry[0] for entry in row] for row in meta[name]]
    return kept


def stream(server: Server, **request: Any) -> list[str]:
    """The texts of a streamed generation, one a chunk."""
    sampling = {"temperature": 0, "max_new_tokens": OUTPUT_TOKENS, **request.pop("sampling_params", {})}
    body = {**request, "sampling_params": sampling, "stream": True}
    with server.post("/generate", body, stream=True) as response:
        response.raise_for_status()
        lines = [line for line in response.iter_lines() if line.startswith(b"data: ")]
    assert lines[-1] == b"data: [DONE]", lines[-1]
    return [json.loads(line[6:])["text"] for line in lines[:-1]]


def _length_case(length: int) -> Case:
    def case(server: Server) -> dict[str, Any]:
        options: dict[str, Any] = {"return_logprob": True, "top_logprobs_num": 2}
        if length % 2:
            options["logprob_start_len"] = 0  # input log-probabilities as well
        return summary(
            generate(server, input_ids=prompt(length), sampling_params={"ignore_eos": True}, **options)
        )

    return case


def _picture_case(picture: Path) -> Case:
    return lambda server: ask_about(server, picture)


def _shared_prefix_case(suffix: int) -> Case:
    """Meets the radix cache from the second of these on."""

    def case(server: Server) -> dict[str, Any]:
        ids = prompt(300, seed=7) + prompt(5, seed=suffix)
        return summary(generate(server, input_ids=ids, sampling_params={"ignore_eos": True}))

    return case


def _token_ids_logprob(server: Server) -> dict[str, Any]:
    return summary(
        generate(server, input_ids=prompt(40, seed=3), return_logprob=True, token_ids_logprob=[11, 12, 300])
    )


def _stop_string(server: Server) -> dict[str, Any]:
    free = generate(server, text="what is 1 + 2 = ?", sampling_params={"ignore_eos": True})
    text = free["text"] or "1"  # the trained model may say nothing
    stop = {"stop": [text[len(text) // 2]], "ignore_eos": True}
    return summary(generate(server, text="what is 1 + 2 = ?", sampling_params=stop))


def _grammar(schema: str) -> Case:
    def case(server: Server) -> dict[str, Any]:
        return summary(
            generate(server, text="a digit", sampling_params={"regex": schema, "max_new_tokens": 24})
        )

    return case


def _json_schema(server: Server) -> dict[str, Any]:
    schema = {"type": "object", "properties": {"digit": {"enum": [1, 2]}}, "required": ["digit"]}
    options = {"json_schema": json.dumps(schema), "max_new_tokens": 24}
    return summary(generate(server, text="answer", sampling_params=options))


def _streamed(server: Server) -> dict[str, Any]:
    chunks = stream(server, input_ids=prompt(33, seed=5), sampling_params={"ignore_eos": True})
    assert all(later.startswith(earlier) for earlier, later in itertools.pairwise(chunks))
    return {"text": chunks[-1]}


def _one_token(server: Server) -> dict[str, Any]:
    return summary(generate(server, input_ids=prompt(90, seed=2), sampling_params={"max_new_tokens": 1}))


def cases() -> dict[str, Case]:
    """All cases by name."""
    found: dict[str, Case] = {f"length {length}": _length_case(length) for length in LENGTHS}
    found |= {f"shared prefix {suffix}": _shared_prefix_case(suffix) for suffix in range(4)}
    found |= {f"picture {picture.stem}": _picture_case(picture) for picture in DIGITS[:6]}
    return found | {
        "token ids logprob": _token_ids_logprob,
        "stop string": _stop_string,
        "regex": _grammar(r"[0-3]{4,8}"),
        "another regex": _grammar(r"(ab|cd)+e"),
        "json schema": _json_schema,
        "stream": _streamed,
        "one token": _one_token,
    }


def run(
    server: Server, concurrency: int = 1, rounds: int = 1, without: Container[str] = ()
) -> list[dict[str, Any]]:
    """Run all cases but those `without`, `rounds` times; return one dict of results by name a round."""
    chosen = {name: case for name, case in cases().items() if name not in without}
    todo = [(name, case) for _ in range(rounds) for name, case in chosen.items()]
    random.Random(concurrency).shuffle(todo)
    with ThreadPoolExecutor(concurrency) as pool:
        results = list(pool.map(lambda item: (item[0], item[1](server)), todo))
    collected: list[dict[str, Any]] = [{} for _ in range(rounds)]
    for name, result in results:
        next(round_ for round_ in collected if name not in round_)[name] = result
    return collected


def differences(
    expected: Mapping[str, Any], found: Mapping[str, Any], without: Container[str] = ()
) -> list[str]:
    """A line for everything in `found` that is not as expected; cases `without` must not be in it."""
    names = [name for name in expected if name not in without]
    assert set(names) == found.keys()
    return [f"{name}: {line}" for name in names for line in _compare(expected[name], found[name], "")]


def _compare(expected: Any, found: Any, where: str) -> Iterator[str]:
    if isinstance(expected, Mapping) and isinstance(found, Mapping) and expected.keys() == found.keys():
        for key in expected:
            yield from _compare(expected[key], found[key], f"{where}/{key}")
    elif _is_list(expected) and _is_list(found) and len(expected) == len(found):
        for index, (left, right) in enumerate(zip(expected, found, strict=True)):
            yield from _compare(left, right, f"{where}/{index}")
    elif isinstance(expected, float) and isinstance(found, float):
        if not abs(expected - found) <= LOGPROB_TOLERANCE:
            yield f"{where} is {found}, expected {expected}"
    elif expected != found:
        yield f"{where} is {found!r}, expected {expected!r}"


def _is_list(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str)
