"""A prefill and a decode server of two stages each, with Mooncake's transfer engine between them over TCP.

On CPU, where a forward has ended when its launch returns, and a page is one token (SGLang's allocator of
larger ones needs Triton): what is shown is that the answers are right, and the order of things. Who waits
for a device is shown by `tests/ascend/test_transfer_gate.py`, larger pages by
`tests/patches/test_disaggregation.py`.
"""

from __future__ import annotations

import re
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from rig import battery, disaggregated
from rig.bootstrap_server import bootstrap_server, dead_address
from rig.launcher import Launcher
from rig.server import Server
from sglang_npu_pp.tools.certify.ports import HOST, free_ports

pytestmark = [
    pytest.mark.thorough,
    pytest.mark.skipif(
        disaggregated.engine_missing() is not None, reason=str(disaggregated.engine_missing())
    ),
]

LENGTHS = (1, 5, 15, 16, 17, 250, 256, 257, 511, 777, 1500)  # tokens; chunks are 256
LIMIT_S = 3.0  # for answers of a bootstrap server


@pytest.fixture(scope="module")
def pair(make_launcher: Callable[[str], Launcher]) -> Iterator[disaggregated.Pair]:
    launcher = make_launcher("disaggregated")
    (bootstrap_port,) = free_ports(1)
    servers = []
    for mode, stages in (("prefill", 2), ("decode", 2)):
        environment = disaggregated.engine_environment("sglang_pp_probe")
        server = launcher.configure(
            1,
            stages,
            patched=True,
            args=disaggregated.arguments(mode, bootstrap_port),
            env={**environment, "SGLANG_NPU_PP_TRACE": "", "SGLANG_NPU_PP_BOOTSTRAP_LIMIT_S": str(LIMIT_S)},
        )
        server.env["KV_PROBE_DIR"] = str(server.log.parent)
        servers.append(server)
    yield disaggregated.start_pair(launcher.servers.enter_context, servers, bootstrap_port)
    launcher.stop_all()


def body(length: int, seed: int = 0) -> dict[str, Any]:
    sampling = {"temperature": 0, "max_new_tokens": 12, "ignore_eos": True}
    return {"input_ids": battery.prompt(length, seed), "sampling_params": sampling}


def ids(answer: Any) -> list[int]:
    assert not isinstance(answer, Exception), answer
    found: list[int] = answer["output_ids"]
    return found


def noted(server: Server, what: str) -> list[dict[str, Any]]:
    """What the probe of every process of this server saw."""
    return disaggregated.noted(server.log.parent, what)


def test_answers_are_those_of_a_server_that_does_both(pair: disaggregated.Pair, patched: Server) -> None:
    """One by one and together, when the last prompt of a batch is cut; with prefixes that others share."""
    shared = battery.prompt(300, seed=7)
    bodies = [body(length) for length in LENGTHS]
    bodies += [{**body(5), "input_ids": shared + battery.prompt(9, seed=number)} for number in range(4)]
    bodies += bodies[-2:]
    expected = [ids(battery.generate(patched, **each)) for each in bodies]
    assert [ids(answer) for answer in pair.generate_all(bodies, concurrency=1)] == expected
    assert [ids(answer) for answer in pair.generate_all(bodies, concurrency=6)] == expected
    assert noted(pair.prefill, "chunk")


def test_a_chunk_is_queued_behind_its_launch(pair: disaggregated.Pair) -> None:
    """On every stage, and before its event loop goes on to messages of the others."""
    before = launches(pair.prefill)
    ids(pair.generate(body(1500, seed=11))[1])
    stages = 2
    assert launches(pair.prefill) - before == Counter({(256, 1): 5 * stages, (220, 1): stages})


def test_log_probabilities_of_prompts_that_are_cut(pair: disaggregated.Pair, patched: Server) -> None:
    """Of the prompt from the prefill server, of the answer from the decode server."""
    for length in (5, 257, 777):
        request = {**body(length, seed=60), "return_logprob": True, "logprob_start_len": 0}
        expected = battery.generate(patched, **request)["meta_info"]
        for answer, name in zip(pair.generate(request), ("input", "output"), strict=True):
            assert not isinstance(answer, Exception), answer
            found, wanted = (
                {name: [entry[0] for entry in meta[f"{name}_token_logprobs"]]}
                for meta in (answer["meta_info"], expected)
            )
            assert not battery.differences({str(length): wanted}, {str(length): found})


def launches(server: Server) -> Counter[tuple[int, int]]:
    """How often a forward of so many tokens was followed by so many chunks."""
    return Counter((each["launch"], each["queued"]) for each in noted(server, "launch"))


def test_a_request_that_is_aborted_between_chunks_leaves_nothing(pair: disaggregated.Pair) -> None:
    other = body(600, seed=21)
    expected = ids(pair.generate(other)[1])
    for number in range(3):
        before = launches(pair.prefill).total()
        doomed = {**body(1500, seed=30 + number), "rid": f"doomed{number}"}
        with ThreadPoolExecutor(1) as pool:
            asked = pool.submit(pair.generate, doomed)
            deadline = time.monotonic() + 60
            while launches(pair.prefill).total() == before:
                assert time.monotonic() < deadline, "no chunk was launched in 60 s"
                time.sleep(0.005)
            for server in (pair.decode, pair.prefill):
                server.post("/abort_request", {"rid": doomed["rid"]})
            asked.result(timeout=60)  # an error, or an answer where the abort came late
        assert ids(pair.generate(other)[1]) == expected
    for server in (pair.prefill, pair.decode):
        server.check_alive("behind aborts")


def test_the_event_loop_asks_no_http_server(pair: disaggregated.Pair) -> None:
    """At start it may; from the first request on it does not."""
    before = len(noted(pair.decode, "http"))
    ids(pair.generate(body(5, seed=40))[1])
    assert len(noted(pair.decode, "http")) == before


def assert_says_why(pair: disaggregated.Pair, reason: str, address: str) -> None:
    """Each stage of the decode server asks by itself. When a later one gives up first, upstream tells the
    client no more than that, and what it was stands in the log."""
    sentence = re.compile(rf"http://{re.escape(address)}/route\S* had no answer in")
    if sentence.search(reason):
        return
    assert "Failed due to an unknown reason from another rank" in reason
    deadline = time.monotonic() + 60
    while not sentence.search(pair.decode.log_text()):
        assert time.monotonic() < deadline, f"nobody said within 60 s why {address} did not answer"
        time.sleep(0.1)


@pytest.mark.parametrize("trouble", ["dead", "slow", "error", "garbage"])
def test_a_bootstrap_server_in_trouble_fails_its_request_alone(
    pair: disaggregated.Pair, trouble: str
) -> None:
    with bootstrap_server() as server, ThreadPoolExecutor(1) as pool:
        server.behaviour = trouble
        address = dead_address() if trouble == "dead" else server.address
        asked = pool.submit(pair.decode_alone, body(5), int(address.split(":")[1]))
        ids(pair.generate(body(40, seed=50))[1])
        reason = str(asked.result(timeout=60))
    assert_says_why(pair, reason, address)


def test_a_bootstrap_server_that_is_killed_and_comes_back(pair: disaggregated.Pair) -> None:
    """Requests that come while the decode server has lost it fail with the reason; others are answered."""
    request = body(40, seed=70)
    expected = ids(pair.generate(request)[1])
    real = f"{HOST}:{pair.bootstrap_port}"
    with bootstrap_server(behind=real) as first:
        assert ids(pair.generate(request, bootstrap_port=first.port)[1]) == expected
    lost = f"Lost connection with prefill instance (bootstrap_addr: {first.address})"
    deadline = time.monotonic() + 60
    while pair.decode.log_text().count(lost) < pair.decode.pp:  # each stage asks by itself
        assert time.monotonic() < deadline, "a stage of the decode server did not notice in 60 s"
        time.sleep(0.1)
    assert_says_why(pair, str(pair.decode_alone(request, first.port)), first.address)
    assert ids(pair.generate(request)[1]) == expected
    with bootstrap_server(behind=real, port=first.port):
        assert ids(pair.generate(request, bootstrap_port=first.port)[1]) == expected
