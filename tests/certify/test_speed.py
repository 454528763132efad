"""The load generator's command line, its result, and each way in which it fails."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from sglang_npu_pp.tools.certify import speed
from sglang_npu_pp.tools.certify.results import Latency, Side
from sglang_npu_pp.tools.certify.speed import Load, Served, SpeedError

from .load_generator import FAILS, HANGS, RECORDED, WRITES, WRITES_NOTHING, environ

URL = "http://127.0.0.1:30000"


def recorded(**changes: Any) -> dict[str, Any]:
    return {**json.loads(RECORDED.read_text()), **changes}


def read(folder: Path, **changes: Any) -> Any:
    path = folder / "speed.jsonl"
    path.write_text(json.dumps(recorded(**changes)) + "\n")
    return speed.read(path, Side.PATCHED, 1)


def option(command: list[str], name: str) -> str:
    return command[command.index(name) + 1]


def test_the_recorded_result_is_read() -> None:
    values = recorded()
    found = speed.read(RECORDED, Side.UNPATCHED, 2, "a load")
    assert (found.side, found.round, found.load) == (Side.UNPATCHED, 2, "a load")
    assert found.completed == values["completed"] == 8
    assert found.output_tokens_per_s == values["output_throughput"]
    assert found.total_tokens_per_s == values["total_throughput"]
    assert found.requests_per_s == values["request_throughput"]
    assert found.ttft_ms == Latency(values["mean_ttft_ms"], values["median_ttft_ms"], values["p99_ttft_ms"])
    assert found.itl_ms.median == values["median_itl_ms"]
    assert found.tpot_ms.p99 == values["p99_tpot_ms"]


def test_the_last_line_counts(tmp_path: Path) -> None:
    path = tmp_path / "speed.jsonl"
    path.write_text("".join(json.dumps(recorded(completed=count)) + "\n" for count in (1, 5)))
    assert speed.read(path, Side.PATCHED, 1).completed == 5


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"errors": ["", "", "Traceback\nTimeoutError"], "completed": 2}, "1 of 3 requests failed.\n  Trace"),
        ({"completed": 0}, "0 requests were completed"),
        ({"median_itl_ms": math.nan}, "without times that could be compared"),
        ({"median_ttft_ms": None}, "gives no .*float"),
    ],
)
def test_a_result_that_is_no_speed_is_refused(tmp_path: Path, changes: Any, sentence: str) -> None:
    with pytest.raises(SpeedError, match=sentence):
        read(tmp_path, **changes)


def test_a_result_without_a_field_names_it(tmp_path: Path) -> None:
    path = tmp_path / "speed.jsonl"
    path.write_text(json.dumps({key: value for key, value in recorded().items() if key != "p99_itl_ms"}))
    with pytest.raises(SpeedError, match="gives no 'p99_itl_ms'"):
        speed.read(path, Side.PATCHED, 1)


@pytest.mark.parametrize("text", ["", "no json\n"])
def test_a_result_that_cannot_be_read_is_a_sentence(tmp_path: Path, text: str) -> None:
    path = tmp_path / "speed.jsonl"
    path.write_text(text)
    with pytest.raises(SpeedError, match=r"^The result of the load generator cannot be read \("):
        speed.read(path, Side.PATCHED, 1)


def test_the_command_asks_for_the_load(tmp_path: Path) -> None:
    load = Load(input_tokens=32, output_tokens=8, prompts=3, concurrency=2, rate=1.5, more=("--top-p", "0.9"))
    command = speed.command(load, Served(URL, "/models/m", tokenizer="/models/t"), tmp_path / "out")
    assert command[1:3] == ["-m", "sglang.bench_serving"]
    assert option(command, "--base-url") == URL
    assert (option(command, "--model"), option(command, "--tokenizer")) == ("/models/m", "/models/t")
    assert option(command, "--dataset-name") == "random-ids"
    assert (option(command, "--random-input-len"), option(command, "--random-output-len")) == ("32", "8")
    assert option(command, "--num-prompts") == option(command, "--warmup-requests") == "3"
    assert (option(command, "--request-rate"), option(command, "--max-concurrency")) == ("1.5", "2")
    assert {"--flush-cache", "--disable-tqdm", "--tokenize-prompt"} <= set(command)
    assert command[-2:] == ["--top-p", "0.9"]


def test_without_a_rate_all_come_at_once(tmp_path: Path) -> None:
    command = speed.command(Load(dataset="sharegpt"), Served(URL, "m"), tmp_path)
    assert float(option(command, "--request-rate")) == math.inf
    assert option(command, "--tokenizer") == "m"
    assert "--max-concurrency" not in command
    assert "--tokenize-prompt" not in command  # for random ids only


def test_a_load_in_words() -> None:
    assert str(Load()) == "64 requests, random-ids of 1024 tokens, 128 to generate each, all at once"
    chosen = Load(dataset="sharegpt", rate=2, concurrency=8, more=("--top-p", "0.9"))
    assert str(chosen) == "64 requests, sharegpt, 2 a second, at most 8 at a time, --top-p 0.9"


@pytest.mark.parametrize("wrong", [{"prompts": 0}, {"rate": 0}, {"concurrency": -1}, {"rate": math.nan}])
def test_an_impossible_load_is_refused(wrong: Any) -> None:
    with pytest.raises(ValueError, match=r"above 0\.$"):
        Load(**wrong)


def test_the_process_sees_neither_this_package_nor_a_network(tmp_path: Path) -> None:
    served = Served(URL, str(tmp_path), api_key="abc", environ=environ(tmp_path, WRITES))
    found = speed.measure(Load(prompts=8), served, Side.PATCHED, 3)
    assert (found.completed, found.round, found.load) == (8, 3, str(Load(prompts=8)))
    seen = json.loads((tmp_path / "seen.json").read_text())
    assert seen["environ"]["SGLANG_NPU_PP"] == "0"
    assert seen["environ"]["HF_HUB_OFFLINE"] == "1"
    assert seen["environ"]["OPENAI_API_KEY"] == "abc"
    assert seen["environ"]["NO_PROXY"].endswith("127.0.0.1")
    assert "abc" not in seen["options"]


def test_a_key_of_another_service_is_not_sent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    environment = {**environ(tmp_path, WRITES), "OPENAI_API_KEY": "of another service"}
    speed.measure(Load(), Served(URL, "org/model", environ=environment), Side.PATCHED, 1)
    seen = json.loads((tmp_path / "seen.json").read_text())["environ"]
    assert seen["OPENAI_API_KEY"] is None
    assert seen["HF_HUB_OFFLINE"] is None  # its tokenizer is on the hub


@pytest.mark.parametrize(
    ("program", "sentence"),
    [
        (FAILS, r"^The load generator ended with exit code 1\.\n  Traceback\n  KeyError: no such model$"),
        (WRITES_NOTHING, r"^The load generator wrote no result\.\n  bye$"),
    ],
)
def test_a_failure_shows_the_last_lines(tmp_path: Path, program: str, sentence: str) -> None:
    with pytest.raises(SpeedError, match=sentence):
        speed.measure(Load(), Served(URL, "m", environ=environ(tmp_path, program)), Side.PATCHED, 1)


def test_a_load_generator_that_hangs_is_ended(tmp_path: Path) -> None:
    served = Served(URL, "m", environ=environ(tmp_path, HANGS))
    with pytest.raises(SpeedError, match=r"did not end within 2 s; ask for less.*\n  waiting$"):
        speed.measure(Load(), served, Side.PATCHED, 1, limit_s=2)
