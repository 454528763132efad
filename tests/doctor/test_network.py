"""Ports and directories: what the server would open is opened, and refused with its sentences."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from sglang_npu_pp.settings import Settings
from sglang_npu_pp.tools.certify.ports import free_ports
from sglang_npu_pp.tools.doctor import network
from sglang_npu_pp.tools.doctor.findings import Finding, Level
from sglang_npu_pp.tools.doctor.layout import Layout
from sglang_npu_pp.transport import addresses

TCP = Settings(host_transport="tcp")


def named(findings: list[Finding], subject: str) -> Finding:
    (finding,) = (finding for finding in findings if finding.subject == subject)
    return finding


@pytest.fixture
def taken_port() -> Iterator[int]:
    """Somebody listens on it; the port below it and the one above are free."""
    (below,) = free_ports(1, with_also=(1, 2))
    with socket.create_server(("127.0.0.1", below + 1)):
        yield below + 1


def test_the_loopback_interface_is_listed() -> None:
    (loopback,) = (each for each in network.interfaces() if each.name == "lo")
    assert loopback.address == "127.0.0.1"
    assert int(loopback.mtu) > 0


def test_one_node_needs_a_directory_and_no_port(ipc_dir: Path) -> None:
    findings = network.check(Settings(ipc_dir=ipc_dir), Layout())
    assert named(findings, "ipc").level is Level.OK
    assert not {"address", "ports"} & {finding.subject for finding in findings}
    assert not list(ipc_dir.iterdir()), "it leaves something behind"


def test_a_directory_that_cannot_be_used_is_named_as_the_server_names_it(tmp_path: Path) -> None:
    finding = named(network.check(Settings(ipc_dir=tmp_path / "missing"), Layout()), "ipc")
    assert finding.level is Level.WRONG
    assert f"cannot make a directory for ipc sockets in {tmp_path / 'missing'}" in finding.text
    assert "SGLANG_NPU_PP_IPC_DIR" in finding.text


def test_a_port_in_use_is_named_as_the_server_names_it(taken_port: int) -> None:
    """The second rank of this node would take it."""
    settings = Settings(host_transport="tcp", port=taken_port - 1)
    finding = named(network.check(settings, Layout(pp_size=2)), "ports")
    assert finding.level is Level.WRONG
    assert f"the host lane cannot listen on 127.0.0.1:{taken_port}" in finding.text
    assert "set SGLANG_NPU_PP_PORT to a range that is free on this node" in finding.text


def test_only_the_ports_of_ranks_on_this_node_count(taken_port: int) -> None:
    layout = Layout(pp_size=2, nnodes=2, node_rank=1, dist_init_addr="127.0.0.1:1")
    assert list(layout.ranks_here) == [1]
    settings = Settings(host_transport="tcp", port=taken_port)  # of the first node; ours is the next one
    assert f":{taken_port} " not in named(network.check(settings, layout), "ports").text


def test_a_free_range_is_said() -> None:
    (port,) = free_ports(1)
    findings = network.check(Settings(host_transport="tcp", port=port), Layout(pp_size=1))
    assert named(findings, "ports").text == f"{port}: free here"
    address = named(findings, "address").text
    assert address == "the host lane listens on 127.0.0.1 (lo); peers try in this order"


def test_any_port_is_said_with_what_a_firewall_needs() -> None:
    finding = named(network.check(TCP, Layout()), "ports")
    assert finding.level is Level.NOTE
    assert "SGLANG_NPU_PP_PORT" in finding.text


def test_an_address_that_no_other_node_reaches_is_wrong() -> None:
    layout = Layout(pp_size=2, nnodes=2, dist_init_addr="127.0.0.1:5000")
    finding = named(network.check(Settings(host="127.0.0.1"), layout), "address")
    assert finding.level is Level.WRONG
    assert "127.0.0.1 (lo), which no other node reaches; set SGLANG_NPU_PP_HOST" in finding.text


def test_a_name_that_is_the_loopback_here_is_no_reason_to_refuse(monkeypatch: pytest.MonkeyPatch) -> None:
    """As Debian's installer makes it of a machine's own name; gloo then uses the interface that is named."""
    monkeypatch.setattr(addresses, "own_interfaces", lambda: {"lo": ["127.0.0.1"], "eth0": ["127.0.0.9"]})
    monkeypatch.setattr(addresses, "is_loopback", lambda address: address == "127.0.0.1")
    monkeypatch.setattr(network, "is_loopback", lambda address: address == "127.0.0.1")
    layout = Layout(pp_size=2, nnodes=2, dist_init_addr="127.0.1.1:5000")
    finding = named(network.check(Settings(), layout), "address")
    assert finding.level is Level.OK
    assert "127.0.0.9" in finding.text


def test_an_address_of_another_machine_is_named_as_the_server_names_it() -> None:
    finding = named(network.check(Settings(host="198.51.100.1", host_transport="tcp"), Layout()), "ports")
    assert finding.level is Level.WRONG
    assert "set SGLANG_NPU_PP_HOST to an address or interface of this node" in finding.text


def test_a_name_that_is_none_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(addresses, "_resolved", lambda name: [])  # so that no name server is asked
    layout = Layout(pp_size=2, nnodes=2, dist_init_addr="nowhere:5000")
    finding = named(network.check(Settings(), layout), "address")
    assert finding.level is Level.WRONG
    assert finding.text == "no address of this node leads to nowhere:5000; give one that exists."


def test_every_replica_has_ports_of_its_own() -> None:
    layout = Layout(pp_size=2, dp_size=2)
    assert layout.ranks_here == [0, 1, 2, 3]
    assert Layout(pp_size=2, dp_size=2, nnodes=2, node_rank=1, dist_init_addr="a:1").ranks_here == [1, 3]
    (port,) = free_ports(1, with_also=(1, 2, 3))
    findings = network.check(Settings(host_transport="tcp", port=port), layout)
    assert named(findings, "ports").text == f"{port}, {port + 1}, {port + 2}, {port + 3}: free here"


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"pp_size": 0}, "at least 1"),
        ({"nnodes": 2, "node_rank": 2, "dist_init_addr": "a:1"}, "--node-rank is below --nnodes"),
        (
            {"pp_size": 3, "nnodes": 2, "dist_init_addr": "a:1"},
            "3 ranks cannot be spread evenly over 2 nodes",
        ),
        ({"nnodes": 2}, "needs --dist-init-addr"),
    ],
)
def test_a_layout_that_cannot_be_is_refused(options: dict[str, int], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        Layout(**options)  # type: ignore[arg-type]
