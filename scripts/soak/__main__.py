"""Serve under random load and random delays for a while, and see whether anything leaks, is lost or mixed up.

python -m scripts.soak                            30 minutes, pp 4
python -m scripts.soak --minutes 3 --pp 2 --json FILE

CPU; two nodes in two network namespaces of this machine, whose link gets another delay every few seconds
(needs root; elsewhere both nodes are on loopback, without delays). Every answer is compared with the one that
the same request gets alone. Meanwhile unauthenticated clients connect to the ports of the host lane. Between
times of load the server is idle: then every stage must hold nothing, every message must have been taken,
every unauthenticated client been counted; memory, descriptors and threads of the schedulers are looked at.
"""

from __future__ import annotations

import argparse
import json
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console

from rig import battery
from rig.agreement import MARKER, disagreement, states
from rig.launcher import ARGUMENTS, RANDOM_MODEL
from rig.probes import probe_variables
from rig.server import Server, ServerError
from scripts.bench.link import EmulatedLink, Link, LinkError, Loopback, reason_for_loopback
from scripts.output import number_table, plain_console
from sglang_npu_pp.observe.telemetry import Snapshot, read_snapshots
from sglang_npu_pp.tools.certify.ports import free_ports

from .checks import GROWTH_LIMIT_MIB, Sample, Trend, errors_in, in_flight, trends
from .load import Clients, Known, Tally, Weather
from .unauthenticated import UnauthenticatedClients

_NODES = 2
_LOAD_S, _GAP_S = (15.0, 45.0), (1.0, 6.0)
_WARM_UP_SHARE = 1 / 4  # of the run: caches fill, allocators find their size
_REST_LIMIT_S = 60.0
_SHOWN = 10  # wrong answers, lines of a log


def main() -> int:
    """0: all is well; 1: something is wrong; 2: not run."""
    options = parse_command_line()
    console = plain_console()
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(130))
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="soak-")))
        try:
            link: Link = Loopback()
            if reason := reason_for_loopback():
                console.print(f"soak: both nodes on loopback, without delays: {reason}.")
            else:
                link = stack.enter_context(EmulatedLink(folder))
            (port,) = free_ports(1)
            server = stack.enter_context(on_two_nodes(options.pp, options.lane, folder, link, port))
            unauthenticated = UnauthenticatedClients(
                list(lane_addresses(link, options.pp, port)), options.seed
            )
            soak = Soak(server, link, unauthenticated, options.seed, console)
            soak.run(60 * options.minutes)
            complaints = soak.complaints()
        except (ServerError, LinkError, ValueError, OSError) as error:
            console.print(f"soak: {error}", soft_wrap=True, markup=False)
            return 2 if isinstance(error, LinkError) else 1
        soak.show(complaints)
        if options.json:
            report = soak.as_json() | {
                "pp": options.pp,
                "lane": options.lane,
                "minutes": options.minutes,
                "wrong": complaints,
            }
            options.json.write_text(json.dumps(report, indent=1) + "\n")
    return int(bool(complaints))


def parse_command_line() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="soak", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=30.0, help="how long there is load (30)")
    parser.add_argument("--pp", type=int, default=4, choices=(2, 4), help="stages (4)")
    parser.add_argument(
        "--lane", default="host", choices=("host", "device"), help="of the proxies; device: gloo here (host)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the load and the delays")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write counts and all samples there")
    options = parser.parse_args()
    if options.minutes < 2:
        parser.error("in less than two minutes there is nothing to see")
    return options


def on_two_nodes(pp: int, lane: str, folder: Path, link: Link, port: int) -> Server:
    """Not started. Float32 and small chunks; three times as many microbatches as stages need (depth 2)."""
    probe = {"PP_PROBE_STATES": "1", "PP_PROBE_DIR": str(folder), **probe_variables("sglang_pp_probe")}
    ours = {"SGLANG_NPU_PP": "require", "SGLANG_NPU_PP_TELEMETRY_DIR": str(folder)}
    ours |= {"SGLANG_NPU_PP_PROXY_LANE": lane, "SGLANG_NPU_PP_PORT": str(port)}
    if isinstance(
        link, Loopback
    ):  # where both nodes are one machine, its ranks would not listen on the network
        ours["SGLANG_NPU_PP_HOST_TRANSPORT"] = "tcp"
    return Server(
        RANDOM_MODEL,
        1,
        pp,
        log=folder / "log",
        env={**ours, **probe},
        args=(*ARGUMENTS, "--pp-async-batch-depth", "2", "--enable-mixed-chunk"),
        nnodes=_NODES,
        node_prefix={node: link.prefix(node) for node in range(_NODES)},
        node_env={node: link.variables(node) for node in range(_NODES)},
        master=link.master,
    )


def lane_addresses(link: Link, pp: int, port: int) -> Iterator[tuple[str, int]]:
    """Where the host lanes of the stages listen."""
    for stage in range(pp):
        yield link.variables(stage * _NODES // pp)["SGLANG_HOST_IP"], port + stage


@dataclass
class Soak:
    """Load and idle gaps in turn, and what was seen in the gaps."""

    server: Server
    link: Link
    unauthenticated: UnauthenticatedClients
    seed: int
    console: Console
    tally: Tally = field(default_factory=Tally)
    samples: list[Sample] = field(default_factory=list)
    rounds: list[str] = field(default_factory=list)
    delays_ms: Counter[float] = field(default_factory=Counter)
    messages: Counter[str] = field(default_factory=Counter)  # sent, by kind
    backpressure: int = 0
    refused: int = 0
    seconds: float = 0.0
    logged: list[int] = field(default_factory=list)  # characters in each node's log before the load
    restless: list[str] = field(default_factory=list)  # what a gap found that must not be there

    def run(self, seconds: float) -> None:
        self.seconds = seconds
        known = Known.asked_alone(self.server)
        self.logged = [len(self.server.log_text(node)) for node in range(self.server.nnodes)]
        clients = Clients(self.server, known, self.tally, self.seed)
        generator = random.Random(f"rounds {self.seed}")
        weather = Weather(self.link, self.seed) if isinstance(self.link, EmulatedLink) else None
        began = time.monotonic()
        with ExitStack() as stack:
            if weather is not None:
                stack.enter_context(weather.changing())
                self.delays_ms = weather.delays_ms
            while time.monotonic() - began < seconds:
                with self.unauthenticated.visiting():
                    self.rounds.append(clients.run(generator.uniform(*_LOAD_S)))
                self._rest()
                at_s = time.monotonic() - began
                self.samples += [
                    Sample.of(pid, stage, at_s) for stage, pid in enumerate(self.server.scheduler_pids())
                ]
                self._print_status(at_s)
                time.sleep(generator.uniform(*_GAP_S))

    def _rest(self) -> None:
        """Wait until every stage holds nothing and every message was taken; says so if that does not come."""
        old = [state.get("forwards") for state in states(self.server)]
        battery.generate(self.server, input_ids=[MARKER], sampling_params={"max_new_tokens": 1})
        deadline = time.monotonic() + _REST_LIMIT_S
        while True:
            self.server.dump_telemetry()
            snapshots = read_snapshots(self.server.log.parent)
            complaint = disagreement(states(self.server), old) or self._left_behind(snapshots)
            if not complaint:
                break
            self.server.check_alive("in an idle gap")
            if time.monotonic() > deadline:
                self.restless.append(f"{_REST_LIMIT_S:.0f} s after round {len(self.rounds)} {complaint}")
                break
            time.sleep(0.2)
        channels = [(kind, one) for snapshot in snapshots for kind, one in snapshot.sent.items()]
        self.messages = Counter()
        for kind, counters in channels:
            self.messages[kind] += counters["messages"]
        self.backpressure = sum(counters["backpressure"] for _, counters in channels)
        self.refused = sum(snapshot.refused for snapshot in snapshots)

    def _left_behind(self, snapshots: list[Snapshot]) -> str:
        """What is not as it must be at rest; empty when all is well."""
        if left := in_flight(snapshots):
            return f"of these kinds so many messages are (under way, not taken): {left}"
        counted = sum(snapshot.refused_connections for snapshot in snapshots)
        if counted != self.unauthenticated.connections:
            return f"of {self.unauthenticated.connections} unauthenticated clients {counted} were counted"
        return ""

    def complaints(self) -> list[str]:
        """Everything that is wrong, a line each."""
        found = [*self.tally.wrong[:_SHOWN], *self.restless]
        for node in range(self.server.nnodes):
            log = self.server.log_text(node)[self.logged[node] :]
            found += [f"log of node {node}: {line}" for line in errors_in(log)[:_SHOWN]]
        for trend in self.trends():
            found += trend.complaints()
        if self.refused:
            found.append(f"{self.refused} messages were refused, though no unauthenticated client was let in")
        return found

    def trends(self) -> list[Trend]:
        """Raises ValueError when there was too little time to see any."""
        return trends(self.samples, self.seconds * _WARM_UP_SHARE)

    # --- what is shown -------------------------------------------------------------------------

    def _print_status(self, at_s: float) -> None:
        memory = ", ".join(f"{sample.rss_mib:.0f}" for sample in self.samples[-self.server.pp :])
        self.console.print(
            f"{at_s / 60:5.1f} min  {self.tally.asked.total():6} requests, {len(self.tally.wrong)} wrong; "
            f"schedulers have {memory} MiB; {self.rounds[-1]}",
            soft_wrap=True,
        )

    def show(self, complaints: list[str]) -> None:
        names = ("stage", "first MiB", "last", "most", "growth a minute", "descriptors", "threads")
        title = f"memory behind the warm-up; growth may be {GROWTH_LIMIT_MIB:g} MiB a minute"
        table = number_table(title, *names, left=0)
        for one in self.trends():
            table.add_row(
                str(one.stage),
                *(f"{value:.1f}" for value in (one.first_mib, one.last_mib, one.most_mib)),
                f"{one.growth_mib:+.3f}",
                f"{one.first_descriptors} to {one.most_descriptors}",
                f"{one.first_threads} to {one.most_threads}",
            )
        self.console.print(table)
        asked = ", ".join(f"{count} {way}" for way, count in self.tally.asked.most_common())
        delays = ", ".join(f"{delay:g} ms {count} times" for delay, count in sorted(self.delays_ms.items()))
        self.console.print(
            f"{self.tally.asked.total()} requests: {asked}; {self.tally.ended_early} ended early, "
            f"{len(self.tally.wrong)} answers wrong",
            soft_wrap=True,
        )
        self.console.print(f"{len(self.rounds)} idle gaps, {len(self.restless)} in which something was left")
        self.console.print(
            f"messages: {dict(self.messages)}; a send found its window full {self.backpressure} times",
            soft_wrap=True,
        )
        self.console.print(
            f"{self.unauthenticated.connections} connections of unauthenticated clients, refused and counted"
        )
        self.console.print(
            f"one-way delays of the link ({self.link.kind}): {delays or 'none'}", soft_wrap=True
        )
        for line in complaints:
            self.console.print(f"WRONG: {line}", soft_wrap=True, markup=False)
        self.console.print("soak: " + (f"{len(complaints)} complaints" if complaints else "all is well"))

    def as_json(self) -> dict[str, Any]:
        return {
            "seed": self.seed,
            "link": self.link.kind,
            "asked": dict(self.tally.asked),
            "ended_early": self.tally.ended_early,
            "wrong_answers": self.tally.wrong,
            "rounds": self.rounds,
            "delays_ms": {f"{delay:g}": count for delay, count in self.delays_ms.items()},
            "unauthenticated": self.unauthenticated.connections,
            "messages": dict(self.messages),
            "backpressure": self.backpressure,
            "trends": [trend.as_json() for trend in self.trends()],
            "samples": [vars(sample) for sample in self.samples],
        }


if __name__ == "__main__":
    sys.exit(main())
