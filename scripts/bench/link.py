"""A link of a chosen one-way delay and rate between two network namespaces of this machine.

netem shapes it where the kernel has it; elsewhere a delay line in user space between two TUN devices
(`delay_line.c`) does. It needs root (CAP_NET_ADMIN); where it cannot be made there is `Loopback`, without
delay and limit. All traffic stays on this machine.
"""

from __future__ import annotations

import ctypes
import os
import secrets
import shutil
import subprocess
from collections.abc import Collection
from contextlib import ExitStack
from pathlib import Path
from typing import Protocol, Self

_SOURCE = Path(__file__).with_name("delay_line.c")
_ADDRESSES = ("10.79.0.1", "10.79.0.2")
_MTU = 65000  # few packets: it is the messages that are to be delayed, not the cores that are to be tested
_COMMAND_LIMIT_S = 30.0
_CLONE_NEWNET = 0x40000000
# A link that starts slowly again after every pause of the load would measure TCP, not the servers.
_SYSCTLS = (
    "net.ipv4.tcp_congestion_control=reno",
    "net.ipv4.tcp_slow_start_after_idle=0",
    "net.ipv4.tcp_rmem=4096 4194304 33554432",
    "net.ipv4.tcp_wmem=4096 4194304 33554432",
)


class LinkError(RuntimeError):
    """The link cannot be made or set here; the message is one sentence."""


class Link(Protocol):
    """Two nodes and what is between them. Node 0 is where this process is."""

    @property
    def kind(self) -> str:
        """What shapes it."""

    @property
    def master(self) -> str:
        """Address of node 0, as node 1 sees it."""

    def set(self, delay_ms: float, rate_mbit: float) -> None:
        """One-way delay and rate in force from now on, both directions; rate 0 is unlimited."""

    def prefix(self, node: int) -> list[str]:
        """What a command line begins with in order to run on that node."""

    def variables(self, node: int) -> dict[str, str]:
        """Environment of a server there: the interface and address that its ranks use."""


class Loopback:
    """Both nodes on the loopback interface: no delay, no limit."""

    kind = "loopback"
    master = "127.0.0.1"

    def set(self, delay_ms: float, rate_mbit: float) -> None:
        if delay_ms or rate_mbit:
            raise LinkError("the loopback interface has no delay and no rate to set")

    def prefix(self, node: int) -> list[str]:
        return []

    def variables(self, node: int) -> dict[str, str]:
        return {"GLOO_SOCKET_IFNAME": "lo", "SGLANG_HOST_IP": self.master}


class EmulatedLink:
    """Two namespaces and a link between them; removed on exit.

    On entry this process moves into the namespace of node 0, so that it reaches the server there on
    loopback; threads that exist already stay where they are. Raises LinkError.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        # A process that was killed may have left its namespaces, and have had our number.
        own = secrets.token_hex(4)
        self._names = (f"ppbench{own}a", f"ppbench{own}b")
        self._device = "pplink"
        self._netem = False
        self._line: subprocess.Popen[str] | None = None
        self._undo = ExitStack()
        self.master = _ADDRESSES[0]

    @property
    def kind(self) -> str:
        return "netem" if self._netem else "user-space delay line"

    def __enter__(self) -> Self:
        try:
            for name in self._names:
                _run("ip", "netns", "add", name)
                self._undo.callback(_run, "ip", "netns", "del", name)
            self._netem = self._join_with_netem()
            if not self._netem:
                self._join_with_delay_line()
            for name, address in zip(self._names, _ADDRESSES, strict=True):
                self._configure(name, address)
            self._undo.callback(_move_to, os.open("/proc/self/ns/net", os.O_RDONLY))
            _move_to(os.open(f"/run/netns/{self._names[0]}", os.O_RDONLY))
            self.set(0, 0)
        except BaseException:
            self._undo.close()
            raise
        return self

    def __exit__(self, *_error: object) -> None:
        self._undo.close()

    def set(self, delay_ms: float, rate_mbit: float, lost_from: Collection[int] = ()) -> None:
        """One-way delay and rate of the link; what the nodes `lost_from` send is lost."""
        if self._line is not None:
            lost = " ".join(str(int(node in lost_from)) for node in range(len(self._names)))
            self._configure_delay_line(f"{delay_ms * 1e3:.0f} {rate_mbit:g} {lost}")
            return
        shape = ["delay", f"{delay_ms}ms", "limit", "100000"]
        shape += ["rate", f"{rate_mbit}mbit"] if rate_mbit else []
        for node, name in enumerate(self._names):
            loss = ["loss", "100%"] if node in lost_from else []
            _run("tc", "-n", name, "qdisc", "replace", "dev", self._device, "root", "netem", *shape, *loss)

    def prefix(self, node: int) -> list[str]:
        return ["nsenter", f"--net=/run/netns/{self._names[node]}"]

    def variables(self, node: int) -> dict[str, str]:
        return {"GLOO_SOCKET_IFNAME": self._device, "SGLANG_HOST_IP": _ADDRESSES[node]}

    def _join_with_netem(self) -> bool:
        """Whether the kernel has netem; then the namespaces are joined by a veth pair."""
        first, second = self._names
        try:
            _run("tc", "-n", first, "qdisc", "add", "dev", "lo", "root", "netem", "delay", "1ms")
        except LinkError:
            return False
        _run("tc", "-n", first, "qdisc", "del", "dev", "lo", "root")
        pair = ("type", "veth", "peer", "name", self._device, "netns", second)
        _run("ip", "-n", first, "link", "add", self._device, *pair)
        return True

    def _join_with_delay_line(self) -> None:
        program = self._folder / "delay_line"
        compiler = shutil.which("cc") or shutil.which("gcc")
        if compiler is None:
            raise LinkError("the kernel has no netem, and there is no C compiler to build the delay line")
        _run(compiler, "-O2", "-o", str(program), str(_SOURCE))
        ends = [word for name in self._names for word in (name, self._device)]
        self._line = subprocess.Popen(
            [str(program), *ends],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,  # Ctrl-C ends the servers first
        )
        self._undo.callback(self._end_delay_line)
        self._expect("ready")

    def _configure(self, name: str, address: str) -> None:
        _run("ip", "-n", name, "link", "set", "lo", "up")
        _run("ip", "-n", name, "addr", "add", f"{address}/24", "dev", self._device)
        _run("ip", "-n", name, "link", "set", self._device, "mtu", str(_MTU), "txqueuelen", "10000", "up")
        for setting in _SYSCTLS:
            _run("nsenter", f"--net=/run/netns/{name}", "sysctl", "-qw", setting)

    def _configure_delay_line(self, command: str) -> None:
        assert self._line is not None
        assert self._line.stdin is not None
        self._line.stdin.write(command + "\n")
        self._line.stdin.flush()
        self._expect("ok")

    def _expect(self, answer: str) -> None:
        assert self._line is not None
        assert self._line.stdout is not None
        if (got := self._line.stdout.readline().strip()) != answer:
            raise LinkError(f"the delay line answered {got!r}, not {answer!r} (exit {self._line.poll()})")

    def _end_delay_line(self) -> None:
        assert self._line is not None
        assert self._line.stdin is not None
        self._line.stdin.close()
        self._line.wait(_COMMAND_LIMIT_S)
        assert self._line.stdout is not None
        self._line.stdout.close()


def reason_for_loopback() -> str:
    """Why no link can be emulated on this machine; empty where it can."""
    if os.geteuid() != 0:
        return "an emulated link needs root"
    missing = [tool for tool in ("ip", "nsenter", "sysctl", "tc") if shutil.which(tool) is None]
    return f"an emulated link needs {', '.join(missing)}" if missing else ""


def _run(*command: str) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_COMMAND_LIMIT_S)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise LinkError(f"{command[0]} cannot be run: {error}") from None
    if done.returncode:
        raise LinkError(f"`{' '.join(command)}` failed: {(done.stderr or done.stdout).strip()}")


def _move_to(namespace: int) -> None:
    """Move this thread into the network namespace of that file descriptor, and close it."""
    try:
        if ctypes.CDLL(None, use_errno=True).setns(namespace, _CLONE_NEWNET):
            raise LinkError(f"cannot enter the network namespace: {os.strerror(ctypes.get_errno())}")
    finally:
        os.close(namespace)
