"""What a command line asks for, and the commands that it would start."""

from __future__ import annotations

from pathlib import Path

import pytest

from scripts import accuracy
from scripts.evaluation import gate, lmms
from scripts.evaluation.results import Layout, Side
from scripts.evaluation.servers import configure

QWEN = "Qwen/Qwen3-VL-8B-Instruct"


def plan(*arguments: str) -> gate.Plan:
    return accuracy.plan_of(*accuracy.parse_command_line(list(arguments)))


def test_by_default_the_shipped_model_in_every_layout() -> None:
    asked = plan()
    assert [str(layout) for layout in asked.layouts] == [
        "tp1 pp1 cpu",
        "tp1 pp2 cpu",
        "tp2 pp2 cpu",
        "tp1 pp2 npu-sim",
    ]
    assert asked.tasks == ("digits_plain", "digits_lettered")
    assert asked.floor == 0.97
    assert asked.twin == gate.RANDOM_MODEL
    assert asked.samples_on("cpu") is None  # all


def test_quick_asks_less() -> None:
    assert plan("--quick").samples_on("cpu") == 100
    assert plan("--quick").samples_on("npu-sim") == 40
    assert plan("--quick").floor == 0.97
    assert plan("--quick", "--samples", "7").samples_on("npu-sim") == 7


def test_the_floor_is_that_of_the_whole_test_set() -> None:
    assert plan("--samples", "7").floor is None
    assert plan("--samples", "7", "--floor", "0.9").floor == 0.9


def test_the_run_of_upstreams_pull_request() -> None:
    asked = plan("--model-path", QWEN, "--tp", "2", "--pp", "2", "--tasks", "mmmu_val")
    assert asked.layouts == (Layout(2, 2, "auto"),)
    assert asked.tasks == ("mmmu_val",)
    assert asked.floor is None
    assert asked.twin is None
    assert asked.samples_on("auto") is None
    assert plan("--model-path", QWEN, "--floor", "0.5").floor == 0.5


def test_the_servers_on_a_real_machine(tmp_path: Path) -> None:
    """The user's arguments and nothing for tiny models or small machines; patched and unpatched."""
    asked = plan(
        "--model-path", QWEN, "--device", "npu", "--tp", "2", "--pp", "2", "--", "--mem-fraction", "0.8"
    )
    (layout,) = asked.layouts
    for side, switch in ((Side.UNPATCHED, "0"), (Side.PATCHED, "require")):
        server = configure(asked.model, layout, side, tmp_path / "log", args=asked.server_args)
        command = server.command()
        port, nccl_port = command[command.index("--port") + 1], command[command.index("--nccl-port") + 1]
        assert command[1:] == [
            *("-m", "sglang.launch_server", "--model-path", QWEN),
            *("--device", "npu", "--tp-size", "2", "--pp-size", "2"),
            *("--host", "127.0.0.1", "--port", port, "--nccl-port", nccl_port),
            *("--mem-fraction", "0.8"),
        ]
        assert server.environment == {"SGLANG_NPU_PP": switch}


def test_without_a_device_sglang_chooses(tmp_path: Path) -> None:
    server = configure(QWEN, Layout(2, 2, "auto"), Side.PATCHED, tmp_path / "log")
    assert "--device" not in server.command()


def test_tiny_models_are_compared_in_float32(tmp_path: Path) -> None:
    server = configure(gate.SHIPPED_MODEL, Layout(1, 2), Side.PATCHED, tmp_path / "log")
    command = server.command()
    assert command[len(command) - command[::-1].index("--dtype")] == "float32"


@pytest.mark.parametrize(
    "arguments",
    [
        ["--base-url", "http://127.0.0.1:1", "--pp", "2"],
        ["--tp", "0"],
        ["--samples", "0"],
        ["--device", "abacus"],
    ],
)
def test_what_cannot_be_meant_is_refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        accuracy.parse_command_line(arguments)
    assert ended.value.code == 2
    assert "error: " in capsys.readouterr().err


def test_no_task_of_ours_carries_the_name_of_mmmu() -> None:
    assert not [task for task in plan().tasks if "mmmu" in task.lower()]
    assert any("neither is MMMU" in note for note in gate.notes(plan()))


def test_the_last_error_of_a_log_is_found_without_its_colours(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text("starting\n  File x.py\nValueError: \x1b[31mno such task\x1b[0m\n\nbye\n")
    assert lmms.last_error(log) == "ValueError: no such task"
    log.write_text("")
    assert lmms.last_error(log) == "it said nothing"


def test_lmms_eval_is_started_without_caches() -> None:
    command = lmms.command(["mmmu_val"], 16, None)
    assert command[1:3] == ["-m", "lmms_eval"]
    assert not {"--use_cache", "--cache_requests", "--limit"} & set(command)
    assert command[command.index("--tasks") + 1] == "mmmu_val"


def test_only_own_tasks_stay_off_the_hub(tmp_path: Path) -> None:
    own = lmms.environment("http://127.0.0.1:1", tmp_path, offline=True)
    assert own["HF_HUB_OFFLINE"] == "1"
    assert own["OPENAI_API_BASE"] == "http://127.0.0.1:1/v1"
    foreign = lmms.environment("http://127.0.0.1:1", tmp_path, offline=False)
    assert "HF_DATASETS_CACHE" not in foreign or foreign["HF_DATASETS_CACHE"] != str(tmp_path / "datasets")
