"""Where a rank listens: directories nobody else can enter, addresses, and what is left behind."""

from __future__ import annotations

import os
import stat
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch.distributed as dist
import zmq
from hypothesis import given, settings
from hypothesis import strategies as st

from rig.harness import Here, Team, receive, results, send
from sglang_npu_pp.errors import TransportError
from sglang_npu_pp.settings import Settings
from sglang_npu_pp.transport import endpoints
from sglang_npu_pp.transport.context import RankContext
from sglang_npu_pp.transport.endpoints import (
    RECORD_BYTES,
    KeyPair,
    SocketDirectory,
    bind_ipc,
    bind_tcp,
    node_identity,
    process_group_exchange,
)
from sglang_npu_pp.transport.host_lane import HostLane
from sglang_npu_pp.transport.message import Kind

pytestmark = pytest.mark.timeout(120)


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


@pytest.fixture
def tmpdir_is(monkeypatch: pytest.MonkeyPatch) -> Callable[[Path | str], None]:
    """Sets TMPDIR as a server would find it; Python remembers the first one that it saw."""

    def set_it(path: Path | str) -> None:
        monkeypatch.setenv("TMPDIR", str(path))
        monkeypatch.setattr(tempfile, "tempdir", None)

    monkeypatch.delenv("XDG_RUNTIME_DIR", raising=False)
    return set_it


def with_length(base: Path, length: int) -> Path:
    """A directory in `base` whose path has that many bytes."""
    path = base / ("d" * (length - len(os.fsencode(base)) - 1))
    path.mkdir()
    return path


def is_used(directory: SocketDirectory) -> bool:
    """Whether a peer reaches a socket there. Leaves nothing behind."""
    with zmq.Context() as context, context.socket(zmq.ROUTER) as near, context.socket(zmq.DEALER) as far:
        far.setsockopt(zmq.LINGER, 0)
        bind_ipc(near, directory, "stage 0 rank 0")
        far.connect(directory.endpoint)
        far.send(b"hello")
        reached = bool(near.poll(10_000)) and near.recv_multipart()[1] == b"hello"
    directory.clear()
    return reached


@pytest.mark.parametrize("length", [79, 80, 86, 89])
def test_a_long_tmpdir_still_holds_the_socket(
    length: int, ipc_dir: Path, tmpdir_is: Callable[[Path], None]
) -> None:
    """Up to what upstream's own sockets, which add 12 bytes and more, leave room for."""
    tmpdir = with_length(ipc_dir, length)
    tmpdir_is(tmpdir)
    directory = SocketDirectory(None, "stage 0 rank 0")
    assert directory.path.parent == tmpdir
    assert is_used(directory)
    assert not list(tmpdir.iterdir())


@pytest.mark.parametrize("length", [90, 95, 107, 200])
def test_a_longer_tmpdir_is_left_for_another_private_place(
    length: int, ipc_dir: Path, tmpdir_is: Callable[[Path], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    tmpdir, runtime = with_length(ipc_dir, length), ipc_dir / "run"
    runtime.mkdir()
    tmpdir_is(tmpdir)
    for variable, place in ((str(runtime), runtime), ("", Path("/tmp"))):
        monkeypatch.setenv("XDG_RUNTIME_DIR", variable)
        directory = SocketDirectory(None, "stage 0 rank 0")
        assert directory.path.parent == place
        assert stat.S_IMODE(directory.path.stat().st_mode) == 0o700
        assert is_used(directory)
        assert not list(tmpdir.iterdir())


@pytest.mark.parametrize("kind", ["missing", "a file", "without sockets"])
def test_a_tmpdir_that_cannot_be_used_is_left_for_another(
    kind: str, ipc_dir: Path, tmpdir_is: Callable[[Path | str], None]
) -> None:
    """Upstream serves: Python itself looks on where TMPDIR cannot be written to."""
    path = {"missing": ipc_dir / "missing", "a file": ipc_dir / "file", "without sockets": Path("/proc")}[
        kind
    ]
    if kind == "a file":
        path.touch()
    tmpdir_is(path)
    directory = SocketDirectory(None, "stage 0 rank 0")
    assert directory.path.parent != path
    assert is_used(directory)


def test_where_no_place_will_do_all_are_named(ipc_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    deep = with_length(ipc_dir, 100)
    monkeypatch.setattr(endpoints, "places", lambda: [ipc_dir / "missing", deep])
    with pytest.raises(TransportError) as caught:
        SocketDirectory(None, "stage 0 rank 0")
    sentence = str(caught.value)
    assert sentence.startswith("stage 0 rank 0: cannot make a directory for ipc sockets in")
    assert f"{ipc_dir / 'missing'} (No such file or directory); {deep} ({deep}/npp-" in sentence
    assert sentence.endswith("set SGLANG_NPU_PP_IPC_DIR to one that this user can write.")
    assert not list(deep.iterdir())


def test_a_directory_that_was_chosen_is_the_only_one(ipc_dir: Path) -> None:
    deep = with_length(ipc_dir, 95)
    with pytest.raises(
        TransportError, match="is longer than 107 bytes; set SGLANG_NPU_PP_IPC_DIR to a shorter"
    ):
        SocketDirectory(deep, "stage 0 rank 0")


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


# --- over the process group that the engine has already made ------------------------------------

ROOM = RECORD_BYTES - 2  # two bytes say how long the record is


def exchange(here: Here, records: list[bytes]) -> list[bytes]:
    assert dist.group.WORLD is not None
    return process_group_exchange(dist.group.WORLD)(records[here.index])


@settings(max_examples=30)
@given(records=st.lists(st.binary(max_size=ROOM), min_size=3, max_size=3))
def test_every_rank_gets_every_record_in_rank_order(team: Team, records: list[bytes]) -> None:
    assert team.each(exchange, records) == [records] * 3


def test_a_record_may_fill_its_room_and_no_more(team: Team) -> None:
    full = [b"\0" * ROOM, b"\xff" * ROOM, b""]
    assert team.each(exchange, full) == [full] * 3
    with pytest.raises(TransportError, match="set SGLANG_NPU_PP_IPC_DIR or SGLANG_NPU_PP_HOST to something"):
        team.ranks[0].call(exchange, [b"\0" * (ROOM + 1)])


def open_over_group(here: Here, transport: str) -> None:
    assert dist.group.WORLD is not None
    settings = Settings(host_transport=transport, wait_limit_s=20, start_limit_s=20)
    here.lane = HostLane(RankContext.begin(here.index, 3, settings))
    here.lane.open(process_group_exchange(dist.group.WORLD))
    here.opened = True


@pytest.mark.parametrize("transport", ["ipc", "tcp"])
def test_lanes_open_over_the_process_group(team: Team, transport: str) -> None:
    """Keys and addresses come over gloo, as in a server."""
    results([rank.start(open_over_group, transport) for rank in team.ranks])
    for peer in (1, 2):
        team.ranks[0].call(send, peer, Kind.REQUESTS, "hello")
        assert team.ranks[peer].call(receive, 0, Kind.REQUESTS, range(1)) == ["hello"]
