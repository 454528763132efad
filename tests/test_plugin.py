"""Activation in a process of its own: modes, refusals, and that a second call changes nothing."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

PRELUDE = """
import sglang_npu_pp
from sglang_npu_pp import plugin
from sglang_npu_pp.errors import ContractError
import sglang.version
from sglang.srt.managers.scheduler_pp_mixin import SchedulerPPMixin
from sglang.srt.distributed.parallel_state import GroupCoordinator
launch = SchedulerPPMixin._pp_launch_batch
"""


def run(program: str, **environment: str) -> subprocess.CompletedProcess[str]:
    variables = {name: text for name, text in os.environ.items() if not name.startswith("SGLANG_NPU_PP")}
    return subprocess.run(
        [sys.executable, "-c", PRELUDE + program],
        env={**variables, "SGLANG_USE_CPU_ENGINE": "1", **environment},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_activate_by_hand_patches_once_and_can_be_taken_back() -> None:
    result = run(
        """
assert sglang_npu_pp.activate() is True
patched = SchedulerPPMixin._pp_launch_batch
assert patched is not launch
assert sglang_npu_pp.activate() is True
assert SchedulerPPMixin._pp_launch_batch is patched
assert hasattr(GroupCoordinator, "irecv_tensor_dict")
assert sglang_npu_pp.counters() is None  # no scheduler runs here
sglang_npu_pp.deactivate()
assert SchedulerPPMixin._pp_launch_batch is launch
assert not hasattr(GroupCoordinator, "irecv_tensor_dict")
"""
    )
    assert result.returncode == 0, result.stderr
    assert result.stderr.count("patches in force for SGLang 0.5.21") == 1


def test_off_leaves_everything_alone() -> None:
    result = run(
        """
assert sglang_npu_pp.activate() is False
assert SchedulerPPMixin._pp_launch_batch is launch
""",
        SGLANG_NPU_PP="0",
    )
    assert result.returncode == 0, result.stderr
    assert "sglang-npu-pp: off, because SGLANG_NPU_PP=0" in result.stderr


@pytest.mark.parametrize(("mode", "release"), [("auto", "0.6.0"), ("require", "0.5.23.post1")])
def test_an_unknown_release_is_left_alone_or_refused(mode: str, release: str) -> None:
    result = run(
        f"sglang.version.__version__ = {release!r}"
        """
try:
    active = sglang_npu_pp.activate()
except ContractError as error:
    print("refused:", error)
else:
    print("active:", active)
assert SchedulerPPMixin._pp_launch_batch is launch
assert not hasattr(GroupCoordinator, "irecv_tensor_dict")
""",
        SGLANG_NPU_PP=mode,
    )
    assert result.returncode == 0, result.stderr
    if mode == "require":
        assert f"refused: SGLang {release} is not a release that sglang-npu-pp knows" in result.stdout
    else:
        assert "active: False" in result.stdout
        assert result.stderr.count(f"SGLang is left as it is: SGLang {release} is not a release") == 1


def test_a_function_that_differs_from_its_release_is_named_and_nothing_is_patched() -> None:
    result = run(
        """
SchedulerPPMixin._pp_commit_comm_work = SchedulerPPMixin._pp_commit_proxy_send_work
assert sglang_npu_pp.activate() is False
assert SchedulerPPMixin._pp_launch_batch is launch
""",
        SGLANG_NPU_PP="auto",
    )
    assert result.returncode == 0, result.stderr
    assert "SchedulerPPMixin._pp_commit_comm_work differs from that release" in result.stderr


def test_a_bad_setting_ends_the_process_through_sglangs_own_loader() -> None:
    """SGLang only logs what a plugin raises; a server with a wrong setting must not start."""
    result = run(
        "from sglang.srt.plugins import load_plugins\nload_plugins()\nprint('went on')",
        SGLANG_NPU_PP="sometimes",
    )
    assert result.returncode == 1
    assert "went on" not in result.stdout
    assert "sglang-npu-pp: SGLANG_NPU_PP='sometimes' must be one of auto, require, 0." in result.stderr


def test_activation_leaves_what_is_imported_late_to_sglang() -> None:
    """prometheus_client decides when it is imported where numbers are kept, and SGLang says that later."""
    result = run(
        """
import sys
assert "prometheus_client" not in sys.modules
assert sglang_npu_pp.activate() is True
assert "prometheus_client" not in sys.modules
"""
    )
    assert result.returncode == 0, result.stderr
