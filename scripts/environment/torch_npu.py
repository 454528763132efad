"""Another torch_npu than the suite's, with its torch, for the simulated Ascend: `make matrix` installs them.

Both lie beside `.venv`, which has the rest of what they need. Apart, because torch loads a torch_npu that it
finds, and then wants an Ascend machine.
"""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path

from scripts.environment import installer
from scripts.environment.parts import BESIDE

CHOSEN = "ASCEND_SIM_TORCH_NPU"  # folder of the torch_npu that the simulator uses (ascend_sim/build.py)
REASON_LENGTH = 400


def environment(version: str) -> Mapping[str, str]:
    """Variables of a process that runs on a torch_npu such as "2.10.0"; both are installed if they are not.

    Raises:
        installer.InstallerError: one of them could not be installed; one sentence.
    """
    folder = BESIDE / f"torch_npu-{version}"
    torch, torch_npu = folder / "torch", folder / "torch_npu"
    _install(torch, f"torch=={torch_of(version)}")
    _install(torch_npu, f"torch_npu=={version}")
    others = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    return {"PYTHONPATH": os.pathsep.join([str(torch), *others]), CHOSEN: str(torch_npu)}


def torch_of(version: str) -> str:
    """The CPU build of torch for a torch_npu: of the same number, without its post-release."""
    return re.sub(r"\.post\d+$", "", version) + "+cpu"


def _install(folder: Path, requirement: str) -> None:
    if folder.is_dir():
        return
    BESIDE.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=BESIDE) as scratch:
        wanted, partial = Path(scratch) / "wanted.txt", Path(scratch) / "partial"
        wanted.write_text(f"{requirement}\n")
        try:
            installer.install_into(partial, wanted, installer.with_cpu_torch(installer.settings(), wanted))
        except installer.InstallerError as error:
            reason = " ".join(str(error).split())[-REASON_LENGTH:]
            raise installer.InstallerError(
                f"{requirement} could not be installed ({reason}); use a machine that reaches its index."
            ) from error
        folder.parent.mkdir(exist_ok=True)
        partial.rename(folder)
