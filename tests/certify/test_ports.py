"""Ports that are chosen now and bound later."""

from __future__ import annotations

import socket
import subprocess
import sys
from pathlib import Path

import pytest

from rig.devices import ROOT
from sglang_npu_pp.tools.certify import ports
from sglang_npu_pp.tools.certify.ports import HOST, free_ports


def test_ports_are_none_of_those_that_connections_get() -> None:
    first, last = map(int, ports.OF_THE_KERNEL.read_text().split())
    assert not any(first <= port <= last for port in free_ports(20))


@pytest.mark.parametrize(
    ("kernel", "first", "last"),
    [("32768\t60999\n", 20768, 32767), ("1024 50000\n", 50001, 65535), ("1024 65535\n", 1024, 65535)],
    ids=["room below", "room above", "none"],
)
def test_where_ports_are_looked_for(kernel: str, first: int, last: int, tmp_path: Path) -> None:
    """The third leaves no choice."""
    (tmp_path / "range").write_text(kernel)
    found = ports.candidates(tmp_path / "range")
    assert (found[0], found[-1]) == (first, last)


def two_to_choose_from(monkeypatch: pytest.MonkeyPatch) -> int:
    """Leave a port and the next, both free; the lower one."""
    (lower,) = free_ports(1, with_also=(1,))
    for name in ports._reserved[-2:]:
        name.close()
    monkeypatch.setattr(ports, "candidates", lambda: range(lower, lower + 2))
    monkeypatch.setattr(ports, "TRIES", 2)
    return lower


def test_a_port_is_given_once(monkeypatch: pytest.MonkeyPatch) -> None:
    lower = two_to_choose_from(monkeypatch)
    assert {*free_ports(1), *free_ports(1)} == {lower, lower + 1}
    with pytest.raises(OSError, match="no 1 free ports among 2 of 127.0.0.1; end programs"):
        free_ports(1)


def test_a_port_with_a_listener_is_not_given(monkeypatch: pytest.MonkeyPatch) -> None:
    lower = two_to_choose_from(monkeypatch)
    with socket.create_server((HOST, lower)):
        assert free_ports(1) == [lower + 1]


def test_what_is_derived_from_a_port_is_free_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that takes the port after its own: what is left of two is no port for it."""
    lower = two_to_choose_from(monkeypatch)
    with socket.create_server((HOST, lower + 1)), pytest.raises(OSError, match="no 1 free ports"):
        free_ports(1, with_also=(1,))
    assert sorted(free_ports(2)) == [lower, lower + 1], "something of it was kept"


def test_another_process_does_not_get_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """As long as the one that chose lives, although the port is not bound."""
    lower = two_to_choose_from(monkeypatch)
    program = (
        "from sglang_npu_pp.tools.certify import ports\n"
        f"ports.candidates, ports.TRIES = lambda: range({lower}, {lower + 2}), 2\n"
        "print(*ports.free_ports(2), flush=True)\n"
        "input()\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout is not None
        assert sorted(map(int, other.stdout.readline().split())) == [lower, lower + 1]
        with pytest.raises(OSError, match="no 2 free ports"):
            free_ports(2)
        other.communicate("\n", timeout=30)
    assert sorted(free_ports(2)) == [lower, lower + 1]
