"""The wire format of the host lane: a typed, numbered msgpack header and the buffers it describes.

Buffers are the bytes of host tensors, and one pickle of other values with its out-of-band buffers (pickle
protocol 5). Device tensors are only described; their bytes take the device lane.

Frame 0 is the header, with the small buffers in it, and its CRC-32; a large buffer is a frame of its own,
without a copy. The header has the sizes of those: truncation is detected before anything is read. Pickles are
read only after authentication of the sender.
"""

from __future__ import annotations

import ctypes
import enum
import io
import math
import pickle
import struct
import zlib
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Annotated, Any, NamedTuple

import msgspec
import torch

from ..errors import MessageError

PROTOCOL = 6
INLINE_BYTES = 16 << 10  # smaller buffers lie in the header: copying them is cheaper than a frame for each
ALWAYS_CHECKED_BYTES = 64 << 10  # frames up to this size are under the CRC whatever the setting
_CRC = struct.Struct("<I")
_CRC_BYTES = _CRC.size
_CRC_OF_ALL = 0x2144DF1C  # CRC-32 of any bytes with their own CRC-32 behind them
_ALIGNMENT = 8  # only complex128 is wider

Buffer = bytes | bytearray | memoryview
Count = Annotated[int, msgspec.Meta(ge=0)]


class Kind(enum.IntEnum):
    """Purpose of a message. Between two ranks each kind is a channel with its own numbering."""

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
    OUTCOME = 10  # what became of a control request on one stage
    CACHE = 11  # what stage 0 decided about its hierarchical cache; several an iteration

    label: str  # its name in counters, traces and errors

    def __init__(self, value: int) -> None:
        self.label = self.name.lower()


class Sizes(NamedTuple):
    """Sizes of a tensor, from type and shape."""

    dtype: torch.dtype
    elements: int  # that travel: of the slice where there is one
    nbytes: int
    shape: tuple[int, ...]  # in which they arrive: slices are flat


@lru_cache(maxsize=4096)
def sizes_of(dtype: str, shape: tuple[int, ...], sliced: int) -> Sizes:
    """Raises MessageError."""
    # Cached: the messages of a decode have tensors of the same few shapes.
    torch_type, elements = torch_dtype(dtype), math.prod(shape) // sliced
    return Sizes(torch_type, elements, elements * torch_type.itemsize, shape if sliced == 1 else (elements,))


class TensorSpec(msgspec.Struct, frozen=True, array_like=True):
    """One tensor of a message, on either lane."""

    name: str
    dtype: str  # torch name without "torch."
    shape: tuple[Count, ...]  # of the whole tensor, also when only a slice travels
    device: str  # device type that the sender held it on
    sliced: Annotated[int, msgspec.Meta(ge=1)] = 1  # equal slices it was cut into, to be gathered
    offset: int = -1  # byte offset in the device-lane buffer; -1: travels as a frame

    @property
    def sizes(self) -> Sizes:
        return sizes_of(self.dtype, self.shape, self.sliced)


class Header(msgspec.Struct, array_like=True):
    """Identity and contents of a message."""

    protocol: int
    kind: Kind
    source: int  # stage of the sender
    number: int  # position in its channel, from 0
    slot: int  # microbatch slot, -1 where there is none
    iteration: int  # scheduler iteration, -1 where there is none
    batch: str  # which requests the microbatch has, in words that are compared; empty where it is not said
    keys: tuple[str, ...]  # keys of the tensor dict in their order; empty for a bare object
    tensors: tuple[TensorSpec, ...]
    buffers: tuple[
        bytearray | Count, ...
    ]  # small ones; of a large one the size, its bytes are the next frame
    values: Count  # number of trailing buffers that are the pickle and what it refers to
    device_nbytes: Count  # bytes that travel on the device lane for this message
    crc: int  # CRC-32 over those of the frames behind this one that are checked


class Message(msgspec.Struct):
    """A message in the program.

    `tensors`: host-lane entries of a tensor dict; `values`: the rest, or any object if `keys` is empty.
    `specs` describe all tensors, device lane last; without them, `tensors` are whole host tensors.
    """

    kind: Kind
    slot: int = -1
    iteration: int = -1
    batch: str = ""
    keys: tuple[str, ...] = ()
    tensors: dict[str, torch.Tensor] = msgspec.field(default_factory=dict)
    values: Any = None
    specs: tuple[TensorSpec, ...] = ()
    device_nbytes: int = 0  # of the message's buffer on the device lane
    source: int = -1
    number: int = -1
    nbytes: int = 0  # of all frames; filled in where it is sent and where it is received
    borrowed: bool = False  # tensors and values may be written to as soon as `send` has returned


@lru_cache(maxsize=64)
def torch_dtype(name: str) -> torch.dtype:
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype):
        raise MessageError(f"A message names the dtype {name!r}, which this torch does not have.")
    return dtype


@lru_cache(maxsize=64)
def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def device_type(tensor: torch.Tensor) -> str:
    return "cpu" if tensor.is_cpu else tensor.device.type  # which torch writes with a stream


def byte_view(tensor: torch.Tensor) -> memoryview:
    """The bytes of a host tensor, any dtype; a copy only if not contiguous."""
    dense = tensor.detach() if tensor.requires_grad else tensor
    if dense.dtype.is_complex:
        dense = dense.resolve_conj().resolve_neg()
    dense = dense.contiguous()
    # One element or none may have any stride, and keeps it in a view.
    flat = dense.as_strided((dense.numel(),), (1,)) if dense.numel() < 2 else dense.view(-1)
    return flat.view(torch.uint8).numpy().data


def tensor_over(buffer: Buffer, dtype: torch.dtype, shape: Sequence[int]) -> torch.Tensor:
    """A writable tensor over received bytes; a copy only if not aligned, which a bytearray is."""
    if len(buffer) == 0:
        return torch.empty(tuple(shape), dtype=dtype)
    raw = torch.frombuffer(buffer, dtype=dtype)
    if type(buffer) is not bytearray and raw.data_ptr() % max(_ALIGNMENT, dtype.itemsize):
        # Byte by byte: torch loads elements as if they were aligned, and faults where they are not.
        raw = torch.frombuffer(buffer, dtype=torch.uint8).clone().view(dtype)
    return raw if len(shape) == 1 else raw.view(shape)


def _bytes_of(tensor: torch.Tensor, nbytes: int) -> Buffer:
    """The `nbytes` bytes of a host tensor."""
    # A few are copied, in one call; a view takes six.
    if nbytes < INLINE_BYTES and tensor.is_contiguous() and not (tensor.is_neg() or tensor.is_conj()):
        return ctypes.string_at(tensor.data_ptr(), nbytes)
    return byte_view(tensor)


# --- Python values -----------------------------------------------------------------------------


class _ValuePickler(pickle.Pickler):
    """Pickles tensors as out-of-band buffers instead of torch's nested archive."""

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
    """The pickle of `values`, then its out-of-band buffers."""
    buffers: list[pickle.PickleBuffer] = []
    stream = io.BytesIO()
    _ValuePickler(stream, protocol=5, buffer_callback=buffers.append).dump(values)
    return [stream.getbuffer(), *(buffer.raw() for buffer in buffers)]


def load_values(frames: Sequence[Buffer]) -> Any:
    return pickle.loads(frames[0], buffers=frames[1:])


# --- frames ------------------------------------------------------------------------------------


def encode(message: Message, *, source: int, number: int, check_all: bool) -> list[Buffer]:
    """The frames of `message`; sets `message.nbytes` to their size.

    Later frames refer to tensor memory, which the sender must own until they are sent.
    """
    specs = message.specs
    if message.tensors and not specs:
        specs = describe(message.tensors)
    buffers: list[Buffer] = []
    for tensor in message.tensors.values():
        if nbytes := tensor.nbytes:
            buffers.append(_bytes_of(tensor, nbytes))
    in_values = 0
    if message.values is not None:
        value_buffers = dump_values(message.values)
        in_values = len(value_buffers)
        buffers += value_buffers
    frames: list[Buffer] = []
    if buffers and max(map(len, buffers)) >= INLINE_BYTES:
        frames = [buffer for buffer in buffers if len(buffer) >= INLINE_BYTES]
    header = Header(
        protocol=PROTOCOL,
        kind=message.kind,
        source=source,
        number=number,
        slot=message.slot,
        iteration=message.iteration,
        batch=message.batch,
        keys=message.keys,
        tensors=specs,
        buffers=_in_header(buffers) if frames else tuple(buffers),  # type: ignore[arg-type]  # any bytes
        values=in_values,
        device_nbytes=message.device_nbytes,
        crc=_checksum(frames, check_all) if frames else 0,
    )
    body = _HEADER_ENCODER.encode(header)
    head = body + _CRC.pack(zlib.crc32(body))
    message.nbytes = len(head) + sum(map(len, frames)) if frames else len(head)
    return [head, *frames]


def _in_header(buffers: Sequence[Buffer]) -> tuple[Any, ...]:
    return tuple(buffer if len(buffer) < INLINE_BYTES else len(buffer) for buffer in buffers)


def describe(tensors: Mapping[str, torch.Tensor]) -> tuple[TensorSpec, ...]:
    """Specs of whole tensors, not placed on the device lane."""
    specs = [
        TensorSpec(name, dtype_name(tensor.dtype), tensor.shape, device_type(tensor))
        for name, tensor in tensors.items()
    ]
    return tuple(specs)


def read_header(head: Buffer) -> Header:
    """The header in frame 0, after its checksum. Raises MessageError."""
    if zlib.crc32(head) != _CRC_OF_ALL:
        raise MessageError("The header of a message does not match its checksum.")
    try:
        header = _HEADER_DECODER.decode(head[:-_CRC_BYTES])
    except msgspec.DecodeError as error:
        raise MessageError(f"The header of a message cannot be read: {error}.") from None
    if header.protocol != PROTOCOL:
        raise MessageError(
            f"A peer speaks protocol {header.protocol} and this rank {PROTOCOL}: install the same "
            "sglang-npu-pp on all nodes."
        )
    return header


_HEADER_ENCODER = msgspec.msgpack.Encoder()
_HEADER_DECODER = msgspec.msgpack.Decoder(Header)


def decode(header: Header, frames: Sequence[Buffer], *, check_all: bool) -> Message:
    """The message of `frames` with this `header`. Raises MessageError."""
    buffers: Sequence[Any] = header.buffers
    nbytes = len(frames[0])
    if len(frames) > 1 or int in map(type, buffers):
        large = frames[1:]
        buffers = _find_buffers(header, large)
        if _checksum(large, check_all) != header.crc:
            raise MessageError(f"The frames of message {header.number} do not match their checksum.")
        nbytes += sum(map(len, large))
    message = Message(
        kind=header.kind,
        slot=header.slot,
        iteration=header.iteration,
        batch=header.batch,
        keys=header.keys,
        specs=header.tensors,
        device_nbytes=header.device_nbytes,
        source=header.source,
        number=header.number,
        nbytes=nbytes,
    )
    used = _read_tensors(message, buffers) if header.tensors else 0
    if used + header.values != len(buffers):
        raise MessageError(
            f"Message {header.number} has {len(buffers)} buffers, but its header describes "
            f"{used} tensors and {header.values} of its values."
        )
    if header.values:
        message.values = _read_values(buffers[used:], header.number)
    return message


def _find_buffers(header: Header, frames: Sequence[Buffer]) -> Sequence[Buffer]:
    """The buffers in order: of the header, and the other frames."""
    sizes = [size for size in header.buffers if isinstance(size, int)]
    if list(map(len, frames)) != sizes:
        raise MessageError(
            f"Message {header.number} is truncated: frames of {list(map(len, frames))} bytes arrived where "
            f"its header announces {sizes}."
        )
    following = iter(frames)
    return [next(following) if isinstance(buffer, int) else buffer for buffer in header.buffers]


def _read_values(frames: Sequence[Buffer], number: int) -> Any:
    try:
        return load_values(frames)
    except Exception as error:  # a class that this rank does not have, for one
        raise MessageError(
            f"The Python values of message {number} cannot be read ({type(error).__name__}: {error})."
        ) from error


def _read_tensors(message: Message, buffers: Sequence[Buffer]) -> int:
    """Fill in host-lane tensors; returns the number of buffers used (an empty tensor: none)."""
    used, tensors = 0, message.tensors
    for spec in message.specs:
        if spec.offset >= 0:
            continue
        dtype, elements, nbytes, shape = sizes_of(spec.dtype, spec.shape, spec.sliced)
        if nbytes == 0:
            tensors[spec.name] = torch.empty(shape, dtype=dtype)
            continue
        buffer = buffers[used] if used < len(buffers) else b""
        used += 1
        if len(buffer) != nbytes:
            raise MessageError(
                f"Tensor {spec.name!r} of message {message.number} has {len(buffer)} bytes, but a "
                f"{spec.dtype} of {elements} elements needs {nbytes}."
            )
        tensors[spec.name] = tensor_over(buffer, dtype, shape)
    return used


def _checksum(frames: Sequence[Buffer], check_all: bool) -> int:
    crc = 0
    for frame in frames:
        if check_all or len(frame) <= ALWAYS_CHECKED_BYTES:
            crc = zlib.crc32(frame, crc)
    return crc
