"""The certify command on real servers: builds that are not known, harmlessly and harmfully changed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rig.copies import Changes, make_copy
from rig.devices import DEVICES
from rig.server import PATH

ROOT = Path(__file__).parents[2]
LIMIT_S = 540
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
        return subprocess.run(
            command,
            env={**os.environ, **self.environment},
            capture_output=True,
            text=True,
            timeout=LIMIT_S,
            check=False,
        )

    def report(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.output / "report.json").read_text())
        return found

    def failed(self) -> set[str]:
        return {check["name"] for check in self.report()["checks"] if check["verdict"] == "failed"}


def replaced(*pairs: tuple[str, str]) -> Callable[[str], str]:
    def change(text: str) -> str:
        for old, new in pairs:
            assert old in text
            text = text.replace(old, new)
        return text

    return change
