"""Ascend's KV manager of a prefill server, in a rank process with a simulated NPU.

Real are SGLang's `AscendKVManager`, `AscendKVSender` and `AscendTransferEngine`, its scheduler's functions
that send chunks, its queue and its transfer worker. The engine below, memfabric_hybrid, wants Ascend's
driver: a stand-in with the signature that SGLang calls copies memory as the real one does, past all streams.
"""

from __future__ import annotations

import ctypes
import sys
import threading
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from types import ModuleType, SimpleNamespace
from typing import Any

import torch

from ascend_sim.kernels import occupy
from rig.harness import Here
from sglang_npu_pp.observe.trace import Trace
from sglang_npu_pp.streams import DeviceStreams
from sglang_npu_pp.transfer_gate import TransferGate

from . import ranks
from .mutation import Rule, broken

LIMIT_S = 30.0
STAGE, STAGES = 1, 2  # a layer each; the decode server has both
SESSION = "127.0.0.1:1"
UNWRITTEN = -1


class TransferEngine:
    """memfabric_hybrid's, as far as SGLang calls it. `writes` are the lengths that were written, in bytes."""

    TransDataOpType = SimpleNamespace(SDMA="sdma", DEVICE_RDMA="device_rdma")

    def __init__(self) -> None:
        self.registered: list[tuple[int, int]] = []
        self.writes: list[list[int]] = []

    def get_rpc_port(self) -> int:
        return 1

    def initialize(self, store_url: str, session_id: str, role: str, npu_id: int, op_type: str) -> int:
        self.opened_as = (session_id, role, npu_id, op_type)
        return 0

    def batch_register_memory(self, addresses: list[int], lengths: list[int]) -> int:
        self.registered += list(zip(addresses, lengths, strict=True))
        return 0

    def batch_transfer_sync_write(
        self, session_id: str, sources: list[int], targets: list[int], lengths: list[int]
    ) -> int:
        for source, target, length in zip(sources, targets, lengths, strict=True):
            if not any(
                begin <= source and source + length <= begin + size for begin, size in self.registered
            ):
                return -1
            ctypes.memmove(target, source, length)
        self.writes.append(lengths)
        return 0


def open_prefill(here: Here, rule: Rule | None = None) -> None:
    """A stage of a prefill server whose transfer worker runs, with one request; `rule` is broken in it."""
    engine = ModuleType("memfabric_hybrid")
    engine.TransferEngine = TransferEngine  # type: ignore[attr-defined]
    sys.modules["memfabric_hybrid"] = engine
    here.device = torch.device(f"npu:{here.index}")

    from sglang_npu_pp.patches import disaggregation, load_contracts, sglang_release
    from sglang_npu_pp.patches.pipeline import set_current
    from sglang_npu_pp.patching import AppliedPatches
    from tests.patches.disaggregated import PrefillScheduler

    contract = load_contracts()[sglang_release()]
    patches = AppliedPatches([patch for patch in disaggregation.PATCHES if patch.is_needed(contract)])
    streams = DeviceStreams(here.device)
    pipeline: Any = SimpleNamespace(
        streams=streams, transfers=TransferGate(streams, Trace()), last_launched=None, early_send=True
    )
    set_current(pipeline)
    manager = make_manager(here)
    scheduler = PrefillScheduler(manager, here.device)
    scheduler.sender_kind = sender_kind()
    mutation = broken(rule)
    mutation.__enter__()
    worker = threading.Thread(
        target=manager.transfer_worker, args=(manager.transfer_queues[0], ThreadPoolExecutor(1)), daemon=True
    )
    worker.start()
    here.kept.update(pipeline=pipeline, manager=manager, scheduler=scheduler, worker=worker)

    def close() -> None:
        manager.transfer_queues[0].put(None)
        worker.join(LIMIT_S)
        mutation.__exit__(None, None, None)
        set_current(None)
        patches.undo()

    here.closers.append(close)


def sender_kind() -> Any:
    from sglang.srt.disaggregation.ascend.conn import AscendKVSender

    return AscendKVSender


def make_manager(here: Here) -> Any:
    """With a KV cache of one layer on the NPU, keys and values, and a decode server's memory on the host."""
    import numpy as np
    from sglang.srt.disaggregation.ascend.conn import AscendKVManager

    from tests.patches.disaggregated import PAGE, ROOM, TOKENS, make_prefill_manager

    pages = TOKENS // PAGE
    cache = torch.full((2, TOKENS), UNWRITTEN, dtype=torch.int32, device=here.device)
    aux = torch.full((1, 4), 7, dtype=torch.int32)
    there = torch.full((2, STAGES, TOKENS), UNWRITTEN, dtype=torch.int32)  # of the decode server
    aux_there = torch.zeros((1, 4), dtype=torch.int32)
    page_bytes = 4 * PAGE
    kv_args = SimpleNamespace(
        gpu_id=here.index,
        engine_rank=0,
        state_types=[],
        state_data_ptrs=[],
        state_data_lens=[],
        kv_data_ptrs=[layer.data_ptr() for layer in cache],
        kv_data_lens=[4 * TOKENS] * 2,
        kv_item_lens=[page_bytes] * 2,
        aux_data_ptrs=[aux.data_ptr()],
        aux_data_lens=[aux.nbytes],
        aux_item_lens=[aux.nbytes],
        prefill_start_layer=STAGE,
    )
    target = SimpleNamespace(
        requires_dcp_relayout=False,
        dst_kv_ptrs=[layer.data_ptr() for half in there for layer in half],
        dst_kv_layer_ids=None,
        dst_kv_item_len=page_bytes,
        dst_attn_tp_size=1,
        dst_aux_ptrs=[aux_there.data_ptr()],
    )
    request = SimpleNamespace(
        is_dummy=False,
        room=ROOM,
        mooncake_session_id=SESSION,
        endpoint="127.0.0.1",
        dst_port=1,
        dst_kv_indices=np.arange(pages, dtype=np.int32)[::-1].copy(),  # it has put them elsewhere
        dst_device_kv_indices=None,
        dst_aux_index=0,
        required_dst_info_num=1,
        decode_prefix_len=0,
    )
    manager: Any = make_prefill_manager(
        AscendKVManager,
        kv_args=kv_args,
        pp_size=STAGES,
        pp_rank=STAGE,
        bootstrap_port=0,
        enable_trace=False,
        enable_custom_mem_pool=False,
        custom_mem_pool_type=None,
        session_lock=threading.Lock(),
        session_failures=defaultdict(int),
        failed_sessions=set(),
        req_to_decode_prefix_len={},
        _staging_outstanding=defaultdict(int),
        transfer_infos={ROOM: {SESSION: request}},
        decode_kv_args_table={SESSION: target},
        _validate_envelope_kv_layout=lambda *args: None,  # asks for the arguments of a server
        conclude_transfer=lambda bootstrap_room, status, **_: manager.update_status(bootstrap_room, status),
    )
    manager.init_engine()
    manager.register_buffer_to_engine()
    here.kept.update(cache=cache, aux=aux, there=there, aux_there=aux_there, request=request)
    return manager


def begin_request(here: Here, length: int, first_page: int) -> None:
    """A prompt whose KV lies in the pages from `first_page` on."""
    from tests.patches.disaggregated import PAGE, TOKENS

    first = here.kept["first"] = PAGE * first_page
    slots = torch.arange(first, TOKENS, device=here.device)
    here.kept["scheduler"].req_to_token_pool.req_to_token = slots.unsqueeze(0)
    here.kept["req"] = here.kept["scheduler"].request(length)
    here.kept["computed"] = 0


def launch(here: Here, number: int, end: int) -> None:
    """The forward of a chunk that ends with token `end` writes `number`. Comes back when it is launched and
    queued."""
    kept = here.kept
    begin, kept["computed"] = kept["computed"], end
    with ranks.on_forward_stream(here):
        occupy(1)
        kept["cache"][:, kept["first"] + begin : kept["first"] + end].fill_(number)
        written = ranks.event(here)
    kept["scheduler"].launch(kept["pipeline"], kept["req"], end, written)
    ranks.flush(here)


def send_last(here: Here) -> None:
    """The first token is known: what is left leaves with it."""
    here.kept["scheduler"].send_kv_chunk(here.kept["req"], last_chunk=True)


def fail(here: Here) -> None:
    """The request is aborted."""
    from sglang.srt.disaggregation.base.conn import KVPoll

    from tests.patches.disaggregated import ROOM

    here.kept["manager"].update_status(ROOM, KVPoll.Failed)


def writes(here: Here) -> list[list[int]]:
    """What the engine has written so far: the lengths of each transfer."""
    found: list[list[int]] = here.kept["manager"].engine.engine.writes
    return found


def finish(here: Here) -> dict[str, Any]:
    """Let the worker empty its queue and end; what the decode server then has, by page in its own order."""
    from tests.patches.disaggregated import PAGE, ROOM

    kept = here.kept
    kept["manager"].transfer_queues[0].put(None)
    kept["worker"].join(LIMIT_S)
    assert not kept["worker"].is_alive(), "the transfer worker has not ended"
    keys, values = kept["there"]
    assert torch.equal(keys, values), "keys and values differ"
    assert bool((keys[1 - STAGE] == UNWRITTEN).all()), "the layer of the other stage was written"
    tokens = keys[STAGE].view(-1, PAGE).flip(0).flatten()
    return {
        "tokens": tokens[: len(kept["req"].origin_input_ids)].tolist(),
        "aux": kept["aux_there"].flatten().tolist(),
        "status": int(kept["manager"].request_status[ROOM]),
        "writes": writes(here),
        "opened": kept["manager"].engine.engine.opened_as[1:],
    }
