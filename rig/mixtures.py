"""Random requests of every kind, together and ended in every way, against the answers that each gets alone.

Lengths, log-probabilities, stop tokens and strings, grammars; streamed or not, some aborted or left. Unlike
those of `rig.loads.Pool`, answers are compared with their log-probabilities and the reason of their end.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

from rig import battery
from rig.loads import ABORTED, Body, Ways, answer, greedy, load
from rig.server import Server

KINDS = 8
PLAIN = (0, 1, 2)  # kinds that end by their length only; the last two of them with log-probabilities
GRAMMARS = (5, 6)
WAYS = Ways(abort=0.12, leave=0.05, stream=0.2, looks=12, pieces=5)
LENGTHS = (1, 5, 20, 60, 130, 255, 256, 257, 400, 700)
DIGITS = (1, 2, 34)
SCHEMA = {
    "type": "object",
    "properties": {"digit": {"enum": DIGITS}, "right": {"type": "boolean"}},
    "required": ["digit", "right"],
}


def make_bodies(count: int, seed: int, without: Sequence[int] = ()) -> list[Body]:
    """Greedy; an eighth of each kind, by index, without those of some kinds."""
    generator = random.Random(seed)
    bodies = [make_body(index, generator) for index in range(count)]
    return [body for index, body in enumerate(bodies) if index % KINDS not in without]


def make_body(index: int, generator: random.Random) -> Body:
    ids = battery.prompt(generator.choice(LENGTHS), seed=7000 + index)
    if index % 5 == 0:
        ids = battery.prompt(200, seed=77) + ids[:50]  # some begin alike
    body = greedy(ids, generator.randrange(1, 60))
    sampling = body["sampling_params"]
    kind = index % KINDS
    if kind in (1, 2):
        body |= {"return_logprob": True, "top_logprobs_num": 2, "logprob_start_len": 0 if kind == 1 else -1}
    elif kind == 3:
        sampling |= {"stop_token_ids": generator.sample(range(512), 60)}
    elif kind == 4:
        sampling |= {"stop": generator.sample("abcdefghijklmnopqrstuvwxyz ", 5)}
    elif kind == 5:
        sampling |= {"regex": f"[0-{index % 9 + 1}]{{3,9}}", "ignore_eos": False}
    elif kind == 6:
        sampling |= {"json_schema": json.dumps(SCHEMA), "ignore_eos": False, "max_new_tokens": 40}
    elif kind == 7:
        sampling |= {"max_new_tokens": generator.randrange(150, 300)}  # it grows, and others are retracted
    return body


@dataclass(frozen=True)
class Mixture:
    """Requests, and their answers when each was asked alone."""

    bodies: Sequence[Body]
    alone: Sequence[dict[str, Any]]

    @classmethod
    def asked_alone(cls, server: Server, count: int, seed: int, without: Sequence[int] = ()) -> Self:
        bodies = make_bodies(count, seed, without)
        answers = [answer(server, body) for body in bodies]
        assert ABORTED not in answers
        return cls(bodies, answers)  # type: ignore[arg-type]

    def ask_many(self, server: Server, count: int, seed: int) -> tuple[int, list[str]]:
        """How many requests were ended early, and what is wrong with the answers to all others."""

        def ask_one(number: int) -> tuple[bool, list[str]]:
            generator = random.Random(f"{seed}/{number}")
            index = generator.randrange(len(self.bodies))
            name = f"{seed}-{number}"
            found = WAYS.ask(server, self.bodies[index], name, generator, answer)
            if found == ABORTED:
                return True, []
            return False, [f"{name}: {line}" for line in differences(self.alone[index], found)]

        return load(ask_one, count)


def differences(alone: dict[str, Any], found: dict[str, Any] | list[int]) -> list[str]:
    if isinstance(found, list):
        expected = alone["output_ids"]
        return [] if found == expected else [f"tokens {found}, alone {expected}"]
    expected, got = battery.summary(alone), battery.summary(found)
    if "\ufffd" in expected["text"]:  # no UTF-8: depends on which tokens the detokenizer gets together
        del expected["text"], got["text"]
    return battery.differences({"": expected}, {"": got})
