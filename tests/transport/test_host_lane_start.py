"""A host lane that opens, or says in one sentence why it cannot."""

from __future__ import annotations

import os
import resource
from pathlib import Path
from typing import Any

import msgspec
import pytest
import zmq

from rig.harness import Here, Team
from sglang_npu_pp.errors import (
    MessageError,
    PeerLostError,
    PipelineError,
    SequenceError,
    TransportError,
    WaitLimitError,
)
from sglang_npu_pp.settings import Settings
from sglang_npu_pp.tools.certify.ports import free_ports
from sglang_npu_pp.transport import host_lane
from sglang_npu_pp.transport.context import RankContext
from sglang_npu_pp.transport.endpoints import EndpointRecord, Exchange, KeyPair, bind_tcp, node_identity
from sglang_npu_pp.transport.host_lane import HostLane

from .test_host_lane_clients import assert_serving, endpoint_of

pytestmark = pytest.mark.timeout(180)


def lane(stage: int = 0, *, host: str = "127.0.0.1", port: int = 0, **values: Any) -> HostLane:
    """A lane of this process, one of two stages."""
    return HostLane(RankContext.begin(stage, 2, Settings(**values)), host=host, port=port)


def alone_with(other: EndpointRecord) -> Exchange:
    """An exchange for stage 0 in which stage 1 always says `other`."""
    return lambda data: [data, msgspec.msgpack.encode(other)]


NEIGHBOUR = EndpointRecord(stage=1, node=node_identity())
FAR_AWAY = EndpointRecord(stage=1, node="another machine")


def fails_to_open(lane: HostLane, exchange: Exchange) -> str:
    """The one sentence of a lane that cannot be opened; closing it again must be harmless."""
    with pytest.raises(TransportError) as caught:
        lane.open(exchange)
    lane.close()
    return str(caught.value)


def test_an_ipc_directory_that_does_not_exist_is_named(ipc_dir: Path) -> None:
    missing = ipc_dir / "missing"
    sentence = fails_to_open(lane(ipc_dir=missing), alone_with(NEIGHBOUR))
    assert sentence.startswith("stage 0 rank 0: cannot make a directory for ipc sockets in")
    assert str(missing) in sentence
    assert "set SGLANG_NPU_PP_IPC_DIR to one that this user can write" in sentence


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can stand in for another user")
def test_an_ipc_directory_of_another_user_is_named(ipc_dir: Path) -> None:
    ipc_dir.chmod(0o700)
    another_user = 65534
    os.seteuid(another_user)
    try:
        sentence = fails_to_open(lane(ipc_dir=ipc_dir), alone_with(NEIGHBOUR))
    finally:
        os.seteuid(0)
    assert f"{ipc_dir} (Permission denied); set SGLANG_NPU_PP_IPC_DIR" in sentence


def test_an_ipc_directory_whose_path_is_too_long_is_named_and_left_empty(ipc_dir: Path) -> None:
    deep = ipc_dir / ("d" * 90)
    deep.mkdir()
    sentence = fails_to_open(lane(ipc_dir=deep), alone_with(NEIGHBOUR))
    assert "longer than 107 bytes; set SGLANG_NPU_PP_IPC_DIR to a shorter directory" in sentence
    assert not list(deep.iterdir())


def test_a_port_in_use_is_named() -> None:
    with zmq.Context() as context, context.socket(zmq.ROUTER) as other:
        (endpoint,) = bind_tcp(other, ["127.0.0.1"], 0, "")
        port = int(endpoint.rpartition(":")[2])
        sentence = fails_to_open(lane(port=port), alone_with(FAR_AWAY))
    assert f"the host lane cannot listen on 127.0.0.1:{port} (Address already in use)" in sentence
    assert "set SGLANG_NPU_PP_PORT to a range that is free on this node" in sentence


def test_an_address_of_another_machine_is_named() -> None:
    sentence = fails_to_open(lane(host="198.51.100.1"), alone_with(FAR_AWAY))
    assert "the host lane cannot listen on 198.51.100.1:any port (" in sentence
    assert "set SGLANG_NPU_PP_HOST to an address or interface of this node" in sentence


def test_a_name_that_is_nothing_here_is_named() -> None:
    sentence = fails_to_open(lane(host="no.such.host.invalid"), alone_with(FAR_AWAY))
    assert sentence.startswith("stage 0 rank 0: SGLANG_NPU_PP_HOST='no.such.host.invalid' is no address, no ")


def test_a_stage_that_cannot_listen_tells_the_others_why() -> None:
    """They would wait for its record for as long as gloo waits."""
    record = msgspec.structs.replace(FAR_AWAY, failure="stage 1 rank 0: no.")
    sentence = fails_to_open(lane(), alone_with(record))
    assert sentence == "stage 0 rank 0: another stage cannot listen. stage 1 rank 0: no."


def test_a_peer_that_says_an_address_that_is_none_is_named_at_once() -> None:
    """Its connection cannot be made; what was made before does not keep the process from ending."""
    record = msgspec.structs.replace(FAR_AWAY, tcp=("tcp://*:5000",), key=KeyPair.generate().public)
    sentence = fails_to_open(lane(), alone_with(record))
    assert sentence.startswith("stage 0 rank 0: cannot connect to stage 1 at tcp://*:5000 (Invalid argument)")
    assert "SGLANG_NPU_PP_HOST" in sentence


def open_with_few_descriptors(here: Here, spare: int) -> str:
    used = len(os.listdir("/proc/self/fd"))
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (used + spare, hard))
    record = EndpointRecord(1, "another machine", tcp=("tcp://127.0.0.1:1",), key=KeyPair.generate().public)
    return fails_to_open(lane(start_limit_s=0.2), alone_with(record))


@pytest.mark.parametrize(
    "spare", [10, *(pytest.param(spare, marks=pytest.mark.slow) for spare in (3, 20, 40))]
)
def test_a_process_that_may_open_no_more_files_is_told_so(team: Team, spare: int) -> None:
    victim = team.recruit()
    sentence = victim.call(open_with_few_descriptors, spare)
    assert "may open " in sentence
    assert "ulimit -n" in sentence
    team.dismiss(victim)


def test_ipc_between_nodes_is_refused() -> None:
    sentence = fails_to_open(lane(host_transport="ipc"), alone_with(FAR_AWAY))
    assert "SGLANG_NPU_PP_HOST_TRANSPORT=ipc, but the stages are on several nodes; set it to auto" in sentence


def test_a_stage_that_does_not_answer_is_named_when_the_limit_is_over(ipc_dir: Path) -> None:
    with zmq.Context() as context, context.socket(zmq.ROUTER) as silent:
        silent.bind(f"ipc://{ipc_dir}/silent")
        record = msgspec.structs.replace(NEIGHBOUR, ipc=f"ipc://{ipc_dir}/silent")
        one = lane(ipc_dir=ipc_dir, start_limit_s=0.5)
        sentence = fails_to_open(one, alone_with(record))
    assert sentence.startswith("stage 0 rank 0: after 0.5 s stage 1 at ipc://")
    assert "did not answer and stage 1 did not connect to us" in sentence
    assert [path.name for path in ipc_dir.iterdir() if path.is_dir()] == []


def test_a_stage_that_is_not_there_is_named() -> None:
    nowhere = msgspec.structs.replace(
        FAR_AWAY, tcp=(f"tcp://127.0.0.1:{free_ports(1)[0]}",), key=KeyPair.generate().public
    )
    sentence = fails_to_open(lane(start_limit_s=0.5), alone_with(nowhere))
    assert sentence.startswith("stage 0 rank 0: ")
    assert "stage 1" in sentence


def test_the_given_port_is_used(team: Team) -> None:
    ports = dict(enumerate(free_ports(2)))
    ranks = team.open_lanes(2, Settings(host_transport="tcp"), ports=ports)
    assert [rank.call(endpoint_of)[0] for rank in ranks] == [f"tcp://127.0.0.1:{p}" for p in ports.values()]
    assert_serving(ranks[0], ranks[1])


def test_errors_of_the_lane_are_all_of_one_family() -> None:
    family = (MessageError, PeerLostError, SequenceError, TransportError, WaitLimitError)
    assert all(issubclass(error, PipelineError) for error in family)
    assert host_lane.MAIN_PORT == "main"
