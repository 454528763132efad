"""How long the metadata of data-parallel attention block a scheduler, a step: unpatched against patched.

    .venv/bin/python -m scripts.bench.dp_metadata --rounds 4 --json result.json

Both servers (tp 2 dp 2 pp 2, a tiny Qwen3-MoE) are resident; the one that is not measured is stopped with
SIGSTOP. Rounds alternate, every other pair in reverse order; the load is 32 concurrent requests of 32 tokens
in and 33 out. Only steps that launch a batch count. The time contains waiting for the other rank to come to
the same point, and for a core: four ranks share this machine's.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from scripts.bench.competitors import FROZEN_LIMIT_S
from scripts.bench.dp_metadata_plugin.dp_metadata_probe import SIGNAL, TARGETS
from scripts.bench.load import DECODE
from scripts.bench.load import run as run_load
from scripts.lib.server import Server, ServerError

ROOT = Path(__file__).parents[2]
MODEL = ROOT / "tests/assets/random_moe"
PLUGIN = Path(__file__).parent / "dp_metadata_plugin"
COMPETITORS = {"upstream": "0", "ours": "require"}  # SGLANG_NPU_PP
WRITE_LIMIT_S = 20

Steps = dict[str, list[dict[str, int]]]  # by stage and rank


def start(name: str, folder: Path, device: str) -> Server:
    folder.mkdir()
    environment = {
        "SGLANG_NPU_PP": COMPETITORS[name],
        "SGLANG_NPU_PP_PEER_TIMEOUT_S": FROZEN_LIMIT_S,
        "DP_METADATA_DIR": str(folder),
        "PYTHONPATH": str(PLUGIN),
    }
    args = (
        *("--dp-size", "2", "--enable-dp-attention", "--max-total-tokens", "16384", "--dtype", "float32"),
        *("--skip-server-warmup", "--disable-radix-cache"),
    )
    return Server(MODEL, 2, 2, log=folder / "log", device=device, env=environment, args=args)


def collect(server: Server, folder: Path) -> Steps:
    """What every scheduler measured since the last call."""
    before = set(folder.glob("stage*.json"))
    schedulers = server.scheduler_pids()
    for pid in schedulers:
        os.kill(pid, SIGNAL)
    deadline = time.monotonic() + WRITE_LIMIT_S
    while len(written := sorted(set(folder.glob("stage*.json")) - before)) < len(schedulers):
        if time.monotonic() > deadline:
            raise ServerError(f"a scheduler did not write within {WRITE_LIMIT_S} s; see {server.log}")
        time.sleep(0.05)
    return {path.name.partition(".")[0]: json.loads(path.read_text()) for path in written}


def run(rounds: int, device: str, folder: Path) -> list[dict[str, Any]]:
    rows = []
    servers: dict[str, Server] = {}
    with ExitStack() as running:
        for name in COMPETITORS:
            server = servers[name] = running.enter_context(start(name, folder / name, device))
            running.callback(server.thaw)
            run_load(server.url, DECODE, seed=0)
            server.freeze()
        for number in range(rounds):
            for name in list(servers) if number % 2 == 0 else list(servers)[::-1]:
                servers[name].thaw()
                collect(servers[name], folder / name)
                run_load(servers[name].url, DECODE, seed=number + 1)
                steps = collect(servers[name], folder / name)
                servers[name].freeze()
                rows.append({"round": number, "competitor": name, "steps": steps})
                print(f"round {number} {name}: {sum(map(len, steps.values()))} steps", flush=True)
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """Median and 90th percentile over all steps of all rounds, in microseconds."""
    lines = [f"{'us a step':24}" + "".join(f"{name:>22}" for name in COMPETITORS)]
    for rank in sorted(rows[0]["steps"]):
        for what in TARGETS:
            cells = []
            for name in COMPETITORS:
                steps = [
                    s[what] / 1e3 for row in rows if row["competitor"] == name for s in row["steps"][rank]
                ]
                percentiles = statistics.quantiles(steps, n=10)
                cells.append(f"{statistics.median(steps):9.0f} (90 %: {percentiles[8]:5.0f})")
            lines.append(f"{rank + ' ' + what:24}" + "".join(f"{cell:>22}" for cell in cells))
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--device", choices=["cpu", "npu-sim"], default="cpu")
    parser.add_argument("--json", type=Path, help="write every step to this file")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        rows = run(arguments.rounds, arguments.device, Path(folder))
    print(table(rows))
    if arguments.json:
        arguments.json.write_text(json.dumps(rows) + "\n")


if __name__ == "__main__":
    main()
