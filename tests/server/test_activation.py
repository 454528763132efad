"""Starts that must fail with one clear sentence, and starts that must leave SGLang as it is."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from rig import battery
from rig.launcher import Launcher
from rig.server import Server, ServerError

FAILURE_LIMIT_S = 120  # a start takes 20 to 30 s; a failing one must not wait for any of our limits


@pytest.fixture
def launcher(make_launcher: Callable[[str], Launcher]) -> Iterator[Launcher]:
    launcher = make_launcher("activation")
    yield launcher
    launcher.stop_all()


def log_of_failed_start(server: Server) -> str:
    """Start `server`, which must end by itself; returns the logs of all nodes."""
    try:
        server.start()
        with pytest.raises(ServerError, match="ended with exit code"):
            server.wait_ready(FAILURE_LIMIT_S)
        return "\n".join(server.log_text(node) for node in range(server.nnodes))
    finally:
        server.stop()


def test_a_wrong_setting_stops_the_start_with_one_sentence(launcher: Launcher) -> None:
    server = launcher.configure(1, 2, patched=True, env={"SGLANG_NPU_PP_WINDOW": "many"})
    log = log_of_failed_start(server)
    assert "SGLANG_NPU_PP_WINDOW='many' must be a whole number of messages from 4 to 4096." in log
    assert "Traceback" not in log


@pytest.mark.release  # another wrong setting
def test_a_misspelt_setting_stops_the_start(launcher: Launcher) -> None:
    server = launcher.configure(1, 2, patched=True, env={"SGLANG_NPU_PP_WINDOWS": "16"})
    assert "SGLANG_NPU_PP_WINDOWS is not a setting" in log_of_failed_start(server)


CORE_FUNCTION = "sglang.srt.managers.scheduler_pp_mixin:SchedulerPPMixin._pp_commit_comm_work"
OF_PREFILLS = "sglang.srt.disaggregation.prefill:SchedulerDisaggregationPrefillMixin.send_kv_chunk"


@pytest.mark.thorough
def test_require_refuses_a_build_that_is_not_known(launcher: Launcher) -> None:
    env = {"PP_PROBE_RELEASE": "9.9.9", "PP_PROBE_CHANGED": CORE_FUNCTION}
    log = log_of_failed_start(launcher.configure(1, 2, patched=True, env=env))
    assert f"SGLang 9.9.9 is not a build that sglang-npu-pp knows: {CORE_FUNCTION}" in log
    assert "SGLANG_NPU_PP=require" in log


@pytest.mark.thorough
def test_a_build_with_another_name_is_in_force(launcher: Launcher) -> None:
    """And what it does not know, this server does not use."""
    env = {"PP_PROBE_RELEASE": "0.5.22.dev1+g1234", "PP_PROBE_CHANGED": OF_PREFILLS}
    server = launcher.start(1, 2, patched=True, env=env)
    answer = battery.generate(server, input_ids=battery.prompt(50), sampling_params={"ignore_eos": True})
    assert len(answer["output_ids"]) == battery.OUTPUT_TOKENS
    log = server.log_text()
    assert f"SGLang 0.5.22.dev1+g1234 (functions of 0.5.21), not for disaggregation ({OF_PREFILLS}" in log
    assert "stage 0 rank 0 of 2 stages" in log


@pytest.mark.thorough
def test_require_refuses_a_server_that_uses_what_is_not_known(launcher: Launcher) -> None:
    env = {"PP_PROBE_CHANGED": OF_PREFILLS, "PP_PROBE_FAKE_KV": "1"}
    arguments = ["--disaggregation-mode", "prefill", "--disaggregation-transfer-backend", "nixl"]
    log = log_of_failed_start(launcher.configure(1, 2, patched=True, env=env, args=arguments))
    assert f"this SGLang is not known for disaggregation ({OF_PREFILLS}" in log
    assert "and SGLANG_NPU_PP=require" in log


@pytest.mark.thorough
def test_auto_leaves_sglang_as_it_is_when_a_patch_fails(launcher: Launcher) -> None:
    """All other patches were in force for a moment; the server must be upstream's from end to end."""
    env = {"SGLANG_NPU_PP": "auto", "PP_PROBE_FAIL_PATCH": "1"}
    server = launcher.start(1, 2, patched=False, env=env)
    answer = battery.generate(server, input_ids=battery.prompt(50), sampling_params={"ignore_eos": True})
    assert len(answer["output_ids"]) == battery.OUTPUT_TOKENS
    lines = [line for line in server.log_text().splitlines() if "not activated" in line]
    assert len(lines) == 3, lines  # engine, two schedulers
    assert all("could not be applied (the probe does not let it)" in line for line in lines)
    assert "of 2 stages" not in server.log_text()


@pytest.mark.release  # tests/test_plugin.py shows it without a server
def test_auto_leaves_an_unknown_build_as_it_is(launcher: Launcher) -> None:
    env = {"SGLANG_NPU_PP": "auto", "PP_PROBE_RELEASE": "9.9.9", "PP_PROBE_CHANGED": CORE_FUNCTION}
    server = launcher.start(1, 2, patched=False, env=env)
    answer = battery.generate(server, input_ids=battery.prompt(50), sampling_params={"ignore_eos": True})
    assert len(answer["output_ids"]) == battery.OUTPUT_TOKENS
    assert "not activated, SGLang is left as it is: SGLang 9.9.9" in server.log_text()


@pytest.mark.thorough
@pytest.mark.parametrize(
    "without", [0, pytest.param(1, marks=pytest.mark.release)], ids=["first stage", "last stage"]
)
def test_a_rank_without_the_plugin_is_named_and_nothing_hangs(launcher: Launcher, without: int) -> None:
    server = launcher.configure(
        1,
        2,
        patched=True,
        nnodes=2,
        env={"SGLANG_NPU_PP_START_LIMIT_S": "5"},
        node_env={without: {"SGLANG_NPU_PP": "0"}},
    )
    log = log_of_failed_start(server)
    assert f"rank {1 - without}: after 5 s there is no word from rank {without};" in log


@pytest.mark.release  # tests/test_agreement.py shows it without a server
def test_ranks_with_different_settings_are_named(launcher: Launcher) -> None:
    server = launcher.configure(1, 2, patched=True, nnodes=2, node_env={1: {"SGLANG_NPU_PP_WINDOW": "32"}})
    log = log_of_failed_start(server)
    assert "SGLANG_NPU_PP_WINDOW is '16' on rank 0 but '32' on rank 1" in log


@pytest.mark.release  # another wrong setting
def test_an_unusable_ipc_directory_is_named(launcher: Launcher, tmp_path: Path) -> None:
    """As for everything that keeps the host lane from opening; tests/transport has the other reasons."""
    missing = tmp_path / "missing"
    env: dict[str, Any] = {"SGLANG_NPU_PP_IPC_DIR": str(missing)}
    log = log_of_failed_start(launcher.configure(1, 2, patched=True, env=env))
    assert f"cannot make a directory for ipc sockets in {missing}" in log
    assert "set SGLANG_NPU_PP_IPC_DIR" in log
