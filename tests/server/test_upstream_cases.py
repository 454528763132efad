"""What SGLang's own tests of pipeline parallelism start, patched, on CPU (listed in tests/upstream_cases.py).

They compare scores of trained models; here, tiny models with random weights have to say the same tokens. All
is float32, so that neither tensor parallelism nor who shares a batch changes them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from rig import battery, disaggregated
from rig.launcher import MOE_MODEL, RANDOM_MODEL, Launcher, take_cpu_compat
from rig.published_twin import write_twin
from rig.server import Server
from rig.upstream_models import MODELS, write_model
from sglang_npu_pp.tools.certify.ports import free_ports
from tests.upstream_cases import upstream_case

pytestmark = pytest.mark.release

LENGTHS = (1, 2, 5, 17, 60, 255, 256, 257, 300, 511, 600, 777)  # tokens; chunks are 256
CONCURRENCY = 12
LATENT = "intel_amx"  # the backend of SGLang's for the CPU that knows latent attention
LATENT_ATTENTION = ("--prefill-attention-backend", LATENT, "--decode-attention-backend", LATENT)
DP_ATTENTION = ("--dp-size", "2", "--enable-dp-attention")


@dataclass(frozen=True)
class Case:
    """A model on two stages, as one test of SGLang has it."""

    upstream: str
    model: str
    tp: int = 1
    args: tuple[str, ...] = ()
    sharded: tuple[str, ...] = ()  # arguments of the server with stages only
    pictures: bool = False

    def __str__(self) -> str:
        return self.model


CASES = (
    Case("TestQwenPPAccuracy.test_pp_consistency", "qwen3"),
    Case("TestQwenPPTieWeightsAccuracy.test_pp_consistency", "qwen3-tied"),
    Case("TestQwenMoePPAccuracy.test_pp_consistency", "moe"),
    Case("TestGLM41VPPAccuracy.test_mmmu", "glm4v", args=("--enable-multimodal",), pictures=True),
    Case("TestDPAttentionDP2PP2.test_mgsm_en", "latent", 2, LATENT_ATTENTION, DP_ATTENTION),
)


@pytest.fixture
def launcher(make_launcher: Callable[[str], Launcher]) -> Iterator[Launcher]:
    launcher = make_launcher("upstream-cases")
    yield launcher
    launcher.stop_all()


def checkpoint(name: str, folder: Path) -> Path:
    if name == "latent":
        return write_twin(folder, RANDOM_MODEL)
    return write_model(name, folder, RANDOM_MODEL) if name in MODELS else MOE_MODEL


def ask_all(server: Server, pictures: bool = False) -> dict[str, Any]:
    """Prompts of several lengths at a time, and pictures."""
    asked: dict[str, Callable[[], Any]] = {
        f"{length} tokens, {seed}": partial(battery.ask_tokens, server, length, seed)
        for seed in range(2)
        for length in LENGTHS
    }
    for picture in battery.DIGITS[:6] if pictures else ():
        asked[picture.stem] = partial(battery.ask_about, server, picture)
    with ThreadPoolExecutor(CONCURRENCY) as pool:
        return dict(zip(asked, pool.map(lambda ask: ask(), asked.values()), strict=True))


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=upstream_case(case.upstream), id=case.model) for case in CASES]
)
def test_two_stages_say_what_one_stage_says(launcher: Launcher, tmp_path: Path, case: Case) -> None:
    """A server with two stages, patched; one with one stage, unpatched."""
    model = checkpoint(case.model, tmp_path / "model")

    def answers(tp: int, pp: int, args: tuple[str, ...], *, patched: bool) -> dict[str, Any]:
        server = launcher.configure(tp, pp, patched=patched, model=model, args=args)
        take_cpu_compat(server)
        with server:
            return ask_all(server, case.pictures)

    expected = answers(1, 1, case.args, patched=False)
    assert len({str(answer) for answer in expected.values()}) > len(LENGTHS), "all answers are alike"
    assert not battery.differences(expected, answers(case.tp, 2, (*case.args, *case.sharded), patched=True))


@upstream_case("TestFixedBugs.test_chunked_prefill_with_small_bs", "TestPPAccuracy.test_logprob")
def test_two_requests_at_most(launcher: Launcher) -> None:
    """One token in and one out; then as many log-probabilities as there are tokens."""
    server = launcher.start(2, 2, patched=True, args=("--max-running-requests", "2"))
    one = battery.generate(
        server, input_ids=battery.prompt(1), sampling_params={"max_new_tokens": 1, "ignore_eos": True}
    )
    assert len(one["output_ids"]) == 1
    prompt = battery.prompt(6)
    answer = battery.generate(
        server,
        input_ids=prompt,
        sampling_params={"max_new_tokens": 16, "ignore_eos": True},
        return_logprob=True,
        top_logprobs_num=5,
        logprob_start_len=0,
    )
    found = answer["meta_info"]
    assert [entry[1] for entry in found["input_token_logprobs"]] == prompt
    assert [entry[1] for entry in found["output_token_logprobs"]] == answer["output_ids"]
    assert [len(entries) for entries in found["output_top_logprobs"]] == [5] * 16
    # Greedy: the token is the first of the most likely ones.
    assert [entries[0][1] for entries in found["output_top_logprobs"]] == answer["output_ids"]


@dataclass(frozen=True)
class Split:
    """A pair of servers, as one test of SGLang has it."""

    upstream: str
    decode_stages: int
    prefill: tuple[str, ...] = ()


SPLITS = (
    Split("TestDisaggregationPrefillPPAccuracy.test_gsm8k", 1),
    Split("TestDisaggregationPrefillPPDynamicChunkAccuracy.test_gsm8k", 1, ("--enable-dynamic-chunking",)),
    Split(
        "TestDisaggregationDecodePPAccuracy.test_gsm8k",
        2,
        ("--pp-async-batch-depth", "2", "--pp-max-micro-batch-size", "2"),
    ),
)


@pytest.fixture(scope="module")
def expected(make_launcher: Callable[[str], Launcher]) -> dict[str, list[int]]:
    """Of one unpatched server that does both."""
    with make_launcher("does-both").configure(1, 1, patched=False) as server:
        return {name: battery.generate(server, **body)["output_ids"] for name, body in bodies().items()}


def bodies() -> dict[str, dict[str, Any]]:
    sampling = {"temperature": 0, "max_new_tokens": 12, "ignore_eos": True}
    return {
        f"{length} tokens": {"input_ids": battery.prompt(length), "sampling_params": sampling}
        for length in LENGTHS
    }


@pytest.mark.skipif(disaggregated.engine_missing() is not None, reason=str(disaggregated.engine_missing()))
@pytest.mark.parametrize(
    "split",
    [
        pytest.param(split, marks=upstream_case(split.upstream), id=split.upstream.partition(".")[0])
        for split in SPLITS
    ],
)
def test_prefill_and_decode_apart_say_the_same(
    launcher: Launcher, expected: dict[str, list[int]], split: Split
) -> None:
    """Over Mooncake's TCP; `--disable-overlap-schedule` as SGLang's test has it."""
    (bootstrap_port,) = free_ports(1)
    servers = []
    for mode, stages, more in (("prefill", 2, split.prefill), ("decode", split.decode_stages, ())):
        args = (*disaggregated.arguments(mode, bootstrap_port), *more)
        servers.append(
            launcher.configure(
                2,
                stages,
                patched=stages > 1,
                args=(*args, "--disable-overlap-schedule"),
                env=disaggregated.engine_environment("sglang_pp_probe"),
            )
        )
    pair = disaggregated.start_pair(launcher.servers.enter_context, servers, bootstrap_port)
    answers = pair.generate_all(list(bodies().values()), CONCURRENCY)
    failed = [answer for answer in answers if isinstance(answer, Exception)]
    assert not failed
    assert dict(zip(bodies(), (answer["output_ids"] for answer in answers), strict=True)) == expected
