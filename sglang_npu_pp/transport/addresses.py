"""The addresses of this machine for other nodes, in the order of their connection attempts.

The address used by the engine's process groups is unknown, and the host lane must come up wherever they do.
So it listens on all plausible ones, gloo's first choice first. CURVE checks each connection for a key known
only to this start's ranks, before Python reads a byte. SGLANG_NPU_PP_HOST limits it to one network.
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
    """Interfaces that are up."""
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
    """Where to listen, in the order of the peers' attempts.

    Args:
        host: an own address, interface or host name; empty, "*", "0.0.0.0" or "::": all plausible addresses.
        master: host and port given to the nodes; None on a single node.
        one_node: all peers are on this machine.
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
    """The addresses of this node on the route to `master` (host and port); none without a route."""
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
    """The `names` selected by a variable like HCCL_SOCKET_IFNAME: "eth" by prefix, "=eth0" exactly, "^docker"
    and "^=eth1" all but those; commas separate several.
    """
    excluded, exact = text.startswith("^"), "=" in text[:2]
    wanted = [part.strip() for part in text.lstrip("^=").split(",") if part.strip()]
    if not wanted:
        return []

    def means(name: str) -> bool:
        return name in wanted if exact else name.startswith(tuple(wanted))

    return [name for name in names if means(name) is not excluded]


def _everywhere(interfaces: Interfaces, master: str | None, environ: Mapping[str, str]) -> list[str]:
    """All plausible addresses, most probable first; the loopback only if named or the only one."""
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
    """Addresses in variables, perhaps of a container's host; others are left out."""
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
