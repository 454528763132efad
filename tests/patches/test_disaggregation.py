"""Which pages a prefill server queues behind a launch, with pages of several tokens and chunks of any length.

Upstream's scheduler functions, sender, manager and queue are real; made by hand is what they read of a
scheduler, and the prefix cache, which these requests do not use.
"""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from sglang.srt.disaggregation.base.conn import KVPoll

from sglang_npu_pp.observe.trace import Trace
from sglang_npu_pp.patches import disaggregation, load_contracts, sglang_release
from sglang_npu_pp.patches.pipeline import set_current
from sglang_npu_pp.patching import AppliedPatches
from sglang_npu_pp.streams import DeviceStreams
from sglang_npu_pp.transfer_gate import TransferGate

from .disaggregated import PAGE, ROOM, PrefillScheduler


class Event:
    """The event behind one launch; notes that it was waited for."""

    def __init__(self, number: int) -> None:
        self.number, self.waits = number, 0

    def synchronize(self) -> None:
        self.waits += 1

    def query(self) -> bool:
        return False


@pytest.fixture
def pipeline() -> Iterator[Any]:
    contract = load_contracts()[sglang_release()]
    patches = AppliedPatches([patch for patch in disaggregation.PATCHES if patch.is_needed(contract)])
    streams = DeviceStreams("cpu")
    pipeline: Any = SimpleNamespace(
        streams=streams, transfers=TransferGate(streams, Trace()), last_launched=None, early_send=True
    )
    set_current(pipeline)
    yield pipeline
    set_current(None)
    patches.undo()


def pages(chunks: list[Any]) -> list[int]:
    return [int(page) for chunk in chunks for page in chunk.prefill_kv_indices]


@pytest.mark.parametrize(
    ("ends", "expected"),
    [
        pytest.param([10, 20, 22], [[0, 1], [2, 3, 4], []], id="chunks that end inside a page"),
        pytest.param([3, 6, 9], [[], [0], [1]], id="chunks shorter than a page"),
        pytest.param([8, 16], [[0, 1], [2]], id="a prompt of whole pages"),
        pytest.param([1], [[]], id="one token"),
        pytest.param([4], [[]], id="one page"),
        pytest.param([13], [[0, 1, 2]], id="no chunks"),
    ],
)
def test_whole_pages_leave_behind_the_launch_that_completes_them(
    pipeline: Any, ends: list[int], expected: list[list[int]]
) -> None:
    scheduler = PrefillScheduler()
    req = scheduler.request(ends[-1])
    sent = []
    for number, end in enumerate(ends):
        event = Event(number)
        scheduler.launch(pipeline, req, end, event)
        chunks = scheduler.queued()
        sent.append(pages(chunks))
        assert not any(chunk.is_last_chunk for chunk in chunks)
        assert event.waits == len(chunks)
        scheduler.process_prefill_chunk(last_batch=None, running_batch=scheduler.running_batch)
        assert scheduler.queued() == []  # upstream's own step in the next iteration finds nothing to do
    assert sent == expected
    scheduler.send_kv_chunk(req, last_chunk=True)
    (last,) = scheduler.queued()
    assert last.is_last_chunk
    assert pages([last])  # the first token never travels alone
    assert [page for chunk in sent for page in chunk] + pages([last]) == list(range(-(-ends[-1] // PAGE)))


def test_the_last_chunk_waits_for_its_own_launch_and_a_prefix_for_the_latest(pipeline: Any) -> None:
    scheduler = PrefillScheduler()
    own, later = Event(1), Event(2)
    first, second = scheduler.request(9), scheduler.request(9)
    scheduler.launch(pipeline, first, 9, own)
    scheduler.launch(pipeline, second, 9, later)
    scheduler.queued()
    own.waits = later.waits = 0
    scheduler.send_kv_chunk(first, last_chunk=True)
    scheduler.queued()
    assert (own.waits, later.waits) == (1, 0)
    follower = scheduler.request(20)
    scheduler.send_kv_chunk(follower, last_chunk=False, end_idx=8)  # pages that it shares with `second`
    assert pages(scheduler.queued()) == [0, 1]
    assert (own.waits, later.waits) == (1, 1)


def test_a_request_that_has_failed_queues_nothing(pipeline: Any) -> None:
    scheduler = PrefillScheduler()
    req = scheduler.request(22)
    scheduler.launch(pipeline, req, 10, Event(1))
    assert pages(scheduler.queued()) == [0, 1]
    scheduler.kv_manager.update_status(ROOM, KVPoll.Failed)
    scheduler.launch(pipeline, req, 20, Event(2))
    assert scheduler.queued() == []


@pytest.mark.parametrize("reason", ["enable_staging", "enable_hierarchical_cache", "state", "a setting"])
def test_where_a_chunk_cannot_leave_early_upstream_sends_it(pipeline: Any, reason: str) -> None:
    scheduler = PrefillScheduler()
    if reason == "state":
        scheduler.kv_manager.kv_args.state_types = ["mamba"]
    elif reason == "a setting":
        pipeline.early_send = False
    else:
        setattr(scheduler, reason, True)
    req, event = scheduler.request(22), Event(1)
    scheduler.launch(pipeline, req, 10, event)
    assert scheduler.queued() == []
    scheduler.enable_staging = False  # its grid is not what is tested here
    scheduler.process_prefill_chunk(last_batch=None, running_batch=scheduler.running_batch)
    assert pages(scheduler.queued()) == [0, 1]
    assert event.waits == 1
