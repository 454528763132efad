"""What CANN refuses while a stream is captured on the simulated Ascend: its error codes, and sentences."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from rig.harness import Here, TeamKeeper
from rig.npu_ranks import run_program, start_team

pytestmark = pytest.mark.thorough

GLOBAL, THREAD_LOCAL, RELAXED = 0, 1, 2  # aclmdlRICaptureMode
SYNC = 1  # flag of an event
DEVICE_TO_HOST = 2  # aclrtMemcpyKind
BYTES = 64
CODES = {
    107000: "ACL_ERROR_RT_PARAM_INVALID",
    107024: "ACL_ERROR_RT_CAPTURE_DEPENDENCY",
    107025: "ACL_ERROR_RT_STREAM_UNJOINED",
    107027: "ACL_ERROR_RT_STREAM_CAPTURED",
    107028: "ACL_ERROR_RT_EVENT_CAPTURED",
    107029: "ACL_ERROR_RT_STREAM_NOT_CAPTURED",
    107030: "ACL_ERROR_RT_CAPTURE_MODE_NOT_SUPPORT",
    107032: "ACL_ERROR_STREAM_CAPTURE_CONFLICT",
    107033: "ACL_ERROR_STREAM_TASK_GROUP_STATUS",
    107036: "ACL_ERROR_RT_STREAM_CAPTURE_UNMATCHED",
    107038: "ACL_ERROR_RT_STREAM_CAPTURE_WRONG_THREAD",
    107041: "ACL_ERROR_RT_CAPTURE_MODE_BLOCK_ASYNC",
    507009: "ACL_ERROR_RT_TASK_TYPE_NOT_SUPPORT",
    507903: "ACL_ERROR_RT_STREAM_CAPTURE_INVALIDATED",
}


@pytest.fixture(scope="module")
def _rank_keeper() -> Iterator[TeamKeeper]:
    """Without poison."""
    keeper = TeamKeeper(lambda: start_team(1, memory_mb=256, kernels=True))
    yield keeper
    keeper.close()


# --- in the rank's process: CANN by its C interface ------------------------------------------------


class Cann:
    """Its functions by name: they return the error code, and the sentence that goes with it."""

    def __init__(self) -> None:
        self._library = ctypes.CDLL("libascendcl.so")
        self._library.aclGetRecentErrMsg.restype = ctypes.c_char_p

    def call(self, function: str, *arguments: Any) -> tuple[int, str]:
        code = self._library[function](*arguments)
        sentence = self._library.aclGetRecentErrMsg()
        return code, "" if sentence is None else sentence.decode()

    def do(self, function: str, *arguments: Any) -> None:
        code, sentence = self.call(function, *arguments)
        assert code == 0, f"{function}: {code} {sentence}"

    def made(self, function: str, *arguments: Any) -> ctypes.c_void_p:
        handle = ctypes.c_void_p()
        self.do(function, ctypes.byref(handle), *arguments)
        return handle

    def stream(self) -> ctypes.c_void_p:
        return self.made("aclrtCreateStream")

    def event(self, flags: int = SYNC) -> ctypes.c_void_p:
        return self.made("aclrtCreateEventExWithFlag", flags)

    def memory(self, *, pinned: bool = False) -> ctypes.c_void_p:
        if pinned:
            return self.made("aclrtMallocHost", ctypes.c_size_t(BYTES))
        return self.made("aclrtMalloc", ctypes.c_size_t(BYTES), 0)

    def begin(self, stream: ctypes.c_void_p, mode: int = GLOBAL) -> None:
        self.do("aclmdlRICaptureBegin", stream, mode)

    def end(self, stream: ctypes.c_void_p) -> tuple[int, str]:
        graph = ctypes.c_void_p()
        return self.call("aclmdlRICaptureEnd", stream, ctypes.byref(graph))

    def copy(self, to: Any, source: Any, stream: ctypes.c_void_p | None = None) -> tuple[int, str]:
        """At once, or on a stream."""
        size = ctypes.c_size_t(BYTES)
        if stream is None:
            return self.call("aclrtMemcpy", to, size, source, size, DEVICE_TO_HOST)
        return self.call("aclrtMemcpyAsync", to, size, source, size, DEVICE_TO_HOST, stream)

    def exchange(self, mode: int) -> int:
        value = ctypes.c_int(mode)
        self.do("aclmdlRICaptureThreadExchangeMode", ctypes.byref(value))
        return value.value


Found = dict[str, tuple[int, str]]


def looking_at_streams(here: Here) -> Found:
    cann = Cann()
    stream, status = cann.stream(), ctypes.c_int()
    cann.begin(stream)
    found = {
        "aclrtSynchronizeStream": cann.call("aclrtSynchronizeStream", stream),
        "aclrtSynchronizeStreamWithTimeout": cann.call("aclrtSynchronizeStreamWithTimeout", stream, 1000),
        "aclrtSynchronizeDevice": cann.call("aclrtSynchronizeDevice"),
        "aclrtStreamQuery": cann.call("aclrtStreamQuery", stream, ctypes.byref(status)),
        "aclrtDestroyStream": cann.call("aclrtDestroyStream", stream),
        "aclmdlRICaptureBegin": cann.call("aclmdlRICaptureBegin", stream, GLOBAL),
    }
    assert cann.end(stream) == (0, "")
    cann.do("aclrtSynchronizeStream", stream)
    cann.do("aclrtSynchronizeDevice")
    return found


def looking_at_events(here: Here) -> Found:
    cann = Cann()
    stream, event, status = cann.stream(), cann.event(), ctypes.c_int()
    milliseconds = ctypes.c_float()
    cann.begin(stream)
    cann.do("aclrtRecordEvent", event, stream)
    found = {
        "aclrtSynchronizeEvent": cann.call("aclrtSynchronizeEvent", event),
        "aclrtQueryEventStatus": cann.call("aclrtQueryEventStatus", event, ctypes.byref(status)),
        "aclrtQueryEventWaitStatus": cann.call("aclrtQueryEventWaitStatus", event, ctypes.byref(status)),
        "aclrtEventElapsedTime": cann.call("aclrtEventElapsedTime", ctypes.byref(milliseconds), event, event),
    }
    assert cann.end(stream) == (0, "")
    cann.do("aclrtSynchronizeEvent", event)
    return found


def event_of_outside(here: Here) -> Found:
    cann = Cann()
    stream, other, event, never = cann.stream(), cann.stream(), cann.event(), cann.event()
    cann.do("aclrtRecordEvent", event, other)
    cann.begin(stream)
    found = {
        "recorded outside": cann.call("aclrtStreamWaitEvent", stream, event),
        "never recorded": cann.call("aclrtStreamWaitEvent", stream, never),
    }
    assert cann.end(stream) == (0, "")
    return found


def events_of_two_captures(here: Here) -> Found:
    cann = Cann()
    one, other, event = cann.stream(), cann.stream(), cann.event()
    cann.begin(one)
    cann.begin(other)
    cann.do("aclrtRecordEvent", event, one)
    found = {"wait": cann.call("aclrtStreamWaitEvent", other, event)}
    return {**found, "end of one": cann.end(one), "end of other": cann.end(other)}


def an_event_that_no_stream_can_wait_for(here: Here) -> Found:
    """CANN leaves its records out of a capture: the stream ends with what is before."""
    cann = Cann()
    stream, side = cann.stream(), cann.stream()
    forth, back, progress = cann.event(), cann.event(), cann.event(flags=2)
    cann.begin(stream)
    cann.do("aclrtRecordEvent", forth, stream)
    cann.do("aclrtStreamWaitEvent", side, forth)
    cann.do("aclrtRecordEvent", back, side)
    cann.do("aclrtStreamWaitEvent", stream, back)
    cann.do("aclrtRecordEvent", progress, side)
    return {"end": cann.end(stream)}


def ends(here: Here) -> Found:
    """Ways to end a capture that are wrong."""
    cann = Cann()
    found = {"nothing begun": cann.end(cann.stream())}

    stream, side, forth, back = cann.stream(), cann.stream(), cann.event(), cann.event()
    cann.begin(stream)
    cann.do("aclrtRecordEvent", forth, stream)
    cann.do("aclrtStreamWaitEvent", side, forth)
    found["another stream"] = cann.end(side)
    found["no record"] = cann.end(stream)

    cann.begin(stream)
    cann.do("aclrtRecordEvent", forth, stream)
    cann.do("aclrtStreamWaitEvent", side, forth)
    cann.do("aclrtRecordEvent", back, side)
    found["no wait"] = cann.end(stream)

    cann.begin(stream)
    cann.do("aclrtRecordEvent", forth, stream)
    cann.do("aclrtStreamWaitEvent", side, forth)
    cann.do("aclrtRecordEvent", back, side)
    cann.do("aclrtStreamWaitEvent", stream, back)
    cann.do("aclrtMemsetAsync", cann.memory(), ctypes.c_size_t(BYTES), 0, ctypes.c_size_t(BYTES), side)
    found["a task behind the record"] = cann.end(stream)

    cann.begin(stream)
    cann.do("aclmdlRICaptureTaskGrpBegin", stream)
    found["open task group"] = cann.end(stream)

    cann.begin(stream)
    thread = threading.Thread(target=lambda: found.update({"another thread": cann.end(stream)}))
    thread.start()
    thread.join()
    cann.do("aclrtSynchronizeStream", stream)
    return found


def copies(here: Here) -> Found:
    cann = Cann()
    stream, device, pinned = cann.stream(), cann.memory(), cann.memory(pinned=True)
    pageable = ctypes.create_string_buffer(BYTES)
    size = ctypes.c_size_t(BYTES)
    cann.do("aclrtMemset", device, size, 5, size)
    cann.begin(stream)
    found = {
        "aclrtMemcpy": cann.copy(pageable, device),
        "aclrtMemset": cann.call("aclrtMemset", device, size, 0, size),
        "aclrtMemcpyAsync": cann.copy(pageable, device, stream),
        "pinned": cann.copy(pinned, device, stream),
    }
    assert pageable.raw == bytes(BYTES)
    before = cann.exchange(RELAXED)
    assert before == GLOBAL
    found["relaxed"] = cann.copy(pageable, device, stream)  # at once
    assert pageable.raw == bytes([5]) * BYTES
    assert cann.exchange(before) == RELAXED
    assert cann.end(stream) == (0, "")
    assert cann.copy(pageable, device) == (0, "")
    return found


def copies_in_another_thread(here: Here) -> Found:
    """By the mode of a capture that goes on in this one."""
    cann = Cann()
    device, pageable, stream = cann.memory(), ctypes.create_string_buffer(BYTES), cann.stream()
    found = {}
    for name, mode in (("global", GLOBAL), ("thread local", THREAD_LOCAL), ("relaxed", RELAXED)):
        cann.begin(stream, mode)
        thread = threading.Thread(target=lambda name=name: found.update({name: cann.copy(pageable, device)}))
        thread.start()
        thread.join()
        found[f"{name}, here"] = cann.copy(pageable, device)
        cann.end(stream)
    return found


def the_default_stream(here: Here) -> Found:
    return {"begin": Cann().call("aclmdlRICaptureBegin", ctypes.c_void_p(), GLOBAL)}


def task_groups(here: Here) -> Found:
    cann = Cann()
    stream, other, memory, group = cann.stream(), cann.stream(), cann.memory(), ctypes.c_void_p()
    handle = ctypes.byref(group)
    found = {
        "begin without a capture": cann.call("aclmdlRICaptureTaskGrpBegin", stream),
        "end without a capture": cann.call("aclmdlRICaptureTaskGrpEnd", stream, handle),
        "end of no update": cann.call("aclmdlRICaptureTaskUpdateEnd", stream),
    }
    cann.begin(stream)
    found["end of none"] = cann.call("aclmdlRICaptureTaskGrpEnd", stream, handle)
    cann.do("aclmdlRICaptureTaskGrpBegin", stream)
    found["begin twice"] = cann.call("aclmdlRICaptureTaskGrpBegin", stream)
    cann.do("aclrtMemsetAsync", memory, ctypes.c_size_t(BYTES), 0, ctypes.c_size_t(BYTES), stream)
    found["not an operator"] = cann.call("aclmdlRICaptureTaskGrpEnd", stream, handle)
    cann.do("aclmdlRICaptureTaskGrpBegin", stream)
    cann.do("aclmdlRICaptureTaskGrpEnd", stream, handle)
    found["update in a capture"] = cann.call("aclmdlRICaptureTaskUpdateBegin", stream, group)
    assert cann.end(stream) == (0, "")
    cann.do("aclmdlRICaptureTaskUpdateBegin", stream, group)
    found["update twice"] = cann.call("aclmdlRICaptureTaskUpdateBegin", stream, group)
    found["update on two streams"] = cann.call("aclmdlRICaptureTaskUpdateBegin", other, group)
    cann.do("aclmdlRICaptureTaskUpdateEnd", stream)
    return found


# --- in the rank's process: torch_npu --------------------------------------------------------------


def npu() -> Any:
    return torch.get_device_module("npu")


def in_a_graph(here: Here, what: str) -> str:
    """The message of the exception that a capture of this raises."""
    x = torch.ones(4, device="npu")
    host = torch.ones(4)
    work: dict[str, Callable[[], Any]] = {
        "item": lambda: x.sum().item(),
        "nonzero": lambda: x.nonzero(),
        "to the host": lambda: x.cpu(),
        "from the host": lambda: host.to("npu"),
        "stream": lambda: npu().current_stream().synchronize(),
        "device": lambda: npu().synchronize(),
    }
    try:
        with npu().graph(npu().NPUGraph()):
            work[what]()
    except (RuntimeError, NotImplementedError) as error:
        return str(error)
    return "nothing was raised"


def printing_a_graph(here: Here, path: str) -> str:
    """A function of the family that is not simulated: torch_npu looks for it by its name."""
    x, graph = torch.ones(4, device="npu"), npu().NPUGraph()
    with npu().graph(graph):
        x.add_(1)
    try:
        graph.debug_dump(path)
    except RuntimeError as error:
        return str(error)
    return "nothing was raised"


# --- tests ---------------------------------------------------------------------------------------


def expect(found: Found, code: int, *names: str) -> None:
    """These were refused with that code, its name, and a sentence that names the call."""
    for name in names:
        assert found[name][0] == code, (name, found[name])
        assert found[name][1].startswith("simulated Ascend: acl"), found[name]
        assert found[name][1].endswith(f": {CODES[code]} ({code})"), found[name]


def test_a_stream_that_captures_cannot_be_synchronised_or_destroyed(rank: Callable[..., Any]) -> None:
    found = rank(looking_at_streams)
    expect(found, 107027, *found)
    for call, (_, sentence) in found.items():
        assert call.removesuffix("WithTimeout") in sentence


def test_an_event_recorded_in_a_capture_cannot_be_looked_at(rank: Callable[..., Any]) -> None:
    found = rank(looking_at_events)
    expect(found, 107028, *found)
    assert all(call in sentence for call, (_, sentence) in found.items())


def test_a_capture_does_not_wait_for_an_event_of_outside(rank: Callable[..., Any]) -> None:
    found = rank(event_of_outside)
    expect(found, 107024, "recorded outside")
    assert found["never recorded"] == (0, "")


def test_two_captures_do_not_wait_for_each_other(rank: Callable[..., Any]) -> None:
    found = rank(events_of_two_captures)
    expect(found, 107032, "wait")
    expect(found, 507903, "end of one", "end of other")


def test_a_record_that_no_stream_can_wait_for_is_left_out(rank: Callable[..., Any]) -> None:
    assert rank(an_event_that_no_stream_can_wait_for) == {"end": (0, "")}


def test_how_a_capture_cannot_end(rank: Callable[..., Any]) -> None:
    found = rank(ends)
    expect(found, 107029, "nothing begun")
    expect(found, 107036, "another stream")
    expect(found, 107033, "open task group")
    expect(found, 107038, "another thread")
    expect(found, 107025, "no record", "no wait", "a task behind the record")


def test_copies_that_a_capture_refuses(rank: Callable[..., Any]) -> None:
    found = rank(copies)
    expect(found, 107030, "aclrtMemcpy", "aclrtMemset")
    expect(found, 107041, "aclrtMemcpyAsync")
    assert found["pinned"] == found["relaxed"] == (0, "")


def test_the_mode_of_a_capture_says_which_threads_it_restricts(rank: Callable[..., Any]) -> None:
    found = rank(copies_in_another_thread)
    expect(found, 107030, "global", "global, here", "thread local, here")
    assert found["thread local"] == found["relaxed"] == found["relaxed, here"] == (0, "")


def test_the_default_stream_captures_nothing(rank: Callable[..., Any]) -> None:
    expect(rank(the_default_stream), 107000, "begin")


def test_task_groups_at_the_wrong_time(rank: Callable[..., Any]) -> None:
    found = rank(task_groups)
    expect(found, 107029, "begin without a capture", "end without a capture")
    expect(found, 107027, "update in a capture")
    expect(found, 507009, "not an operator")
    assert "memset is none" in found["not an operator"][1]
    expect(
        found,
        107033,
        "end of no update",
        "end of none",
        "begin twice",
        "update twice",
        "update on two streams",
    )


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("item", "aclrtSynchronizeStream of stream"),
        ("nonzero", "aten::nonzero cannot be captured in a graph"),
        ("to the host", "aclrtMemcpy during a capture"),
        ("from the host", "aclrtMemcpy during a capture"),
        ("stream", "aclrtSynchronizeStream of stream"),
        ("device", "aclrtSynchronizeDevice of device 0 while stream"),
    ],
)
def test_torch_npu_reports_the_sentence(rank: Callable[..., Any], what: str, message: str) -> None:
    found = rank(in_a_graph, what)
    assert "simulated Ascend: " in found
    assert message in found
    assert any(str(code) in found and name in found for code, name in CODES.items())


def test_what_is_not_simulated_is_reported_by_its_name(rank: Callable[..., Any], tmp_path: Path) -> None:
    assert "aclmdlRIDebugJsonPrint" in rank(printing_a_graph, str(tmp_path / "graph.json"))


@pytest.mark.parametrize(
    ("use", "message"),
    [
        ("aclmdlRIExecuteAsync(handle, stream)", "the use of a graph that does not exist, or no longer,"),
        (
            "aclmdlRICaptureTaskUpdateBegin(stream, handle)",
            "the update of a task group that does not exist, or no longer,",
        ),
        (
            "aclrtCreateEventExWithFlag(ctypes.byref(handle), 0x20)",
            "an event with the flag ACL_EVENT_EXTERNAL",
        ),
    ],
)
def test_what_is_not_simulated_ends_the_process(use: str, message: str) -> None:
    program = f"""
import ctypes
cann = ctypes.CDLL("libascendcl.so")
handle, stream = ctypes.c_void_p(1234), ctypes.c_void_p()
cann.aclrtSetDevice(0)
cann.aclrtCreateStream(ctypes.byref(stream))
cann.{use}
"""
    ended = run_program(program)
    assert ended.returncode == -6
    assert f"simulated Ascend: {message} is not simulated" in ended.stderr
