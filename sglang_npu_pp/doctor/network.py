"""Interfaces of this machine, and whether the host lane can listen where it would: directory and ports."""

from __future__ import annotations

import fcntl
import socket
import struct
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path

import zmq

from ..errors import TransportError
from ..patches.startup import address_towards_master
from ..settings import Settings
from ..transport.endpoints import SocketDirectory, bind_ipc, bind_tcp
from .findings import Finding, Level
from .layout import Layout

_GET_ADDRESS = 0x8915  # SIOCGIFADDR
_NAME_BYTES = 15


@dataclass(frozen=True)
class Interface:
    """A network interface, as the kernel describes it; what is not known is empty."""

    name: str
    address: str  # IPv4
    state: str
    mtu: str
    megabits_per_s: str

    def __str__(self) -> str:
        speed = f", {self.megabits_per_s} Mbit/s" if self.megabits_per_s not in ("", "-1") else ""
        return f"{self.address or 'no IPv4 address'}, {self.state}, MTU {self.mtu}{speed}"


def interfaces() -> Iterator[Interface]:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            facts = (_read(name, fact) for fact in ("operstate", "mtu", "speed"))
            yield Interface(name, _address(probe, name), *facts)


def _address(probe: socket.socket, name: str) -> str:
    request = struct.pack("256s", name.encode()[:_NAME_BYTES])
    try:
        return socket.inet_ntoa(fcntl.ioctl(probe.fileno(), _GET_ADDRESS, request)[20:24])
    except OSError:
        return ""


def _read(name: str, fact: str) -> str:
    try:
        return (Path("/sys/class/net") / name / fact).read_text().strip()
    except OSError:  # a virtual interface has no speed
        return ""


def check(settings: Settings, layout: Layout) -> list[Finding]:
    """Opens what the server would open, and closes it."""
    found = list(interfaces())
    findings = [Finding(Level.OK, each.name, str(each)) for each in found]
    if settings.host_transport != "tcp":
        findings.append(_directory(settings))
    if settings.host_transport == "tcp" or layout.nnodes > 1:
        findings += _ports(settings, layout, found)
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


def _ports(settings: Settings, layout: Layout, found: list[Interface]) -> list[Finding]:
    try:
        host = settings.host or address_towards_master(layout.dist_init_addr)
    except OSError as error:
        text = (
            f"no address of this node leads to {layout.dist_init_addr} ({error.strerror}); give one that "
            "exists, or set SGLANG_NPU_PP_HOST."
        )
        return [Finding(Level.WRONG, "address", text)]
    ports = [settings.port + rank if settings.port else 0 for rank in layout.ranks_here]
    try:
        with ExitStack() as stack:
            context = stack.enter_context(zmq.Context())
            for port in ports:
                bind_tcp(stack.enter_context(context.socket(zmq.ROUTER)), host, port, "doctor")
    except TransportError as error:
        return [Finding(Level.WRONG, "ports", str(error))]
    return [_bound_to(host, layout, found), _range(settings, ports)]


def _bound_to(host: str, layout: Layout, found: list[Interface]) -> Finding:
    name = next((each.name for each in found if each.address == host), "an interface")
    if layout.nnodes > 1 and _is_loopback(host):
        return Finding(
            Level.WRONG,
            "address",
            f"the host lane would listen on {host}, which no other node reaches; set SGLANG_NPU_PP_HOST to "
            "the address of this node, or --dist-init-addr to one of the first node that is not the "
            "loopback.",
        )
    return Finding(Level.OK, "address", f"the host lane listens on {host} ({name})")


def _is_loopback(host: str) -> bool:
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _range(settings: Settings, ports: list[int]) -> Finding:
    if not settings.port:
        low, high = Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()
        return Finding(
            Level.NOTE,
            "ports",
            f"any free one of {low} to {high}; behind a firewall set SGLANG_NPU_PP_PORT, and open that port "
            "and the next ones, one a rank",
        )
    return Finding(Level.OK, "ports", f"{ports[0]} to {ports[-1]} are free here")
