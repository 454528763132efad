"""Seam: on stage 0 the next decode of a microbatch is prepared while its tokens are on their way.

When tokens arrive, upstream processes them (ends, streaming, metrics), schedules, takes pages, builds the
next batch and then launches. None of this needs the tokens if no request ends with them. So upstream's own
update of the running batch runs before the wait, as if none ended. If none does, it is kept, and on a device
the tokens are processed behind the launch; otherwise it is taken back, and all goes as upstream has it.

Decisions stay upstream's: nothing is prepared where one could fall otherwise (a request that waits for a free
place, an eviction, a retraction, a length that is reached), and anything that arrives is looked at in the
state that upstream would have, `settle`. What is decided here follows from state that all ranks of the stage
have alike. Later stages do all this while their proxies travel.
"""

from __future__ import annotations

import copy
import functools
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from sglang_npu_pp.errors import PipelineError
from sglang_npu_pp.patching import Patch
from sglang_npu_pp.streams import DeviceStreams, Event
from sglang_npu_pp.transport.stage_link import StageLink

from .forwards import planned_without_ids
from .pipeline import current, forward_stream

_SCHEDULER = "sglang.srt.managers.scheduler:Scheduler"
_MIXIN = "sglang.srt.managers.scheduler_pp_mixin:SchedulerPPMixin"

# Those whose state is taken back: lists of free pages that are replaced, not changed.
_ALLOCATORS = frozenset(
    ("TokenToKVPoolAllocator", "PagedTokenToKVPoolAllocator", "NPUPagedTokenToKVPoolAllocator")
)
_ROW_POOLS = frozenset(("ReqToTokenPool",))

_COUNTS = ("decode_batch_idx", "kv_committed_len", "kv_allocated_len")
_LENGTHS = ("seq_lens", "seq_lens_cpu", "orig_seq_lens")  # tensors of a batch, int, of shape (requests,)

Process = Callable[[Any, Any], None]
"""Of a batch and its result: upstream's."""


class Saved:
    """A batch as it is, and what the preparation of its next decode changes beside it."""

    def __init__(self, scheduler: Any, batch: Any) -> None:
        self.batch = copy.copy(batch)  # device tensors stay alive, too: a forward in flight may read them
        tracker = scheduler.new_token_ratio_tracker
        counts = [(tracker, "current"), *(each for request in batch.reqs for each in _counts_of(request))]
        self._counts = [(owner, name, getattr(owner, name)) for owner, name in counts]
        allocator = scheduler.token_to_kv_pool_allocator
        self._state = [(batch, vars(self.batch)), (allocator, dict(vars(allocator)))]
        if _lengths_change_in_place():
            for name in _LENGTHS:
                setattr(batch, name, getattr(batch, name).clone())

    def restore(self) -> None:
        for owner, name, value in self._counts:
            setattr(owner, name, value)
        for part, state in self._state:
            vars(part).clear()
            vars(part).update(state)


def _counts_of(request: Any) -> list[tuple[Any, str]]:
    """What a decode adds to. From 0.5.19 on lengths belong to what a request holds of the KV cache; up to
    0.5.15.post1 all is its own; between, one of each."""
    owners = (request, getattr(request, "kv", None))
    return [(owner, name) for owner in owners for name in _COUNTS if hasattr(owner, name)]


def _lengths_change_in_place() -> bool:
    """Up to 0.5.15.post1, on the device, too, where a forward in flight could see it."""
    from sglang.srt.managers import schedule_batch

    return not hasattr(schedule_batch, "ReqKvInfo")


@dataclass(frozen=True)
class _Results:
    """Results of a batch that are processed later."""

    process: Process
    result: Any


class Ahead:
    """The preparation of one batch at a time, of a scheduler of stage 0."""

    def __init__(self, scheduler: Any, link: StageLink, streams: DeviceStreams, launch_first: bool) -> None:
        self._scheduler, self._link, self._streams = scheduler, link, streams
        self._launch_first = launch_first
        self._dropped: deque[tuple[Event, Any]] = deque()  # plans that the forward stream may still read
        self._batch: Any = None  # the live one
        self._slot = -1
        self._saved: Saved | None = None  # as it was before its preparation
        self._forward: Any = None  # SGLang's ForwardBatch, once
        self._kept = False  # its launch is certain: taken by upstream's scheduling
        self._results: _Results | None = None  # put off

    def prepare(self, batch: Any, slot: int) -> None:
        """Before the wait for the tokens of `batch`."""
        if not self._may_prepare(batch, slot):
            return
        saved = Saved(self._scheduler, batch)
        if self._scheduler.update_running_batch(batch) is not batch:
            raise self._fault("another batch than the running one")
        self._batch, self._slot, self._kept, self._saved = batch, slot, False, saved
        self._forward = planned_without_ids(self._scheduler, batch)
        self._record("prepared")

    def check(self, tokens: Sequence[int]) -> None:
        """Take the preparation back if a request may end with its token."""
        if self._saved is not None and any(map(may_end, self._batch.reqs, tokens)):
            self._take_back()

    def process(self, process: Process, batch: Any, result: Any) -> None:
        """Now, or behind the launch."""
        if self._saved is None:
            process(batch, result)
            return
        self._saved.batch.input_ids = batch.input_ids  # set by upstream when it prepared the result
        if self._launch_first:
            self._results = _Results(process, result)
        else:
            self._process(process, result)

    def settle(self) -> None:
        """To the state that upstream has between two microbatches."""
        if self._saved is None:
            return
        results, batch = self._results, self._batch
        self._take_back()
        if results is not None:
            results.process(batch, results.result)

    def settle_if_more_may_run(self) -> None:
        """Where scheduling may decide for something else than the decode that is prepared."""
        if self._saved is not None and not _only_decodes(self._scheduler, self._batch):
            self.settle()

    def take(self, batch: Any) -> bool:
        """Whether the next decode of `batch` is prepared; it is launched then."""
        if self._saved is None or batch is not self._batch:
            return False
        self._kept = True
        return True

    def take_forward(self, batch: Any) -> Any:
        forward, self._forward = self._forward, None
        return forward if batch is self._batch else None

    def expect_taken(self) -> None:
        """Behind the scheduling that should have taken it."""
        if self._saved is not None and not self._kept:
            raise self._fault("a decode that was prepared and not scheduled")

    def behind_launch(self) -> None:
        if self._saved is None:
            return
        results = self._results
        if results is not None:
            self._process(results.process, results.result)
        self._forget()
        self._link.telemetry.prepared += 1

    # --- steps -------------------------------------------------------------------------------------------

    def _may_prepare(self, batch: Any, slot: int) -> bool:
        scheduler = self._scheduler
        return (
            scheduler.mbs[slot] is batch
            and scheduler.running_mbs[slot] is batch
            and scheduler.disaggregation_mode.value == "null"  # a running server may change its role
            and batch.forward_mode.is_decode()
            and not batch.is_prefill_only
            and not batch.has_grammar
            and not batch.sampling_info.penalizer_orchestrator.is_required
            and not any(map(_ends_or_is_special, batch.reqs))
            and _only_decodes(scheduler, batch)
            and _has_room(batch)
        )

    def _process(self, process: Process, result: Any) -> None:
        assert self._saved is not None
        self._record("processed")
        process(self._saved.batch, result)
        ended = [request.rid for request in self._batch.reqs if request.finished()]
        if ended:
            raise self._fault(f"the end of {', '.join(ended)}, whose next decode was prepared")

    def _take_back(self) -> None:
        assert self._saved is not None
        self._drop_forward()
        self._saved.restore()
        self._record("taken_back")
        self._forget()
        self._link.telemetry.taken_back += 1

    def _drop_forward(self) -> None:
        """Its tensors are of the scheduler's stream, which would use their memory again at once."""
        while self._dropped and self._dropped[0][0].query():
            self._dropped.popleft()
        with forward_stream(self._scheduler):
            self._dropped.append((self._streams.record(), self._forward))

    def _forget(self) -> None:
        self._batch = self._saved = self._results = self._forward = None

    def _record(self, what: str) -> None:
        self._link.trace.record(what, "", self._slot)

    def _fault(self, what: str) -> PipelineError:
        return PipelineError(
            f"{self._link.context.where}: preparing ahead met {what}, which must not be possible; start the "
            "server with SGLANG_NPU_PP_AHEAD=0 and report this."
        )


# --- what is prepared, and what is not ---------------------------------------------------------------------


def can_prepare(scheduler: Any) -> bool:
    """Whether this server's decodes are of the kind that is prepared here, as long as it runs."""
    from sglang.srt.managers import scheduler as upstream

    def has(name: str) -> bool:
        return bool(getattr(scheduler, name, None))

    rows = scheduler.req_to_token_pool
    return (
        scheduler.spec_algorithm.is_none()
        and type(scheduler.token_to_kv_pool_allocator).__name__ in _ALLOCATORS
        and type(rows).__name__ in _ROW_POOLS
        and getattr(rows, "_aux_cache", None) is None
        and not scheduler.model_config.is_encoder_decoder
        and not upstream.TEST_RETRACT
        and not any(map(has, _WITH_STATE_OF_THEIR_OWN))
    )


# Attributes of a scheduler that schedules in another way or keeps more than pages for a request.
_WITH_STATE_OF_THEIR_OWN = (
    "enable_overlap",
    "enable_hierarchical_cache",
    "enable_hisparse",
    "enable_priority_preemption",
    "is_hybrid_swa",
    "is_hybrid_ssm",
    "require_mlp_sync",
    "use_ngram_embedding",
    "dllm_config",
    "prefill_delayer",
    "decode_offload_manager",
)


def _only_decodes(scheduler: Any, batch: Any) -> bool:
    """Nothing waits that scheduling could run in the place of the next decode."""
    return (
        scheduler.chunked_req is None
        and (batch.batch_is_full or not scheduler.waiting_queue)
        and not scheduler.grammar_manager.has_waiting_grammars()
    )


def _has_room(batch: Any) -> bool:
    """Pages for all without evicting any; upstream counts one for each request."""
    allocator = batch.token_to_kv_pool_allocator
    return bool(allocator.available_size() >= len(batch.reqs) * allocator.page_size)


def _ends_or_is_special(request: Any) -> bool:
    """Ends with its next token, whichever that is; or has more than tokens to process."""
    return bool(
        request.to_finish
        or request.grammar is not None
        or getattr(request, "beam_group", None) is not None
        or getattr(request, "return_sampling_mask", False)
        or len(request.output_ids) + 1 >= request.sampling_params.max_new_tokens
    )


def may_end(request: Any, token: int) -> bool:
    """False only where upstream's `update_finish_state` lets the request go on behind this token.

    Besides, the request is none of `_ends_or_is_special`.
    """
    sampling = request.sampling_params
    if sampling.stop_strs or sampling.stop_regex_strs:
        return _ends_in_a_copy(request, token)
    if token < 0 or (request.vocab_size is not None and token >= request.vocab_size):
        return True
    if sampling.ignore_eos:
        return False
    stops = (sampling.stop_token_ids, request.eos_token_ids, _stop_tokens(request.tokenizer))
    return any(token in each for each in stops if each)


@functools.lru_cache(maxsize=4)  # a tokenizer looks its own up: 28 us on CPU, for each request of a round
def _stop_tokens(tokenizer: Any) -> frozenset[int]:
    if tokenizer is None:
        return frozenset()
    return frozenset((tokenizer.eos_token_id, *(getattr(tokenizer, "additional_stop_token_ids", None) or ())))


def _ends_in_a_copy(request: Any, token: int) -> bool:
    """Upstream's own answer, which a stop string depends on."""
    tried = copy.copy(request)
    tried.output_ids = copy.copy(request.output_ids)
    tried.output_ids.append(token)
    tried.update_finish_state(1)
    return bool(tried.finished())


# --- seams -----------------------------------------------------------------------------------------------


def _here() -> Ahead | None:
    found = current().ahead
    assert found is None or isinstance(found, Ahead)
    return found


def update_running_batch(original: Any, scheduler: Any, batch: Any) -> Any:
    """Done already, for a batch that is prepared."""
    ahead = _here()
    return batch if ahead is not None and ahead.take(batch) else original(scheduler, batch)


def get_next_batch_to_run(original: Any, scheduler: Any, *arguments: Any, **options: Any) -> Any:
    ahead = _here()
    if ahead is None:
        return original(scheduler, *arguments, **options)
    ahead.settle_if_more_may_run()
    plan = original(scheduler, *arguments, **options)
    ahead.expect_taken()
    return plan


def process_batch_result(original: Any, scheduler: Any, batch: Any, result: Any) -> None:
    ahead = _here()
    if ahead is None:
        original(scheduler, batch, result)
    else:
        ahead.process(lambda *of_batch: original(scheduler, *of_batch), batch, result)


_BATCH = "sglang.srt.managers.schedule_batch:ScheduleBatch"
_REQUEST = "sglang.srt.managers.schedule_batch:Req"
_PROCESSOR = "sglang.srt.managers.scheduler_components.batch_result_processor:SchedulerBatchResultProcessor"
_UPSTREAM = "vllm-ascend #7136, vllm #32618 (asynchronous scheduling with PP); sglang's overlap schedule"
_PLAN = "goes when upstream schedules ahead with PP"

PATCHES = (
    Patch(
        target=f"{_SCHEDULER}.update_running_batch",
        wrapper=update_running_batch,
        why="pages, lengths and tensors of the next decode are made between the tokens and the launch",
        how="it has run while the tokens were on their way",
        upstream=_UPSTREAM,
        plan=_PLAN,
        relies_on=(
            f"{_BATCH}.prepare_for_decode",
            f"{_BATCH}.filter_batch",
            f"{_BATCH}.check_decode_mem",
            "sglang.srt.mem_cache.allocation:alloc_for_decode",
            "sglang.srt.mem_cache.allocation:alloc_for_decode_default",
            "sglang.srt.mem_cache.common:alloc_for_decode",  # up to 0.5.15.post1
            "sglang.srt.mem_cache.allocator.token:TokenToKVPoolAllocator.alloc",
            "sglang.srt.mem_cache.allocator.paged:PagedTokenToKVPoolAllocator.alloc_decode",
            "sglang.srt.mem_cache.allocator.paged:PagedTokenToKVPoolAllocator.merge_and_sort_free",
            "sglang.srt.hardware_backend.npu.allocator_npu:NPUPagedTokenToKVPoolAllocator.alloc_decode",
            "sglang.srt.managers.overlap_utils:resolve_forward_inputs",
        ),
    ),
    Patch(
        target=f"{_SCHEDULER}.get_next_batch_to_run",
        wrapper=get_next_batch_to_run,
        why="may decide for something else than the decode that is prepared",
        how="where it may, what is prepared is taken back first",
        upstream=_UPSTREAM,
        plan=_PLAN,
        relies_on=(f"{_SCHEDULER}.get_new_batch_prefill", f"{_SCHEDULER}._get_new_batch_prefill_raw"),
    ),
    Patch(
        target=f"{_MIXIN}._pp_process_batch_result",
        wrapper=process_batch_result,
        why="streaming, log-probabilities and metrics come before the launch, which needs none of them",
        how="on a device, behind the launch, for requests that surely go on",
        upstream=_UPSTREAM,
        plan=_PLAN,
        relies_on=(
            f"{_SCHEDULER}.process_batch_result",
            f"{_PROCESSOR}.process_batch_result_decode",
            f"{_REQUEST}.update_finish_state",
            f"{_REQUEST}._check_token_based_finish",
            f"{_REQUEST}._check_vocab_boundary_finish",
            f"{_REQUEST}._check_str_based_finish",
        ),
    ),
)
