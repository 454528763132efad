"""SGLang 0.5.23's store of transfers, in two processes that have open lanes: who may write into it."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from typing import Any

import msgspec
import pytest
import zmq
from zmq.utils.monitor import recv_monitor_message

from rig.harness import Here, Rank, Team, results
from rig.releases import NEWEST, RELEASES
from sglang_npu_pp.transport.endpoints import KeyPair

RELEASE = RELEASES[NEWEST]
pytestmark = [
    pytest.mark.thorough,
    pytest.mark.skipif(not RELEASE.is_installed, reason=f"SGLang {NEWEST} is not installed (make matrix)"),
]

STAGES, ROOM = 2, 7
NOTED, FORGED = 3, 4
LIMIT_S = 20.0
PUT = 1  # upstream's kind of a note
REFUSED = (
    zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL,
    zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL,
    zmq.EVENT_HANDSHAKE_FAILED_AUTH,
)


class Group:
    """In the place of SGLang's group of stages: what stage 0 broadcasts goes over the team's store."""

    def __init__(self, here: Here, stage: int, name: str) -> None:
        self._here, self._stage, self._name = here, stage, name

    def broadcast_object(self, value: Any, src: int) -> Any:
        key = f"{self._name}/broadcast"
        if self._stage == src:
            self._here.store.set(key, msgspec.json.encode(value))
        return msgspec.json.decode(self._here.store.get(key))


# --- in the rank's process ---------------------------------------------------------------------


def open_store(here: Here, folder: str, stage: int, name: str, patched: bool) -> str:
    """The endpoint of stage 0's socket, and nothing on the others."""
    sys.path.insert(0, folder)
    from types import SimpleNamespace

    from sglang.srt.disaggregation.pp_consensus_store import PPConsensusStore

    from sglang_npu_pp.patches import consensus_store
    from sglang_npu_pp.patches.pipeline import set_current
    from sglang_npu_pp.patching import AppliedPatches

    pipeline: Any = SimpleNamespace(link=here.link)  # all of a pipeline that the seam reads
    set_current(pipeline)
    applied = AppliedPatches(consensus_store.PATCHES if patched else [])
    store = PPConsensusStore(STAGES, stage, Group(here, stage, name))
    here.kept["consensus"] = store
    here.closers += [store.close, applied.undo]
    return store._socket.getsockopt_string(zmq.LAST_ENDPOINT)


def note(here: Here, key: int, value: int) -> None:
    here.kept["consensus"][key] = value


def collected(here: Here, key: int, value: int | None = None) -> list[int | None]:
    """What stage 0 has of all stages; once the last one's is `value`, if that is given."""
    deadline = time.monotonic() + LIMIT_S
    while True:
        found: list[int | None] = here.kept["consensus"].collect(key)
        if value is None or found[-1] == value:
            return found
        assert time.monotonic() < deadline, f"after {LIMIT_S:g} s stage 0 has {found}"
        time.sleep(0.01)


# --- in the test's process ---------------------------------------------------------------------


@pytest.fixture(scope="module")
def pair() -> Iterator[Team]:
    team = Team(STAGES)
    yield team
    for rank in team.ranks:
        rank.kill()


def opened(pair: Team, *, patched: bool) -> tuple[list[Rank], str]:
    ranks = pair.open_lanes(STAGES)
    name = pair.new_round()
    endpoint, _ = results(
        [
            rank.start(open_store, str(RELEASE.folder), stage, name, patched)
            for stage, rank in enumerate(ranks)
        ]
    )
    ranks[1].call(note, ROOM, NOTED)
    assert ranks[0].call(collected, ROOM, NOTED) == [None, NOTED]
    return ranks, endpoint


class Client:
    """Of neither stage; it says that it is stage 1."""

    def __init__(self, endpoint: str, options: dict[Any, bytes]) -> None:
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.PUSH)
        self._socket.setsockopt(zmq.LINGER, 0)
        for option, value in options.items():
            self._socket.setsockopt(option, value)
        self._monitor = self._socket.get_monitor_socket()
        self._socket.connect(endpoint)

    def send(self) -> None:
        self._socket.send(msgspec.msgpack.encode([PUT, 1, ROOM, FORGED]))

    def await_refusal(self) -> None:
        deadline = time.monotonic() + LIMIT_S
        while (left := deadline - time.monotonic()) > 0:
            if (
                self._monitor.poll(round(1000 * left))
                and recv_monitor_message(self._monitor)["event"] in REFUSED
            ):
                return
        pytest.fail(f"the client was not refused within {LIMIT_S:g} s")

    def close(self) -> None:
        self._context.destroy(linger=0)


def options(keys: str, server: bytes) -> dict[Any, bytes]:
    own = KeyPair.generate()
    return {
        "none": {},
        "its own": {
            zmq.CURVE_PUBLICKEY: own.public,
            zmq.CURVE_SECRETKEY: own.secret,
            zmq.CURVE_SERVERKEY: server,
        },
    }[keys]


def server_key(here: Here) -> bytes:
    return here.lane.keys.public


@pytest.mark.parametrize("keys", ["none", "its own"])
def test_a_client_of_neither_stage_writes_nothing(pair: Team, keys: str) -> None:
    """Without keys, or with stage 0's public key and keys of its own. Stage 1 is still read afterwards."""
    ranks, endpoint = opened(pair, patched=True)
    client = Client(endpoint, options(keys, ranks[0].call(server_key)))
    client.send()
    client.await_refusal()
    ranks[1].call(note, ROOM + 1, NOTED)
    assert ranks[0].call(collected, ROOM + 1, NOTED) == [None, NOTED]
    assert ranks[0].call(collected, ROOM) == [None, NOTED]
    client.close()


def test_upstreams_takes_what_any_client_sends(pair: Team) -> None:
    ranks, endpoint = opened(pair, patched=False)
    client = Client(endpoint, {})
    client.send()
    assert ranks[0].call(collected, ROOM, FORGED) == [None, FORGED]
    client.close()


def test_a_store_closes(pair: Team) -> None:
    """As `open_lanes` makes the ranks do, where upstream's would wait for the authentication's socket."""
    opened(pair, patched=True)
    pair.open_lanes(STAGES)
