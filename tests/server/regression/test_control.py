"""Control requests that fail, on all stages or on one: the client is told, all stages do the same, and the
next request is served.

Upstream answers with what stage 0 made of it: a success, although a later stage has other weights and another
prefix cache, and the next request ends the server. A handler that raises ends it at once.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import requests
from safetensors.torch import load_file, save_file

from rig import battery
from rig.agreement import assert_stages_agree
from rig.launcher import DIGITS_MODEL, RANDOM_MODEL, Launcher
from rig.loads import ask, greedy, running
from rig.server import Server

CACHED = greedy(battery.prompt(300, seed=515), 8)
LONG_TOKENS = 500
LONG = greedy(battery.prompt(60, seed=516), LONG_TOKENS)
LATE_CLOCK_S = 600
PROBES = {
    "PP_PROBE_STATES": "1",
    "PP_PROBE_ONLY_ON_STAGE_0": "1",
    "PP_PROBE_LATE_CLOCK": str(LATE_CLOCK_S),
}


@pytest.fixture(
    scope="module",
    params=[
        (1, 2),
        pytest.param((1, 3), marks=pytest.mark.release),
        pytest.param((2, 2), marks=pytest.mark.release),
    ],
    ids=["pp2", "pp3", "tp2-pp2"],
)
def server(request: pytest.FixtureRequest, make_launcher: Callable[[str], Launcher]) -> Iterator[Server]:
    launcher = make_launcher("control")
    tp, pp = request.param
    yield launcher.start(tp, pp, patched=True, env=PROBES)
    launcher.stop_all()


@pytest.fixture(autouse=True)
def in_agreement(server: Server) -> Iterator[None]:
    yield
    assert_stages_agree(server)


@pytest.fixture
def random_answer(server: Server) -> list[int]:
    """What the model that is served says; it has been cached."""
    answer = ask(server, CACHED)
    assert cached_tokens(server) > 256
    return answer  # type: ignore[return-value]


def cached_tokens(server: Server) -> int:
    count: int = battery.generate(server, **CACHED)["meta_info"]["cached_tokens"]
    return count


def update(server: Server, model: Path, **options: Any) -> requests.Response:
    return server.post("/update_weights_from_disk", {"model_path": str(model), **options}, timeout_s=120)


def copy_of(model: Path, folder: Path) -> Path:
    return Path(shutil.copytree(model, folder, copy_function=shutil.copyfile))


def served_again(server: Server) -> str:
    return f"all stages have loaded the weights of {RANDOM_MODEL} again"


def test_files_that_a_later_stage_does_not_have(
    server: Server, random_answer: list[int], tmp_path: Path
) -> None:
    answer = update(server, copy_of(DIGITS_MODEL, tmp_path / "only-on-stage-0"))
    assert answer.status_code == requests.codes.bad_request, answer.text
    told = answer.json()["message"]
    assert "stage 1 rank 0: Failed to get weights iterator" in told
    assert "stage 0" not in told
    assert told.endswith(served_again(server))
    assert cached_tokens(server) == 0, "what stage 0 flushed, all must have flushed"
    assert ask(server, CACHED) == random_answer


@pytest.mark.thorough
def test_a_checkpoint_that_a_later_stage_cannot_load(
    server: Server, random_answer: list[int], tmp_path: Path
) -> None:
    """The last layer's tensors have another shape: stage 0 does not read them."""
    broken = copy_of(DIGITS_MODEL, tmp_path / "broken")
    tensors = load_file(broken / "model.safetensors")
    for name in tensors:
        if ".layers.7." in name:
            tensors[name] = tensors[name][1:].clone()
    save_file(tensors, broken / "model.safetensors", {"format": "pt"})
    answer = update(server, broken)
    assert answer.status_code == requests.codes.bad_request, answer.text
    told = answer.json()["message"]
    assert told.startswith(f"stage {server.pp - 1} rank 0: ")
    assert f"stage {server.pp - 1} rank {server.tp - 1}: " in told
    assert told.endswith(served_again(server))
    assert ask(server, CACHED) == random_answer


@pytest.mark.thorough
def test_files_that_no_stage_has_change_nothing(
    server: Server, random_answer: list[int], tmp_path: Path
) -> None:
    answer = update(server, tmp_path / "nowhere")
    assert answer.status_code == requests.codes.bad_request, answer.text
    assert answer.json()["message"].startswith("Failed to get weights iterator")
    assert cached_tokens(server) > 256
    assert ask(server, CACHED) == random_answer


@pytest.mark.thorough
def test_what_cannot_be_restored_is_said_and_mended_by_an_update(
    server: Server, random_answer: list[int], tmp_path: Path
) -> None:
    served = copy_of(RANDOM_MODEL, tmp_path / "served")
    assert update(server, served).ok
    shutil.rmtree(served)
    answer = update(server, copy_of(DIGITS_MODEL, tmp_path / "only-on-stage-0"))
    assert answer.status_code == requests.codes.bad_request, answer.text
    assert "the stages have different weights now" in answer.json()["message"]
    assert ask(server, CACHED), "it serves, as the client was told, with a mixture"
    assert update(server, DIGITS_MODEL).ok
    assert ask(server, CACHED) != random_answer
    assert update(server, RANDOM_MODEL).ok
    assert ask(server, CACHED) == random_answer


@pytest.mark.parametrize("action", ["start", "stop", "dump"])
@pytest.mark.thorough
def test_expert_distribution_without_a_recorder(
    server: Server, random_answer: list[int], action: str
) -> None:
    answer = server.post(f"/{action}_expert_distribution_record")
    assert answer.status_code == requests.codes.bad_request, answer.text
    assert "expert_distribution_recorder_mode" in answer.text
    assert ask(server, CACHED) == random_answer


@pytest.mark.thorough
def test_memory_is_not_released_while_requests_run(server: Server, random_answer: list[int]) -> None:
    with running(server, LONG) as finish:
        answer = server.post("/release_memory_occupation", {"tags": ["kv_cache"]}, timeout_s=60)
        assert answer.status_code == requests.codes.bad_request, answer.text
        assert "only when server is idle" in answer.text
        assert len(finish()) == LONG_TOKENS
    assert ask(server, CACHED) == random_answer


def test_control_requests_among_others(server: Server, random_answer: list[int]) -> None:
    """Stages wait for each other while microbatches are in flight: these drain, and no token changes."""
    bodies = [greedy(battery.prompt(30 + 40 * index, seed=517), 60) for index in range(12)]
    alone = [ask(server, body) for body in bodies]
    asked = [
        ("/start_expert_distribution_record", None, requests.codes.bad_request),
        ("/set_internal_state", {"server_args": {"nope": 1}}, requests.codes.ok),
        ("/slow_down", {"forward_sleep_time": -1}, requests.codes.ok),
    ]
    with ThreadPoolExecutor(16) as threads:
        answers = [threads.submit(ask, server, body) for body in bodies]
        told = [
            (threads.submit(server.post, path, body, timeout_s=60), status)
            for _ in range(8)
            for path, body, status in asked
        ]
        assert [answer.result() for answer in answers] == alone
        for answer, status in told:
            assert answer.result().status_code == status, answer.result().text
    assert ask(server, CACHED) == random_answer


@pytest.mark.thorough
def test_a_flush_that_stage_0_gives_up_is_given_up_by_all(server: Server, random_answer: list[int]) -> None:
    """The later stages' clocks are late: by themselves they would flush as soon as they are idle."""
    with running(server, LONG) as finish:
        answer = server.post("/flush_cache?timeout=0.2", timeout_s=60)
        assert not answer.ok
        assert "Timed out" in answer.text
        assert len(finish()) == LONG_TOKENS
    assert cached_tokens(server) > 256
    assert ask(server, CACHED) == random_answer
    assert server.post("/flush_cache?timeout=60", timeout_s=60).ok
    assert cached_tokens(server) == 0
