"""Streams of torch's pool on a simulated NPU: the pool comes round, ours stay apart from those in use."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from rig.harness import Here, Team
from sglang_npu_pp.streams import DeviceStreams

from . import ranks


def in_use(here: Here) -> set[int]:
    """Of forwards, of the default group's collectives and messages to neighbours; the default stream."""
    device, npu = torch.device(here.device), ranks.npu(here)
    dist.all_reduce(torch.ones(8, device=device))
    token = torch.ones(8, device=device)
    for source in range(2):
        if here.index == source:
            dist.send(token, source + 1)
        elif here.index == source + 1:
            dist.recv(token, source)
    found = {ranks.stream_of_group(here, peer) for peer in (None, *range(3))} - {-1}
    assert len(found) == (3 if here.index == 1 else 2)
    return found | {npu.default_stream().stream_id, npu.current_stream().stream_id}


def new_streams(here: Here, count: int) -> list[int]:
    """Ids of so many streams that are all in use together, made while forwards have theirs."""
    with ranks.on_forward_stream(here):
        used = in_use(here)
        streams = [DeviceStreams(here.device).new_stream() for _ in range(count)]
        found = [stream.stream_id for stream in streams]
        assert not used & set(found)
    return found


def next_streams(here: Here, count: int) -> None:
    """What torch hands out behind `make_way`, wherever its pool stands."""
    streams, npu = DeviceStreams(here.device), ranks.npu(here)
    ours = streams.new_stream()
    with ranks.on_forward_stream(here):
        used = in_use(here) | {ours.stream_id}
        for _ in range(40):
            streams.make_way(count)
            assert not used & {npu.Stream().stream_id for _ in range(count)}


def test_new_streams_are_apart_from_all_that_are_in_use(young_npu_team: Team) -> None:
    for found in young_npu_team.each(new_streams, 20):
        assert len(set(found)) == 20


def streams_beyond_the_pool(here: Here, count: int) -> list[int]:
    kept = [DeviceStreams(here.device).new_stream() for _ in range(count)]
    return [stream.stream_id for stream in kept]


def test_a_pool_that_is_used_up_gives_streams_twice(young_npu_team: Team) -> None:
    for found in young_npu_team.each(streams_beyond_the_pool, 40):
        assert len(found) == 40 > 32 >= len(set(found)) > 20


@pytest.mark.parametrize("count", [1, 2])
def test_a_communicator_gets_streams_that_are_not_in_use(young_npu_team: Team, count: int) -> None:
    young_npu_team.each(next_streams, count)
