"""At which addresses of this machine other nodes may find it, in the order in which they should try them.

The host lane has to come up wherever the process groups of the engine do, and those do not tell which address
they use. So the addresses that could be right are collected, the one that gloo itself would use first; the
lane listens on all of them and the peers try them in this order.

That is more than one network, but not more than is safe: each connection is asked for a key that only the
ranks of this start know (CURVE), before Python reads a byte. SGLANG_NPU_PP_HOST narrows it to one network.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Iterable, Mapping, Sequence
from ipaddress import ip_address

import psutil

from ..errors import TransportError

MOST = 16  # addresses that are told; a node of a cluster may have hundreds for its containers
LOOPBACK = "127.0.0.1"
_EVERYWHERE = ("*", "::", "0.0.0.0")

Interfaces = Mapping[str, Sequence[str]]
"""Name -> addresses, IPv4 first. Addresses that are good for one link only (fe80::) are left out."""


def own_interfaces() -> dict[str, list[str]]:
    """The interfaces that are up and have addresses."""
    states = psutil.net_if_stats()
    found: dict[str, list[str]] = {}
    for label, entries in psutil.net_if_addrs().items():
        name = label.partition(":")[0]  # eth0:1 is a second address of eth0
        if name in states and not states[name].isup:
            continue
        for family in (socket.AF_INET, socket.AF_INET6):
            texts = [each.address for each in entries if each.family == family]
            found.setdefault(name, []).extend(text for text in texts if not _is_of_one_link(text))
    return {name: sorted(texts, key=_is_ipv6) for name, texts in found.items() if texts}


def is_loopback(address: str) -> bool:
    return ip_address(address).is_loopback


def listening_addresses(
    host: str,
    *,
    master: str | None,
    one_node: bool,
    where: str,
    environ: Mapping[str, str] | None = None,
) -> list[str]:
    """Where to listen, in the order in which peers should try.

    Args:
        host: an address, an interface or a host name of this node; empty, "*", "0.0.0.0" or "::" for all
            addresses of it that could be right.
        master: host and port that the nodes were given; None on a single node.
        one_node: no peer is on another machine.
        where: stage and rank, for errors.

    Raises:
        TransportError: `host` is none of these.
    """
    environ = os.environ if environ is None else environ
    if one_node and not host:
        return [LOOPBACK]
    interfaces = own_interfaces()
    if host in ("", *_EVERYWHERE):
        found = _everywhere(interfaces, master, environ)
        ipv4 = [address for address in found if not _is_ipv6(address)]
        return ipv4 or found if host == "0.0.0.0" else found
    if host in interfaces:
        return list(interfaces[host])
    if (address := _literal(host)) is not None:
        return [address]
    return _of_host_name(host, interfaces, master, environ, where)


def towards(master: str | None) -> list[str]:
    """The addresses of this node from which `master` (host and port) is reached; none if it cannot be."""
    if not master:
        return []
    found = []
    for address in _resolved(master.rsplit(":", 1)[0].strip("[]")):
        family = socket.AF_INET6 if _is_ipv6(address) else socket.AF_INET
        try:
            with socket.socket(family, socket.SOCK_DGRAM) as probe:
                probe.connect((address, 9))  # sends nothing; asks the routing table
                found.append(str(probe.getsockname()[0]))
        except OSError:
            continue
    return found


def matching(text: str, names: Iterable[str]) -> list[str]:
    """Which of `names` a variable like HCCL_SOCKET_IFNAME means: "eth" all that begin so, "=eth0" exactly,
    "^docker" and "^=eth1" all but those; several separated by commas."""
    excluded, exact = text.startswith("^"), "=" in text[:2]
    wanted = [part.strip() for part in text.lstrip("^=").split(",") if part.strip()]
    if not wanted:
        return []

    def means(name: str) -> bool:
        return name in wanted if exact else name.startswith(tuple(wanted))

    return [name for name in names if means(name) is not excluded]


def _everywhere(interfaces: Interfaces, master: str | None, environ: Mapping[str, str]) -> list[str]:
    """All that could be right, the most probable first; the loopback only if it is named or all there is."""
    local = [address for addresses in interfaces.values() for address in addresses]
    named = [
        address
        for name in environ.get("GLOO_SOCKET_IFNAME", "").split(",")
        for address in interfaces.get(name.strip(), ())
    ]
    candidates = [
        *([] if named else _resolved(socket.gethostname())),  # as gloo does
        *towards(master),
        *_given(environ, "HCCL_IF_IP"),
        *_of_interfaces(environ.get("HCCL_SOCKET_IFNAME", ""), interfaces),
        *_of_interfaces(environ.get("NCCL_SOCKET_IFNAME", ""), interfaces),
        *_given(environ, "SGLANG_HOST_IP", "HOST_IP"),
        *local,
    ]
    others = [address for address in candidates if address in local and not is_loopback(address)]
    found = list(dict.fromkeys([*named, *others]))
    return found[:MOST] or [LOOPBACK]


def _of_host_name(
    host: str, interfaces: Interfaces, master: str | None, environ: Mapping[str, str], where: str
) -> list[str]:
    found = _resolved(host)
    if not found:
        raise TransportError(
            f"{where}: SGLANG_NPU_PP_HOST={host!r} is no address, no interface with an address "
            f"({', '.join(interfaces)}) and no known host name; set it to one that this node has, or leave "
            "it out."
        )
    if host != "localhost" and all(map(is_loopback, found)):
        return _everywhere(interfaces, master, environ)  # Debian gives 127.0.1.1 for a machine's own name
    return found[:MOST]


def _of_interfaces(text: str, interfaces: Interfaces) -> list[str]:
    return [address for name in matching(text, interfaces) for address in interfaces[name]]


def _given(environ: Mapping[str, str], *variables: str) -> list[str]:
    """Addresses in variables; what is none is left out, and may be one of the machine around a container."""
    found = (_literal(environ.get(variable, "").strip()) for variable in variables)
    return [address for address in found if address is not None]


def _literal(text: str) -> str | None:
    try:
        return str(ip_address(text.strip("[]")))
    except ValueError:
        return None


def _resolved(name: str) -> list[str]:
    try:
        answers = socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        return []
    return list(dict.fromkeys(str(answer[4][0]) for answer in answers))


def _is_ipv6(address: str) -> bool:
    return ":" in address


def _is_of_one_link(address: str) -> bool:
    return "%" in address or address.lower().startswith("fe80:")
