"""Faults in the order and in the lifetime of messages, planted in the patches of a running server.

As in sglang_pp_faults.py, which arms them by name and counts strikes. Each is what a wrong change of a patch
would do; none of them touches SGLang. A server that is not patched has none of these functions in use.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

EXCHANGED = "outputs exchanged"
DROPPED = "output dropped"
SENT_TWICE = "output sent twice"
OVERWRITTEN = "overwritten before it was read"
TOKENS_BEFORE = "tokens of the iteration before"
SENT_LATE = "proxies sent late"
WAITED_EARLY = "tokens waited for before the launch"

SILENT = (EXCHANGED, OVERWRITTEN, TOKENS_BEFORE, SENT_LATE, WAITED_EARLY)
ENDING = (DROPPED, SENT_TWICE)  # the server notices them by itself, and ends
FAULTS = (*SILENT, *ENDING)

TOKENS = "next_token_ids"
NTH = 10  # output, of those that are sent once a fault is armed
ROUNDS_LEFT = 4  # of requests that surely have another microbatch
Function = Callable[..., Any]


def plant(fault: Callable[[], str], note: Callable[[], None]) -> None:
    """Put the faults around functions of the patches; `fault` says which is in force, `note` counts it."""
    from sglang_npu_pp.patches import outputs, pipeline, proxies
    from sglang_npu_pp.token_return import TokenReturn
    from sglang_npu_pp.transport.stage_link import StageLink

    sent, late = _Outputs(fault, note), _Proxies(fault, note)
    fed, early = _Tokens(fault, note), _EarlyWaits(fault, note)
    wrap(TokenReturn, "post", sent.post)
    wrap(pipeline.AsyncPipeline, "send_proxies", late.send)
    wrap(pipeline.AsyncPipeline, "begin_iteration", late.begin_iteration)
    wrap(StageLink, "_take", late.take)
    wrap(outputs.OutputTicket, "on_device", fed.on_device)
    wrap(proxies, "_wait_for_proxies", early.wait_for_proxies)
    wrap(pipeline.AsyncPipeline, "post_outputs", early.post_outputs)


def wrap(owner: Any, name: str, around: Function) -> None:
    original = getattr(owner, name)

    def call(*arguments: Any, **options: Any) -> Any:
        return around(original, *arguments, **options)

    setattr(owner, name, call)


class _Outputs:
    """Of the last stage, on their way to the others."""

    def __init__(self, fault: Callable[[], str], note: Callable[[], None]) -> None:
        self._fault, self._note = fault, note
        self._armed, self._count = "", 0
        self._held: tuple[Any, int, int] | None = None

    def post(self, original: Function, tokens: Any, copy: Any, slot: int, iteration: int) -> None:
        fault = self._fault()
        if fault != self._armed:
            self._armed, self._count = fault, 0
        self._count += 1
        if self._held is not None:
            self._send_exchanged(original, tokens, (copy, slot, iteration))
        elif fault == EXCHANGED and _next_batch_is_like(slot, len(copy.values[TOKENS])):
            self._held = copy, slot, iteration
        elif fault == DROPPED and self._count == NTH:
            self._note()
        else:
            original(tokens, copy, slot, iteration)
            if fault == SENT_TWICE and self._count == NTH:
                self._note()
                original(tokens, copy, slot, iteration)

    def _send_exchanged(self, original: Function, tokens: Any, second: tuple[Any, int, int]) -> None:
        """The two microbatches get each other's tokens, if they have equally many."""
        assert self._held is not None
        first, self._held = self._held, None
        ours, theirs = (one[0].values[TOKENS] for one in (first, second))
        if ours.shape == theirs.shape and not torch.equal(ours, theirs):
            first, second = (
                (replace(one[0], values={**one[0].values, TOKENS: other}), *one[1:])
                for one, other in ((first, theirs), (second, ours))
            )
            self._note()
        original(tokens, *first)
        original(tokens, *second)


def _next_batch_is_like(slot: int, rows: int) -> bool:
    """Whether the next slot will surely launch as many requests: what is held is sent then.

    And whether it matters to none of the requests what the tokens are: the last stage goes by its own.
    """
    from sglang_npu_pp.patches.pipeline import current

    scheduler = current().scheduler
    following = scheduler.running_mbs[(slot + 1) % len(scheduler.mbs)]
    requests = [] if following is None else following.reqs
    return (
        len(requests) == rows
        and all(request.sampling_params.ignore_eos for request in (*requests, *scheduler.mbs[slot].reqs))
        and all(
            request.sampling_params.max_new_tokens - len(request.output_ids) >= ROUNDS_LEFT
            for request in requests
        )
    )


class _Proxies:
    """Of all stages but the last: handed over when the stage waits next, or at the end of its iteration."""

    def __init__(self, fault: Callable[[], str], note: Callable[[], None]) -> None:
        self._fault, self._note = fault, note
        self._held: Callable[[], None] | None = None

    def send(self, original: Function, pipeline: Any, tensors: Mapping[str, Any], *more: Any) -> None:
        self._send_held()
        fault, iteration = self._fault(), pipeline.loop.iteration
        if fault not in (SENT_LATE, OVERWRITTEN):
            original(pipeline, tensors, *more)
            return
        self._note()

        def send() -> None:
            if fault == OVERWRITTEN:  # by the forward behind it, which writes to the same memory
                for tensor in tensors.values():
                    tensor[..., tensor.shape[-1] // 2 :] = 0
            now, pipeline.loop.iteration = pipeline.loop.iteration, iteration
            try:
                original(pipeline, tensors, *more)
            finally:
                pipeline.loop.iteration = now

        self._held = send

    def begin_iteration(self, original: Function, pipeline: Any) -> None:
        self._send_held()
        original(pipeline)

    def take(self, original: Function, link: Any, pending: Any) -> Any:
        self._send_held()
        return original(link, pending)

    def _send_held(self) -> None:
        send, self._held = self._held, None
        if send is not None:
            send()


class _Tokens:
    """Of the first stage: what the next forward of a request computes with."""

    def __init__(self, fault: Callable[[], str], note: Callable[[], None]) -> None:
        self._fault, self._note = fault, note
        self._before: dict[tuple[str, ...], torch.Tensor] = {}

    def on_device(self, original: Function, ticket: Any, name: str, value: Any) -> Any:
        found = original(ticket, name, value)
        if name != TOKENS or ticket._pipeline.link.stage != 0:
            return found
        requests = tuple(request.rid for request in ticket._batch.reqs)
        before = self._before.get(requests)
        self._before = {requests: found.clone()} if len(self._before) > 64 else self._before
        self._before[requests] = found.clone()
        if self._fault() != TOKENS_BEFORE or before is None or torch.equal(before, found):
            return found
        self._note()
        return before


@dataclass
class Answered:
    """A receive whose message is here already."""

    values: Any

    def wait(self) -> Any:
        return self.values


class _EarlyWaits:
    """Of the first stage: the outputs that it processes behind a launch are waited for before it."""

    def __init__(self, fault: Callable[[], str], note: Callable[[], None]) -> None:
        self._fault, self._note = fault, note
        self._here: dict[int, Any] = {}  # slot -> values

    def wait_for_proxies(self, original: Function, scheduler: Any, *more: Any) -> Any:
        from sglang_npu_pp.patches.pipeline import current

        pipeline = current()
        following = (pipeline.slot + 1) % len(scheduler.mbs)
        due = scheduler.mbs[following] is not None and not pipeline.launched[following].skipped
        if self._fault() == WAITED_EARLY and pipeline.link.stage == 0 and due and following != pipeline.slot:
            self._here[following] = pipeline.post_outputs(following).wait()
            self._note()
        return original(scheduler, *more)

    def post_outputs(self, original: Function, pipeline: Any, slot: int) -> Any:
        if slot in self._here:
            return Answered(self._here.pop(slot))
        return original(pipeline, slot)
