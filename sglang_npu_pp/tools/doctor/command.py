"""`python -m sglang_npu_pp doctor`: options, output, exit code."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ...errors import PipelineError
from ...transport.addresses import listening_addresses
from ..imports import without_device_backends
from .findings import Level, Section, as_json, count, render
from .layout import Layout

if TYPE_CHECKING:
    from .peer import PeerTest

USAGE_ERROR = 2
LISTEN_LIMIT_S = 300.0
_EVERYWHERE = ("*", "0.0.0.0", "::")


def add(commands: Any) -> None:
    """Add the command to an argparse parser's commands."""
    parser = commands.add_parser(
        "doctor",
        help="versions, contracts, settings, ports, a self-test, and the link to another node",
        description="Says whether a server would start here with all patches, and what the variables around "
        "it cost. Exit code 0: nothing is wrong, 1: something is, 2: the options do not fit together.",
    )
    server = parser.add_argument_group("what the server is started with")
    server.add_argument("--tp-size", type=int, default=1, metavar="N", help="tensor-parallel ranks (1)")
    server.add_argument("--pp-size", type=int, default=2, metavar="N", help="stages (2)")
    server.add_argument("--nnodes", type=int, default=1, metavar="N", help="nodes (1)")
    server.add_argument("--node-rank", type=int, default=0, metavar="N", help="number of this one (0)")
    server.add_argument(
        "--dp-size", type=int, default=1, metavar="N", help="replicas (1); 1 with --enable-dp-attention"
    )
    server.add_argument("--dist-init-addr", metavar="HOST:PORT", help="of the first node")
    link = parser.add_argument_group("link test")
    side = link.add_mutually_exclusive_group()
    side.add_argument("--listen", metavar="[HOST:]PORT", help="wait here for the other node")
    side.add_argument("--peer", metavar="HOST:PORT", help="where the other node listens")
    link.add_argument(
        "--key",
        help="what --listen printed; - reads it from standard input, where no list of processes shows it",
    )
    link.add_argument(
        "--limit", type=float, default=LISTEN_LIMIT_S, metavar="S", help="how long --listen waits (300)"
    )
    link.add_argument("--forward-ms", type=float, metavar="MS", help="a forward of one stage, for the depth")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    try:
        with without_device_backends():  # versions.py tries torch_npu in a process of its own
            from .examine import examine
        layout = Layout(
            options.tp_size,
            options.pp_size,
            options.nnodes,
            options.node_rank,
            options.dist_init_addr,
            options.dp_size,
        )
        peer_test = _peer_test(options)
    except ValueError as error:
        print(f"doctor: {error}", file=sys.stderr)
        return USAGE_ERROR
    except (ImportError, OSError) as error:  # OSError: a library that torch needs
        print(f"doctor: {error}; use the Python that has SGLang and torch.", file=sys.stderr)
        return 1
    sections: list[Section] = []
    for section in examine(dict(os.environ), layout, peer_test):
        sections.append(section)
        if not options.json:
            print(f"{render(section)}\n", flush=True)
    exit_code = 1 if count(sections, Level.WRONG) else 0
    if options.json:
        print(
            json.dumps({"sections": [as_json(each) for each in sections], "exit_code": exit_code}, indent=1)
        )
    else:
        print(_summary(sections))
    return exit_code


def _summary(sections: Sequence[Section]) -> str:
    wrong, warnings = count(sections, Level.WRONG), count(sections, Level.WARNING)
    if wrong:
        return f"{wrong} wrong, {warnings} warnings: the server would not start, or not with the patches."
    return f"Nothing is wrong, {warnings} warnings."


def _peer_test(options: argparse.Namespace) -> PeerTest | None:
    """Raises ValueError for options that do not fit together."""
    if options.listen is None and options.peer is None:
        if options.key is not None:
            raise ValueError("--key goes with --peer, or with --listen.")
        return None
    from . import peer, rendezvous

    listens = options.listen is not None
    host, port = _address(options.listen if listens else options.peer, needs_host=not listens)
    key = sys.stdin.readline().strip() if options.key == "-" else options.key
    if key is None and not listens:
        raise ValueError("--peer needs the --key that `doctor --listen` printed on the other node.")
    if not options.limit > 0 or not (options.forward_ms is None or options.forward_ms > 0):
        raise ValueError("--limit and --forward-ms are above 0.")
    test = peer.PeerTest(
        host=host,
        port=port,
        key=key or rendezvous.new_key(),
        listens=listens,
        limit_s=options.limit,
        stages=options.pp_size,
        forward_ms=options.forward_ms,
    )
    rendezvous.key_pair(test.key)
    if listens and key is None:
        where = _bracketed(_to_dial(host), port)
        command = f"python -m sglang_npu_pp doctor --peer {where} --key {test.key}"
        print(f"On the other node, within {options.limit:g} s:\n  {command}\n", file=sys.stderr, flush=True)
    return test


def _to_dial(host: str) -> str:
    """The address for the other node, where an interface name is meaningless."""
    try:
        found = listening_addresses(host, master=None, one_node=False, where="doctor")
    except PipelineError:
        return host  # the link test reports it better
    return found[0]


def _bracketed(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _address(text: str, needs_host: bool) -> tuple[str, int]:
    host, _, port = text.rpartition(":")
    host = host.strip("[]")
    if not port.isdecimal() or not 0 < int(port) < 65536 or (needs_host and not host):
        form = "HOST:PORT" if needs_host else "[HOST:]PORT"
        raise ValueError(f"{text!r} must be {form}.")
    return "" if host in _EVERYWHERE else host, int(port)
