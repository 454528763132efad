"""The forwarder between lmms_eval and the server."""

from __future__ import annotations

from typing import Any

import requests

from scripts.evaluation.lmms import by_request, by_task
from scripts.evaluation.recorder import COMPLETIONS, Exchange, Recorder, request_name
from sglang_npu_pp.tools.certify.ports import HOST, free_ports

from .samples import TOKENS, fake_server


def body(text: str = "which digit?", model: str = "served") -> dict[str, Any]:
    content = [{"type": "image_url", "image_url": {"url": "data:,x"}}, {"type": "text", "text": text}]
    return {"model": model, "max_tokens": 8, "messages": [{"role": "user", "content": content}]}


def ask(recorder: Recorder, **changed: Any) -> requests.Response:
    return requests.post(recorder.url + COMPLETIONS, json={**body(), **changed}, timeout=30)


def test_a_request_passes_with_log_probabilities_asked_for() -> None:
    with fake_server("4") as server, Recorder(server.url, "its-name") as recorder:
        answer = ask(recorder).json()
    assert answer["choices"][0]["message"]["content"] == "4"
    (seen,) = server.bodies
    assert seen == {**body(), "model": "its-name", "logprobs": True, "top_logprobs": 2}
    (exchange,) = recorder.exchanges
    assert exchange == Exchange(request_name(body()), "which digit?", "4", TOKENS)


def test_a_dead_server_is_a_failed_request_and_no_answer() -> None:
    with Recorder(f"http://{HOST}:{free_ports(1)[0]}", "its-name") as recorder:
        answer = ask(recorder)
    assert answer.status_code == 502
    assert "refused" in answer.json()["error"]["message"]
    (exchange,) = recorder.exchanges
    assert "refused" in exchange.error


def test_a_server_that_dies_is_noticed_at_the_request_that_it_does_not_answer() -> None:
    with fake_server("4", lives=2) as server, Recorder(server.url, "its-name") as recorder:
        statuses = [ask(recorder).status_code for _ in range(3)]
    assert statuses == [200, 200, 502]
    assert [bool(exchange.error) for exchange in recorder.exchanges] == [False, False, True]


def test_the_name_of_a_request_is_its_question() -> None:
    assert request_name(body(model="a")) == request_name(body(model="b"))
    assert request_name(body("one")) != request_name(body("two"))


def test_equal_requests_are_counted_and_failed_ones_are_not() -> None:
    exchanges = [Exchange("a"), Exchange("a"), Exchange("b", error="no"), Exchange("c")]
    assert list(by_request(exchanges)) == ["a#1", "a#2", "c#1"]


def test_requests_belong_to_the_task_whose_question_they_ask() -> None:
    samples = {"plain": [{"input": "which digit?"}], "lettered": [{"input": "<image 1> which?\nA. 0"}]}
    one, other = Exchange("a", "which digit?"), Exchange("b", "which?\nA. 0")
    assert by_task([one, other], samples) == {"plain": [one], "lettered": [other]}
