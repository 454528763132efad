"""Activation in a process of its own: modes, refusals, and that a second call changes nothing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(120)]

# Imports SGLang, which takes seconds, then forks a process for each program: what it changes ends with it.
IMPORTED = """
import json
import os
import sys

import sglang_npu_pp
from sglang_npu_pp import plugin
from sglang_npu_pp.errors import ContractError
import sglang.version
from sglang.srt.managers.scheduler_pp_mixin import SchedulerPPMixin
from sglang.srt.distributed.parallel_state import GroupCoordinator
launch = SchedulerPPMixin._pp_launch_batch
print("imported", flush=True)

for line in sys.stdin:
    order = json.loads(line)
    if not (child := os.fork()):
        break
    _, status = os.waitpid(child, 0)
    print(os.waitstatus_to_exitcode(status), flush=True)
else:
    sys.exit()
for descriptor, path in enumerate(order["output"], 1):
    os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), descriptor)
os.environ.update(order["environment"])
exec(order["program"])
"""

Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def imported(tmp_path_factory: pytest.TempPathFactory) -> Iterator[subprocess.Popen[str]]:
    """A process that has imported SGLang and runs a program a line, each in a child."""
    errors = tmp_path_factory.mktemp("imported") / "stderr"
    variables = {name: text for name, text in os.environ.items() if not name.startswith("SGLANG_NPU_PP")}
    with (
        errors.open("w") as stderr,
        subprocess.Popen(
            [sys.executable, "-c", IMPORTED],
            env={**variables, "SGLANG_USE_CPU_ENGINE": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
        ) as process,
    ):
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stdout.readline() == "imported\n", errors.read_text()
        yield process
        process.stdin.close()  # which ends it


@pytest.fixture
def run(imported: subprocess.Popen[str], tmp_path: Path) -> Run:
    """Runs a program behind those imports, with these variables, in a process of its own."""

    def run(program: str, **environment: str) -> subprocess.CompletedProcess[str]:
        output = [tmp_path / "stdout", tmp_path / "stderr"]
        order = {"program": program, "environment": environment, "output": [str(path) for path in output]}
        assert imported.stdin is not None
        assert imported.stdout is not None
        print(json.dumps(order), file=imported.stdin, flush=True)
        status = int(imported.stdout.readline())
        stdout, stderr = (path.read_text() for path in output)
        return subprocess.CompletedProcess([program], status, stdout, stderr)

    return run


def test_activate_by_hand_patches_once_and_can_be_taken_back(run: Run) -> None:
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


def test_off_leaves_everything_alone(run: Run) -> None:
    result = run(
        """
assert sglang_npu_pp.activate() is False
assert SchedulerPPMixin._pp_launch_batch is launch
""",
        SGLANG_NPU_PP="0",
    )
    assert result.returncode == 0, result.stderr
    assert "sglang-npu-pp: off, because SGLANG_NPU_PP=0" in result.stderr


@pytest.mark.parametrize("release", ["0.5.22.dev1+g1234", "nightly"])
def test_a_known_build_is_in_force_whatever_it_calls_itself(run: Run, release: str) -> None:
    result = run(
        f"sglang.version.__version__ = {release!r}"
        """
assert sglang_npu_pp.activate() is True
assert SchedulerPPMixin._pp_launch_batch is not launch
""",
        SGLANG_NPU_PP="require",
    )
    assert result.returncode == 0, result.stderr
    assert f"patches in force for SGLang {release} (functions of 0.5.21), all features" in result.stderr


@pytest.mark.parametrize(("mode", "release"), [("auto", "0.6.0"), ("require", "0.5.21")])
def test_an_unknown_build_is_left_alone_or_refused(run: Run, mode: str, release: str) -> None:
    result = run(
        f"sglang.version.__version__ = {release!r}"
        """
SchedulerPPMixin._pp_commit_comm_work = SchedulerPPMixin._pp_commit_proxy_send_work
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
        assert f"refused: SGLang {release} is not a build that sglang-npu-pp knows" in result.stdout
    else:
        assert "active: False" in result.stdout
        assert result.stderr.count(f"SGLang is left as it is: SGLang {release} is not a build") == 1


def test_a_function_that_differs_from_its_release_is_named_and_nothing_is_patched(run: Run) -> None:
    result = run(
        """
SchedulerPPMixin._pp_commit_comm_work = SchedulerPPMixin._pp_commit_proxy_send_work
assert sglang_npu_pp.activate() is False
assert SchedulerPPMixin._pp_launch_batch is launch
""",
        SGLANG_NPU_PP="auto",
    )
    assert result.returncode == 0, result.stderr
    assert "SchedulerPPMixin._pp_commit_comm_work differs from SGLang 0.5.21 (another plugin" in result.stderr


def test_a_feature_whose_functions_differ_is_left_out_alone(run: Run) -> None:
    result = run(
        """
from sglang.srt.disaggregation.prefill import SchedulerDisaggregationPrefillMixin as Prefill
Prefill.send_kv_chunk = chunk = Prefill.process_prefill_chunk
assert sglang_npu_pp.activate() is True
assert SchedulerPPMixin._pp_launch_batch is not launch
assert Prefill.send_kv_chunk is chunk
""",
        SGLANG_NPU_PP="require",
    )
    assert result.returncode == 0, result.stderr
    assert "send_kv_chunk differs from SGLang 0.5.21)" in result.stderr
    assert "not for disaggregation (" in result.stderr


CERTIFIED = """
from sglang_npu_pp import certificates, patches
from sglang_npu_pp.builds import CORE, Known, build_of_this_process
from sglang_npu_pp.settings import load_settings

SchedulerPPMixin._pp_commit_comm_work = SchedulerPPMixin._pp_commit_proxy_send_work
seams = patches.seams_here()
known = Known(build_of_this_process(patches.sglang_release(), seams), seams, patches.load_contracts())
path = certificates.write(certificates.for_known(known, [CORE]), certificates.folder(load_settings()))
"""


@pytest.mark.parametrize("mode", ["auto", "require"])
def test_a_build_with_a_certificate_is_in_force(run: Run, mode: str, tmp_path: Path) -> None:
    result = run(
        CERTIFIED
        + """
assert sglang_npu_pp.activate() is True
assert SchedulerPPMixin._pp_launch_batch is not launch
assert patches.features.certificate().startswith(path.stem)
""",
        SGLANG_NPU_PP=mode,
        SGLANG_NPU_PP_CERTIFICATES=str(tmp_path / "certificates"),
    )
    assert result.returncode == 0, result.stderr
    assert "patches in force for SGLang 0.5.21 (by certificate: proxies), all features" in result.stderr


@pytest.mark.parametrize("mode", ["auto", "require"])
def test_a_certificate_that_others_may_write_does_not_count(run: Run, mode: str, tmp_path: Path) -> None:
    result = run(
        CERTIFIED
        + """
path.chmod(0o666)
try:
    active = sglang_npu_pp.activate()
except ContractError as error:
    print("refused:", error)
else:
    print("active:", active)
assert SchedulerPPMixin._pp_launch_batch is launch
""",
        SGLANG_NPU_PP=mode,
        SGLANG_NPU_PP_CERTIFICATES=str(tmp_path / "certificates"),
    )
    assert result.returncode == 0, result.stderr
    said = result.stdout if mode == "require" else result.stderr
    assert "is not a build that sglang-npu-pp knows: " in said
    assert f" {tmp_path}/certificates/" in said
    assert ".json can be written by other users (mode 666), so it does not count" in said
    assert ("refused: " if mode == "require" else "active: False") in result.stdout


def test_a_bad_setting_ends_the_process_through_sglangs_own_loader(run: Run) -> None:
    """SGLang only logs what a plugin raises; a server with a wrong setting must not start."""
    result = run(
        "from sglang.srt.plugins import load_plugins\nload_plugins()\nprint('went on')",
        SGLANG_NPU_PP="sometimes",
    )
    assert result.returncode == 1
    assert "went on" not in result.stdout
    assert "sglang-npu-pp: SGLANG_NPU_PP='sometimes' must be one of auto, require, 0." in result.stderr


def test_activation_leaves_what_is_imported_late_to_sglang(run: Run) -> None:
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
