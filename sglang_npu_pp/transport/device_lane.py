"""The device lane: packed device tensors from one stage to the next, over torch.distributed P2P.

One direction only, a process group for each pair of neighbours: no ring of rendezvous sends can form. One
message is one contiguous buffer. Sends are packed into a ring of slots and own their bytes; receives, into a
ring of slots, are posted at the header's arrival on the host lane. Each has its own stream, so that no
receive waits for the forward before a send. `Work.wait()` is called only where a stream waits (HCCL, NCCL)
or, on gloo (no streams), where the data is needed.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
import torch
import torch.distributed as dist

from ..errors import TransportError
from ..observe.telemetry import ChannelCounters
from ..streams import DeviceStreams, Event
from .context import RankContext
from .message import Message, TensorSpec, sizes_of

logger = logging.getLogger("sglang_npu_pp")

ALIGNMENT = 512  # bytes; what allocators of accelerators give, and copy engines like
_WARM_UP_BYTES = ALIGNMENT
_STREAMS_OF_A_PAIR = 2  # that torch_npu 2.13 takes for a communicator of messages between two ranks
PROXY_TENSORS = 2  # hidden states and residual; few models send other ones


def create_neighbour_groups(
    ranks: Sequence[int], stage: int, backend: str | None = None
) -> tuple[dist.ProcessGroup | None, dist.ProcessGroup | None]:
    """Process groups (from the previous stage, to the next stage) of one pipeline.

    `ranks`: global ranks by stage. Only its two members make a group: first stages 0-1, 2-3, ..., then 1-2,
    3-4, ...
    """
    # torch names a group after the number of groups that a member has made so far, so both members must have
    # made equally many; a stage without a partner makes one with itself.
    neighbours: dict[int, dist.ProcessGroup] = {}
    for parity in (0, 1):
        partner = stage + 1 if stage % 2 == parity else stage - 1
        members = sorted({stage, partner}) if 0 <= partner < len(ranks) else [stage]
        neighbours[partner] = dist.new_group(
            [ranks[member] for member in members], backend=backend, use_local_synchronization=True
        )
    previous = neighbours[stage - 1] if stage > 0 else None
    following = neighbours[stage + 1] if stage + 1 < len(ranks) else None
    return previous, following


def _aligned(nbytes: int) -> int:
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


def pack_layout(specs: Iterable[TensorSpec]) -> tuple[list[TensorSpec], int]:
    """The specs with offsets in the message's buffer, and its bytes."""
    placed, end = [], 0
    for spec in specs:
        placed.append(msgspec.structs.replace(spec, offset=end))
        end += _aligned(sizes_of(spec.dtype, spec.shape, spec.sliced).nbytes)
    return placed, end


def unpack(buffer: torch.Tensor, specs: Iterable[TensorSpec]) -> dict[str, torch.Tensor]:
    """Views into `buffer` of this lane's tensors; a slice is a flat tensor."""
    tensors = {}
    for spec in specs:
        if spec.offset >= 0:
            dtype, _, nbytes, shape = sizes_of(spec.dtype, spec.shape, spec.sliced)
            tensors[spec.name] = buffer[spec.offset : spec.offset + nbytes].view(dtype).view(shape)
    return tensors


@dataclass
class _Slot:
    """A reused buffer."""

    buffer: torch.Tensor
    work: Any = None  # the transfer that last used it
    freed: Any = None  # event behind the last reader of a received message


def slot_bytes_for(tokens: int, hidden_size: int, item_bytes: int, ranks: int = 1, indices: int = 0) -> int:
    """Bytes of hidden states and residual of `tokens` tokens, sliced over `ranks` tensor-parallel ranks, and
    of `indices` int32 numbers a token, whole."""
    tensor = -(-tokens * hidden_size * item_bytes // ranks)
    return PROXY_TENSORS * _aligned(tensor) + _aligned(tokens * indices * torch.int32.itemsize)


class Receive:
    """A posted receive. `wait()` orders the current stream after it and returns the buffer."""

    def __init__(self, lane: DeviceLane, slot: _Slot, buffer: torch.Tensor, work: Any) -> None:
        self._lane, self._slot, self._buffer, self._work = lane, slot, buffer, work

    def wait(self) -> torch.Tensor:
        self._work.wait()
        return self._buffer

    def release(self, reader: Any) -> None:
        """Free the slot for reuse after the event `reader`."""
        self._slot.freed = reader
        self._lane.free_receive_slots.append(self._slot)


class DeviceLane:
    """One rank's ends of the device lane. Owned by the scheduler thread."""

    def __init__(
        self,
        context: RankContext,
        device: torch.device | str,
        *,
        previous: dist.ProcessGroup | None,
        following: dist.ProcessGroup | None,
        slots: int,
        slot_bytes: int = 0,
    ) -> None:
        """`previous`, `following`: groups of (previous stage, us) and (us, next stage).

        `slot_bytes`: reserved for each slot before device memory is measured. Larger messages grow it, with a
        warning.
        """
        self._previous, self._following = previous, following
        self._streams = DeviceStreams(device)
        self.device_type = self._streams.device.type
        self._sending, self._receiving = self._streams.new_stream(), self._streams.new_stream()
        self._where = context.where
        self._slot_bytes = self._said_bytes = slot_bytes
        self._outgrown: list[tuple[torch.Tensor, Event]] = []  # until the event behind their last use
        self._send_slots = self._reserve(slots if following is not None else 0)
        with self._streams.use(self._receiving):
            self.free_receive_slots = self._reserve(slots if previous is not None else 0)
        self.reserved_bytes = slot_bytes * (len(self._send_slots) + len(self.free_receive_slots))

    def _reserve(self, slots: int) -> deque[_Slot]:
        return deque(_Slot(self._new_buffer(self._slot_bytes)) for _ in range(slots))

    def _new_buffer(self, nbytes: int) -> torch.Tensor:
        return torch.empty(nbytes, dtype=torch.uint8, device=self._streams.device)

    def _room(self, slot: _Slot, nbytes: int) -> torch.Tensor:
        """The first bytes of a slot, for the current stream."""
        if slot.buffer.numel() < nbytes:
            if nbytes > self._said_bytes:
                self._say_too_large(nbytes)
            # Its memory would go back at once to the stream that it was made on, which may be another one.
            self._outgrown.append((slot.buffer, self._streams.record()))
            slot.buffer = self._new_buffer(nbytes)
        if self._outgrown:
            self._outgrown = [each for each in self._outgrown if not each[1].query()]
        return slot.buffer[:nbytes]

    def _say_too_large(self, nbytes: int) -> None:
        """Once for each doubling."""
        self._said_bytes = 2 * nbytes
        logger.warning(
            "%s: a message of %.1f MB does not fit into the slots of %.1f MB that the device lane has "
            "reserved; they grow, by memory that SGLang has not counted: lower --mem-fraction-static if that "
            "is tight.",
            self._where,
            nbytes / 1e6,
            self._slot_bytes / 1e6,
        )

    def warm_up(self) -> None:
        """Make the communicators before the first request, by one small message each way.

        Blocks for the neighbours; receives first, so the chain unwinds.
        """
        token = torch.zeros(_WARM_UP_BYTES, dtype=torch.uint8, device=self._streams.device)
        if self._previous is not None:
            self._streams.make_way(_STREAMS_OF_A_PAIR)
            dist.recv(token, group=self._previous, group_src=0)
        if self._following is not None:
            self._streams.make_way(_STREAMS_OF_A_PAIR)
            dist.send(token, group=self._following, group_dst=1)
        self._streams.record().synchronize()

    def send(self, tensors: Mapping[str, torch.Tensor], message: Message, counters: ChannelCounters) -> None:
        """Pack this lane's `tensors` of `message` on the current stream, which may then overwrite them, and
        send.
        """
        if self._following is None:
            raise TransportError(
                f"{self._where}: the last stage has no next one to send device tensors to; "
                "send host tensors instead."
            )
        slot = self._send_slots.popleft()
        self._send_slots.append(slot)
        self._wait_until_sent(slot, counters)
        buffer = self._room(slot, message.device_nbytes)
        for spec in message.specs:
            if spec.offset >= 0:
                source = tensors[spec.name].reshape(-1)
                buffer[spec.offset : spec.offset + source.nbytes].view(source.dtype).copy_(source)
        packed = self._streams.record()
        with self._streams.use(self._sending):
            self._streams.wait_for(packed)
            slot.work = dist.isend(buffer, group=self._following, group_dst=1)

    def can_send(self) -> bool:
        """Whether the next `send` finds its slot free."""
        work = self._send_slots[0].work
        return work is None or work.is_completed()

    def can_receive(self) -> bool:
        return bool(self.free_receive_slots)

    def post_receive(self, nbytes: int) -> Receive:
        """Post the next message's receive; call in header order."""
        slot = self.free_receive_slots.popleft()
        with self._streams.use(self._receiving):
            if slot.freed is not None:
                self._streams.wait_for(slot.freed)
            # Behind that wait, because a slot that grows gives its old buffer back to this stream.
            buffer = self._room(slot, nbytes)
            work = dist.irecv(buffer, group=self._previous, group_src=0)
        slot.work = work
        return Receive(self, slot, buffer, work)

    def _wait_until_sent(self, slot: _Slot, counters: ChannelCounters) -> None:
        """Back-pressure: wait for the slot's last message; on accelerators only the current stream waits."""
        # Completed work too: that costs nothing and makes a failed transfer raise here.
        if slot.work is None:
            return
        began = time.monotonic()
        if not slot.work.is_completed():
            counters.backpressure += 1
        slot.work.wait()
        slot.work = None
        counters.backpressure_s += time.monotonic() - began
