"""Interfaces, and directory and ports of the host lane."""

from __future__ import annotations

import socket
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import psutil
import zmq

from ...errors import TransportError
from ...settings import Settings
from ...transport.addresses import is_loopback, listening_addresses, own_interfaces, towards
from ...transport.endpoints import SocketDirectory, bind_ipc, bind_tcp
from .findings import Finding, Level
from .layout import Layout


@dataclass(frozen=True)
class Interface:
    """A network interface, as described by psutil."""

    name: str
    address: str  # IPv4, empty where it has none
    up: bool
    mtu: int
    megabits_per_s: int  # 0: a virtual interface has no speed

    def __str__(self) -> str:
        speed = f", {self.megabits_per_s} Mbit/s" if self.megabits_per_s else ""
        state = "up" if self.up else "down"
        return f"{self.address or 'no IPv4 address'}, {state}, MTU {self.mtu}{speed}"


def interfaces() -> Iterator[Interface]:
    states = psutil.net_if_stats()
    for name, addresses in psutil.net_if_addrs().items():
        address = next((each.address for each in addresses if each.family == socket.AF_INET), "")
        if (state := states.get(name)) is not None:  # else it has gone meanwhile
            yield Interface(name, address, state.isup, state.mtu, state.speed)


def check(settings: Settings, layout: Layout) -> list[Finding]:
    """Opens and closes what the server would open."""
    findings = [Finding(Level.OK, each.name, str(each)) for each in interfaces()]
    if settings.host_transport != "tcp":
        findings.append(_directory(settings))
    if settings.host_transport == "tcp" or layout.nnodes > 1:
        findings += _ports(settings, layout)
    return findings


def _directory(settings: Settings) -> Finding:
    try:
        directory = SocketDirectory(settings.ipc_dir, "doctor")
        with zmq.Context() as context, context.socket(zmq.ROUTER) as router:
            endpoint = bind_ipc(router, directory, "doctor")
        directory.clear()
    except TransportError as error:
        return Finding(Level.WRONG, "ipc", str(error))
    return Finding(
        Level.OK,
        "ipc",
        f"ranks of this node listen in a directory like {Path(endpoint).parent.name} of "
        f"{directory.path.parent}",
    )


def _ports(settings: Settings, layout: Layout) -> list[Finding]:
    if layout.nnodes > 1 and not towards(layout.dist_init_addr):
        text = f"no address of this node leads to {layout.dist_init_addr}; give one that exists."
        return [Finding(Level.WRONG, "address", text)]
    ports = [settings.port + rank if settings.port else 0 for rank in layout.ranks_here]
    try:
        hosts = listening_addresses(
            settings.host, master=layout.dist_init_addr, one_node=layout.nnodes == 1, where="doctor"
        )
        with ExitStack() as stack:
            context = stack.enter_context(zmq.Context())
            for port in ports:
                bind_tcp(stack.enter_context(context.socket(zmq.ROUTER)), hosts, port, "doctor")
    except TransportError as error:
        return [Finding(Level.WRONG, "ports", str(error))]
    return [_bound_to(hosts, layout), _range(settings, ports)]


def _bound_to(hosts: Sequence[str], layout: Layout) -> Finding:
    interface = {address: name for name, addresses in own_interfaces().items() for address in addresses}
    named = ", ".join(f"{host} ({interface.get(host, 'an interface')})" for host in hosts)
    if layout.nnodes > 1 and all(map(is_loopback, hosts)):
        return Finding(
            Level.WRONG,
            "address",
            f"the host lane would listen on {named}, which no other node reaches; set SGLANG_NPU_PP_HOST to "
            "the address or interface of this node between the nodes.",
        )
    return Finding(Level.OK, "address", f"the host lane listens on {named}; peers try in this order")


def _range(settings: Settings, ports: list[int]) -> Finding:
    if not settings.port:
        low, high = Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()
        return Finding(
            Level.NOTE,
            "ports",
            f"any free one of {low} to {high}; behind a firewall set SGLANG_NPU_PP_PORT, and open that port "
            "and the next ones, one a rank",
        )
    numbers = ", ".join(map(str, ports)) if len(ports) < 9 else f"{ports[0]} to {ports[-1]}"
    return Finding(Level.OK, "ports", f"{numbers}: free here")
