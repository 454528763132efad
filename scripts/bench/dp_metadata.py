"""How long the metadata of data-parallel attention block a scheduler, a step: unpatched against patched.

    .venv/bin/python -m scripts.bench.dp_metadata --rounds 6 --json result.json     # --device npu-sim

The servers (tp 2 dp 2 pp 2, a tiny Qwen3-MoE) are resident; those that are not measured are stopped with
SIGSTOP. Rounds alternate, every other one backwards. A round sends 32 requests at once, of 32 tokens in and
33 out, and then one alone, which leaves one of the two ranks idle. "ours" gathers on the device, "ours, host"
over gloo; on CPU they are the same, so only one is measured. All tokens are compared.

Blocked is the time in upstream's gather, or in our post and wait. It contains waiting until the other rank
has come to the same point; CPU time does not, and depends little on what else the machine does.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from rich.table import Table

from rig.probes import probe_variables
from rig.probes.dp_metadata_probe import KINDS, SIGNAL
from rig.server import Server
from scripts.bench.asked import ask_schedulers
from scripts.bench.competitors import FROZEN_LIMIT_S
from scripts.bench.load import DECODE, Load, Request
from scripts.bench.load import run as run_load
from scripts.output import number_table, plain_console

ROOT = Path(__file__).parents[2]
MODEL = ROOT / "rig/assets/random_moe"
ON, OFF = {"SGLANG_NPU_PP": "require"}, {"SGLANG_NPU_PP": "0"}
HOST = {"SGLANG_NPU_PP_DP_METADATA": "host"}
COMPETITORS = {
    "cpu": {"upstream": OFF, "ours": ON},
    "npu-sim": {"upstream": OFF, "ours": ON, "ours, host": {**ON, **HOST}},
}
ALONE = Load("alone", [Request(32, 33)])
ARGUMENTS = (
    *("--dp-size", "2", "--enable-dp-attention", "--max-total-tokens", "16384"),
    *("--skip-server-warmup", "--disable-radix-cache", "--watchdog-timeout", FROZEN_LIMIT_S),
)
# In float32 tokens do not depend on who shares a batch; but on NPU SGLang's experts answer in bfloat16.
DTYPES = {"cpu": "float32", "npu-sim": "bfloat16"}
START_LIMIT_S = 900.0

Steps = dict[str, dict[str, list[tuple[int, int]]]]  # by stage and rank, then by kind


def configure(name: str, variables: Mapping[str, str], folder: Path, device: str) -> Server:
    folder.mkdir()
    environment = {
        **variables,
        "SGLANG_NPU_PP_PEER_TIMEOUT_S": FROZEN_LIMIT_S,
        "DP_METADATA_DIR": str(folder),
        **probe_variables("dp_metadata_probe"),
    }
    args = (*ARGUMENTS, "--dtype", DTYPES[device])
    return Server(MODEL, 2, 2, log=folder / "log", device=device, env=environment, args=args)


def measure(server: Server, folder: Path, seed: int) -> dict[str, Any]:
    """One round: what the steps of every rank took, and all tokens."""
    server.thaw()
    try:
        ask_schedulers(server, folder, SIGNAL)
        tokens = [run_load(server.url, load, seed).tokens for load in (DECODE, ALONE)]
        steps: Steps = ask_schedulers(server, folder, SIGNAL)
        return {"steps": steps, "tokens": tokens, "load": os.getloadavg()[0]}
    finally:
        server.freeze()


def run(rounds: int, device: str, folder: Path) -> list[dict[str, Any]]:
    rows = []
    servers: dict[str, Server] = {}
    with ExitStack() as running:
        for name, variables in COMPETITORS[device].items():
            began = time.monotonic()
            server = servers[name] = configure(name, variables, folder / name, device)
            running.callback(server.stop)
            running.callback(server.thaw)
            server.start()
            server.wait_ready(START_LIMIT_S)
            for load in (DECODE, ALONE):
                run_load(server.url, load, seed=0)
            server.freeze()
            print(f"{name} is up after {time.monotonic() - began:.0f} s", flush=True)
        for number in range(rounds):
            for name in list(servers)[:: 1 if number % 2 == 0 else -1]:
                row = measure(servers[name], folder / name, seed=1 + number)
                rows.append({"round": number, "competitor": name, **row})
                print(f"round {number} {name}: machine load {row['load']:.1f}", flush=True)
    return rows


def tokens_are_equal(rows: list[dict[str, Any]]) -> bool:
    by_round: dict[int, list[Any]] = {}
    for row in rows:
        by_round.setdefault(row["round"], []).append(row["tokens"])
    return all(each == tokens[0] for tokens in by_round.values() for each in tokens)


def table(rows: list[dict[str, Any]]) -> Table:
    """Over all steps of both ranks of a stage, in microseconds: wall median and 90 %, median of CPU time."""
    names = list(dict.fromkeys(row["competitor"] for row in rows))
    columns = [f"{name}: {what}" for name in names for what in ("steps", "median", "90 %", "CPU")]
    found = number_table(None, "us blocked a step", *columns)
    for stage in ("stage0", "stage1"):
        for kind in KINDS:
            texts: list[str] = []
            for name in names:
                steps = [
                    step
                    for row in rows
                    if row["competitor"] == name
                    for rank, kinds in row["steps"].items()
                    if rank.startswith(stage)
                    for step in kinds.get(kind, [])
                ]
                texts += cells(steps)
            found.add_row(f"{stage} {kind}", *texts)
    return found


def cells(steps: list[tuple[int, int]]) -> list[str]:
    if len(steps) < 2:
        return [f"({len(steps)})", "", "", ""]
    wall, cpu = ([ns / 1e3 for ns in values] for values in zip(*steps, strict=True))
    ninety = statistics.quantiles(wall, n=10)[8]
    return [
        f"({len(steps)})",
        *(f"{us:.0f}" for us in (statistics.median(wall), ninety, statistics.median(cpu))),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--device", choices=sorted(COMPETITORS), default="cpu")
    parser.add_argument("--json", type=Path, help="write every step to this file")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        rows = run(arguments.rounds, arguments.device, Path(folder))
    plain_console(200).print(table(rows))
    print("all tokens are equal:", tokens_are_equal(rows))
    if arguments.json:
        arguments.json.write_text(json.dumps(rows) + "\n")


if __name__ == "__main__":
    main()
