"""Where the host's time goes between the arrival of what a stage waits for and its next forward.

    .venv/bin/python -m scripts.bench.host_picture --pp 3                       # CPU
    .venv/bin/python -m scripts.bench.host_picture --device npu-sim --pp 2      # simulated Ascend, graphs
    .venv/bin/python -m scripts.bench.host_picture --device npu-sim --eager

One patched server decodes 32 requests. A turn begins on stage 0 with the tokens of a microbatch, on later
stages with the proxies of one, and ends where the model is called. Given are means over the turns of decodes
of 8 to 32 requests, in microseconds of CPU time of the scheduler thread, which depend little on what else
the machine does.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rig.devices import EAGER
from rig.probes import probe_variables
from rig.probes.host_picture_probe import SIGNAL
from rig.server import Server
from scripts.bench.asked import ask_schedulers
from scripts.bench.host_time import MODEL
from scripts.bench.load import DECODE
from scripts.bench.load import run as run_load
from scripts.output import number_table, plain_console

GRAPHS = ("--cuda-graph-bs-decode", "1", "2", "4", "8", "16", "24", "32")
COUNTED = range(8, 33)  # requests in a decode that counts
Means = dict[str, float]  # by part, microseconds a turn


def start(folder: Path, device: str, pp: int, eager: bool) -> Server:
    environment = {
        "SGLANG_NPU_PP": "require",
        "HOST_PICTURE_DIR": str(folder),
        **probe_variables("host_picture_probe"),
    }
    graphs = () if device == "cpu" else EAGER if eager else GRAPHS
    flags = ("--max-total-tokens", "16384", "--dtype", "float32", "--skip-server-warmup")
    return Server(
        MODEL,
        1,
        pp,
        log=folder / "log",
        device=device,
        env=environment,
        args=(*flags, "--disable-radix-cache", *graphs),
    )


def means(turns: Mapping[str, Sequence[Mapping[str, int]]]) -> tuple[int, Means]:
    """How many turns count, and what they spent; of none, nothing."""
    counted = [turn for rows, found in turns.items() if int(rows) in COUNTED for turn in found]
    total: Counter[str] = Counter()
    for turn in counted:
        total.update(turn)
    return len(counted), {part: spent / len(counted) / 1000 for part, spent in total.items()}


def run(device: str, pp: int, eager: bool, loads: int, folder: Path) -> dict[str, Any]:
    with start(folder, device, pp, eager) as server:
        run_load(server.url, DECODE, seed=0)
        ask_schedulers(server, folder, SIGNAL)
        for number in range(loads):
            run_load(server.url, DECODE, seed=1 + number)
        found = ask_schedulers(server, folder, SIGNAL)
    return {
        stage.partition("-")[0]: dict(zip(("turns", "parts"), means(turns), strict=True))
        for stage, turns in found.items()
    }


def print_table(stages: Mapping[str, Any]) -> None:
    names = sorted({part for stage in stages.values() for part in stage["parts"]})
    names.sort(key=lambda part: -max(stage["parts"].get(part, 0.0) for stage in stages.values()))
    table = number_table(None, "us of CPU a turn", *(f"{name}: {stages[name]['turns']}" for name in stages))
    for part in names:
        table.add_row(part, *(f"{stage['parts'].get(part, 0.0):.0f}" for stage in stages.values()))
    table.add_row("all", *(f"{sum(stage['parts'].values()):.0f}" for stage in stages.values()))
    plain_console().print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "npu-sim"), default="cpu")
    parser.add_argument("--pp", type=int, default=2)
    parser.add_argument("--eager", action="store_true", help="decode without graphs")
    parser.add_argument("--loads", type=int, default=4, help="how often the 32 requests are sent")
    parser.add_argument("--json", type=Path, help="write the numbers to this file")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        stages = run(arguments.device, arguments.pp, arguments.eager, arguments.loads, Path(folder))
    print(f"load of the machine {os.getloadavg()[0]:.1f}")
    print_table(stages)
    if arguments.json:
        arguments.json.write_text(json.dumps(stages, indent=1) + "\n")


if __name__ == "__main__":
    main()
