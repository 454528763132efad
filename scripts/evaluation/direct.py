"""Questions that are put to a server without lmms_eval: exact requests with log-probabilities.

For the random-weight model, the sensitive twin of the trained one: its logits are nearly flat, so its greedy
texts change with the smallest fault, where those of a trained model stay.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import requests

from .lmms import EvaluationError, Target
from .pictures import Picture
from .recorder import COMPLETIONS, TOP_LOGPROBS, one_line, post, read_answer
from .results import Result, Token

TWIN = "random_weights"
TWIN_PICTURES, TWIN_TOKENS = 48, 16
DIRECT_PROMPT = "\nanswer with a single digit."
CONTROL_LIMIT_S = 120.0


def ask_pictures(
    task: str,
    target: Target,
    shown: Sequence[Picture],
    *,
    tokens: int,
    whole: bool = False,
    on_progress: Callable[[int], None] = lambda answered: None,
) -> Result:
    """Ask which digit each picture shows, `tokens` tokens at most; `whole`: exactly so many, right or wrong.

    The result has an accuracy only without `whole`.
    """
    began = time.monotonic()
    answers: dict[str, str] = {}
    generated: dict[str, Sequence[Token]] = {}
    errors = []

    def ask(picture: Picture) -> None:
        try:
            response = post(
                target.url + COMPLETIONS, question(picture, target.model, tokens, whole), target.headers
            )
            answers[picture.name], generated[picture.name] = read_answer(response)
        except (requests.RequestException, ValueError) as error:
            errors.append(one_line(error))

    with ThreadPoolExecutor(target.concurrency) as pool:
        for done, _ in enumerate(pool.map(ask, shown), 1):
            on_progress(done)
    right = sum(answers.get(picture.name) == picture.answer for picture in shown)
    return Result(
        task=task,
        layout=str(target.layout),
        side=target.side,
        asked=len(shown),
        ran=len(answers),
        failed=len(errors),
        accuracy=None if whole else right / max(1, len(shown)),
        answers=answers,
        tokens=generated,
        seconds=time.monotonic() - began,
        errors=tuple(dict.fromkeys(errors)),
    )


def question(picture: Picture, model: str, tokens: int, whole: bool) -> dict[str, Any]:
    """The body of one request, greedy. `ignore_eos` is SGLang's own extension."""
    content = [
        {"type": "image_url", "image_url": {"url": picture.url}},
        {"type": "text", "text": picture.question + DIRECT_PROMPT},
    ]
    return {
        "model": model,
        "messages": [{"role": "user", "content": content}],
        "temperature": 0,
        "max_tokens": tokens,
        "ignore_eos": whole,
        "logprobs": True,
        "top_logprobs": TOP_LOGPROBS,
    }


def load_weights(target: Target, model: Path) -> None:
    """Replace the weights of a running SGLang by those of a model of the same shape; empties its caches.

    Raises:
        EvaluationError: the server refused.
    """
    body: dict[str, Any] = {"model_path": str(model), "flush_cache": True}
    try:
        post(f"{target.url}/update_weights_from_disk", body, limit_s=CONTROL_LIMIT_S)
    except requests.RequestException as error:
        raise EvaluationError(f"the server did not load {model.name}: {one_line(error)}") from None


def served_model(url: str, headers: dict[str, str]) -> str:
    """The name under which a server serves its model; also shows that there is a server.

    Raises:
        EvaluationError: there is none, or it is no OpenAI-compatible one.
    """
    try:
        with requests.Session() as session:
            session.trust_env = False
            response = session.get(f"{url}/v1/models", headers=headers, timeout=CONTROL_LIMIT_S)
        return str(response.json()["data"][0]["id"])
    except (requests.RequestException, ValueError, LookupError, TypeError) as error:
        raise EvaluationError(
            f"no OpenAI-compatible server answers at {url} ({one_line(error)}); start one there or correct "
            "--base-url"
        ) from None
