"""Strike the stages of a server, and the link between its nodes, and see what is left.

python -m scripts.lost_peers                    pp 2 and 4, every fault on every stage, idle and busy: an hour
python -m scripts.lost_peers --pp 2 --faults killed --busy
python -m scripts.lost_peers --upstream ...     what the unpatched server does, half a minute each

Two nodes in two network namespaces of this machine; needs root. Kills nothing but the servers it started.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rig.server import ServerError
from scripts.bench.link import EmulatedLink, LinkError, reason_for_loopback
from scripts.output import plain_console
from sglang_npu_pp.settings import Settings

from .episode import Episode, Outcome, describe, on_two_nodes
from .faults import FAULTS, Fault

ROOT = Path(__file__).resolve().parents[2]
_MODEL = ROOT / "sglang_npu_pp/tools/certify/model"
DEFAULT_TIMEOUT_S = Settings().peer_timeout_s
_HARMLESS_S = 2.0  # how long a pause lasts
_END_LIMIT_S = 10.0  # with the default time-out; more by what a chosen one is longer
_UPSTREAM_LIMIT_S = 30.0
_OURS, _UPSTREAM = "sglang-npu-pp", "upstream"


def main() -> int:
    """0: as it should be; 1: something was left, lost or wrong; 2: not run."""
    options = parse_command_line()
    console = plain_console(160)
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(130))
    reason = reason_for_loopback()
    if reason:
        console.print(f"lost_peers: not run, because {reason}.")
        return 2
    rows = []
    with tempfile.TemporaryDirectory(prefix="lost-peers-") as folder:
        try:
            for row in run(options, Path(folder)):
                rows.append(row)
                console.print(line(row), soft_wrap=True)
                if options.json:
                    options.json.write_text(json.dumps(rows, indent=1) + "\n")
        except (ServerError, LinkError, OSError) as error:
            console.print(f"lost_peers: {error}", soft_wrap=True, markup=False)
            return 2
    return int(any(row["wrong"] for row in rows if row["server"] == _OURS))


def parse_command_line() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="lost_peers", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pp", type=int, choices=(2, 4), help="only this pipeline size")
    parser.add_argument(
        "--faults", default=",".join(FAULTS), help=f"of these, with commas: {','.join(FAULTS)}"
    )
    parser.add_argument("--stages", help="only these, with commas")
    parser.add_argument("--busy", action="store_true", help="only with requests under way")
    parser.add_argument("--upstream", action="store_true", help="also the unpatched server")
    parser.add_argument(
        "--timeout",
        type=float,
        default=DEFAULT_TIMEOUT_S,
        help=f"SGLANG_NPU_PP_PEER_TIMEOUT_S ({DEFAULT_TIMEOUT_S:g})",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all outcomes there")
    options = parser.parse_args()
    unknown = set(options.faults.split(",")).difference(FAULTS)
    if unknown:
        parser.error(f"there is no fault {', '.join(sorted(unknown))}")
    return options


def run(options: argparse.Namespace, folder: Path) -> Iterator[dict[str, Any]]:
    faults = [FAULTS[name] for name in options.faults.split(",")]
    servers = [_OURS, *([_UPSTREAM] if options.upstream else [])]
    with EmulatedLink(folder) as link:
        for pp in [options.pp] if options.pp else [2, 4]:
            for name in servers:
                env = {"SGLANG_NPU_PP": "require" if name == _OURS else "0"}
                env["SGLANG_NPU_PP_PEER_TIMEOUT_S"] = f"{options.timeout:g}"
                with on_two_nodes(_MODEL, pp, folder / f"{name}-{pp}", link, env) as server:
                    episode = Episode(server, link)
                    for fault, stage, busy in cases(faults, stages(options, pp), options.busy):
                        outcome = strike(episode, fault, stage, busy, name, options.timeout)
                        row = {"server": name, "pp": pp, "fault": fault.name, "stage": stage, "busy": busy}
                        yield {**row, **describe(outcome), "wrong": wrong(outcome, fault, busy, pp)}


def stages(options: argparse.Namespace, pp: int) -> list[int]:
    chosen = [int(stage) for stage in options.stages.split(",")] if options.stages else list(range(pp))
    return [stage for stage in chosen if stage < pp]


def cases(
    faults: Sequence[Fault], stages: Sequence[int], only_busy: bool
) -> Iterator[tuple[Fault, int, bool]]:
    """The harmless ones first: they need no new start."""
    for fault in sorted(faults, key=lambda fault: not fault.harmless):
        for stage in stages[:1] if fault.on_link else stages:
            for busy in (True,) if fault.harmless or only_busy else (False, True):
                yield fault, stage, busy


def strike(episode: Episode, fault: Fault, stage: int, busy: bool, name: str, timeout_s: float) -> Outcome:
    if fault.harmless:
        return episode.survive(fault, stage, seconds=_HARMLESS_S)
    allowed_s = _END_LIMIT_S + max(0.0, timeout_s - DEFAULT_TIMEOUT_S)
    limit_s = allowed_s if name == _OURS else _UPSTREAM_LIMIT_S
    outcome = episode.lose(fault, stage, busy=busy, limit_s=limit_s)
    outcome.restarted = episode.restart()
    return outcome


def wrong(outcome: Outcome, fault: Fault, busy: bool, pp: int) -> list[str]:
    """What is not as it should be."""
    found = list(outcome.left)
    if fault.harmless:
        if set(outcome.clients) != {"answer"}:
            found.append(f"requests got {dict(outcome.clients)}")
        return found
    if not outcome.ended:
        found.append(f"not everything had ended after {outcome.ended_s:.0f} s")
    silent = [str(node) for node, sentences in enumerate(outcome.sentences) if not sentences]
    if silent:
        found.append(f"no error of node {' and '.join(silent)} says who is gone")
    if busy and set(outcome.clients).difference({"answer", "error"}):
        found.append(f"requests got {dict(outcome.clients)}")
    if outcome.restarted is False:
        found.append("the server could not be started again")
    return found


def line(row: dict[str, Any]) -> str:
    state = "busy" if row["busy"] else "idle"
    ended = f", all ended after {row['ended_s']:.1f} s" if row["ended"] else ""
    verdict = "; ".join(row["wrong"]) or "as it should be"
    return f"{row['server']} pp {row['pp']}: stage {row['stage']} {row['fault']}, {state}{ended}: {verdict}"


if __name__ == "__main__":
    sys.exit(main())
