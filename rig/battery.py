"""The requests that patched and unpatched servers are compared on.

Every case is deterministic (temperature 0) and returns plain values: token ids, texts, finish reasons, and
log-probabilities, which `differences` compares with a tolerance.
"""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Callable, Container, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from rig.server import Server
from sglang_npu_pp.tools.certify import asking, comparison
from sglang_npu_pp.tools.certify.asking import generate, stream, summary

LOGPROB_TOLERANCE = 1e-3
OUTPUT_TOKENS = asking.OUTPUT_TOKENS
LENGTHS = (1, 2, 7, 31, 64, 129, 255, 256, 257, 511, 1000, 1500)  # tokens; chunks are 256
DIGITS = sorted((Path(__file__).parents[1] / "scripts/assets/digits").glob("*.png"))
QUESTION = "which digit is shown in the image?\nanswer with a single digit."

Case = Callable[[Server], dict[str, Any]]


def prompt(length: int, seed: int = 0) -> list[int]:
    """Token ids of the tiny tokenizer, none of them special."""
    generator = random.Random(1000 * seed + length)
    return [generator.randrange(10, 500) for _ in range(length)]


def ask_tokens(server: Server, length: int, seed: int = 0, **options: Any) -> dict[str, Any]:
    """The summary of an answer to `prompt(length, seed)`, with log-probabilities."""
    return summary(
        generate(
            server,
            input_ids=prompt(length, seed),
            sampling_params={"ignore_eos": True},
            return_logprob=True,
            timeout_s=200,
            **options,
        )
    )


def ask_about(server: Server, picture: Path) -> dict[str, Any]:
    """Ask which digit a picture shows, with log-probabilities."""
    return asking.ask_about(server, picture.read_bytes(), QUESTION)


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
    return [
        f"{name}: {line}"
        for name in names
        for line in comparison.differences(expected[name], found[name], LOGPROB_TOLERANCE)
    ]
