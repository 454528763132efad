"""Faults in what only some servers exchange, planted in the patches of a running server: what returns of a
draft, the slices of context-parallel ranks, a hierarchical cache.

As in sglang_pp_order_faults.py. Of drafts, all but the last stage get something else than it has sent; on a
prefill server the last one, too, since each stage tells the decode server, and the last to do so counts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

DRAFTS_BEFORE = "drafts of the iteration before"
DRAFTS_SWAPPED = "drafts of another request"
LENGTHS_SWAPPED = "accepted lengths swapped"
LENGTH_LOST = "accepted length lost"
OUTPUTS_LATE = "outputs sent late"
OUTPUTS_EARLY = "outputs waited for before the launch"
SLICE_BEFORE = "slice of the microbatch before"
PROPOSAL_BEFORE = "first drafts of the prefill before"
PROPOSALS_SWAPPED = "first drafts of another request"
DECISION_BEFORE = "decision about the prefetch before"

SILENT_DRAFTS = (DRAFTS_BEFORE, DRAFTS_SWAPPED)
SILENT_PROPOSALS = (PROPOSAL_BEFORE, PROPOSALS_SWAPPED)
ENDING_DRAFTS = (LENGTHS_SWAPPED, LENGTH_LOST)  # stages soon disagree about which requests go on

ACCEPTED = "spec_accept_lens"
TREE = ("spec_next_chain", "spec_next_parents", "spec_next_top_scores")
PROPOSAL = ("draft_topk_p", "draft_topk_index", "draft_hidden_states")
RANK = 1  # of the context-parallel ranks
KEPT = 64  # microbatches
Function = Callable[..., Any]


def plant(fault: Callable[[], str], note: Callable[[], None]) -> None:
    """Put the faults around functions of the patches; `fault` says which is in force, `note` counts it."""
    from sglang_pp_order_faults import wrap  # by its bare name, as the server loads it

    from sglang_npu_pp.patches import outputs, pipeline
    from sglang_npu_pp.token_return import TokenReturn
    from sglang_npu_pp.transport.stage_link import StageLink

    drafts, late = _Drafts(fault, note), _LateOutputs(fault, note)
    early, slices = _EarlyOutputs(fault, note), _Slices(fault, note)
    proposals, cache = _Proposals(fault, note), _Cache(fault, note)
    wrap(outputs.OutputTicket, "_wait", drafts.wait)
    wrap(outputs.OutputTicket, "_wait", proposals.wait)
    wrap(StageLink, "push", cache.push)
    wrap(TokenReturn, "post", late.post)
    wrap(pipeline.AsyncPipeline, "begin_iteration", late.begin_iteration)
    wrap(pipeline.AsyncPipeline, "post_outputs", early.post_outputs)
    wrap(pipeline.AsyncPipeline, "send_proxies", slices.send)


class _Drafts:
    """Outputs of a verify round in the hands of an earlier stage."""

    def __init__(self, fault: Callable[[], str], note: Callable[[], None]) -> None:
        self._fault, self._note = fault, note
        self._before: dict[tuple[str, ...], dict[str, torch.Tensor]] = {}  # trees, by requests

    def wait(self, original: Function, ticket: Any) -> Mapping[str, Any]:
        values: Mapping[str, Any] = original(ticket)
        if ticket._pending is None or ACCEPTED not in values:
            return values
        before = self._keep(ticket, values)
        fault = self._fault()
        wrong: dict[str, torch.Tensor] = {}
        if fault == DRAFTS_BEFORE:
            wrong = before
        elif fault == DRAFTS_SWAPPED:
            wrong = rows_swapped(values)
        elif fault in ENDING_DRAFTS:
            wrong = {ACCEPTED: other_lengths(values[ACCEPTED], fault)}
        return spoiled(values, wrong, self._note)

    def _keep(self, ticket: Any, values: Mapping[str, Any]) -> dict[str, torch.Tensor]:
        """The tree of the iteration before, of the same requests; empty in their first."""
        requests = tuple(request.rid for request in ticket._metadata.fwd_batch.reqs)
        before = self._before.pop(requests, {})
        self._before[requests] = {name: values[name].clone() for name in TREE}
        while len(self._before) > KEPT:
            del self._before[next(iter(self._before))]
        return before


def spoiled(
    values: Mapping[str, Any], wrong: Mapping[str, torch.Tensor], note: Callable[[], None]
) -> Mapping[str, Any]:
    """`values` with what is wrong; a strike only if that is something else."""
    if all(torch.equal(tensor, values[name]) for name, tensor in wrong.items()):
        return values
    note()
    return {**values, **wrong}


def rows_swapped(values: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """The tree, each request with that of its neighbour."""
    rows = len(values[ACCEPTED])
    return {name: values[name].reshape(rows, -1).roll(1, 0).reshape(values[name].shape) for name in TREE}


def other_lengths(lengths: torch.Tensor, fault: str) -> torch.Tensor:
    """The first two that differ are swapped, or of the longest none of its drafts counts as accepted."""
    other = lengths.clone()
    if fault == LENGTH_LOST:
        other[lengths.argmax()] = 1
    elif differing := (lengths[1:] != lengths[:-1]).nonzero().flatten().tolist():
        first = differing[0]
        other[first : first + 2] = lengths[first : first + 2].flip(0)
    return other


class _Proposals:
    """Outputs of a prefill in the hands of any stage."""

    def __init__(self, fault: Callable[[], str], note: Callable[[], None]) -> None:
        self._fault, self._note = fault, note
        self._before: dict[str, torch.Tensor] = {}

    def wait(self, original: Function, ticket: Any) -> Mapping[str, Any]:
        values: Mapping[str, Any] = original(ticket)
        if ACCEPTED in values or PROPOSAL[0] not in values:
            return values
        before, self._before = self._before, {name: values[name].clone() for name in PROPOSAL}
        fault = self._fault()
        wrong: dict[str, torch.Tensor] = {}
        if fault == PROPOSAL_BEFORE and before:
            wrong = {name: stale(values[name], before[name]) for name in PROPOSAL}
        elif fault == PROPOSALS_SWAPPED:
            wrong = {name: values[name].roll(1, 0) for name in PROPOSAL}
        return spoiled(values, wrong, self._note)


class _LateOutputs:
    """Of the last stage: they leave at the end of its iteration."""

    def __init__(self, fault: Callable[[], str], note: Callable[[], None]) -> None:
        self._fault, self._note = fault, note
        self._held: Callable[[], None] | None = None

    def post(self, original: Function, *arguments: Any) -> None:
        if self._fault() != OUTPUTS_LATE:
            original(*arguments)
            return
        self._note()
        self._held = lambda: original(*arguments)

    def begin_iteration(self, original: Function, pipeline: Any) -> None:
        send, self._held = self._held, None
        original(pipeline)
        if send is not None:
            send()


class _EarlyOutputs:
    """Of an earlier stage: where a verify round is next, they are posted before its launch."""

    def __init__(self, fault: Callable[[], str], note: Callable[[], None]) -> None:
        self._fault, self._note = fault, note

    def post_outputs(self, original: Function, pipeline: Any, slot: int) -> Any:
        from sglang_pp_order_faults import Answered  # by its bare name, as the server loads it

        pending = original(pipeline, slot)
        last = pipeline.launched.get(pipeline.slot)
        launched = last is not None and last.iteration == pipeline.iteration
        if self._fault() != OUTPUTS_EARLY or launched:
            return pending
        self._note()
        return Answered(pending.wait())


class _Slices:
    """Of one context-parallel rank: the rows that the microbatch before had."""

    def __init__(self, fault: Callable[[], str], note: Callable[[], None]) -> None:
        self._fault, self._note = fault, note
        self._before: dict[str, torch.Tensor] = {}

    def send(self, original: Function, pipeline: Any, tensors: Mapping[str, Any], *more: Any) -> None:
        from sglang.srt.runtime_context import get_parallel

        before = self._before
        self._before = {name: tensor.clone() for name, tensor in tensors.items()}
        parallel = get_parallel()
        concerned = parallel.attn_cp_size > 1 and parallel.attn_cp_rank == RANK
        if self._fault() == SLICE_BEFORE and concerned and before:
            tensors = {name: stale(tensor, before[name]) for name, tensor in tensors.items()}
            self._note()
        original(pipeline, tensors, *more)


def stale(tensor: torch.Tensor, before: torch.Tensor) -> torch.Tensor:
    rows = min(len(tensor), len(before))
    return torch.cat([before[:rows], tensor[rows:]])


class _Cache:
    """A hierarchical cache: decisions of stage 0, each what it has decided before."""

    def __init__(self, fault: Callable[[], str], note: Callable[[], None]) -> None:
        self._fault, self._note = fault, note
        self._before: Any = None

    def push(self, original: Function, link: Any, kind: Any, peer: int, values: Any, **options: Any) -> None:
        if kind.name == "CACHE" and link.stage == 0:
            before, self._before = self._before, values
            if self._fault() == DECISION_BEFORE and before not in (None, values):
                self._note()
                values = before
        original(link, kind, peer, values, **options)
