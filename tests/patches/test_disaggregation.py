"""Which pages a prefill server queues behind a launch, with pages of several tokens and chunks of any length.

Upstream's scheduler functions, sender, manager and queue are real; made by hand is what they read of a
scheduler, and the prefix cache, which these requests do not use.
"""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sglang.srt.disaggregation.base.conn import KVPoll
from sglang.srt.disaggregation.common.utils import FastQueue
from sglang.srt.disaggregation.mooncake.conn import MooncakeKVManager, MooncakeKVSender
from sglang.srt.disaggregation.prefill import SchedulerDisaggregationPrefillMixin
from sglang.srt.disaggregation.utils import DisaggregationMode
from sglang.srt.observability.trace import TraceNullContext

from sglang_npu_pp.patches import disaggregation, load_contracts, sglang_release
from sglang_npu_pp.patches.pipeline import set_current
from sglang_npu_pp.patching import AppliedPatches
from sglang_npu_pp.streams import DeviceStreams
from sglang_npu_pp.trace import Trace
from sglang_npu_pp.transfer_gate import TransferGate

PAGE = 4
ROOM = 7


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
    pipeline = SimpleNamespace(streams=streams, transfers=TransferGate(streams, Trace()), last_launched=None)
    set_current(pipeline)
    yield pipeline
    set_current(None)
    patches.undo()


class Request:
    """As much of a request as its chunks need; upstream puts it into sets."""

    def __init__(self, **values: Any) -> None:
        self.__dict__.update(values)


class Scheduler(SchedulerDisaggregationPrefillMixin):
    """As much of a prefill server's scheduler as its chunks need."""

    def __init__(self) -> None:
        self.disaggregation_mode = DisaggregationMode.PREFILL
        self.enable_overlap = self.enable_staging = self.enable_hierarchical_cache = False
        self.token_to_kv_pool_allocator = SimpleNamespace(
            page_size=PAGE, translate_kv_indices_for_transfer=lambda indices: indices
        )
        self.req_to_token_pool = SimpleNamespace(req_to_token=torch.arange(400).reshape(1, 400))
        self.kv_manager = object.__new__(MooncakeKVManager)
        self.kv_manager.__dict__.update(
            kv_args=SimpleNamespace(state_types=[]),
            disaggregation_mode=DisaggregationMode.PREFILL,
            enable_all_cp_ranks_for_transfer=False,
            is_dummy_cp_rank=False,
            _dcp_pack_max_tokens=None,
            request_status={ROOM: KVPoll.WaitingForInput},
            transfer_infos={ROOM: {"127.0.0.1:1": None}},
            transfer_queues=[FastQueue()],
        )
        self.disagg_prefill_bootstrap_queue = SimpleNamespace(kv_manager=self.kv_manager)
        self.disagg_metadata_buffers = SimpleNamespace(set_buf=lambda req: None)
        self.disagg_prefill_pending_chunk_rids: set[str] = set()
        self.kv_checksum_computer = None
        self.tree_cache = self.running_batch = SimpleNamespace(batch_is_full=True)
        self.chunked_req: Any = None

    def request(self, length: int) -> Any:
        sender = object.__new__(MooncakeKVSender)
        sender.__dict__.update(
            kv_mgr=self.kv_manager,
            bootstrap_room=ROOM,
            curr_idx=0,
            num_kv_indices=-(-length // PAGE),
            aux_index=0,
            conclude_state=None,
            trace_ctx=TraceNullContext(),
            _transfer_num_kv_indices=0,
            _transfer_num_state_indices=0,
        )
        return Request(
            rid="request",
            origin_input_ids=list(range(length)),
            start_send_idx=0,
            disagg_decode_prefix_len=0,
            pending_bootstrap=False,
            skip_radix_cache_insert=True,
            extend_range=None,
            disagg_kv_sender=sender,
            kv=SimpleNamespace(req_pool_idx=0),
        )

    def launch(self, pipeline: Any, req: Any, end: int, event: Event) -> None:
        """A forward that ends with token `end` of the prompt."""
        req.extend_range = SimpleNamespace(end=end)
        self.chunked_req = req if end < len(req.origin_input_ids) else None
        disaggregation.send_launched_chunks(self, pipeline, SimpleNamespace(reqs=[req]), event)

    def queued(self) -> list[Any]:
        """Everything in the engine's queue, as upstream takes it."""
        (found,) = self.kv_manager.transfer_queues
        return [found.get() for _ in range(len(found._buf))]


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
    scheduler = Scheduler()
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
    scheduler = Scheduler()
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
    scheduler = Scheduler()
    req = scheduler.request(22)
    scheduler.launch(pipeline, req, 10, Event(1))
    assert pages(scheduler.queued()) == [0, 1]
    scheduler.kv_manager.update_status(ROOM, KVPoll.Failed)
    scheduler.launch(pipeline, req, 20, Event(2))
    assert scheduler.queued() == []


@pytest.mark.parametrize("reason", ["enable_staging", "enable_hierarchical_cache", "state"])
def test_where_a_chunk_cannot_leave_early_upstream_sends_it(pipeline: Any, reason: str) -> None:
    scheduler = Scheduler()
    if reason == "state":
        scheduler.kv_manager.kv_args.state_types = ["mamba"]
    else:
        setattr(scheduler, reason, True)
    req, event = scheduler.request(22), Event(1)
    scheduler.launch(pipeline, req, 10, event)
    assert scheduler.queued() == []
    scheduler.enable_staging = False  # its grid is not what is tested here
    scheduler.process_prefill_chunk(last_batch=None, running_batch=scheduler.running_batch)
    assert pages(scheduler.queued()) == [0, 1]
    assert event.waits == 1
