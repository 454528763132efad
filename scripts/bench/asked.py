"""What the probes of a server's schedulers have measured, whenever they are asked for it."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

from rig.server import Server, ServerError

WRITE_LIMIT_S = 20


def ask_schedulers(server: Server, folder: Path, signal_number: int) -> dict[str, Any]:
    """What every scheduler measured since it was last asked, by "stage<S>-rank<R>".

    A probe writes `stage<S>-rank<R>.<n>.json` into `folder` when it gets the signal. Raises ServerError.
    """
    before = set(folder.glob("stage*.json"))
    schedulers = server.scheduler_pids()
    for pid in schedulers:
        os.kill(pid, signal_number)
    deadline = time.monotonic() + WRITE_LIMIT_S
    while len(written := sorted(set(folder.glob("stage*.json")) - before)) < len(schedulers):
        if time.monotonic() > deadline:
            raise ServerError(f"a scheduler did not write within {WRITE_LIMIT_S} s; see {server.log}")
        time.sleep(0.05)
    return {path.name.partition(".")[0]: json.loads(path.read_text()) for path in written}
