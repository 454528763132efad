"""The battery suits what a server serves, and says what it leaves out."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import requests
from PIL import Image

from sglang_npu_pp.tools.certify.asking import Server
from sglang_npu_pp.tools.certify.battery import Battery, Case, choose, lengths, picture, prompt, run
from sglang_npu_pp.tools.certify.served import SMALL_VOCABULARY, Served, ServedError, ask_served, vocabulary

SERVED = Served("0.5.21", 2, 512, 256, 4000, True, "", True, "cpu")
INFO = {
    "version": "0.5.21",
    "pp_size": 2,
    "chunked_prefill_size": 256,
    "max_req_input_len": 4090,
    "max_total_num_tokens": 16384,
    "device": "cpu",
    "model_path": "/nowhere",
}
MODEL = {"is_generation": True, "has_image_understanding": True}


def response(status: int, body: Any) -> requests.Response:
    made = requests.Response()
    made.status_code, made._content = status, json.dumps(body).encode()
    return made


class Pages:
    """A server with these answers to GET, 404 elsewhere."""

    def __init__(self, answers: Mapping[str, Any]) -> None:
        self._answers = answers

    def get(self, path: str, *, timeout_s: float = 60.0) -> requests.Response:
        return response(200, self._answers[path]) if path in self._answers else response(404, "no such page")

    def post(
        self, path: str, body: Any = None, *, timeout_s: float = 300.0, stream: bool = False
    ) -> requests.Response:
        raise requests.ConnectionError


# --- what a server says ------------------------------------------------------------------------------


@pytest.mark.parametrize("names", [("/server_info", "/model_info"), ("/get_server_info", "/get_model_info")])
def test_a_server_is_asked_under_the_names_of_its_release(names: tuple[str, str]) -> None:
    served = ask_served(Pages(dict(zip(names, (INFO, MODEL), strict=True))))
    assert served == Served("0.5.21", 2, SMALL_VOCABULARY, 256, 4010, True, "", True, "cpu")


def test_little_is_assumed_of_a_server_that_says_little() -> None:
    served = ask_served(Pages({"/server_info": {"chunked_prefill_size": -1}, "/model_info": {}}))
    assert (served.chunk, served.stages, served.pictures, served.text) == (0, 1, False, True)
    assert 0 < served.longest < 1024


@pytest.mark.parametrize(
    ("info", "model", "words"),
    [
        ({"disaggregation_mode": "prefill"}, {}, "A prefill server answers nothing alone"),
        ({}, {"is_generation": False}, "does not generate text"),
    ],
)
def test_a_server_that_cannot_be_compared_is_refused_with_a_sentence(
    info: dict[str, Any], model: dict[str, Any], words: str
) -> None:
    with pytest.raises(ServedError, match=words):
        ask_served(Pages({"/server_info": info, "/model_info": model}))


def test_a_server_that_does_not_say_what_it_serves_is_refused() -> None:
    with pytest.raises(ServedError, match="answers 404 to /server_info and /get_server_info"):
        ask_served(Pages({}))


def test_the_vocabulary_is_that_of_the_text_model(tmp_path: Path) -> None:
    nested = {"vision_config": {"vocab_size": 3}, "text_config": {"vocab_size": 512}, "vocab_size": 700}
    (tmp_path / "config.json").write_text(json.dumps(nested))
    assert vocabulary(str(tmp_path)) == 512
    (tmp_path / "config.json").write_text("{")
    assert vocabulary(str(tmp_path)) == SMALL_VOCABULARY


# --- what is asked -----------------------------------------------------------------------------------


def test_lengths_are_around_the_chunks_and_within_the_context() -> None:
    assert {1, 255, 256, 257, 511, 1024} <= set(lengths(SERVED))
    assert max(lengths(replace(SERVED, longest=300))) <= 300
    assert {8191, 8192, 8193, 16383} <= set(lengths(replace(SERVED, chunk=8192, longest=100_000)))
    assert lengths(replace(SERVED, chunk=0, longest=10)) == [1, 2, 7]
    assert max(lengths(replace(SERVED, chunk=65536, longest=200_000))) <= 20_000


def test_tokens_of_a_prompt_are_in_the_middle_of_the_vocabulary() -> None:
    ids = prompt(SERVED, 400)
    assert min(ids) >= 128
    assert max(ids) < 256
    assert ids == prompt(SERVED, 400)
    assert ids != prompt(SERVED, 400, seed=1)


def test_a_server_with_everything_is_asked_everything() -> None:
    battery = choose(SERVED)
    assert {"regex", "json schema", "stop string", "stream", "one token", "least tokens"} <= set(
        battery.names
    )
    assert len([name for name in battery.names if name.startswith("picture")]) == 4
    assert len(set(battery.names)) == len(battery.names) > 25
    assert battery.left_out == {}


@pytest.mark.parametrize(
    ("change", "cases", "reason"),
    [
        ({"text": False}, {"text", "stop string", "stream", "regex"}, "the server has no tokenizer"),
        ({"grammars": "none"}, {"regex", "another regex", "json schema"}, "no grammar backend"),
        ({"release": "0.5.15.post1"}, {"regex", "json schema"}, "disagree on when a grammar is compiled"),
        ({"release": "0.5.20"}, {"regex", "json schema"}, "ends a server on CPU"),
        ({"pictures": False}, {"picture 64 x 64"}, "takes no pictures"),
    ],
)
def test_what_a_server_cannot_do_is_left_out_with_the_reason(
    change: dict[str, Any], cases: set[str], reason: str
) -> None:
    battery = choose(replace(SERVED, **change))
    assert cases <= set(battery.left_out)
    assert not cases & set(battery.names)
    assert all(reason in battery.left_out[case] for case in cases)


@pytest.mark.parametrize(
    "change",
    [
        {"release": "0.5.20", "grammars": "llguidance"},
        {"release": "0.5.20", "device": "npu"},
        {"release": "0.5.15", "stages": 1, "device": "npu"},
        {"release": "main-of-today"},
        {"release": "0.5.24.dev7+gabc"},
    ],
)
def test_grammars_are_asked_where_they_work(change: dict[str, Any]) -> None:
    assert "regex" in choose(replace(SERVED, **change)).names


def test_the_user_may_leave_out_a_case() -> None:
    battery = choose(SERVED, without=["regex"])
    assert battery.left_out == {"regex": "left out by choice"}
    assert "regex" not in battery.names


def test_what_ends_old_servers_in_company_is_asked_alone() -> None:
    battery = choose(SERVED)
    assert set(battery.names) - set(battery.names_in_company) == {"token ids logprob"}


def test_a_picture_is_the_same_every_time() -> None:
    assert picture(96, 64) == picture(96, 64) != picture(64, 96)
    assert Image.open(io.BytesIO(picture(96, 64))).size == (96, 64)


# --- how it is asked ---------------------------------------------------------------------------------


def refusing(status: int) -> Any:
    def ask(server: Server, limit_s: float) -> dict[str, Any]:
        response(status, "not here").raise_for_status()
        return {}

    return ask


def raising(error: Exception) -> Any:
    def ask(server: Server, limit_s: float) -> dict[str, Any]:
        raise error

    return ask


def test_answers_and_refusals_are_kept_apart() -> None:
    cases = [
        Case("good", lambda server, limit_s: {"ids": [1]}),
        Case("bad", refusing(400)),
        Case("odd", raising(KeyError("choices"))),
    ]
    found = run(Pages({}), Battery(cases))
    assert found.answers == {"good": {"ids": [1]}}
    assert found.refused["bad"].startswith("HTTP 400")
    assert found.refused["odd"].startswith("an answer of another form")
    assert found.ended == ""


@pytest.mark.parametrize("concurrency", [1, 4])
@pytest.mark.parametrize(
    ("error", "words"),
    [
        (requests.ReadTimeout(), "no answer to 'first' came within 7 s"),
        (requests.ConnectionError(), "the connection broke while 'first' was asked"),
    ],
)
def test_nothing_more_is_asked_of_a_server_that_is_gone(
    concurrency: int, error: Exception, words: str
) -> None:
    found = run(Pages({}), Battery([Case("first", raising(error))] * 9), concurrency=concurrency, limit_s=7)
    assert found.ended == words
    assert not found.answers
    emptied: list[int] = []
    run(Pages({}), Battery([Case("first", raising(error))] * 9), on_fresh=lambda: emptied.append(1))
    assert emptied == [1]


def test_alone_each_case_begins_with_an_empty_cache_but_for_those_that_share_a_prefix() -> None:
    order: list[str] = []

    def asked(name: str) -> Case:
        def ask(server: Server, limit_s: float) -> dict[str, Any]:
            order.append(name)
            return {}

        return Case(name, ask, fresh=not name.startswith("shared prefix") or name.endswith("0"))

    battery = Battery([asked(name) for name in choose(SERVED).names])
    run(Pages({}), battery, on_fresh=lambda: order.append("empty"))
    assert "empty shared prefix 0 shared prefix 1 shared prefix 2 shared prefix 3 empty" in " ".join(order)
    assert order.count("empty") == len(battery.cases) - 3
    assert [case.fresh for case in choose(SERVED).cases] == [case.fresh for case in battery.cases]


def test_the_order_in_company_stays_when_a_case_is_left_out() -> None:
    """The unpatched server may refuse one that the patched one is then not asked."""

    whole = [case.name for case in choose(SERVED).mixed()]
    fewer = [case.name for case in choose(SERVED).without({"stream": "refused"}).mixed()]
    assert whole != choose(SERVED).names_in_company
    assert [name for name in whole if name != "stream"] == fewer


def test_in_company_only_what_may_have_company_is_asked() -> None:
    cases = [Case(str(n), lambda server, limit_s: {}, in_company=n > 2) for n in range(6)]
    assert set(run(Pages({}), Battery(cases), concurrency=3).answers) == {"3", "4", "5"}
    assert len(run(Pages({}), Battery(cases)).answers) == 6
