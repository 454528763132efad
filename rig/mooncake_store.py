"""Mooncake's store, the third level of a hierarchical cache: its master, on this machine, and what servers
need to keep pages in it, over TCP."""

from __future__ import annotations

import os
import socket
import subprocess
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from rig.disaggregated import ENGINE
from rig.server import LIBRARY_PATH
from scripts.environment.parts import LIBRARIES
from sglang_npu_pp.tools.certify.ports import HOST, free_ports

MASTER = ENGINE.folder / "mooncake/mooncake_master"
SEGMENT = 64 << 20  # bytes of each server process
LIMIT_S, POLL_S, END_S = 30.0, 0.05, 10.0


@contextmanager
def mooncake_store(log: Path) -> Iterator[Mapping[str, str]]:
    """The environment of servers, as long as the store runs.

    Raises:
        RuntimeError: it has not begun to listen.
    """
    port, metrics = free_ports(2)
    environment = {
        LIBRARY_PATH: str(ENGINE.folder / LIBRARIES),
        "MC_FORCE_TCP": "1",
        "MOONCAKE_PROTOCOL": "tcp",
        "MOONCAKE_MASTER": f"{HOST}:{port}",
        "MOONCAKE_MASTER_METRICS_PORT": str(metrics),
        "MOONCAKE_LOCAL_HOSTNAME": HOST,
        "MOONCAKE_GLOBAL_SEGMENT_SIZE": str(SEGMENT),
    }
    command = [str(MASTER), f"--rpc_address={HOST}", f"--rpc_port={port}", f"--metrics_port={metrics}"]
    with log.open("w") as output:
        master = subprocess.Popen(
            command,
            env={**os.environ, LIBRARY_PATH: environment[LIBRARY_PATH]},
            stdout=output,
            stderr=subprocess.STDOUT,
        )
        try:
            _wait_for(master, port, log)
            yield environment
        finally:
            _end(master)


def _wait_for(master: subprocess.Popen[bytes], port: int, log: Path) -> None:
    deadline = time.monotonic() + LIMIT_S
    while time.monotonic() < deadline and master.poll() is None:
        with socket.socket() as probe:
            if probe.connect_ex((HOST, port)) == 0:
                return
        time.sleep(POLL_S)
    raise RuntimeError(f"Mooncake's master does not listen: {log.read_text()[-400:]}")


def _end(master: subprocess.Popen[bytes]) -> None:
    master.terminate()
    try:
        master.wait(END_S)
    except subprocess.TimeoutExpired:
        master.kill()
        master.wait(END_S)
