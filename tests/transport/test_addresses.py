"""Which addresses of a machine are told to the other nodes, and in which order."""

from __future__ import annotations

import socket
from collections.abc import Mapping

import pytest

from sglang_npu_pp.errors import TransportError
from sglang_npu_pp.transport import addresses
from sglang_npu_pp.transport.addresses import LOOPBACK, MOST, listening_addresses, matching, own_interfaces

MACHINE = {
    "lo": [LOOPBACK, "::1"],
    "docker0": ["172.17.0.1"],
    "eth0": ["10.0.0.1", "fd00::1"],
    "eth1": ["10.1.0.1"],
    "ib0": ["10.2.0.1"],
}
NAMES = {
    "own-name": ["127.0.1.1"],  # as Debian's installer writes it
    "dns-name": ["10.1.0.1"],
    "localhost": ["127.0.0.1", "::1"],
}
ALL = ["172.17.0.1", "10.0.0.1", "fd00::1", "10.1.0.1", "10.2.0.1"]


@pytest.fixture(autouse=True)
def machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(addresses, "own_interfaces", lambda: MACHINE)
    monkeypatch.setattr(addresses, "_resolved", lambda name: NAMES.get(name, []))
    monkeypatch.setattr(socket, "gethostname", lambda: "own-name")


def told(
    host: str = "",
    *,
    environ: Mapping[str, str] | None = None,
    master: str | None = None,
    one_node: bool = False,
) -> list[str]:
    return listening_addresses(
        host, master=master, one_node=one_node, where="stage 0 rank 0", environ=environ or {}
    )


def test_on_one_node_nothing_but_the_loopback_is_listened_on() -> None:
    assert told(one_node=True) == [LOOPBACK]


def test_between_nodes_every_address_is_told_but_not_the_loopback() -> None:
    assert told() == ALL


def test_what_gloo_would_use_is_tried_first(monkeypatch: pytest.MonkeyPatch) -> None:
    environ = {
        "GLOO_SOCKET_IFNAME": "eth1",
        "HCCL_IF_IP": "172.17.0.1",
        "HCCL_SOCKET_IFNAME": "ib",
        "SGLANG_HOST_IP": "fd00::1",
        "HOST_IP": "10.0.0.1",
    }
    assert told(environ=environ) == ["10.1.0.1", "172.17.0.1", "10.2.0.1", "fd00::1", "10.0.0.1"]
    monkeypatch.setattr(socket, "gethostname", lambda: "dns-name")  # gloo's, where no interface is named
    assert told(environ={"HCCL_SOCKET_IFNAME": "=ib0"}) == ["10.1.0.1", "10.2.0.1", *ALL[:3]]


def test_several_interfaces_of_gloo_are_tried_in_its_order() -> None:
    assert told(environ={"GLOO_SOCKET_IFNAME": "ib0,eth1"})[:2] == ["10.2.0.1", "10.1.0.1"]


def test_the_way_to_the_first_node_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(addresses, "towards", lambda master: ["10.2.0.1"] if master == "there:5000" else [])
    assert told(master="there:5000")[0] == "10.2.0.1"


@pytest.mark.parametrize(
    "master", ["own-name:5000", "0.0.0.0:5000", "127.0.0.1:5000", "nowhere:5000", ":5000"]
)
def test_a_first_node_that_is_the_loopback_here_or_nothing_changes_nothing(master: str) -> None:
    assert told(master=master) == ALL


def test_addresses_of_the_machine_around_a_container_are_left_out() -> None:
    environ = {"HOST_IP": "192.0.2.99", "SGLANG_HOST_IP": "node-7", "HCCL_IF_IP": ""}
    assert told(environ=environ) == ALL


def test_the_loopback_is_told_if_gloo_is_to_use_it_or_there_is_nothing_else(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert told(environ={"GLOO_SOCKET_IFNAME": "lo"}) == [LOOPBACK, "::1", *ALL]
    monkeypatch.setattr(addresses, "own_interfaces", lambda: {"lo": [LOOPBACK]})
    assert told() == [LOOPBACK]


def test_a_machine_with_many_addresses_tells_the_best_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    many = {"cali": [f"10.9.0.{n}" for n in range(100)], **MACHINE}
    monkeypatch.setattr(addresses, "own_interfaces", lambda: many)
    found = told(environ={"GLOO_SOCKET_IFNAME": "eth0"})
    assert len(found) == MOST
    assert found[:3] == ["10.0.0.1", "fd00::1", "10.9.0.0"]


@pytest.mark.parametrize(
    ("host", "expected"),
    [
        ("10.1.0.1", ["10.1.0.1"]),
        ("198.51.100.1", ["198.51.100.1"]),  # whose error says what to do
        ("[fd00::1]", ["fd00::1"]),
        ("eth0", ["10.0.0.1", "fd00::1"]),
        ("dns-name", ["10.1.0.1"]),
        ("localhost", ["127.0.0.1", "::1"]),
        ("own-name", ALL),
        ("*", ALL),
        ("::", ALL),
        ("0.0.0.0", [address for address in ALL if ":" not in address]),
    ],
)
def test_the_setting_is_told_as_addresses(host: str, expected: list[str]) -> None:
    assert told(host) == expected


def test_a_setting_that_is_nothing_here_is_named() -> None:
    with pytest.raises(
        TransportError, match=r"SGLANG_NPU_PP_HOST='eth7' is no address, no interface with an"
    ) as e:
        told("eth7")
    assert "(lo, docker0, eth0, eth1, ib0)" in str(e.value)


@pytest.mark.parametrize(
    ("text", "meant"),
    [
        ("eth", ["eth0", "eth1"]),
        ("eth1,ib", ["eth1", "ib0"]),
        ("=eth", []),
        ("=eth0", ["eth0"]),
        ("^docker,lo", ["eth0", "eth1", "ib0"]),
        ("^=eth0", ["lo", "docker0", "eth1", "ib0"]),
        ("", []),
    ],
)
def test_interfaces_are_named_as_hccl_does(text: str, meant: list[str]) -> None:
    assert matching(text, MACHINE) == meant


def test_the_real_loopback_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    assert own_interfaces()["lo"][0] == LOOPBACK
    assert not [address for found in own_interfaces().values() for address in found if "%" in address]
    assert addresses.towards("127.0.0.1:5000") == ["127.0.0.1"]
    assert addresses.towards(None) == []
