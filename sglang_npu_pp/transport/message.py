"""What travels on the host lane: a typed, numbered header and the frames it describes.

A message is a list of frames. Frame 0 is four bytes of CRC-32 and a msgpack header; the header counts
and measures every frame behind it, so a truncated message is recognised before anything is read from
it. Host tensors are frames of raw bytes and are not copied on the way in or out. Device tensors are
only described here; their bytes take the device lane. Other Python values are one pickle whose buffers
(tensors and arrays nested in it) are frames too: pickle protocol 5, out of band. Pickles are read only
after the lane has authenticated the sender.
"""

from __future__ import annotations

import enum
import io
import pickle
import struct
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Annotated, Any

import msgspec
import torch

from ..errors import MessageError

PROTOCOL = 3
ALWAYS_CHECKED_BYTES = 64 << 10  # frames up to this size are under the CRC whatever the setting
_CRC = struct.Struct("<I")
_ALIGNMENT = 8  # only complex128 is wider

Buffer = bytes | bytearray | memoryview
Count = Annotated[int, msgspec.Meta(ge=0)]


class Kind(enum.IntEnum):
    """What a message is for. Each kind between two ranks is a channel with its own numbering."""

    HELLO = 0  # first message of a connection
    GOODBYE = 1  # the sender closes on purpose
    REQUESTS = 2  # requests of one scheduler iteration
    PROXY = 3  # hidden states (and residual) of one microbatch
    OUTPUT = 4  # sampled token ids and logprobs of one microbatch
    CONSENSUS = 5  # request ids that the stages of a disaggregated server agree on
    TENSORS = 6  # a tensor dict sent by hand through GroupCoordinator
    OBJECT = 7  # a Python object sent by hand through GroupCoordinator
    CLOCK = 8  # ping-pong at start: round trip times and clock offsets
    STAGE_TIMES = 9  # what a stage measured of its first busy batches, told to stage 0

    @property
    def label(self) -> str:
        return _LABELS[self]


_LABELS = {kind: kind.name.lower() for kind in Kind}


class TensorSpec(msgspec.Struct, frozen=True, array_like=True):
    """One tensor of a message."""

    name: str
    dtype: str  # torch name without "torch."
    shape: tuple[Count, ...]  # of the whole tensor, also when only a slice travels
    device: str  # device type that the sender held it on
    sliced: Annotated[int, msgspec.Meta(ge=1)] = 1  # equal slices it was cut into, to be gathered
    offset: int = -1  # byte offset in the device-lane buffer; -1: travels as a frame

    @property
    def elements(self) -> int:
        """Elements that travel in this message."""
        total = 1
        for extent in self.shape:
            total *= extent
        return total // self.sliced

    @property
    def nbytes(self) -> int:
        return self.elements * torch_dtype(self.dtype).itemsize


class Header(msgspec.Struct, array_like=True):
    """Frame 0 of a message."""

    protocol: int
    kind: int
    source: int  # stage of the sender
    number: int  # position in its channel, from 0
    slot: int  # microbatch slot, -1 where there is none
    iteration: int  # scheduler iteration, -1 where there is none
    batch: str  # which requests the microbatch has, in words that are compared; empty where it is not said
    keys: tuple[str, ...]  # keys of the tensor dict in their order; empty for a bare object
    tensors: tuple[TensorSpec, ...]
    frame_sizes: tuple[Count, ...]  # bytes of every frame behind the header
    values: Count  # number of trailing frames that are the pickle and its buffers
    device_nbytes: Count  # bytes that travel on the device lane for this message
    crc: int  # CRC-32 over the frames that are checked


@dataclass
class Message:
    """A message as the program sees it.

    `tensors` are the entries of a tensor dict that are host tensors (and, once the device lane has
    delivered, device tensors); `values` is the rest of the dict, or any object when `keys` is empty.
    """

    kind: Kind
    slot: int = -1
    iteration: int = -1
    batch: str = ""
    keys: tuple[str, ...] = ()
    tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    values: Any = None
    device_specs: tuple[TensorSpec, ...] = ()
    device_nbytes: int = 0
    slices: Mapping[str, tuple[int, tuple[int, ...]]] = field(default_factory=dict)
    devices: Mapping[str, str] = field(default_factory=dict)
    source: int = -1
    number: int = -1
    nbytes: int = 0  # of all frames; filled in where it is sent and where it is received


@lru_cache(maxsize=64)
def torch_dtype(name: str) -> torch.dtype:
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype):
        raise MessageError(f"A message names the dtype {name!r}, which this torch does not have.")
    return dtype


@lru_cache(maxsize=64)
def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def byte_view(tensor: torch.Tensor) -> memoryview:
    """The bytes of a host tensor, any dtype, without a copy when it is contiguous."""
    dense = tensor.detach()
    if dense.dtype.is_complex:
        dense = dense.resolve_conj().resolve_neg()
    dense = dense.contiguous()
    flat = dense.as_strided((dense.numel(),), (1,))  # one element may have any stride, and keeps it
    return flat.view(torch.uint8).numpy().data


def tensor_over(buffer: Buffer, dtype: torch.dtype, shape: Sequence[int]) -> torch.Tensor:
    """A writable tensor over received bytes; copied only when the bytes are not aligned."""
    if len(buffer) == 0:
        return torch.empty(tuple(shape), dtype=dtype)
    raw = torch.frombuffer(buffer, dtype=dtype)
    if raw.data_ptr() % max(_ALIGNMENT, dtype.itemsize):
        # Byte by byte: torch loads elements as if they were aligned, and faults where they are not.
        raw = torch.frombuffer(buffer, dtype=torch.uint8).clone().view(dtype)
    return raw.view(tuple(shape))


# --- Python values -----------------------------------------------------------------------------


class _ValuePickler(pickle.Pickler):
    """Pickles tensors as out-of-band buffers instead of torch's own nested archive."""

    def reducer_override(self, value: Any) -> Any:
        if type(value) is not torch.Tensor or value.layout is not torch.strided:
            return NotImplemented
        buffer = pickle.PickleBuffer(byte_view(value.cpu()))
        return _rebuild_tensor, (
            buffer,
            dtype_name(value.dtype),
            tuple(value.shape),
            value.device.type,
        )


def _rebuild_tensor(buffer: Any, dtype: str, shape: tuple[int, ...], device: str) -> torch.Tensor:
    tensor = tensor_over(memoryview(buffer), torch_dtype(dtype), shape)
    return tensor if device == "cpu" else tensor.to(device)


def dump_values(values: Any) -> list[Buffer]:
    """The pickle of `values` and behind it the buffers it refers to."""
    buffers: list[pickle.PickleBuffer] = []
    stream = io.BytesIO()
    _ValuePickler(stream, protocol=5, buffer_callback=buffers.append).dump(values)
    return [stream.getbuffer(), *(buffer.raw() for buffer in buffers)]


def load_values(frames: Sequence[Buffer]) -> Any:
    return pickle.loads(frames[0], buffers=frames[1:])


# --- frames ------------------------------------------------------------------------------------


def encode(message: Message, *, source: int, number: int, check_all: bool) -> list[Buffer]:
    """The frames of `message`; `message.nbytes` becomes their size.

    The frames refer to the memory of the tensors: whoever sends must own it until it is sent.
    """
    specs: list[TensorSpec] = []
    frames: list[Buffer] = []
    for name, tensor in message.tensors.items():
        count, shape = message.slices.get(name, (1, tuple(tensor.shape)))
        device = message.devices.get(name, "cpu")
        specs.append(TensorSpec(name, dtype_name(tensor.dtype), shape, device, count))
        if tensor.numel():
            frames.append(byte_view(tensor))
    value_frames = [] if message.values is None else dump_values(message.values)
    frames += value_frames
    header = Header(
        protocol=PROTOCOL,
        kind=int(message.kind),
        source=source,
        number=number,
        slot=message.slot,
        iteration=message.iteration,
        batch=message.batch,
        keys=message.keys,
        tensors=(*specs, *message.device_specs),
        frame_sizes=tuple(len(frame) for frame in frames),
        values=len(value_frames),
        device_nbytes=message.device_nbytes,
        crc=_checksum(frames, check_all),
    )
    body = msgspec.msgpack.encode(header)
    head = _CRC.pack(zlib.crc32(body)) + body
    message.nbytes = len(head) + sum(header.frame_sizes)
    return [head, *frames]


def read_header(frame: Buffer) -> Header:
    """Frame 0, checked. Raises MessageError."""
    if len(frame) <= _CRC.size:
        raise MessageError(f"A message of {len(frame)} bytes is too short to hold a header.")
    (crc,) = _CRC.unpack_from(frame)
    body = memoryview(frame)[_CRC.size :]
    if zlib.crc32(body) != crc:
        raise MessageError("The header of a message does not match its checksum.")
    try:
        header = _HEADER_DECODER.decode(body)
        Kind(header.kind)
    except (msgspec.DecodeError, ValueError) as error:
        raise MessageError(f"The header of a message cannot be read: {error}.") from None
    if header.protocol != PROTOCOL:
        raise MessageError(
            f"A peer speaks protocol {header.protocol} and this rank {PROTOCOL}: install the same "
            "sglang-npu-pp on all nodes."
        )
    return header


_HEADER_DECODER = msgspec.msgpack.Decoder(Header)


def decode(header: Header, frames: Sequence[Buffer], *, check_all: bool) -> Message:
    """The message behind a header that `read_header` accepted. Raises MessageError."""
    sizes = tuple(len(frame) for frame in frames)
    if sizes != header.frame_sizes:
        raise MessageError(
            f"Message {header.number} is truncated: frames of {list(sizes)} bytes arrived where its "
            f"header announces {list(header.frame_sizes)}."
        )
    if _checksum(frames, check_all) != header.crc:
        raise MessageError(f"The frames of message {header.number} do not match their checksum.")
    in_frames = [spec for spec in header.tensors if spec.offset < 0]
    tensors, used = _read_tensors(in_frames, frames, header.number)
    if used + header.values != len(frames):
        raise MessageError(
            f"Message {header.number} has {len(frames)} frames, but its header describes "
            f"{used} tensors and {header.values} value frames."
        )
    return Message(
        kind=Kind(header.kind),
        slot=header.slot,
        iteration=header.iteration,
        batch=header.batch,
        keys=header.keys,
        tensors=tensors,
        values=_read_values(frames[-header.values :], header.number) if header.values else None,
        device_specs=tuple(spec for spec in header.tensors if spec.offset >= 0),
        device_nbytes=header.device_nbytes,
        slices={spec.name: (spec.sliced, spec.shape) for spec in in_frames if spec.sliced > 1},
        devices={spec.name: spec.device for spec in in_frames if spec.device != "cpu"},
        source=header.source,
        number=header.number,
        nbytes=sum(sizes),  # and the frame of the header, which is not here
    )


def _read_values(frames: Sequence[Buffer], number: int) -> Any:
    try:
        return load_values(frames)
    except Exception as error:  # a class that this rank does not have, for one
        raise MessageError(
            f"The Python values of message {number} cannot be read ({type(error).__name__}: {error})."
        ) from error


def _read_tensors(
    specs: Sequence[TensorSpec], frames: Sequence[Buffer], number: int
) -> tuple[dict[str, torch.Tensor], int]:
    """The tensors, and how many frames they took; an empty tensor takes none."""
    tensors: dict[str, torch.Tensor] = {}
    used = 0
    for spec in specs:
        dtype, elements = torch_dtype(spec.dtype), spec.elements
        nbytes = elements * dtype.itemsize
        frame: Buffer = frames[used] if nbytes and used < len(frames) else b""
        if len(frame) != nbytes:
            raise MessageError(
                f"Tensor {spec.name!r} of message {number} has {len(frame)} bytes, but a "
                f"{spec.dtype} of {elements} elements needs {nbytes}."
            )
        used += bool(nbytes)
        tensors[spec.name] = tensor_over(frame, dtype, spec.shape if spec.sliced == 1 else (elements,))
    return tensors, used


def _checksum(frames: Sequence[Buffer], check_all: bool) -> int:
    crc = 0
    for frame in frames:
        if check_all or len(frame) <= ALWAYS_CHECKED_BYTES:
            crc = zlib.crc32(frame, crc)
    return crc
