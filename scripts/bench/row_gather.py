"""How long one gather of DP metadata blocks the host while a forward runs: simulated NPUs without a server.

    .venv/bin/python -m scripts.bench.row_gather --json result.json

Two rank processes with a simulated NPU each. In every step a forward is launched, which takes 0 or 20 ms of
its stream, and then the ranks gather: by SGLang's `MLPSyncBatchInfo.all_gather` on the group of the model,
by ours on the device, and by ours over gloo. Blocked is the time inside of them, both parts of ours together.
The simulated device takes no time for a collective or a copy; the host work of torch_npu is real.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed as dist

from ascend_sim import sglang_on_sim
from ascend_sim.kernels import occupy
from rig.harness import Here, results
from rig.npu_ranks import start_team
from scripts.output import number_table, plain_console
from sglang_npu_pp.observe.telemetry import ChannelCounters
from sglang_npu_pp.row_gather import RowGather, create_row_group

RANKS = 2
FORWARDS_MS = (0, 20)
COMPETITORS = ("upstream", "ours, device", "ours, host")
WAIT_LIMIT_S = 300.0
ROW = {
    "dp_size": RANKS,
    "tp_size": 1,
    "cp_size": 1,
    "num_tokens": 7,
    "num_tokens_for_logprob": 7,
    "can_run_decode_cuda_graph": True,
    "can_run_draft_cuda_graph": True,
    "can_run_prefill_cuda_graph": False,
    "is_extend_in_batch": False,
    "local_can_run_tbo": False,
    "local_forward_mode": 2,
}
WIDTH = 9  # numbers of a row

Gather = Callable[[], list[int]]


def prepare(here: Here) -> None:
    """Everything that gathers; each gives the tokens of all ranks."""
    from sglang.srt.managers.scheduler_components import dp_attn

    active = torch.ones(RANKS, dtype=torch.int32, device=here.device)
    parallel = SimpleNamespace(tp_group=SimpleNamespace(active_ranks=active, active_ranks_cpu=active.cpu()))
    dp_attn.get_parallel = lambda: parallel

    def upstream() -> list[int]:
        info = dp_attn.MLPSyncBatchInfo(**{**ROW, "num_tokens": here.index})
        info.all_gather(device=here.device, group=dist.group.WORLD)
        return list(info.global_num_tokens)

    here.kept["upstream"] = upstream
    for name, device in (("ours, device", here.device), ("ours, host", torch.device("cpu"))):
        here.kept[name] = ours(here, device, name)


def ours(here: Here, device: torch.device, name: str) -> Gather:
    group = create_row_group(range(RANKS), device)
    rows = RowGather(group, WIDTH, device, ChannelCounters(), f"rank {here.index} {name}")
    rows.warm_up()

    def gather() -> list[int]:
        rows.post([here.index, *[1] * (WIDTH - 1)])
        return [int(row[0]) for row in rows.wait()]

    return gather


def run(here: Here, name: str, forward_ms: int, steps: int) -> list[tuple[int, int]]:
    """Wall time and CPU time of the thread in each step, in nanoseconds."""
    npu = torch.get_device_module(here.device)
    stream, gather = npu.Stream(), here.kept[name]
    times: list[tuple[int, int]] = []
    with npu.stream(stream):
        for _ in range(steps):
            if forward_ms:
                occupy(forward_ms)
            wall, cpu = time.monotonic_ns(), time.thread_time_ns()
            tokens = gather()
            times.append((time.monotonic_ns() - wall, time.thread_time_ns() - cpu))
            assert tokens == list(range(RANKS)), tokens
            stream.synchronize()
            dist.barrier(here.kept["steps"])
    return times


def join_gloo(here: Here) -> None:
    """A group by which the ranks begin each step together."""
    here.kept["steps"] = dist.new_group(list(range(RANKS)), backend="gloo")


def measure(rounds: int, steps: int) -> dict[str, list[tuple[int, int]]]:
    """By "competitor, ms of a forward": the steps of all ranks in all rounds."""
    paths = os.pathsep.join([str(sglang_on_sim.STARTUP), os.environ.get("PYTHONPATH", "")])
    team = start_team(RANKS, process_group=True, kernels=True, variables={"PYTHONPATH": paths})
    found: dict[str, list[tuple[int, int]]] = {}
    try:
        for function in (join_gloo, prepare):
            for call in [rank.start(function) for rank in team.ranks]:
                call.result(WAIT_LIMIT_S)
        for number in range(rounds + 1):
            for name in COMPETITORS[:: 1 if number % 2 == 0 else -1]:
                for forward_ms in FORWARDS_MS:
                    calls = [rank.start(run, name, forward_ms, steps) for rank in team.ranks]
                    times = [step for each in results(calls) for step in each]
                    if number:  # the first warms up
                        found.setdefault(f"{name}, {forward_ms} ms", []).extend(times)
    finally:
        team.close()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--json", type=Path, help="write every step to this file")
    arguments = parser.parse_args()
    found = measure(arguments.rounds, arguments.steps)
    table = number_table(None, "us blocked", "median", "90 %", "CPU")
    for name, steps in sorted(found.items(), key=lambda item: item[0].rpartition(", ")[::-1]):
        wall, cpu = ([ns / 1e3 for ns in values] for values in zip(*steps, strict=True))
        ninety = statistics.quantiles(wall, n=10)[8]
        table.add_row(
            name, *(f"{each:.0f}" for each in (statistics.median(wall), ninety, statistics.median(cpu)))
        )
    plain_console().print(table)
    if arguments.json:
        arguments.json.write_text(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
