"""Speculative decoding on one server of two stages (SGLANG_ENABLE_PP_SPEC), unpatched against patched.

On CPU, with plain torch in the place of SGLang's kernels for it (`scripts/cpu_compat`), a tiny target and a
draft that is right about half of the time. Trees of eight nodes, four branches wide.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from rig import battery
from rig.agreement import assert_stages_agree
from rig.launcher import RANDOM_MODEL, Launcher, take_cpu_compat, traces
from rig.server import Server
from rig.speculation_models import write_models
from sglang_npu_pp.tools.certify import order

pytestmark = pytest.mark.thorough

STAGES, CONCURRENCY = 2, 12
BACKEND = "intel_amx"  # of SGLang's for the CPU, the one that knows trees
LENGTHS = (1, 2, 5, 17, 60, 250, 256, 257, 300, 511, 600, 777)  # tokens; chunks are 256
TOKENS = 24
LONG = {"ignore_eos": True, "max_new_tokens": 2000}
ACCEPTANCE = ("spec_verify_ct", "spec_correct_drafts_histogram", "spec_accept_length")


@dataclass(frozen=True)
class Served:
    target: Path
    upstream: Mapping[str, dict[str, Any]]  # answers of an unpatched server, which has ended
    patched: Server


@pytest.fixture(scope="module")
def served(
    make_launcher: Callable[[str], Launcher], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Served]:
    target, draft = write_models(tmp_path_factory.mktemp("models"), RANDOM_MODEL)
    launcher = make_launcher("speculation")
    options: dict[str, Any] = {
        "model": target,
        "args": (
            *("--prefill-attention-backend", BACKEND, "--decode-attention-backend", BACKEND),
            *("--speculative-algorithm", "EAGLE", "--speculative-draft-model-path", str(draft)),
            *("--speculative-num-steps", "3", "--speculative-eagle-topk", "4"),
            *("--speculative-num-draft-tokens", "8"),
        ),
        "env": {"SGLANG_ENABLE_PP_SPEC": "1", "PP_PROBE_STATES": "1"},
    }

    def start(patched: bool) -> Server:
        server = launcher.configure(1, STAGES, patched=patched, **options)
        take_cpu_compat(server)
        return launcher.servers.enter_context(server)

    try:
        answers = ask_all(start(patched=False), CONCURRENCY)
        launcher.stop_all()
        yield Served(target, answers, start(patched=True))
    finally:
        launcher.stop_all()


def requests() -> dict[str, dict[str, Any]]:
    """By name, twice as many as are asked at a time; log-probabilities of the input, too, for some."""
    found = {}
    for seed in range(2):
        for length in LENGTHS:
            start = {"logprob_start_len": 0} if length % 2 else {}
            found[f"{length} tokens, {seed}"] = {
                "input_ids": battery.prompt(length, seed),
                "sampling_params": {"ignore_eos": True, "max_new_tokens": TOKENS},
                "return_logprob": True,
                "top_logprobs_num": 2,
                **start,
            }
    return found


def ask_all(server: Server, concurrency: int) -> dict[str, dict[str, Any]]:
    with ThreadPoolExecutor(concurrency) as pool:
        answers = pool.map(lambda body: battery.generate(server, **body), requests().values())
        return dict(zip(requests(), answers, strict=True))


def essence(answers: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    """Tokens, log-probabilities and how many drafts were accepted in how many rounds."""
    return {
        name: {**battery.summary(answer), **{key: answer["meta_info"][key] for key in ACCEPTANCE}}
        for name, answer in answers.items()
    }


@pytest.mark.parametrize("concurrency", [1, CONCURRENCY])
def test_answers_and_accepted_drafts_are_upstreams(served: Served, concurrency: int) -> None:
    found = essence(ask_all(served.patched, concurrency))
    assert not battery.differences(essence(served.upstream), found)
    accepted = [answer["spec_accept_length"] for answer in found.values()]
    assert min(accepted) > 1.2, "the draft is never right: nothing is compared here"
    assert max(accepted) < 4.0, "the draft is always right: nothing is rejected here"


def test_greedy_answers_are_those_without_speculation(served: Served) -> None:
    """Those of the same weights in transformers, one token after another."""
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(served.target, dtype=torch.float32).eval()
    chosen = [name for name in requests() if name.startswith(("1 ", "17 ", "257 ", "777 "))]
    for name in chosen:
        prompt = torch.tensor([requests()[name]["input_ids"]])
        with torch.inference_mode():
            ids = model.generate(
                prompt,
                attention_mask=torch.ones_like(prompt),  # else none of a token that is also the padding
                max_new_tokens=TOKENS,
                do_sample=False,
                eos_token_id=None,
            )
        found = battery.generate(served.patched, **requests()[name])["output_ids"]
        assert found == ids[0, prompt.shape[1] :].tolist(), name


def test_a_stop_in_the_middle_of_what_was_accepted(served: Served) -> None:
    """At each token of an answer, so that some are inside of an accepted path."""
    body = requests()["60 tokens, 1"]
    ids = battery.generate(served.patched, **body)["output_ids"]

    def stopped(token: int) -> list[int]:
        sampling = {"max_new_tokens": TOKENS, "stop_token_ids": [token]}
        return battery.generate(served.patched, **{**body, "sampling_params": sampling})["output_ids"]

    with ThreadPoolExecutor(CONCURRENCY) as pool:
        found = list(pool.map(stopped, ids))
    assert found == [ids[: ids.index(token) + 1] for token in ids]


def test_requests_that_end_in_the_middle_change_no_others(served: Served) -> None:
    """Aborted while others of their batch go on: the rows of the tree move up."""
    doomed = [f"doomed{number}" for number in range(6)]
    with ThreadPoolExecutor(CONCURRENCY + len(doomed)) as pool:
        running = [
            pool.submit(
                battery.generate,
                served.patched,
                input_ids=battery.prompt(20 + number),
                sampling_params=LONG,
                rid=name,
            )
            for number, name in enumerate(doomed)
        ]
        answers = pool.submit(ask_all, served.patched, CONCURRENCY)
        for name, each in zip(doomed, running, strict=True):
            while not each.done():  # until it has begun, there is nothing to abort
                assert served.patched.post("/abort_request", {"rid": name}).ok
        reasons = {each.result(timeout=60)["meta_info"]["finish_reason"]["type"] for each in running}
        found = answers.result(timeout=120)
    assert reasons == {"abort"}
    assert not battery.differences(essence(served.upstream), essence(found))
    assert_stages_agree(served.patched)


def test_outputs_leave_behind_the_launch_and_are_waited_for_behind_the_next(served: Served) -> None:
    recorded = traces(served.patched)
    assert min(len(order.launches(trace)) for trace in recorded.values()) > 100
    assert not order.outputs_come_from_the_last_stage(recorded)
    assert not order.proxies_leave_right_behind_the_launch(recorded[0])
    assert not order.proxies_are_waited_for_last(recorded[1])
    for trace in recorded.values():
        assert not order.tokens_are_waited_for_behind_the_launch(trace)
    assert order.launches(recorded[0]) == order.launches(recorded[1])


def test_it_is_in_force(served: Served) -> None:
    log = served.patched.log_text()
    assert log.count("speculative decoding, end of a server") == STAGES
    assert "stays on upstream's path" not in log
