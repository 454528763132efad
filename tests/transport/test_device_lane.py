"""The device lane over gloo: layout, slots that own their bytes, receives that are posted early."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import msgspec
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rig.harness import Here, Team, results
from rig.samples import Sample, assert_same, realise, samples
from sglang_npu_pp.errors import TransportError
from sglang_npu_pp.streams import PassedEvent
from sglang_npu_pp.transport.device_lane import ALIGNMENT, DeviceLane, pack_layout, slot_bytes_for, unpack
from sglang_npu_pp.transport.message import Kind, Message, TensorSpec, byte_view, describe

pytestmark = pytest.mark.timeout(180)

MEBIBYTE = 1 << 20
sample_dicts = st.dictionaries(st.text(max_size=6), samples, max_size=5)


def specs_of(tensors: dict[str, torch.Tensor], cut: Sequence[str] = (), count: int = 1) -> list[TensorSpec]:
    """Pretend that the tensors `cut` are one of `count` slices of something larger."""
    return [
        msgspec.structs.replace(spec, sliced=count, shape=(count, tensors[spec.name].numel()))
        if spec.name in cut and tensors[spec.name].numel()
        else spec
        for spec in describe(tensors)
    ]


# --- layout ------------------------------------------------------------------------------------


@given(dicts=sample_dicts, count=st.integers(2, 4), data=st.data())
def test_tensors_lie_apart_aligned_and_in_order(
    dicts: dict[str, Sample], count: int, data: st.DataObject
) -> None:
    tensors = realise(dicts)
    cut = data.draw(st.lists(st.sampled_from(sorted(tensors)), unique=True)) if tensors else []
    specs, nbytes = pack_layout(specs_of(tensors, cut, count))
    assert [spec.name for spec in specs] == list(tensors)
    end = 0
    for spec in specs:
        assert spec.offset % ALIGNMENT == 0
        assert spec.offset >= end
        assert spec.sizes.nbytes == tensors[spec.name].nbytes
        end = spec.offset + spec.sizes.nbytes
    assert end <= nbytes < end + ALIGNMENT


@given(dicts=sample_dicts, data=st.data())
def test_what_is_packed_by_a_layout_is_unpacked_by_it(dicts: dict[str, Sample], data: st.DataObject) -> None:
    tensors = realise(dicts)
    cut = data.draw(st.lists(st.sampled_from(sorted(tensors)), unique=True)) if tensors else []
    specs, nbytes = pack_layout(specs_of(tensors, cut, 2))
    buffer = torch.zeros(nbytes, dtype=torch.uint8)
    for spec in specs:
        source = tensors[spec.name].reshape(-1)
        buffer[spec.offset : spec.offset + source.nbytes].view(source.dtype).copy_(source)
    expected = {s.name: tensors[s.name].reshape(-1) if s.sliced > 1 else tensors[s.name] for s in specs}
    assert_same(unpack(buffer, specs), expected)


def test_unpacked_tensors_are_views() -> None:
    specs, nbytes = pack_layout(describe({"a": torch.zeros(4), "b": torch.zeros(2, 2)}))
    buffer = torch.zeros(nbytes, dtype=torch.uint8)
    views = unpack(buffer, specs)
    views["b"].fill_(1)
    assert buffer.count_nonzero() == 2 * views["b"].numel()  # 1.0 has two bytes that are not 0
    assert not views["a"].any()


# --- transfers ---------------------------------------------------------------------------------


def device_lane(here: Here) -> DeviceLane:
    assert here.link.device_lane is not None
    return here.link.device_lane


def send_messages(here: Here, messages: list[dict[str, Sample]]) -> int:
    """Send each and spoil its sources at once; returns how often a send had to wait for a slot."""
    counters = here.telemetry.sending("proxy")
    before = counters.backpressure
    for message in messages:
        tensors = realise(message)
        specs, nbytes = pack_layout(describe(tensors))
        sent = Message(Kind.PROXY, specs=tuple(specs), device_nbytes=nbytes)
        device_lane(here).send(tensors, sent, counters)
        for tensor in tensors.values():
            if tensor.is_contiguous():
                spoiled = byte_view(tensor)
                spoiled[:] = bytes(len(spoiled))
    return counters.backpressure - before


def layout_of(message: dict[str, Sample]) -> tuple[list[TensorSpec], int]:
    return pack_layout(describe(realise(message)))


def receive_messages(here: Here, messages: list[dict[str, Sample]], at_once: int = 1) -> None:
    """Post the receives of `at_once` messages, then wait for them, the last one first."""
    for begin in range(0, len(messages), at_once):
        batch = messages[begin : begin + at_once]
        layouts = [layout_of(message) for message in batch]
        posted = [device_lane(here).post_receive(nbytes) for _, nbytes in layouts]
        for receive, (specs, _), message in reversed(list(zip(posted, layouts, batch, strict=True))):
            assert_same(unpack(receive.wait(), specs), realise(message))
        for receive in posted:
            receive.release(PassedEvent())


nonempty = sample_dicts.filter(lambda message: any(0 not in sample.shape for sample in message.values()))


@settings(max_examples=20)
@given(messages=st.lists(nonempty, min_size=1, max_size=9), at_once=st.integers(1, 3))
def test_messages_arrive_though_their_sources_are_overwritten(
    team: Team, messages: list[dict[str, Sample]], at_once: int
) -> None:
    """More messages than slots, several receives posted, waited for in another order."""
    a, b = team.open_links(2, slots=3)
    results([a.start(send_messages, messages), b.start(receive_messages, messages, at_once)])


def slot_buffers(here: Here) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """Address and bytes of the memory behind the send slots and the receive slots."""
    lane = device_lane(here)
    sending, receiving = (
        sorted((slot.buffer.data_ptr(), slot.buffer.numel()) for slot in slots)
        for slots in (lane._send_slots, lane.free_receive_slots)
    )
    return sending, receiving


def test_a_message_that_fits_into_what_is_reserved_needs_no_memory(team: Team) -> None:
    ranks = team.open_links(3, slots=2, slot_bytes=4 * MEBIBYTE)
    before = [rank.call(slot_buffers) for rank in ranks]
    assert [[len(slots) for slots in each] for each in before] == [[2, 0], [2, 2], [0, 2]]
    assert all(size == 4 * MEBIBYTE for each in before for slots in each for _, size in slots)
    sizes = [10, 4 * MEBIBYTE, 5, 3 * MEBIBYTE]
    messages = [{"t": Sample(torch.uint8, (size,), seed)} for seed, size in enumerate(sizes)]
    results(
        [
            ranks[0].start(send_messages, messages),
            ranks[1].start(pass_on, messages),
            ranks[2].start(receive_messages, messages, 2),
        ]
    )
    assert [rank.call(slot_buffers) for rank in ranks] == before


def warnings_of_sending(here: Here, messages: list[dict[str, Sample]]) -> list[str]:
    said: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("sglang_npu_pp").addHandler(handler)
    try:
        send_messages(here, messages)
    finally:
        logging.getLogger("sglang_npu_pp").removeHandler(handler)
    return said


def test_slots_grow_to_a_larger_message_and_say_so(team: Team) -> None:
    """Once for each doubling."""
    a, b = team.open_links(2, slots=2, slot_bytes=MEBIBYTE)
    sizes = [10, 3 * MEBIBYTE, 5, 100, 4 * MEBIBYTE, 4 * MEBIBYTE, 1, 8 * MEBIBYTE]
    messages = [{"t": Sample(torch.uint8, (size,), seed)} for seed, size in enumerate(sizes)]
    said, _ = results([a.start(warnings_of_sending, messages), b.start(receive_messages, messages, 2)])
    assert said == [
        f"stage 0 rank 0: a message of {megabytes} MB does not fit into the slots of 1.0 MB that the device "
        "lane has reserved; they grow, by memory that SGLang has not counted: lower --mem-fraction-static "
        "if that is tight."
        for megabytes in ("3.1", "8.4")
    ]


@given(
    tokens=st.integers(1, 300),
    hidden=st.integers(1, 300),
    dtype=st.sampled_from([torch.bfloat16, torch.float32]),
    ranks=st.sampled_from([1, 2, 4]),
    indices=st.integers(0, 70),
)
def test_hidden_states_and_residual_fit_into_a_slot(
    tokens: int, hidden: int, dtype: torch.dtype, ranks: int, indices: int
) -> None:
    """Also when each rank sends a slice, which those send whole that cannot be cut."""
    sent = tokens * hidden // ranks if tokens * hidden % ranks == 0 else 0
    tensors = {name: torch.zeros(sent, dtype=dtype) for name in ("hidden_states", "residual")}
    tensors["topk_indices"] = torch.zeros(tokens, indices, dtype=torch.int32)
    _, nbytes = pack_layout(describe(tensors))
    assert nbytes <= slot_bytes_for(tokens, hidden, dtype.itemsize, ranks, indices)


def pass_on(here: Here, messages: list[dict[str, Sample]]) -> None:
    receive_messages(here, messages)
    send_messages(here, messages)


def test_a_message_travels_down_three_stages(team: Team) -> None:
    ranks = team.open_links(3, slots=2)
    messages = [
        {"hidden": Sample(torch.bfloat16, (16, 32), n), "scales": Sample(torch.float8_e4m3fn, (9,), n)}
        for n in range(7)
    ]
    results(
        [
            ranks[0].start(send_messages, messages),
            ranks[1].start(pass_on, messages),
            ranks[2].start(receive_messages, messages),
        ]
    )


def announce_full_slots(here: Here) -> None:
    """From now on a send that finds its slot in use sends the note "full" and then waits."""
    lane = device_lane(here)
    original = lane._wait_until_sent

    def noted(slot: Any, counters: Any) -> None:
        if slot.work is not None and not slot.work.is_completed():
            here.note("full")
        original(slot, counters)

    setattr(lane, "_wait_until_sent", noted)  # noqa: B010


def test_a_sender_waits_when_all_its_slots_are_in_use_and_that_is_counted(team: Team) -> None:
    a, b = team.open_links(2, slots=2)
    a.call(announce_full_slots)
    messages = [{"t": Sample(torch.uint8, (MEBIBYTE,), seed)} for seed in range(3)]
    sending = a.start(send_messages, messages)  # gloo sends nothing before the receive is posted
    assert sending.note() == "full"
    receiving = b.start(receive_messages, messages)
    assert sending.result() == 1
    receiving.result()


def describe_lane(here: Here) -> tuple[bool, bool]:
    lane = device_lane(here)
    return lane._previous is not None, lane._following is not None


def send_nowhere(here: Here) -> None:
    send_messages(here, [{"t": Sample(torch.uint8, (1,))}])


def test_the_lane_has_one_direction(team: Team) -> None:
    ranks = team.open_links(3)
    ends = [rank.call(describe_lane) for rank in ranks]
    assert ends == [(False, True), (True, True), (True, False)]
    with pytest.raises(TransportError, match="stage 2 rank 0: the last stage has no next one"):
        ranks[2].call(send_nowhere)
