"""Servers whose names, variables, addresses and ports are as they are found in the field.

Each of them starts unpatched: on two nodes gloo listens on the interface that GLOO_SOCKET_IFNAME names.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import psutil
import pytest

from rig.devices import cores_per_rank
from rig.launcher import ARGUMENTS, RANDOM_MODEL
from rig.server import Server
from scripts.bench.link import EmulatedLink, reason_for_loopback
from sglang_npu_pp.tools.certify.ports import free_ports

pytestmark = [pytest.mark.server, pytest.mark.thorough]
on_two_nodes = pytest.mark.skipif(bool(reason_for_loopback()), reason=reason_for_loopback())

NAME = "node0.example"
START_LIMIT_S = 30
REQUEST = {"text": "one two", "sampling_params": {"temperature": 0, "max_new_tokens": 4}}


class Case(NamedTuple):
    """Two nodes; `own_address`: what node 0's /etc/hosts says of NAME, node 1's has the real one."""

    own_address: str = "127.0.1.1"  # as Debian's installer writes it
    env: Mapping[str, str] = {}
    of_node_0: Sequence[str] = ()


CASES = {
    "name_on_loopback": Case(),
    "every_address": Case(of_node_0=("--dist-init-addr", "0.0.0.0:{init_port}")),
    "foreign_HOST_IP": Case(env={"HOST_IP": "192.0.2.99", "SGLANG_HOST_IP": "192.0.2.99"}),
}


def with_hosts(folder: Path, node: int, address: str) -> list[str]:
    """What a command begins with to see an /etc/hosts of its own."""
    hosts = folder / f"hosts{node}"
    hosts.write_text(f"127.0.0.1 localhost\n{address} {NAME}\n")
    return ["unshare", "--mount", "sh", "-c", f'mount --bind {hosts} /etc/hosts && exec "$@"', "sh"]


def server_on(link: EmulatedLink, folder: Path, case: Case) -> Server:
    addresses = (case.own_address, link.master)
    gloo = {
        node: {name: value for name, value in link.variables(node).items() if name == "GLOO_SOCKET_IFNAME"}
        for node in range(2)
    }
    return Server(
        RANDOM_MODEL,
        1,
        2,
        log=folder / "log",
        env={"SGLANG_NPU_PP": "require", "SGLANG_NPU_PP_START_LIMIT_S": str(START_LIMIT_S), **case.env},
        args=ARGUMENTS,
        nnodes=2,
        node_env=gloo,
        node_args={0: case.of_node_0},
        node_prefix={
            node: [*link.prefix(node), *with_hosts(folder, node, addresses[node])] for node in range(2)
        },
        master=NAME,
    )


@on_two_nodes
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_a_server_that_starts_unpatched_starts_patched(tmp_path: Path, case: Case) -> None:
    with EmulatedLink(tmp_path) as link, server_on(link, tmp_path, case) as server:
        answer = server.post("/generate", REQUEST).json()
    assert answer["meta_info"]["completion_tokens"] == 4


def test_replicas_have_ports_of_their_own(tmp_path: Path) -> None:
    """Two worlds of ranks 0 and 1 on one machine, and a range of four ports."""
    (port,) = free_ports(1, with_also=(1, 2, 3))
    env = {
        "SGLANG_NPU_PP": "require",
        "SGLANG_NPU_PP_HOST_TRANSPORT": "tcp",
        "SGLANG_NPU_PP_PORT": str(port),
        "SGLANG_CPU_OMP_THREADS_BIND": cores_per_rank(4),
    }
    args = (*ARGUMENTS, "--dp-size", "2")
    with Server(RANDOM_MODEL, 1, 2, log=tmp_path / "log", env=env, args=args) as server:
        answers = [server.post("/generate", REQUEST).json() for _ in range(2)]
        listening = {
            connection.laddr.port
            for pid in server.scheduler_pids()
            for connection in psutil.Process(pid).net_connections("tcp")
            if connection.status == psutil.CONN_LISTEN
        }
    assert [answer["meta_info"]["completion_tokens"] for answer in answers] == [4, 4]
    assert listening & set(range(port, port + 4)) == set(range(port, port + 4))


def test_where_the_lane_cannot_be_opened_auto_serves_on_upstreams_path(tmp_path: Path) -> None:
    """The address is wrong on node 1 only: node 0, which could listen, must decide the same."""
    env = {"SGLANG_NPU_PP": "auto", "SGLANG_NPU_PP_HOST_TRANSPORT": "tcp"}
    wrong = {1: {"SGLANG_NPU_PP_HOST": "198.51.100.1"}}
    with Server(
        RANDOM_MODEL, 1, 2, log=tmp_path / "log", env=env, args=ARGUMENTS, nnodes=2, node_env=wrong
    ) as server:
        answer = server.post("/generate", REQUEST).json()
        logs = [server.log.read_text(), server.log.with_name("log.node1").read_text()]
    assert answer["meta_info"]["completion_tokens"] == 4
    for stage, log in enumerate(logs):
        assert f"stage {stage} rank 0 stays on upstream's path: stage {stage} rank 0: " in log
        assert "the host lane cannot listen on 198.51.100.1:any port (Cannot assign requested address)" in log
