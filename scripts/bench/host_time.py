"""What an iteration costs the host of each stage outside the forward: unpatched against patched, on CPU.

    .venv/bin/python -m scripts.bench.host_time --rounds 6 --json result.json     # --parts: by function

Both servers (tp 1 pp 2) are resident; the one that is not measured is stopped with SIGSTOP. Rounds alternate,
every other pair in reverse order. The load is 32 concurrent requests of 32 tokens in and 33 out. Given are
medians over the rounds, in microseconds per iteration that decodes 10 to 22 requests: requests fall into the
two microbatches as they come, and an iteration of few costs less than one of many. CPU time depends little on
what else the machine does; wall time contains it.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import tempfile
from collections import Counter
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from rig.probes import probe_variables
from rig.probes.host_time_probe import SIGNAL
from rig.server import Server
from scripts.bench.asked import ask_schedulers
from scripts.bench.competitors import FROZEN_LIMIT_S
from scripts.bench.load import DECODE
from scripts.bench.load import run as run_load
from scripts.output import number_table, plain_console

ROOT = Path(__file__).parents[2]
MODEL = ROOT / "sglang_npu_pp/tools/certify/model"
COMPETITORS = {"upstream": "0", "ours": "require"}  # SGLANG_NPU_PP
COUNTED = range(10, 23)  # requests in a decode that counts
CLOCKS = {"cpu": "scheduler thread", "process": "all threads", "wall": "wall, with waiting"}

Row = dict[str, Any]


def start(name: str, folder: Path, parts: bool) -> Server:
    folder.mkdir()
    environment = {
        "SGLANG_NPU_PP": COMPETITORS[name],
        "SGLANG_NPU_PP_PEER_TIMEOUT_S": FROZEN_LIMIT_S,
        "HOST_TIME_DIR": str(folder),
        "HOST_TIME_PARTS": "1" if parts else "0",
        **probe_variables("host_time_probe"),
    }
    args = ("--max-total-tokens", "16384", "--dtype", "float32", "--skip-server-warmup")
    return Server(MODEL, 1, 2, log=folder / "log", env=environment, args=(*args, "--disable-radix-cache"))


def measure(server: Server, folder: Path, loads: int, seed: int) -> Row:
    server.thaw()
    try:
        ask_schedulers(server, folder, SIGNAL)
        seconds = sum(run_load(server.url, DECODE, seed + number).duration_s for number in range(loads))
        stages = [counted(stage) for stage in ask_schedulers(server, folder, SIGNAL).values()]
    finally:
        server.freeze()
    rate = loads * DECODE.answer_tokens / seconds
    return {"tokens_a_second": round(rate), "load": os.getloadavg()[0], "stages": stages}


def counted(measured: Mapping[str, Any]) -> dict[str, Any]:
    """The sum over the kinds of batches that count."""
    total: dict[str, Any] = {"iterations": 0, **dict.fromkeys(CLOCKS, 0), "parts": Counter()}
    for kind, values in measured.items():
        mode, _, requests = kind.partition(" ")
        if mode == "DECODE" and int(requests) in COUNTED:
            for name in ("iterations", *CLOCKS):
                total[name] += values[name]
            total["parts"].update(values["parts"])
    return total


def run(rounds: int, loads: int, parts: bool, folder: Path) -> list[Row]:
    rows = []
    servers: dict[str, Server] = {}
    with ExitStack() as running:
        for name in COMPETITORS:
            server = servers[name] = running.enter_context(start(name, folder / name, parts))
            running.callback(server.thaw)
            run_load(server.url, DECODE, seed=0)
            server.freeze()
        for number in range(rounds):
            for name in list(servers) if number % 2 == 0 else list(servers)[::-1]:
                row = measure(servers[name], folder / name, loads, seed=1 + number * loads)
                rows.append({"round": number, "competitor": name, **row})
                print(f"round {number} {name}: {row['tokens_a_second']} tokens/s", flush=True)
    return rows


def median(rows: list[Row], stage: int, value: str) -> float:
    """Microseconds an iteration."""

    def one(measured: Mapping[str, Any]) -> float:
        spent = measured[value] if value in measured else measured["parts"].get(value, 0)
        return spent / measured["iterations"] / 1000

    found = [one(row["stages"][stage]) for row in rows if row["stages"][stage]["iterations"]]
    return statistics.median(found) if found else math.nan


def print_table(rows: list[Row]) -> None:
    console = plain_console()
    of = {name: [row for row in rows if row["competitor"] == name] for name in COMPETITORS}
    for stage in range(2):
        parts = {part for row in rows for part in row["stages"][stage]["parts"]}
        names = [*CLOCKS, *sorted(parts, key=lambda part: -max(median(of[n], stage, part) for n in of))]
        table = number_table(
            None, f"stage {stage}, us an iteration outside the forward", *COMPETITORS, "ratio"
        )
        for name in names:
            upstream, ours = median(of["upstream"], stage, name), median(of["ours"], stage, name)
            ratio = f"{ours / upstream:.2f}" if upstream else ""
            table.add_row(CLOCKS.get(name, name), f"{upstream:.0f}", f"{ours:.0f}", ratio)
        console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--loads", type=int, default=3, help="how often a round sends the 32 requests")
    parser.add_argument("--parts", action="store_true", help="CPU time by function as well")
    parser.add_argument("--json", type=Path, help="write every round to this file")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        rows = run(arguments.rounds, arguments.loads, arguments.parts, Path(folder))
    print_table(rows)
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
