"""The requests on which the two servers are compared: chosen for what a server serves.

Left out: n > 1, whose answers upstream gives in any order, and what needs a second model (LoRA, drafts).
"""

from __future__ import annotations

import io
import itertools
import json
import random
import threading
import zlib
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import requests
from packaging.version import InvalidVersion, Version
from PIL import Image

from .asking import ANSWER_LIMIT_S, OUTPUT_TOKENS, Server, ask_about, generate, stream, summary
from .served import Served

SHORT_LENGTHS = (1, 2, 7, 31, 64, 129, 255)  # tokens of a prompt
WITHOUT_CHUNKS = (512, 1000)
LONGEST = 20_000  # tokens that are worth the time
DEEP_CHUNK = 1024  # of chunks up to this size, a prompt of four is asked
SHARED = 300  # tokens with which several prompts begin
INPUT_LOGPROBS = 300  # tokens at the end of a prompt: for a long one, those of all need gigabytes
PICTURES = ((64, 64), (96, 64), (128, 128), (160, 96))  # width and height
QUESTION = "What is in this picture?"
TEXT = "What is 1 + 2?"
SCHEMA = {"type": "object", "properties": {"digit": {"enum": [1, 2]}}, "required": ["digit"]}
NEVER_STOP = {"ignore_eos": True}

_STAGES_DISAGREE = "the stages of an unpatched server before 0.5.16 disagree on when a grammar is compiled"
_ENDS_ON_CPU = "up to 0.5.20 a grammar of xgrammar ends a server on CPU"

Ask = Callable[[Server, float], dict[str, Any]]
"""Server and seconds that an answer may take -> answer, as plain values."""


@dataclass(frozen=True)
class Case:
    """One kind of request."""

    name: str
    ask: Ask
    in_company: bool = True  # may share a batch with others
    fresh: bool = True  # alone it is asked from an empty cache of prefixes; else behind the case before it


@dataclass(frozen=True)
class Battery:
    """All that is asked of a server; the same for every server that it is compared with."""

    cases: Sequence[Case]
    left_out: Mapping[str, str] = field(default_factory=dict)  # case -> why it is not asked

    def without(self, reasons: Mapping[str, str]) -> Battery:
        """Fewer cases: name -> why."""
        cases = [case for case in self.cases if case.name not in reasons]
        return replace(self, cases=cases, left_out={**self.left_out, **reasons})

    def mixed(self) -> list[Case]:
        """Those that may share a batch, in an order that stays when one is left out."""
        together = (case for case in self.cases if case.in_company)
        return sorted(together, key=lambda case: zlib.crc32(case.name.encode()))

    @property
    def names(self) -> list[str]:
        return [case.name for case in self.cases]

    @property
    def names_in_company(self) -> list[str]:
        return [case.name for case in self.cases if case.in_company]


@dataclass
class Run:
    """What a server answered to a battery."""

    answers: dict[str, dict[str, Any]] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)  # case -> the error that it was answered with
    ended: str = ""  # why not all was asked, as a sentence


def choose(served: Served, without: Collection[str] = ()) -> Battery:
    """The battery for a server; `without`: names of cases that the user leaves out."""
    cases = [*_length_cases(served), *_plain_cases(served)]
    left_out: dict[str, str] = {}
    for reason, more in (
        (_why_no_text(served), _text_cases()),
        (_why_no_grammar(served), _grammar_cases()),
        ("" if served.pictures else "the model takes no pictures", _picture_cases()),
    ):
        if reason:
            left_out |= {case.name: reason for case in more}
        else:
            cases += more
    return Battery(cases, left_out).without(
        {case.name: "left out by choice" for case in cases if case.name in without}
    )


def run(
    server: Server,
    battery: Battery,
    *,
    concurrency: int = 1,
    limit_s: float = ANSWER_LIMIT_S,
    on_fresh: Callable[[], object] = lambda: None,
) -> Run:
    """Ask all cases; with `concurrency` > 1 those that may share a batch, so many at a time.

    `on_fresh` is to empty the cache of prefixes: alone, an answer then depends on no case before it. Nothing
    more is asked of a server that does not answer within `limit_s` seconds, or is gone.
    """
    result, lock = Run(), threading.Lock()
    cases = battery.cases if concurrency == 1 else battery.mixed()

    def ask(case: Case) -> None:
        if result.ended:
            return
        if concurrency == 1 and case.fresh:
            on_fresh()
        answer, refusal, ended = _outcome(server, case, limit_s)
        with lock:
            if answer is not None:
                result.answers[case.name] = answer
            elif refusal:
                result.refused[case.name] = refusal
            else:
                result.ended = result.ended or ended

    with ThreadPoolExecutor(concurrency) as threads:
        list(threads.map(ask, cases))
    return result


def _outcome(server: Server, case: Case, limit_s: float) -> tuple[dict[str, Any] | None, str, str]:
    """Answer, refusal, or why nothing more can be asked."""
    try:
        return case.ask(server, limit_s), "", ""
    except requests.HTTPError as error:
        return None, _refusal(error), ""
    except requests.Timeout:
        return None, "", f"no answer to {case.name!r} came within {limit_s:g} s"
    except requests.RequestException:
        return None, "", f"the connection broke while {case.name!r} was asked"
    except (KeyError, TypeError, ValueError, IndexError) as error:
        return None, f"an answer of another form ({type(error).__name__}: {error})", ""


def _refusal(error: requests.HTTPError) -> str:
    response = error.response
    return str(error) if response is None else f"HTTP {response.status_code}: {response.text[:200].strip()}"


# --- cases -------------------------------------------------------------------------------------------


def lengths(served: Served) -> list[int]:
    """Tokens of the prompts: short ones, and those around one chunk and several."""
    chunk = served.chunk
    around = (chunk - 1, chunk, chunk + 1, 2 * chunk - 1) if chunk else WITHOUT_CHUNKS
    deep = (4 * chunk,) if 0 < chunk <= DEEP_CHUNK else ()
    longest = min(served.longest, LONGEST)
    return sorted({length for length in (*SHORT_LENGTHS, *around, *deep) if 0 < length <= longest})


def prompt(served: Served, length: int, seed: int = 0) -> list[int]:
    """Token ids from the middle of the vocabulary: special tokens are at its ends."""
    generator = random.Random(1000 * seed + length)
    return [generator.randrange(served.vocabulary // 4, served.vocabulary // 2) for _ in range(length)]


def _length_cases(served: Served) -> list[Case]:
    return [Case(f"length {length}", _of_length(served, length)) for length in lengths(served)]


def _of_length(served: Served, length: int) -> Ask:
    """Half of them with log-probabilities of the prompt as well."""
    options: dict[str, Any] = {"return_logprob": True, "top_logprobs_num": 2}
    if length % 2:
        options["logprob_start_len"] = max(0, length - INPUT_LOGPROBS)
    return _generation(input_ids=prompt(served, length), sampling_params=NEVER_STOP, **options)


def _plain_cases(served: Served) -> list[Case]:
    """Token ids to token ids: for every model."""
    shared = min(SHARED, served.longest - 5)
    middle = min(90, served.longest)
    logprobs = {"return_logprob": True, "top_logprobs_num": 2}
    ids = served.vocabulary // 3
    found = [
        Case(
            f"shared prefix {number}",
            _generation(
                input_ids=prompt(served, shared, seed=7) + prompt(served, 5, seed=number),
                sampling_params=NEVER_STOP,
                **logprobs,
            ),
            fresh=number == 0,
        )
        for number in range(4)
    ]
    return [
        *found,
        Case(
            "token ids logprob",
            _generation(
                input_ids=prompt(served, min(40, middle), seed=3),
                token_ids_logprob=[ids, ids + 1, ids + 5],
                return_logprob=True,
            ),
            in_company=False,  # up to 0.5.20 it ends an unpatched server when others share its batch
        ),
        Case(
            "one token",
            _generation(input_ids=prompt(served, middle, 2), sampling_params={"max_new_tokens": 1}),
        ),
        Case(
            "many tokens",
            _generation(
                input_ids=prompt(served, min(50, middle), 4),
                sampling_params={"max_new_tokens": 4 * OUTPUT_TOKENS, **NEVER_STOP},
                **logprobs,
            ),
        ),
        Case(
            "least tokens",
            _generation(
                input_ids=prompt(served, min(60, middle), 6),
                sampling_params={"min_new_tokens": OUTPUT_TOKENS // 2},
                **logprobs,
            ),
        ),
    ]


def _text_cases() -> list[Case]:
    return [
        Case("text", _generation(text=TEXT)),
        Case("stop string", _stop_string),
        Case("stream", _streamed),
    ]


def _grammar_cases() -> list[Case]:
    def constrained(**grammar: str) -> Ask:
        return _generation(text="Answer:", sampling_params={"max_new_tokens": 24, **grammar})

    return [
        Case("regex", constrained(regex=r"[0-3]{4,8}")),
        Case("another regex", constrained(regex=r"(ab|cd)+e")),
        Case("json schema", constrained(json_schema=json.dumps(SCHEMA))),
    ]


def _picture_cases() -> list[Case]:
    return [Case(f"picture {width} x {height}", _about(picture(width, height))) for width, height in PICTURES]


def _generation(**request: Any) -> Ask:
    return lambda server, limit_s: summary(generate(server, timeout_s=limit_s, **request))


def _stop_string(server: Server, limit_s: float) -> dict[str, Any]:
    """It stops at a letter from the middle of what it says without."""
    free = generate(server, timeout_s=limit_s, text=TEXT, sampling_params=NEVER_STOP)["text"] or "1"
    stop = {"stop": [free[len(free) // 2]], **NEVER_STOP}
    return summary(generate(server, timeout_s=limit_s, text=TEXT, sampling_params=stop))


def _streamed(server: Server, limit_s: float) -> dict[str, Any]:
    """Only the whole: how it is divided depends on the time."""
    chunks = stream(server, timeout_s=limit_s, text=TEXT, sampling_params=NEVER_STOP)
    whole = all(later.startswith(earlier) for earlier, later in itertools.pairwise(chunks))
    return {"text": chunks[-1] if whole else "".join(chunks)}


def _about(png: bytes) -> Ask:
    return lambda server, limit_s: ask_about(server, png, QUESTION, timeout_s=limit_s, **NEVER_STOP)


def picture(width: int, height: int) -> bytes:
    """A PNG with stripes and noise, the same every time."""
    noise = np.random.default_rng(width * height).integers(0, 64, (height, width, 3))
    rows, columns = np.mgrid[0:height, 0:width]
    stripes = np.stack([rows * 2, columns * 2, (rows + columns) % 32 * 4], axis=-1)
    data = io.BytesIO()
    Image.fromarray(((noise + stripes) % 256).astype(np.uint8)).save(data, "PNG")
    return data.getvalue()


# --- what an unpatched server cannot do --------------------------------------------------------------


def _why_no_text(served: Served) -> str:
    return "" if served.text else "the server has no tokenizer"


def _why_no_grammar(served: Served) -> str:
    if not served.text:
        return _why_no_text(served)
    if served.grammars == "none":
        return "the server has no grammar backend"
    if served.stages > 1 and _is_before(served.release, "0.5.16"):
        return _STAGES_DISAGREE
    uses_xgrammar = served.grammars in ("", "xgrammar")
    if served.device == "cpu" and uses_xgrammar and _is_before(served.release, "0.5.21"):
        return _ENDS_ON_CPU
    return ""


def _is_before(release: str, other: str) -> bool:
    """False for a label that is no version: a build of main is later than all that are asked for."""
    try:
        return Version(release) < Version(other)
    except InvalidVersion:
        return False
