"""Where a rank listens: directories nobody else can enter, addresses, and what is left behind."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest
import zmq

from sglang_npu_pp.transport.endpoints import KeyPair, SocketDirectory, bind_ipc, bind_tcp, node_identity

from .harness import Here, Team


def identity(here: Here) -> str:
    return node_identity()


def test_processes_of_one_machine_are_of_one_node(team: Team) -> None:
    assert set(team.each(identity)) == {node_identity()}


def test_a_socket_directory_is_only_for_its_user(ipc_dir: Path) -> None:
    directory = SocketDirectory(ipc_dir, "stage 0 rank 0")
    assert stat.S_IMODE(directory.path.stat().st_mode) == 0o700
    assert directory.endpoint == f"ipc://{directory.path}/lane"
    with zmq.Context() as context, context.socket(zmq.ROUTER) as router:
        assert bind_ipc(router, directory, "stage 0 rank 0") == directory.endpoint
        assert [path.name for path in directory.path.iterdir()] == ["lane"]
    directory.clear()
    directory.clear()
    assert not list(ipc_dir.iterdir())


def test_two_ranks_may_share_a_directory(ipc_dir: Path) -> None:
    endpoints = {SocketDirectory(ipc_dir, "").endpoint for _ in range(8)}
    assert len(endpoints) == 8


@pytest.mark.parametrize(("host", "name"), [("127.0.0.1", "127.0.0.1"), ("::1", "[::1]")])
def test_an_endpoint_says_what_a_peer_connects_to(host: str, name: str) -> None:
    with zmq.Context() as context, context.socket(zmq.ROUTER) as near, context.socket(zmq.DEALER) as far:
        try:
            (endpoint,) = bind_tcp(near, [host], 0, "stage 0 rank 0")
        except Exception as error:
            if host == "::1":
                pytest.skip(f"this machine has no IPv6 loopback: {error}")
            raise
        assert endpoint.startswith(f"tcp://{name}:")
        far.setsockopt(zmq.IPV6, 1)
        far.setsockopt(zmq.LINGER, 0)
        far.connect(endpoint)
        far.send(b"hello")
        assert near.poll(10_000)
        assert near.recv_multipart()[1] == b"hello"


def test_keys_are_made_anew_and_the_secret_one_is_never_shown() -> None:
    one, other = KeyPair.generate(), KeyPair.generate()
    assert one.public != other.public
    assert one.secret.decode() not in repr(one)
