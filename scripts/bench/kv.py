"""A prefill server of two stages and a decode server, unpatched against patched, on CPU over Mooncake's TCP.

    .venv/bin/python -m scripts.bench.kv --json result.json

Two things are measured. "transfer": how long a page of KV waits from the end of the forward that wrote it
to the beginning of its transfer, over the chunks of a load of long prompts, on both stages. "lookups": how
long an iteration of the decode server's event loop is in the functions that may ask a bootstrap server, while
requests come that name one which is dead, slow, or answers with errors, among others that name the right one;
and what became of every request.

Not shown: a device, on which a forward ends behind its launch; and a network.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from scripts.lib import disaggregated
from scripts.lib.disaggregated import Pair, noted
from scripts.lib.server import Server, free_ports
from tests.bootstrap_server import bootstrap_server, dead_address
from tests.server.battery import prompt

ROOT = Path(__file__).parents[2]
MODEL = ROOT / "tests/assets/random_vl"
COMPETITORS = {"upstream": "0", "ours": "require"}  # SGLANG_NPU_PP
LIMIT_S = "5"  # SGLANG_NPU_PP_BOOTSTRAP_LIMIT_S
ARGUMENTS = (
    *("--chunked-prefill-size", "256", "--max-total-tokens", "32768"),
    *("--dtype", "float32", "--skip-server-warmup", "--disable-radix-cache"),
)
LENGTH, PROMPTS, CONCURRENCY = 1500, 16, 4
REQUESTS = 200
TROUBLES = ("well", "dead", "slow", "error")


@contextmanager
def running(name: str, folder: Path) -> Iterator[tuple[Pair, dict[str, Path]]]:
    """Both servers; with the folders in which their probes write."""
    (bootstrap_port,) = free_ports(1)
    folders = {mode: folder / name / mode for mode in disaggregated.MODES}
    servers = []
    for mode, stages in zip(disaggregated.MODES, (2, 1), strict=True):
        folders[mode].mkdir(parents=True)
        environment = {
            **disaggregated.engine_environment(),
            "SGLANG_NPU_PP": COMPETITORS[name],
            "SGLANG_NPU_PP_BOOTSTRAP_LIMIT_S": LIMIT_S,
            "KV_PROBE_DIR": str(folders[mode]),
        }
        args = (*ARGUMENTS, *disaggregated.arguments(mode, bootstrap_port))
        servers.append(Server(MODEL, 1, stages, log=folders[mode] / "log", env=environment, args=args))
    with ExitStack() as stack, ThreadPoolExecutor(2) as pool:
        prefill, decode = pool.map(stack.enter_context, servers)
        yield Pair(prefill, decode, bootstrap_port), folders


def body(length: int, seed: int, tokens: int = 4) -> dict[str, Any]:
    sampling = {"temperature": 0, "max_new_tokens": tokens, "ignore_eos": True}
    return {"input_ids": prompt(length, seed), "sampling_params": sampling}


def measure_transfers(pair: Pair, folder: Path) -> dict[str, Any]:
    before = len(noted(folder, "chunk"))
    answers = pair.generate_all([body(LENGTH, seed) for seed in range(PROMPTS)], CONCURRENCY)
    chunks = noted(folder, "chunk")[before:]
    ages = sorted(chunk["age_ms"] for chunk in chunks)
    return {
        "answers": [getattr(answer, "args", None) or answer["output_ids"] for answer in answers],
        "chunks": len(chunks),
        "mean_ms": statistics.mean(ages),
        "median_ms": statistics.median(ages),
        "p90_ms": ages[int(0.9 * len(ages))],
        "longest_ms": ages[-1],
    }


def measure_trouble(pair: Pair, folder: Path) -> dict[str, Any]:
    """Every fourth request names each of the servers; the right one has to answer its requests."""
    before = {what: len(noted(folder, what)) for what in ("lookups", "http")}
    with bootstrap_server() as slow, bootstrap_server() as wrong, ThreadPoolExecutor(REQUESTS) as pool:
        slow.behaviour, wrong.behaviour = "slow", "error"
        ports = {"dead": int(dead_address().split(":")[1]), "slow": slow.port, "error": wrong.port}

        def ask(number: int) -> tuple[str, str]:
            trouble = TROUBLES[number % len(TROUBLES)]
            if trouble == "well":
                answer = pair.generate(body(20, number))[1]
                return trouble, "failed" if isinstance(answer, Exception) else "answered"
            answer = pair.decode_alone(body(20, number), ports[trouble])
            return trouble, "failed" if isinstance(answer, Exception) else "answered"

        ends = Counter(pool.map(ask, range(REQUESTS)))
    iterations = noted(folder, "lookups")[before["lookups"] :]
    result: dict[str, Any] = {"ends": {f"{trouble}, {end}": count for (trouble, end), count in ends.items()}}
    for clock, name in (("wall", "lookups"), ("cpu", "cpu_ms")):
        times = [iteration[name] for iteration in iterations]
        result[f"longest_{clock}_ms"] = max(times, default=0.0)
        result[f"iterations_over_5_ms_{clock}"] = sum(time > 5 for time in times)
    return {**result, "http_in_the_event_loop": len(noted(folder, "http")) - before["http"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--json", type=Path, help="write what was measured to this file")
    parser.add_argument("--without-trouble", action="store_true", help="measure transfers only")
    arguments = parser.parse_args()
    if reason := disaggregated.engine_missing():
        parser.error(reason)
    results: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in COMPETITORS:
            with running(name, Path(folder)) as (pair, folders):
                measure_transfers(pair, folders["prefill"])  # warms up
                results[name] = {"transfer": measure_transfers(pair, folders["prefill"])}
                if not arguments.without_trouble:
                    results[name]["lookups"] = measure_trouble(pair, folders["decode"])
    answers = [result["transfer"].pop("answers") for result in results.values()]
    for name, result in results.items():
        print(name, json.dumps(result, indent=1))
    print("answers of both are equal:", answers[0] == answers[1])
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
