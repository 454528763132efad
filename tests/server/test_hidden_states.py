"""`return_hidden_states` at pp 2: the values of an unpatched server without pipeline parallelism."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest

from rig import battery
from rig.launcher import Launcher
from rig.loads import greedy
from rig.server import Server

pytestmark = pytest.mark.thorough

TOLERANCE = 1e-4  # float32; the same kernels, other shapes
WANTED = ("--enable-return-hidden-states",)
# Prompts of one chunk and of several; chunks are 256 tokens.
PROMPTS = [battery.prompt(length, seed=77) for length in (3, 40, 256, 257, 600, 1000)]
Body = dict[str, Any]


@pytest.fixture(scope="module")
def alone(make_launcher: Callable[[str], Launcher]) -> Iterator[Server]:
    """Unpatched, one stage."""
    launcher = make_launcher("hidden-alone")
    yield launcher.start(1, 1, patched=False, args=WANTED)
    launcher.stop_all()


@pytest.fixture(
    scope="module",
    params=[
        pytest.param((2, 0), marks=pytest.mark.release),
        (2, 2),
        pytest.param((3, 1), marks=pytest.mark.release),
    ],
    ids=["pp2", "pp2-depth2", "pp3-depth1"],
)
def staged(request: pytest.FixtureRequest, make_launcher: Callable[[str], Launcher]) -> Iterator[Server]:
    pp, depth = request.param
    launcher = make_launcher("hidden-staged")
    yield launcher.start(1, pp, patched=True, args=(*WANTED, "--pp-async-batch-depth", str(depth)))
    launcher.stop_all()


def wanting(prompt: list[int], hidden: bool | str = True, new_tokens: int = 5) -> Body:
    return {**greedy(prompt, new_tokens), "return_hidden_states": hidden}


def rows(answer: dict[str, Any]) -> np.ndarray:
    """All hidden states of an answer, a row a token: the prompt's are one entry, later ones an entry each."""
    entries = answer["meta_info"]["hidden_states"]
    return np.concatenate([np.atleast_2d(np.array(entry, dtype=np.float64)) for entry in entries])


def assert_equal(reference: dict[str, Any], answer: dict[str, Any]) -> None:
    assert answer["output_ids"] == reference["output_ids"]
    expected, found = rows(reference), rows(answer)
    assert found.shape == expected.shape
    np.testing.assert_allclose(found, expected, atol=TOLERANCE)


def flush(*servers: Server) -> None:
    """A prompt that is in the prefix cache is not computed, and has no hidden states."""
    for server in servers:
        assert server.post("/flush_cache?timeout=60").ok


@pytest.mark.parametrize("hidden", [True, "last"])
def test_prompts_of_one_chunk_and_of_several(alone: Server, staged: Server, hidden: bool | str) -> None:
    for prompt in PROMPTS:
        flush(alone, staged)
        reference = battery.generate(alone, **wanting(prompt, hidden))
        assert_equal(reference, battery.generate(staged, **wanting(prompt, hidden)))


def test_with_logprobs(alone: Server, staged: Server) -> None:
    flush(alone, staged)
    body = {**wanting(PROMPTS[4]), "return_logprob": True, "logprob_start_len": 0}
    reference, answer = battery.generate(alone, **body), battery.generate(staged, **body)
    assert_equal(reference, answer)
    assert not battery.differences({"": battery.summary(reference)}, {"": battery.summary(answer)})


def test_streamed(alone: Server, staged: Server) -> None:
    flush(alone, staged)
    reference = streamed(alone, wanting(PROMPTS[1], new_tokens=12))
    answer = streamed(staged, wanting(PROMPTS[1], new_tokens=12))
    assert_equal(reference[-1], answer[-1])


def streamed(server: Server, body: Body) -> list[dict[str, Any]]:
    with server.post("/generate", {**body, "stream": True}, stream=True) as response:
        response.raise_for_status()
        lines = [line for line in response.iter_lines() if line.startswith(b"data: {")]
    return [json.loads(line.removeprefix(b"data: ")) for line in lines]


def test_among_requests_that_do_not_want_them(alone: Server, staged: Server) -> None:
    """Sixteen at a time: the rows of a batch belong to the right requests.

    Of a prompt that was cut into chunks, upstream gives the rows of the last chunk; what is cut depends on
    which requests come together.
    """
    prompts = [battery.prompt(20 + 13 * index, seed=78) for index in range(16)]
    bodies = [wanting(prompt, index % 2 == 0, 24) for index, prompt in enumerate(prompts)]
    flush(alone, staged)
    references = [battery.generate(alone, **body) for body in bodies]
    with ThreadPoolExecutor(len(bodies)) as threads:
        answers = list(threads.map(lambda body: battery.generate(staged, **body), bodies))
    for index, (reference, answer) in enumerate(zip(references, answers, strict=True)):
        assert answer["output_ids"] == reference["output_ids"]
        if index % 2 == 0:
            found = rows(answer)
            assert len(found) >= 24
            np.testing.assert_allclose(found, rows(reference)[-len(found) :], atol=TOLERANCE)
        else:
            assert "hidden_states" not in answer["meta_info"]
