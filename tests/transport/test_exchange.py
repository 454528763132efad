"""Cards over the process group that the engine has already made."""

from __future__ import annotations

import pytest
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st

from rig.harness import Here, Team, receive, results, send
from sglang_npu_pp.errors import TransportError
from sglang_npu_pp.observe.telemetry import Telemetry
from sglang_npu_pp.observe.trace import Trace
from sglang_npu_pp.settings import Settings
from sglang_npu_pp.transport.exchange import RECORD_BYTES, process_group_exchange
from sglang_npu_pp.transport.host_lane import HostLane
from sglang_npu_pp.transport.message import Kind

pytestmark = pytest.mark.timeout(120)

ROOM = RECORD_BYTES - 2  # two bytes say how long the record is


def exchange(here: Here, records: list[bytes]) -> list[bytes]:
    assert dist.group.WORLD is not None
    return process_group_exchange(dist.group.WORLD)(records[here.index])


@settings(max_examples=30)
@given(records=st.lists(st.binary(max_size=ROOM), min_size=3, max_size=3))
def test_every_rank_gets_every_card_in_rank_order(team: Team, records: list[bytes]) -> None:
    assert team.each(exchange, records) == [records] * 3


def test_a_card_may_fill_its_room_and_no_more(team: Team) -> None:
    full = [b"\0" * ROOM, b"\xff" * ROOM, b""]
    assert team.each(exchange, full) == [full] * 3
    with pytest.raises(TransportError, match="set SGLANG_NPU_PP_IPC_DIR or SGLANG_NPU_PP_HOST to something"):
        team.ranks[0].call(exchange, [b"\0" * (ROOM + 1)])


def open_over_group(here: Here, transport: str) -> None:
    assert dist.group.WORLD is not None
    here.telemetry, here.trace = Telemetry(here.index, 0), Trace()
    here.lane = HostLane(
        stage=here.index,
        stages=3,
        rank=0,
        settings=Settings(host_transport=transport, wait_limit_s=20, start_limit_s=20),
        telemetry=here.telemetry,
        trace=here.trace,
    )
    here.lane.open(process_group_exchange(dist.group.WORLD))
    here.opened = True


@pytest.mark.parametrize("transport", ["ipc", "tcp"])
def test_lanes_open_over_the_process_group(team: Team, transport: str) -> None:
    """Keys and addresses come over gloo, as in a server."""
    results([rank.start(open_over_group, transport) for rank in team.ranks])
    for peer in (1, 2):
        team.ranks[0].call(send, peer, Kind.REQUESTS, "hello")
        assert team.ranks[peer].call(receive, 0, Kind.REQUESTS, range(1)) == ["hello"]
