"""Who copies and who waits, without a device: streams and events are doubles, which the test lets pass.

On a simulated device: tests/ascend/test_host_copies.py.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from sglang_npu_pp.host_copies import PlainCopy, copy_to_host, upload
from sglang_npu_pp.streams import DeviceStreams
from tests.device_event import LIMIT_S, DeviceEvent


class PlainStreams(DeviceStreams):
    """Those of a device without pinned memory, whose tensors are on the CPU."""

    def __init__(self) -> None:
        super().__init__("cpu")
        self.asynchronous = True
        self.events: list[DeviceEvent] = []
        self.apart_in: list[str] = []  # threads

    @contextmanager
    def apart(self) -> Iterator[None]:
        self.apart_in.append(threading.current_thread().name)
        yield

    def record(self) -> DeviceEvent:
        self.events.append(DeviceEvent())
        return self.events[-1]


def test_a_device_is_pinned_unless_set_otherwise_and_cpu_never() -> None:
    assert not DeviceStreams("cpu").pinned
    assert not DeviceStreams("cpu", pinned=True).pinned
    device = torch.device("meta")  # has no streams, and is asked for none
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "get_device_module", lambda device: None)
        assert DeviceStreams(device).pinned
        assert not DeviceStreams(device, pinned=False).pinned


def test_nested_outputs_keep_their_shape() -> None:
    outputs = {"ids": torch.tensor([1]), "top": [torch.tensor([2]), (3, None)], "none": None}
    streams, produced = PlainStreams(), DeviceEvent()
    produced.passed.set()
    for copy in (
        copy_to_host(outputs, DeviceStreams("cpu"), None, None),
        PlainCopy(outputs, streams, produced),
    ):
        copied = copy.wait()
        assert copied["ids"].tolist() == [1]
        assert copied["top"][0].tolist() == [2]
        assert copied["top"][1] == (3, None)
        assert copied["none"] is None
        assert copy.sources["ids"] is outputs["ids"]


def test_without_pinned_memory_the_first_that_waits_copies_for_all() -> None:
    streams, produced = PlainStreams(), DeviceEvent()
    copy = copy_to_host({"ids": torch.tensor([7])}, streams, None, produced)
    assert isinstance(copy, PlainCopy)
    assert not produced.awaited.is_set(), "the scheduler waited at the launch"
    with ThreadPoolExecutor(1, thread_name_prefix="first") as first, ThreadPoolExecutor(2) as others:
        copying = first.submit(copy.wait)
        assert produced.awaited.wait(LIMIT_S), "the first that waits does not wait for the outputs"
        waiting = [others.submit(copy.wait) for _ in range(2)]
        assert streams.apart_in == []
        produced.passed.set()
        found = [each.result(LIMIT_S) for each in (copying, *waiting)]
    assert [values["ids"].tolist() for values in found] == [[7]] * 3
    assert streams.apart_in == ["first_0"]


def test_a_copy_that_failed_is_tried_again_by_the_next_that_waits() -> None:
    """So the scheduler gets the error of the device too, and not values that are not there."""
    streams, produced = PlainStreams(), DeviceEvent()
    produced.passed.set()

    class Lost(torch.Tensor):
        @classmethod
        def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            raise RuntimeError("the device is lost")

    copy = PlainCopy({"ids": torch.zeros(1).as_subclass(Lost)}, streams, produced)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="the device is lost"):
            copy.wait()


def test_on_cpu_an_upload_is_the_tensor_itself() -> None:
    tensor = torch.tensor([1, 2])
    assert upload(tensor, DeviceStreams("cpu")) is tensor


def test_an_upload_from_plain_memory_is_staged_apart_and_kept_until_it_is_copied() -> None:
    streams = PlainStreams()
    tensors = [torch.tensor([number]) for number in range(3)]
    uploaded = [upload(tensor, streams) for tensor in tensors[:2]]
    assert [each.tolist() for each in uploaded] == [[0], [1]]
    assert not {each.data_ptr() for each in uploaded} & {each.data_ptr() for each in tensors}
    assert len(streams.apart_in) == 2
    assert [kept.tolist() for kept, _ in streams._kept] == [[0], [1]]
    streams.events[0].passed.set()
    upload(tensors[2], streams)
    assert [kept.tolist() for kept, _ in streams._kept] == [[1], [2]]
