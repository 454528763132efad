"""The certify command on real servers: builds that are not known, harmlessly and harmfully changed."""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rig import battery
from rig.copies import LABEL, Changes, make_copy
from rig.devices import DEVICES
from rig.launcher import RANDOM_MODEL
from rig.server import PATH, Server

pytestmark = pytest.mark.release  # tests/test_builds.py shows without servers which builds are known

ROOT = Path(__file__).parents[2]
LIMIT_S = 540
END_LIMIT_S = 60
LOOP = "sglang.srt.managers.scheduler_pp_mixin"
LAUNCH = f"{LOOP}:SchedulerPPMixin._pp_launch_batch"


class Build:
    """A copy of SGLang, and a folder of its user's certificates."""

    def __init__(self, folder: Path, changes: Changes) -> None:
        self.certificates = folder / "certificates"
        self.output = folder / "report"
        device = DEVICES["cpu"].environment(2)
        copy = make_copy(folder / "copy", changes)
        self.environment = {
            **device,
            **copy,
            PATH: os.pathsep.join([copy[PATH], str(ROOT)]),
            "SGLANG_NPU_PP_CERTIFICATES": str(self.certificates),
        }

    def certify(self, *options: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "sglang_npu_pp", "certify", "--rounds", "1", "--no-speed"]
        command += [*options, "--output", str(self.output), "--", "--device", "cpu", "--pp-size", "2"]
        with subprocess.Popen(
            command,
            env={**os.environ, **self.environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        ) as process:
            try:
                said, errors = process.communicate(timeout=LIMIT_S)
            except BaseException:
                process.terminate()  # not killed: it ends its server
                process.communicate(timeout=END_LIMIT_S)
                raise
        return subprocess.CompletedProcess(command, process.returncode, said, errors)

    def log_of_a_start(self, log: Path) -> str:
        """Of a patched server that has answered."""
        server = Server(RANDOM_MODEL, 1, 2, log=log, env={**self.environment, "SGLANG_NPU_PP": "require"})
        with server:
            answer = battery.generate(server, input_ids=battery.prompt(50))
            assert answer["output_ids"]
            return server.log_text()

    def report(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.output / "report.json").read_text())
        return found

    def failed(self) -> set[str]:
        return {check["name"] for check in self.report()["checks"] if check["verdict"] == "failed"}


def within(function: str, text: str, change: Callable[[str], str]) -> str:
    """The module's text with one of its methods changed."""
    begin = text.index(f"    def {function}(")
    end = text.index("\n    def ", begin + 1)
    changed = change(text[begin:end])
    assert changed != text[begin:end]
    return text[:begin] + changed + text[end:]


def renamed(text: str) -> str:
    """A local variable of _pp_launch_batch has another name."""
    return within("_pp_launch_batch", text, lambda body: re.sub(r"(?<![.\w])event\b", "done", body))


def swapped(text: str) -> str:
    """Two arguments of _pp_launch_batch, where it is defined and called: unpatched, nothing changes."""
    defined = r"(mb_id: int,)(\s+)(cur_batch: ScheduleBatch,)"
    text = within("_pp_launch_batch", text, lambda body: re.sub(defined, r"\3\2\1", body))
    called = r"(_pp_launch_batch\(\s+)mb_id,(\s+)cur_batch,"
    return within("event_loop_pp", text, lambda body: re.sub(called, r"\1cur_batch,\2mb_id,", body))


def dropped(text: str) -> str:
    """Log-probabilities no longer leave the last stage."""
    return within("_pp_prepare_tensor_dict", text, lambda body: body.replace("**logits_output_dict,", ""))


def at_once(text: str) -> str:
    """Proxies are looked at where they are received, before outputs are exchanged."""
    receive = "pp_proxy_tensors = self._pp_recv_proxy_tensors()\n"
    look = " " * 20 + "tuple(pp_proxy_tensors.tensors) if pp_proxy_tensors else None\n"
    return within("event_loop_pp", text, lambda body: body.replace(receive, receive + look))


def respelled(text: str) -> str:
    """Without comments, formatted otherwise, with one more function."""
    return f"{ast.unparse(ast.parse(text))}\n\n\ndef added_by_a_commit(value):\n    return value + 1\n"


def test_a_harmless_change_is_shown_certified_and_then_in_force(tmp_path: Path) -> None:
    build = Build(tmp_path, {LOOP: renamed})
    done = build.certify("--faults")
    assert done.returncode == 0, done.stdout + done.stderr
    report = build.report()
    assert report["certified"]
    (difference,) = report["differences"]
    assert difference["target"] == LAUNCH
    (file,) = build.certificates.glob("*.json")
    assert LAUNCH in json.loads(file.read_text())["certificate"]["functions"]
    log = build.log_of_a_start(tmp_path / "log")
    assert re.search(
        rf"patches in force for SGLang {re.escape(LABEL)} \(.*by certificate: [\w, ]*proxies", log
    )


@pytest.mark.parametrize(
    ("change", "red"),
    [
        pytest.param(swapped, "servers", id="two arguments swapped"),
        pytest.param(dropped, "servers", id="an output dropped"),
        pytest.param(at_once, "servers", id="a wait before the send"),
    ],
)
def test_a_harmful_change_is_red(tmp_path: Path, change: Callable[[str], str], red: str) -> None:
    build = Build(tmp_path, {LOOP: change})
    done = build.certify()
    assert done.returncode == 1, done.stdout + done.stderr
    assert red in build.failed()
    assert red in done.stdout.splitlines()[-1]
    assert not build.report()["certified"]
    assert not build.certificates.exists()
    (logs,) = re.findall(r"logs of the servers: (.+)", done.stdout)  # kept for the user
    shutil.rmtree(logs)


def test_another_name_and_spelling_is_in_force_at_once(tmp_path: Path) -> None:
    """And a function that was added beside those that matter."""
    build = Build(tmp_path, {LOOP: respelled})
    log = build.log_of_a_start(tmp_path / "log")
    assert f"patches in force for SGLang {LABEL} (functions of 0.5.21), all features; stage 0" in log
