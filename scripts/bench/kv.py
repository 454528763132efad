"""A prefill server of two stages and a decode server, unpatched against patched, on CPU over Mooncake's TCP.

    .venv/bin/python -m scripts.bench.kv --json result.json

Two things are measured. "transfer": how long a page of KV waits from the end of the forward that wrote it
to the beginning of its transfer, over the chunks of a load of long prompts, on both stages. "lookups": how
long an iteration of the decode server's event loop is in the functions that may ask a bootstrap server, while
200 requests come in four turns. In each turn half of them name a bootstrap server that is killed, slow,
answers with errors, and is back, and the others the right one; and what became of every request.

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

from rig import disaggregated
from rig.battery import prompt
from rig.bootstrap_server import bootstrap_server, dead_address
from rig.disaggregated import Pair, noted
from rig.server import Server
from scripts.environment.parts import PartError, provide
from sglang_npu_pp.tools.certify.ports import HOST, free_ports

ROOT = Path(__file__).parents[2]
MODEL = ROOT / "sglang_npu_pp/tools/certify/model"
COMPETITORS = {"upstream": "0", "ours": "require"}  # SGLANG_NPU_PP
LIMIT_S = "5"  # SGLANG_NPU_PP_BOOTSTRAP_LIMIT_S
ARGUMENTS = (
    *("--chunked-prefill-size", "256", "--max-total-tokens", "32768"),
    *("--dtype", "float32", "--skip-server-warmup", "--disable-radix-cache"),
)
LENGTH, PROMPTS, CONCURRENCY = 1500, 16, 4
TURNS = ("killed", "slow", "error", "back")
A_TURN = 50  # requests


@contextmanager
def running(name: str, folder: Path, decode_stages: int) -> Iterator[tuple[Pair, dict[str, Path]]]:
    """Both servers; with the folders in which their probes write."""
    (bootstrap_port,) = free_ports(1)
    folders = {mode: folder / name / mode for mode in disaggregated.MODES}
    servers = []
    for mode, stages in zip(disaggregated.MODES, (2, decode_stages), strict=True):
        folders[mode].mkdir(parents=True)
        environment = {
            **disaggregated.engine_environment(),
            "SGLANG_NPU_PP": COMPETITORS[name],
            "SGLANG_NPU_PP_BOOTSTRAP_LIMIT_S": LIMIT_S,
            "KV_PROBE_DIR": str(folders[mode]),
        }
        args = (*ARGUMENTS, *disaggregated.arguments(mode, bootstrap_port))
        servers.append(Server(MODEL, 1, stages, log=folders[mode] / "log", env=environment, args=args))
    with ExitStack() as stack:
        yield disaggregated.start_pair(stack.enter_context, servers, bootstrap_port), folders


def body(length: int, seed: int, tokens: int = 4) -> dict[str, Any]:
    sampling = {"temperature": 0, "max_new_tokens": tokens, "ignore_eos": True}
    return {"input_ids": prompt(length, seed), "sampling_params": sampling}


def load() -> list[dict[str, Any]]:
    return [body(LENGTH, seed) for seed in range(PROMPTS)]


def warm_up(pair: Pair) -> list[list[int]]:
    """The load for the first time; its tokens."""
    return [answer["output_ids"] for answer in pair.generate_all(load(), CONCURRENCY)]


def measure_transfers(pair: Pair, folder: Path) -> dict[str, Any]:
    before = len(noted(folder, "chunk"))
    pair.generate_all(load(), CONCURRENCY)
    chunks = noted(folder, "chunk")[before:]
    ages = sorted(chunk["age_ms"] for chunk in chunks)
    return {
        "chunks": len(chunks),
        "mean_ms": statistics.mean(ages),
        "median_ms": statistics.median(ages),
        "p90_ms": ages[int(0.9 * len(ages))],
        "longest_ms": ages[-1],
    }


def measure_lookups(pair: Pair, folder: Path) -> dict[str, Any]:
    before = {what: len(noted(folder, what)) for what in ("lookups", "http")}
    port = int(dead_address().split(":")[1])
    ends: Counter[str] = Counter()
    for number, turn in enumerate(TURNS):
        with ExitStack() as stack:
            if turn != "killed":
                real = f"{HOST}:{pair.bootstrap_port}"
                server = stack.enter_context(bootstrap_server(port=port, behind=real))
                server.behaviour = turn if turn in ("slow", "error") else "well"
            ends.update(f"{turn}: {end}" for end in ask(pair, port, turn, seed=A_TURN * number))
    iterations = noted(folder, "lookups")[before["lookups"] :]
    result: dict[str, Any] = {"ends": dict(ends)}
    for clock, name in (("wall", "lookups"), ("cpu", "cpu_ms")):
        times = [iteration[name] for iteration in iterations]
        result[f"longest_{clock}_ms"] = max(times, default=0.0)
        result[f"iterations_over_5_ms_{clock}"] = sum(time > 5 for time in times)
    return {**result, "http_in_the_event_loop": len(noted(folder, "http")) - before["http"]}


def ask(pair: Pair, port: int, turn: str, seed: int) -> list[str]:
    """How the requests of a turn end. Those that nobody can bring together with the prefill server go to the
    decode server alone."""

    def one(number: int) -> str:
        request = body(20, seed + number)
        if number % 2:
            return f"right one, {end(pair.generate(request, 300)[1])}"
        if turn == "back":
            return f"that one, {end(pair.generate(request, 300, port)[1])}"
        return f"that one, {end(pair.decode_alone(request, port))}"

    def end(answer: Any) -> str:
        return "failed" if isinstance(answer, Exception) else "answered"

    with ThreadPoolExecutor(A_TURN) as pool:
        return list(pool.map(one, range(A_TURN)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--json", type=Path, help="write what was measured to this file")
    parser.add_argument("--only", choices=["transfer", "lookups"], help="measure one of them")
    parser.add_argument("--decode-pp", type=int, default=1, help="stages of the decode server")
    arguments = parser.parse_args()
    try:
        provide(disaggregated.ENGINE.name)
    except PartError as error:
        parser.error(str(error))
    results: dict[str, dict[str, Any]] = {}
    answers = []
    with tempfile.TemporaryDirectory() as folder:
        for name in COMPETITORS:
            with running(name, Path(folder), arguments.decode_pp) as (pair, folders):
                result = results[name] = {}
                answers.append(warm_up(pair))
                if arguments.only != "lookups":
                    result["transfer"] = measure_transfers(pair, folders["prefill"])
                if arguments.only != "transfer":
                    result["lookups"] = measure_lookups(pair, folders["decode"])
            print(name, json.dumps(result, indent=1), flush=True)
    print("answers of both are equal:", answers[0] == answers[1])
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
