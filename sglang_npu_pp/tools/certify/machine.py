"""The device that the servers ran on, in words for the report: a simulated one is called simulated."""

from __future__ import annotations

import argparse
import os
import re
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

from ..imports import asked_apart

SIMULATED = "simulated Ascend"
LIMIT_S = 120.0  # torch_npu may take a minute to load on a machine that has just started
_SIMULATOR = "ASCEND_SIM_DEVICES"  # set wherever the simulated CANN is the one that is loaded
_MODEL = re.compile(r"^model name\s*:\s*(.+)$", re.M)
_ASK = """
import importlib.util, torch
if importlib.util.find_spec("torch_npu"):
    import torch_npu
    device = torch.npu
else:
    device = torch.cuda
count = device.device_count() if device.is_available() else 0
print("device", count, device.get_device_name(0) if count else "")
"""


def device(arguments: Sequence[str], environ: Mapping[str, str], limit_s: float = LIMIT_S) -> str:
    """Of servers with these arguments and variables. Loads torch_npu or CUDA in a process of its own."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--device", default="")
    chosen = parser.parse_known_args(list(arguments))[0].device
    if chosen == "cpu":
        return _cpu()
    count, name = _asked(environ, limit_s)
    if environ.get(_SIMULATOR):
        return f"{SIMULATED} ({count} devices; a simulation on the CPU, no Ascend hardware)"
    if count:
        return f"{count} x {name}"
    return _cpu() if not chosen else f"{chosen}, {name or 'which names no device'}"


def _asked(environ: Mapping[str, str], limit_s: float) -> tuple[int, str]:
    """Number of accelerators and the name of the first; 0 with a reason or "" where there is none."""
    try:
        found = asked_apart(_ASK, r"^device (\d+) ?(.*)$", environ, limit_s)
    except subprocess.TimeoutExpired:
        return 0, f"which does not answer within {limit_s:g} s"
    if isinstance(found, str):
        return 0, f"which cannot be asked ({found})"
    return int(found[1]), found[2]


def _cpu(description: Path = Path("/proc/cpuinfo")) -> str:
    try:
        model = _MODEL.search(description.read_text())
    except OSError:
        model = None
    cores = len(os.sched_getaffinity(0))
    return f"CPU ({cores} cores{f', {model[1]}' if model else ''})"
