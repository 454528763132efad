"""The format of a message: nothing is lost, nothing is copied, and nothing damaged is believed."""

from __future__ import annotations

import pickle
import struct
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
import zmq
from hypothesis import example, given, settings
from hypothesis import strategies as st

from rig.samples import DTYPES, Sample, assert_same, assert_same_tensor, bits, python_values, realise, samples
from sglang_npu_pp.errors import MessageError
from sglang_npu_pp.transport.message import (
    ALWAYS_CHECKED_BYTES,
    INLINE_BYTES,
    PROTOCOL,
    Buffer,
    Header,
    Kind,
    Message,
    TensorSpec,
    byte_view,
    decode,
    dtype_name,
    encode,
    read_header,
    tensor_over,
    torch_dtype,
)

BIG = 4 * ALWAYS_CHECKED_BYTES
SMALL = {
    "ids": Sample(torch.int64, (5,), 1),
    "hidden": Sample(torch.bfloat16, (3, 4), 2),
    "nothing": Sample(torch.float32, (0, 7)),
}
SEVERAL_FRAMES = {
    "first": Sample(torch.uint8, (INLINE_BYTES,), 3),
    **SMALL,
    "second": Sample(torch.int16, (INLINE_BYTES,), 4),
}


def as_sent(message: Message, *, check_all: bool = False) -> list[bytearray]:
    """The frames of `message` as another process gets them: in memory of their own."""
    return [bytearray(frame) for frame in encode(message, source=1, number=3, check_all=check_all)]


def as_read(frames: Sequence[Buffer], *, check_all: bool = False) -> Message:
    return decode(read_header(frames[0]), frames, check_all=check_all)


def message_of(samples: dict[str, Sample], values: Any = ("top-k", [1, 2, 3])) -> Message:
    tensors = {name: sample.tensor() for name, sample in samples.items()}
    return Message(Kind.OUTPUT, 2, 17, keys=(*tensors, "rest"), tensors=tensors, values=values)


def seal(body: bytes) -> bytes:
    """Frame 0 with a checksum that is right, whatever is in it."""
    return body + struct.pack("<I", zlib.crc32(body))


def reseal(header: Header) -> bytes:
    """Frame 0 with a checksum that is right, whatever the header says."""
    return seal(msgspec.msgpack.encode(header))


# --- round trip --------------------------------------------------------------------------------


def test_every_dtype_that_torch_can_hold_is_tried() -> None:
    must = {"bfloat16", "float16", "float32", "float64", "bool", "int8", "int64", "uint8", "uint16"}
    must |= {"float8_e4m3fn", "float8_e5m2", "complex64", "complex128"}
    assert must <= {dtype_name(dtype) for dtype in DTYPES}


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("shape", [(), (0,), (3, 0, 2), (1,), (7,), (3, 5), (2, INLINE_BYTES)], ids=str)
def test_a_tensor_of_any_dtype_arrives_bit_by_bit(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    tensor = Sample(dtype, shape, seed=5).tensor()
    read = as_read(as_sent(Message(Kind.PROXY, keys=("t",), tensors={"t": tensor})))
    assert_same_tensor(read.tensors["t"], tensor)


@given(
    tensors=st.dictionaries(st.text(max_size=8), samples, max_size=5),
    values=python_values,
    kind=st.sampled_from([kind for kind in Kind if kind > Kind.GOODBYE]),
    slot=st.integers(-1, 2**31),
    iteration=st.integers(-1, 2**62),
    batch=st.text(max_size=40),
    check_all=st.booleans(),
)
@settings(max_examples=200)
def test_a_message_arrives_as_it_was_sent(
    tensors: dict[str, Sample],
    values: Any,
    kind: Kind,
    slot: int,
    iteration: int,
    batch: str,
    check_all: bool,
) -> None:
    sent = Message(kind, slot, iteration, batch, tuple(tensors), realise(tensors), realise(values))
    read = as_read(as_sent(sent, check_all=check_all), check_all=check_all)
    assert (read.kind, read.slot, read.iteration, read.batch) == (kind, slot, iteration, batch)
    assert (read.source, read.number) == (1, 3)
    assert read.keys == tuple(tensors)
    assert_same(read.tensors, sent.tensors)
    assert_same(read.values, sent.values)


@given(st.permutations(["b", "a", "d", "c"]))
def test_keys_keep_their_order(keys: list[str]) -> None:
    sent = Message(Kind.TENSORS, keys=tuple(keys), tensors={key: torch.ones(1) for key in keys})
    assert as_read(as_sent(sent)).keys == tuple(keys)


def test_slices_and_devices_are_described() -> None:
    part = torch.arange(6.0)
    sent = Message(
        Kind.PROXY,
        keys=("cut", "whole"),
        tensors={"cut": part, "whole": torch.ones(2, 2)},
        specs=(
            TensorSpec("cut", "float32", (2, 12), "npu", sliced=4),
            TensorSpec("whole", "float32", (2, 2), "cpu"),
        ),
    )
    read = as_read(as_sent(sent))
    assert read.specs == sent.specs
    assert_same_tensor(read.tensors["cut"], part)
    assert_same_tensor(read.tensors["whole"], torch.ones(2, 2))


def test_device_tensors_are_only_described() -> None:
    specs = (
        TensorSpec("hidden", "bfloat16", (2, 3), "npu", 1, 0),
        TensorSpec("residual", "float32", (8,), "npu", 2, 512),
    )
    sent = Message(Kind.PROXY, keys=("hidden", "residual"), specs=specs, device_nbytes=1024)
    frames = as_sent(sent)
    assert len(frames) == 1
    read = as_read(frames)
    assert (read.specs, read.device_nbytes, read.tensors) == (specs, 1024, {})
    assert [spec.sizes.nbytes for spec in read.specs] == [12, 16]


@pytest.mark.parametrize("value", [0, False, "", [], {}, (), b""], ids=repr)
def test_a_false_value_is_a_value(value: object) -> None:
    assert as_read(as_sent(Message(Kind.OBJECT, values=value))).values == value


def test_a_message_may_be_empty() -> None:
    read = as_read(as_sent(Message(Kind.REQUESTS)))
    assert (read.keys, read.tensors, read.values) == ((), {}, None)


def test_one_element_of_a_column_arrives() -> None:
    """What a batch of one leaves behind: contiguous for torch, and yet with the stride of its column."""
    tensor = torch.arange(8).view(2, 4)[:1, 1]
    assert tensor.is_contiguous()
    assert tensor.stride() == (4,)
    read = as_read(as_sent(Message(Kind.OUTPUT, keys=("t",), tensors={"t": tensor}, values=[tensor])))
    assert torch.equal(read.tensors["t"], tensor)
    assert torch.equal(read.values[0], tensor)


def test_a_view_of_a_conjugate_arrives_as_its_values() -> None:
    tensor = torch.tensor([1 + 2j, 3 - 4j]).conj()
    read = as_read(as_sent(Message(Kind.PROXY, keys=("t",), tensors={"t": tensor})))
    assert torch.equal(read.tensors["t"], tensor.resolve_conj())


def test_a_nested_tensor_that_needs_a_gradient_arrives_as_its_values() -> None:
    tensor = torch.ones(3, requires_grad=True)
    (read,) = as_read(as_sent(Message(Kind.REQUESTS, values=[tensor]))).values
    assert not read.requires_grad
    assert torch.equal(read, torch.ones(3))


# --- frames ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("nbytes", "frames"), [(INLINE_BYTES - 1, 1), (INLINE_BYTES, 2)])
def test_small_buffers_lie_in_the_first_frame(nbytes: int, frames: int) -> None:
    sample = Sample(torch.uint8, (nbytes,), 6)
    sent = as_sent(Message(Kind.PROXY, keys=("t", "v"), tensors={"t": sample.tensor()}, values={"v": 1}))
    assert len(sent) == frames
    assert_same_tensor(as_read(sent).tensors["t"], sample.tensor())


def test_small_and_large_buffers_keep_their_places() -> None:
    sent = message_of(SEVERAL_FRAMES, values=[np.arange(3), np.arange(INLINE_BYTES), "rest"])
    frames = as_sent(sent)
    assert [len(frame) for frame in frames[1:]] == [INLINE_BYTES, 2 * INLINE_BYTES, 8 * INLINE_BYTES]
    read = as_read(frames)
    assert_same(read.tensors, sent.tensors)
    assert_same(read.values, sent.values)


# --- no copies ---------------------------------------------------------------------------------


def address(buffer: Buffer) -> int:
    found: int = np.frombuffer(buffer, dtype=np.uint8).ctypes.data
    return found


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn, torch.bool, torch.int64], ids=str)
def test_encoding_refers_to_the_memory_of_a_contiguous_tensor(dtype: torch.dtype) -> None:
    tensor = Sample(dtype, (BIG,)).tensor()
    _, frame = encode(
        Message(Kind.PROXY, keys=("t",), tensors={"t": tensor}), source=0, number=0, check_all=False
    )
    assert address(frame) == tensor.data_ptr()


def test_encoding_refers_to_the_memory_of_nested_tensors_and_arrays() -> None:
    tensor, array = torch.ones(BIG), np.ones(BIG)
    frames = encode(
        Message(Kind.REQUESTS, values=[tensor, {"a": array}]), source=0, number=0, check_all=False
    )
    assert [address(frame) for frame in frames[1:]] == [tensor.data_ptr(), array.ctypes.data]


@pytest.fixture
def wire() -> Iterator[tuple[zmq.Socket, zmq.Socket]]:
    """Two connected sockets."""
    with zmq.Context() as context, context.socket(zmq.PAIR) as near, context.socket(zmq.PAIR) as far:
        port = near.bind_to_random_port("tcp://127.0.0.1")
        far.connect(f"tcp://127.0.0.1:{port}")
        far.setsockopt(zmq.RCVTIMEO, 10_000)
        yield near, far


def over(wire: tuple[zmq.Socket, zmq.Socket], message: Message) -> tuple[Message, list[Buffer]]:
    """The message behind a real socket, and the memory that it was received into."""
    near, far = wire
    near.send_multipart(encode(message, source=0, number=0, check_all=False), copy=False)
    frames: list[Buffer] = [frame.buffer for frame in far.recv_multipart(copy=False)]
    return as_read(frames), frames


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e5m2, torch.float64], ids=str)
def test_a_large_tensor_is_used_where_it_was_received(
    wire: tuple[zmq.Socket, zmq.Socket], dtype: torch.dtype
) -> None:
    tensor = Sample(dtype, (BIG,)).tensor()
    read, frames = over(wire, Message(Kind.PROXY, keys=("t",), tensors={"t": tensor}))
    assert read.tensors["t"].data_ptr() == address(frames[1])
    assert_same_tensor(read.tensors["t"], tensor)


@pytest.mark.filterwarnings("error")  # torch warns about memory that must not be written
def test_received_tensors_and_arrays_can_be_written(wire: tuple[zmq.Socket, zmq.Socket]) -> None:
    sent = Message(
        Kind.PROXY,
        keys=("t", "v"),
        tensors={"t": torch.zeros(BIG)},
        values={"v": [torch.zeros(3), np.zeros(9)]},
    )
    read, _ = over(wire, sent)
    nested, array = read.values["v"]
    for tensor in (read.tensors["t"], nested):
        assert torch.equal(tensor.add_(1), torch.ones_like(tensor))
    assert array.flags.writeable
    assert not sent.tensors["t"].any()


@given(sample=samples, shift=st.integers(1, 15))
def test_bytes_that_are_not_aligned_are_copied_to_where_they_are(sample: Sample, shift: int) -> None:
    tensor = sample.tensor()
    memory = bytearray(shift) + bytearray(bits(tensor))
    read = tensor_over(memoryview(memory)[shift:], tensor.dtype, tensor.shape)
    assert_same_tensor(read, tensor)
    assert read.data_ptr() % tensor.dtype.itemsize == 0


def test_the_bytes_of_a_tensor_are_counted_in_elements() -> None:
    assert len(byte_view(torch.zeros(3, 2, dtype=torch.complex64))) == 48
    assert len(byte_view(torch.zeros(8, dtype=torch.complex64)[4:4:2])) == 0
    assert len(byte_view(torch.zeros(8, dtype=torch.complex64)[4:5:2])) == 8


# --- damage ------------------------------------------------------------------------------------


def test_a_header_cut_anywhere_is_refused() -> None:
    head = bytes(as_sent(message_of(SMALL))[0])
    for length in range(len(head)):
        with pytest.raises(MessageError):
            read_header(head[:length])
    with pytest.raises(MessageError):
        read_header(head + b"\0")


def test_a_header_with_any_one_byte_changed_is_refused() -> None:
    head = as_sent(message_of(SMALL))[0]
    for position in range(len(head)):
        for change in (0x01, 0x80, 0xFF):
            damaged = bytearray(head)
            damaged[position] ^= change
            with pytest.raises(MessageError):
                read_header(damaged)


def test_frames_with_any_one_byte_changed_are_refused() -> None:
    frames = as_sent(message_of(SEVERAL_FRAMES))
    assert len(frames) == 3
    for index, frame in enumerate(frames[1:], start=1):
        for position in [*range(0, len(frame), 101), len(frame) - 1]:
            damaged = [bytearray(other) for other in frames]
            damaged[index][position] ^= 0x10
            with pytest.raises(MessageError, match="checksum"):
                as_read(damaged)


@given(position=st.integers(0, BIG - 1), change=st.integers(1, 255))
def test_large_frames_are_checked_where_the_setting_says_so(position: int, change: int) -> None:
    sent = Message(Kind.PROXY, keys=("t",), tensors={"t": torch.zeros(BIG, dtype=torch.uint8)})
    frames = as_sent(sent, check_all=True)
    frames[1][position] ^= change
    with pytest.raises(MessageError, match="checksum"):
        as_read(frames, check_all=True)


def test_frames_that_are_missing_cut_repeated_or_swapped_are_refused() -> None:
    head, *rest = as_sent(message_of(SEVERAL_FRAMES))
    damaged = [rest[:-1], rest[1:], [], [*rest, rest[-1]], [*rest, bytearray()], rest[::-1]]
    damaged += [[*rest[:i], rest[i][:-1], *rest[i + 1 :]] for i in range(len(rest))]
    damaged += [[*rest[:i], rest[i] + b"\0", *rest[i + 1 :]] for i in range(len(rest))]
    for frames in damaged:
        with pytest.raises(MessageError):
            as_read([head, *frames])


@pytest.mark.parametrize("change", [lambda small: small[:-1], lambda small: small + b"\0", lambda small: b""])
def test_small_buffers_that_are_cut_under_a_right_checksum_are_refused(
    change: Callable[[bytes], bytes],
) -> None:
    head, *rest = as_sent(message_of(SEVERAL_FRAMES))
    header = read_header(head)
    first, ids, *others = header.buffers
    assert isinstance(ids, bytearray)
    damaged = msgspec.structs.replace(header, buffers=(first, bytearray(change(bytes(ids))), *others))
    with pytest.raises(MessageError, match="'ids' of message 3 has"):
        as_read([reseal(damaged), *rest])


@pytest.mark.parametrize("buffers", [(), (0,), (1,), (INLINE_BYTES,), (b"",), (b"1", 2**40)], ids=str)
def test_buffers_that_cannot_be_those_of_the_frames_are_refused(buffers: tuple[Any, ...]) -> None:
    head, *rest = as_sent(message_of(SEVERAL_FRAMES))
    for frames in ([], rest):
        with pytest.raises(MessageError):
            as_read([reseal(msgspec.structs.replace(read_header(head), buffers=buffers)), *frames])


@pytest.mark.parametrize("rest", [b"\0", b"\xc0", b"\x90"], ids=repr)
def test_bytes_behind_the_header_are_refused(rest: bytes) -> None:
    head = as_sent(message_of(SMALL))[0]
    with pytest.raises(MessageError, match="cannot be read"):
        read_header(seal(bytes(head[:-4]) + rest))


def test_a_large_frame_that_is_cut_is_refused_though_it_is_not_under_the_checksum() -> None:
    frames = as_sent(Message(Kind.PROXY, keys=("t",), tensors={"t": torch.zeros(BIG)}))
    with pytest.raises(MessageError, match="truncated"):
        as_read([frames[0], frames[1][:-4]])


def test_another_protocol_is_refused_with_the_advice() -> None:
    header = read_header(as_sent(message_of(SMALL))[0])
    with pytest.raises(MessageError, match=f"protocol {PROTOCOL + 1} .* same sglang-npu-pp on all nodes"):
        read_header(reseal(msgspec.structs.replace(header, protocol=PROTOCOL + 1)))


@given(st.binary(max_size=300))
@example(b"")
@example(b"\0" * 4)
def test_random_bytes_are_no_header(noise: bytes) -> None:
    with pytest.raises(MessageError):
        read_header(noise)


@given(st.binary(max_size=300))
def test_random_bytes_under_a_right_checksum_are_no_header(noise: bytes) -> None:
    with pytest.raises(MessageError):
        read_header(seal(noise))


@pytest.mark.parametrize(
    "lie",
    [
        {"shape": (-2, -2)},
        {"shape": (2, 3)},
        {"shape": (2**40, 2**40)},
        {"sliced": 0},
        {"sliced": -1},
        {"sliced": 3},
        {"dtype": "float64"},
        {"dtype": "Tensor"},
    ],
    ids=str,
)
def test_a_description_that_cannot_be_true_is_refused(lie: dict[str, Any]) -> None:
    frames = as_sent(Message(Kind.PROXY, keys=("t",), tensors={"t": torch.zeros(2, 2)}))
    header = read_header(frames[0])
    spec = msgspec.structs.replace(header.tensors[0], **lie)
    with pytest.raises(MessageError):
        as_read([reseal(msgspec.structs.replace(header, tensors=(spec,)))])


@pytest.mark.parametrize("field", ["values", "device_nbytes", "kind"])
def test_a_negative_count_is_refused(field: str) -> None:
    header = read_header(as_sent(message_of(SMALL))[0])
    with pytest.raises(MessageError, match="cannot be read"):
        read_header(reseal(msgspec.structs.replace(header, **{field: -1})))


_small_ints = st.one_of(st.integers(-3, 8), st.sampled_from([-(2**63), 2**63 - 1]))
_specs = st.builds(
    TensorSpec,
    name=st.text(max_size=3),
    dtype=st.sampled_from(["float32", "bfloat16", "uint8", "none", "nn"]),
    shape=st.lists(_small_ints, max_size=3).map(tuple),
    device=st.sampled_from(["cpu", "npu"]),
    sliced=_small_ints,
    offset=_small_ints,
)


_buffers = st.one_of(st.binary(max_size=16), st.just(bytes(INLINE_BYTES)))


@given(data=st.data(), payload=st.lists(_buffers.map(bytearray), max_size=3))
@settings(max_examples=400)
def test_a_header_that_lies_under_a_right_checksum_is_refused_or_harmless(
    data: st.DataObject, payload: list[bytearray]
) -> None:
    large = [buffer for buffer in payload if len(buffer) >= INLINE_BYTES]
    header = Header(
        protocol=PROTOCOL,
        kind=data.draw(_small_ints),  # type: ignore[arg-type]
        source=data.draw(_small_ints),
        number=data.draw(_small_ints),
        slot=data.draw(_small_ints),
        iteration=data.draw(_small_ints),
        batch="",
        keys=("k",),
        tensors=tuple(data.draw(st.lists(_specs, max_size=3))),
        buffers=data.draw(
            st.one_of(
                st.just(tuple(buffer if len(buffer) < INLINE_BYTES else len(buffer) for buffer in payload)),
                st.lists(st.one_of(_buffers.map(bytearray), _small_ints), max_size=3).map(tuple),
            )
        ),
        values=data.draw(_small_ints),
        device_nbytes=data.draw(_small_ints),
        crc=zlib.crc32(b"".join(large)),
    )
    try:
        read = as_read([reseal(header), *large])
    except MessageError:
        return
    for spec in header.tensors:
        if spec.offset < 0:
            assert spec.sliced > 1 or read.tensors[spec.name].shape == torch.Size(spec.shape)


class Unreadable:
    """Can be pickled, and raises where it is read."""

    def __reduce__(self) -> tuple[Any, ...]:
        return _raise_on_read, ()


def _raise_on_read() -> None:
    raise LookupError("no such thing on this rank")


def test_values_that_cannot_be_read_here_are_one_clear_error() -> None:
    frames = as_sent(Message(Kind.REQUESTS, values=Unreadable()))
    with pytest.raises(MessageError, match="LookupError: no such thing on this rank"):
        as_read(frames)


def test_a_pickle_that_is_none_is_refused() -> None:
    noise = bytearray(b"this is no pickle")
    header = read_header(as_sent(Message(Kind.REQUESTS, values=1))[0])
    with pytest.raises(MessageError, match="cannot be read"):
        as_read([reseal(msgspec.structs.replace(header, buffers=(noise,)))])


def test_an_unknown_dtype_is_refused() -> None:
    for name in ("float3", "Tensor", "__name__"):
        with pytest.raises(MessageError, match="dtype"):
            torch_dtype(name)


def test_what_cannot_be_pickled_raises_at_the_sender() -> None:
    with pytest.raises((pickle.PicklingError, AttributeError, TypeError)):
        encode(Message(Kind.REQUESTS, values=lambda: None), source=0, number=0, check_all=False)


def test_a_sent_message_knows_its_bytes() -> None:
    sent = message_of(SEVERAL_FRAMES)
    frames = as_sent(sent)
    assert sent.nbytes == sum(len(frame) for frame in frames)
