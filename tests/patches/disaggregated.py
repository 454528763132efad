"""Disaggregated servers made by hand, around upstream's own functions, which are under test.

Upstream's managers, senders and schedulers are objects without their constructors, which would open ports and
start threads: they have the attributes that the functions under test read, and no more.
"""

from __future__ import annotations

import threading
from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import torch
from sglang.srt.disaggregation.base.conn import KVPoll
from sglang.srt.disaggregation.common.utils import FastQueue
from sglang.srt.disaggregation.mooncake.conn import MooncakeKVManager, MooncakeKVSender
from sglang.srt.disaggregation.prefill import SchedulerDisaggregationPrefillMixin
from sglang.srt.disaggregation.utils import DisaggregationMode
from sglang.srt.observability.trace import TraceNullContext

from sglang_npu_pp.patches.disaggregation import send_launched_chunks

PAGE = 4
ROOM = 7
TOKENS = 400  # that a request may have


def bare(kind: type, **values: Any) -> Any:
    """An object of that class without its constructor."""
    made: Any = object.__new__(kind)
    made.__dict__.update(values)
    return made


def make_manager(kind: type[MooncakeKVManager] = MooncakeKVManager, **values: Any) -> Any:
    """A manager of one rank that knows of no request and no peer; `values` are more of its attributes."""
    common = {
        "attn_tp_size": 1,
        "attn_tp_rank": 0,
        "attn_cp_size": 1,
        "attn_cp_rank": 0,
        "pp_size": 1,
        "pp_rank": 0,
        "is_mla_backend": False,
        "is_hybrid_mla_backend": False,
        "enable_staging": False,
        "enable_all_cp_ranks_for_transfer": False,
        "enable_deferred_decode_kv_release": False,
        "request_status": {},
        "failure_records": {},
        "failure_lock": threading.Lock(),
        "prefill_response_tracker": defaultdict(set),
        "addr_to_rooms_tracker": defaultdict(set),
    }
    return bare(kind, **{**common, **values})


def make_prefill_manager(kind: type[MooncakeKVManager] = MooncakeKVManager, **values: Any) -> Any:
    """One with a request in room `ROOM`, whose decode server is known, and a queue that nobody empties."""
    mine = {
        "kv_args": SimpleNamespace(state_types=[]),
        "disaggregation_mode": DisaggregationMode.PREFILL,
        "is_dummy_cp_rank": False,
        "_dcp_pack_max_tokens": None,
        "request_status": {ROOM: KVPoll.WaitingForInput},
        "transfer_infos": {ROOM: {"127.0.0.1:1": None}},
        "transfer_queues": [FastQueue()],
    }
    return make_manager(kind, **{**mine, **values})


class Request:
    """As much of a request as its chunks need; upstream puts it into sets."""

    def __init__(self, **values: Any) -> None:
        self.__dict__.update(values)


class PrefillScheduler(SchedulerDisaggregationPrefillMixin):
    """As much of a prefill server's scheduler as its chunks need. `req_to_token` is on `device`."""

    sender_kind: type[MooncakeKVSender] = MooncakeKVSender

    def __init__(self, manager: Any = None, device: str | torch.device = "cpu") -> None:
        self.disaggregation_mode = DisaggregationMode.PREFILL
        self.enable_overlap = self.enable_staging = self.enable_hierarchical_cache = False
        self.token_to_kv_pool_allocator = SimpleNamespace(
            page_size=PAGE,
            translate_kv_indices_for_transfer=lambda indices: indices,
            get_kvcache=lambda: None,  # asked for on NPU
        )
        self.req_to_token_pool = SimpleNamespace(
            req_to_token=torch.arange(TOKENS, device=device).reshape(1, TOKENS)
        )
        self.kv_manager = manager or make_prefill_manager()
        self.disagg_prefill_bootstrap_queue = SimpleNamespace(kv_manager=self.kv_manager)
        self.disagg_metadata_buffers = SimpleNamespace(set_buf=lambda req: None)
        self.disagg_prefill_pending_chunk_rids: set[str] = set()
        self.kv_checksum_computer = None
        self.tree_cache = self.running_batch = SimpleNamespace(batch_is_full=True)
        self.chunked_req: Any = None

    def request(self, length: int) -> Any:
        sender = bare(
            self.sender_kind,
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

    def launch(self, pipeline: Any, req: Any, end: int, event: Any) -> None:
        """A forward that ends with token `end` of the prompt."""
        req.extend_range = SimpleNamespace(end=end)
        self.chunked_req = req if end < len(req.origin_input_ids) else None
        send_launched_chunks(self, pipeline, SimpleNamespace(reqs=[req]), event)

    def queued(self) -> list[Any]:
        """Everything in the engine's queue, as upstream takes it."""
        (found,) = self.kv_manager.transfer_queues
        return [found.get() for _ in range(len(found._buf))]
