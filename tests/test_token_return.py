"""Tokens on their way home: order, who waits, and what happens when sending fails.

The link and the outbox are doubles that record calls, and so is the device's event: an asynchronous device
cannot be had here. What really crosses sockets is tested in tests/transport and tests/server.
"""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch

from sglang_npu_pp.errors import PipelineError
from sglang_npu_pp.streams import DeviceStreams
from sglang_npu_pp.token_return import HostCopy, TokenReturn, Uploads, copy_to_host
from sglang_npu_pp.transport.message import Kind

LIMIT_S = 20


class RecordingLink:
    """Double of StageLink: the last of three stages; remembers what was pushed."""

    stage, stages, rank = 2, 3, 0

    def __init__(self, fails: bool = False) -> None:
        self.pushed: list[tuple[int, int, list[int]]] = []
        self.fails = fails
        self.sent = threading.Semaphore(0)

    def push_tensors(self, kind: Kind, peer: int, values: Any, **options: Any) -> None:
        assert kind is Kind.OUTPUT
        assert options["owned"]
        if self.fails:
            self.sent.release()
            raise PipelineError("the probe does not send")
        self.pushed.append((peer, options["slot"], values["next_token_ids"].tolist()))
        self.sent.release()

    def await_pushes(self, count: int) -> None:
        for _ in range(count):
            assert self.sent.acquire(timeout=LIMIT_S), "a push did not come"


class DeviceEvent:
    """Double of a device's event: passes when the test says so."""

    def __init__(self) -> None:
        self.passed = threading.Event()

    def synchronize(self) -> None:
        assert self.passed.wait(LIMIT_S), "the test never let the event pass"

    def query(self) -> bool:
        return self.passed.is_set()


class SilentOutbox:
    """Double of an Outbox that only has to be closed."""

    def __init__(self) -> None:
        self.closed = False

    def close(self) -> None:
        self.closed = True


def copy_of(token: int, event: Any) -> HostCopy:
    return HostCopy({"next_token_ids": torch.tensor([token])}, event)


def on_cpu(token: int) -> HostCopy:
    return copy_to_host({"next_token_ids": torch.tensor([token])}, DeviceStreams("cpu"), None, None)


def test_on_cpu_tokens_leave_at_once_to_every_other_stage() -> None:
    link = RecordingLink()
    tokens = TokenReturn(link, None)  # type: ignore[arg-type]
    tokens.post(on_cpu(7), slot=1, iteration=4)
    assert link.pushed == [(0, 1, [7]), (1, 1, [7])]
    assert tokens.own(1, 4).wait()["next_token_ids"].tolist() == [7]


def test_outputs_of_another_iteration_are_refused() -> None:
    tokens = TokenReturn(RecordingLink(), None)  # type: ignore[arg-type]
    tokens.post(on_cpu(7), slot=1, iteration=4)
    with pytest.raises(PipelineError, match="slot 1 are of iteration 4, not 6"):
        tokens.own(1, 6)


def test_on_a_device_tokens_wait_for_their_event_and_the_scheduler_does_not() -> None:
    link, events = RecordingLink(), [DeviceEvent(), DeviceEvent()]
    tokens = TokenReturn(link, {0: SilentOutbox(), 1: SilentOutbox()})  # type: ignore[arg-type, dict-item]
    for slot, event in enumerate(events):
        tokens.post(copy_of(10 + slot, event), slot, iteration=slot)  # returns although nothing passed
    events[1].passed.set()
    assert link.pushed == []  # the first is not there yet, and order is kept
    events[0].passed.set()
    link.await_pushes(4)
    assert link.pushed == [(0, 0, [10]), (1, 0, [10]), (0, 1, [11]), (1, 1, [11])]
    tokens.close()


def test_close_sends_what_is_queued_and_closes_the_connections() -> None:
    link, event, outbox = RecordingLink(), DeviceEvent(), SilentOutbox()
    tokens = TokenReturn(link, {0: outbox})  # type: ignore[arg-type, dict-item]
    tokens.post(copy_of(5, event), 0, 0)
    event.passed.set()
    tokens.close()
    assert [push[2] for push in link.pushed] == [[5], [5]]
    assert outbox.closed


def test_a_failure_of_the_sending_thread_surfaces_in_the_scheduler() -> None:
    link, event = RecordingLink(fails=True), DeviceEvent()
    tokens = TokenReturn(link, {0: SilentOutbox()})  # type: ignore[arg-type, dict-item]
    event.passed.set()
    tokens.post(copy_of(5, event), 0, 0)
    link.await_pushes(1)
    assert tokens._thread is not None
    tokens._thread.join(LIMIT_S)
    with pytest.raises(PipelineError, match="the probe does not send"):
        tokens.own(0, 0)
    with pytest.raises(PipelineError, match="the probe does not send"):
        tokens.post(copy_of(6, event), 1, 1)


def test_nested_outputs_keep_their_shape() -> None:
    outputs = {"ids": torch.tensor([1]), "top": [torch.tensor([2]), (3, None)], "none": None}
    copied = copy_to_host(outputs, DeviceStreams("cpu"), None, None).wait()
    assert copied["top"][1] == (3, None)
    assert copied["none"] is None


def test_on_cpu_an_upload_is_the_tensor_itself() -> None:
    tensor = torch.tensor([1, 2])
    assert Uploads(DeviceStreams("cpu")).to_device(tensor) is tensor
