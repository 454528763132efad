"""What one rank of one stage says to the other stages: post, wait, commit.

`StageLink` puts the two lanes together. A send is one call and never blocks on the receiver; a receive is
two: `post` says what is expected and returns a `Pending`, `Pending.wait` is the one place where the program
waits. A device message posts its receive by itself as soon as its header is here, which may be while
the scheduler waits for something else.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Mapping
from typing import Any, Protocol

import torch

from ..errors import SequenceError
from ..observe.telemetry import Telemetry
from ..observe.trace import Trace
from ..streams import DeviceStreams
from .clock import UNMEASURED, LinkClock
from .device_lane import DeviceLane, Receive, pack_layout, unpack
from .host_lane import HostLane
from .message import Kind, Message
from .outbox import Outbox


class GatherGroup(Protocol):
    """Tensor-parallel ranks that hold equal tensors: each sends a slice, the receivers gather."""

    world_size: int
    rank_in_group: int

    def all_gather(self, tensor: torch.Tensor, dim: int) -> torch.Tensor: ...


class Pending:
    """A message that is on its way. Only `wait` blocks."""

    def __init__(
        self,
        link: StageLink,
        kind: Kind,
        source: int,
        number: int,
        slot: int,
        iteration: int,
        overtaken_by: Kind | None,
    ) -> None:
        self._link, self.kind, self.source, self.number = link, kind, source, number
        self.slot, self.iteration, self.overtaken_by = slot, iteration, overtaken_by
        self.batch = ""
        """Which requests the microbatch has here; compared with what the message says unless empty."""

    def wait(self, gather: GatherGroup | None = None, *, owned: bool = False) -> dict[str, Any]:
        """The tensor dict, in the sender's key order.

        The current stream is ordered behind the arrival of device tensors. They are views of a receive
        slot and good until `StageLink.release`; with `owned` they are copies and good for ever.
        Raises PeerLostError, WaitLimitError, MessageError, SequenceError.
        """
        message = self._link.take(self)
        tensors = self._link.finish(message, gather, owned=owned)
        self._link.record("ready", message)
        return tensors

    def wait_values(self) -> Any:
        """The Python object of a message that is not a tensor dict."""
        message = self._link.take(self)
        self._link.record("ready", message)
        return message.values


class StageLink:
    """The link of one rank to the same rank of the other stages. Owned by the scheduler thread."""

    def __init__(
        self,
        host_lane: HostLane,
        device_lane: DeviceLane | None,
        *,
        telemetry: Telemetry,
        trace: Trace,
        clock: LinkClock = UNMEASURED,
    ) -> None:
        self.stage, self.stages, self.rank = host_lane.stage, host_lane.stages, host_lane.rank
        self.host_lane, self.device_lane = host_lane, device_lane
        self.telemetry, self.trace, self.clock = telemetry, trace, clock
        self._where = f"stage {self.stage} rank {self.rank}"
        self._next_number: dict[tuple[int, Kind], int] = {}
        self._announced: deque[Message] = deque()  # device messages whose receive is not posted yet
        self._posted: dict[tuple[Kind, int], Receive] = {}
        self._in_use: list[Receive] = []
        host_lane.inbox.on_arrival = self._arrived

    # --- send ----------------------------------------------------------------------------------

    def push(self, kind: Kind, peer: int, values: Any = None, *, slot: int = -1, iteration: int = -1) -> None:
        """Push a Python object to stage `peer`; arrays and tensors in it may be written to afterwards."""
        self.host_lane.send(peer, Message(kind, slot, iteration, values=values, borrowed=True))

    def push_tensors(
        self,
        kind: Kind,
        peer: int,
        tensors: Mapping[str, Any],
        *,
        slot: int = -1,
        iteration: int = -1,
        batch: str = "",
        gather: GatherGroup | None = None,
        owned: bool = False,
        outboxes: Mapping[int, Outbox] | None = None,
    ) -> None:
        """Push a tensor dict to stage `peer`.

        Tensors on the device of the device lane take it when `peer` is the next stage; other device
        tensors are staged through the host. `gather`: send this rank's 1/world_size of every tensor that
        can be cut so. `batch`: which requests these are, in words; a receiver that has others refuses them.
        `owned`: no one writes to the host tensors any more, nor to arrays and tensors nested in other
        values; otherwise they are copied here.
        `outboxes`: connections of a thread of its own, instead of the scheduler's.
        """
        message = Message(kind, slot, iteration, batch, keys=tuple(tensors))
        on_device = self._compose(message, peer, tensors, gather, owned)
        if outboxes is None:
            self.host_lane.send(peer, message)
        else:
            outboxes[peer].send(message)
        if on_device:
            assert self.device_lane is not None
            if self.trace.enabled and not self.device_lane.can_send():
                self.record("full", message)
            counters = self.telemetry.sending(kind.label)
            self.device_lane.send(on_device, message.device_specs, message.device_nbytes, counters)
            self.record("post_send", message)

    def _compose(
        self,
        message: Message,
        peer: int,
        tensors: Mapping[str, Any],
        gather: GatherGroup | None,
        owned: bool,
    ) -> dict[str, torch.Tensor]:
        """Fill `message` from a tensor dict; returns what the device lane carries."""
        on_device: dict[str, torch.Tensor] = {}
        values: dict[str, Any] = {}
        slices: dict[str, tuple[int, tuple[int, ...]]] = {}
        devices: dict[str, str] = {}
        on_host = False
        for name, value in tensors.items():
            if not isinstance(name, str):
                raise TypeError(f"{self._where}: a tensor dict needs string keys, not {name!r}.")
            if not isinstance(value, torch.Tensor):
                values[name] = value
                continue
            part = _slice_for(value, gather)
            if part.numel() != value.numel():
                assert gather is not None
                slices[name] = (gather.world_size, tuple(value.shape))
            if self._takes_device_lane(part, peer):
                on_device[name] = part
            elif value.device.type == "cpu":
                message.tensors[name] = part
                on_host = True
            else:
                message.tensors[name] = part.cpu()
                devices[name] = value.device.type
        message.values = values or None
        message.borrowed = not owned and (on_host or bool(values))
        message.slices, message.devices = slices, devices
        message.device_specs, message.device_nbytes = pack_layout(on_device, slices)
        return on_device

    def _takes_device_lane(self, tensor: torch.Tensor, peer: int) -> bool:
        lane = self.device_lane
        if lane is None or peer != self.stage + 1 or not tensor.numel():
            return False
        return tensor.device.type == lane.device_type

    # --- receive -------------------------------------------------------------------------------

    def post(
        self,
        kind: Kind,
        source: int,
        *,
        slot: int = -1,
        iteration: int = -1,
        overtaken_by: Kind | None = None,
    ) -> Pending:
        """Expect the next message of `kind` from stage `source`. Does not wait.

        `slot` and `iteration` are compared with what the message says; -1 compares nothing. The sender
        sends this message before those of kind `overtaken_by` with a later iteration: once such a one is
        here and this is not, waiting for it raises instead of going on.
        """
        number = self._next_number.get((source, kind), 0)
        self._next_number[source, kind] = number + 1
        if self.device_lane is not None:
            self.host_lane.poll()  # a header that is here posts its receive
        self.trace.record("post", kind.label, slot, iteration)
        return Pending(self, kind, source, number, slot, iteration, overtaken_by)

    def take(self, pending: Pending) -> Message:
        """Wait for the message of `pending` and check that it is the one expected."""
        label = pending.kind.label
        self.trace.record("wait", label, pending.slot, pending.iteration)
        message = self.host_lane.wait(
            pending.source, pending.kind, pending.number, check=lambda: self._check_overtaken(pending)
        )
        expected = (pending.slot, pending.iteration)
        if pending.iteration >= 0 and (message.slot, message.iteration) != expected:
            raise SequenceError(
                f"{self._where}: expected the {label} message of microbatch slot {pending.slot}, "
                f"iteration {pending.iteration}, but stage {message.source} sent slot "
                f"{message.slot}, iteration {message.iteration}: the stages run different "
                "batches; restart the server and report this."
            )
        if pending.batch and message.batch != pending.batch:
            raise self._diverged(
                message.slot,
                message.iteration,
                f"is {message.batch or 'not described'} on stage {message.source}, but {pending.batch} here",
            )
        return message

    def refuse_leftovers(self, kind: Kind, source: int, iteration: int) -> None:
        """Raise SequenceError if a message of `kind` for an earlier iteration was never asked for."""
        message = self.host_lane.inbox.oldest(source, kind)
        if message is not None and message.iteration < iteration:
            raise self._diverged(
                message.slot,
                message.iteration,
                f"was run on stage {source} ({message.batch or 'not described'}), but not here",
            )

    def _check_overtaken(self, pending: Pending) -> None:
        if pending.overtaken_by is None:
            return
        inbox = self.host_lane.inbox
        later = inbox.oldest(pending.source, pending.overtaken_by)
        if later is None or later.iteration <= pending.iteration:
            return
        if not inbox.has(pending.source, pending.kind, pending.number):
            raise self._diverged(
                pending.slot,
                pending.iteration,
                f"is {pending.batch or 'run'} here, but stage {pending.source} ran nothing in it and has "
                f"gone on to iteration {later.iteration}",
            )

    def _diverged(self, slot: int, iteration: int, difference: str) -> SequenceError:
        return SequenceError(
            f"{self._where}: microbatch slot {slot}, iteration {iteration}, {difference}: the stages decided "
            "differently which requests to run; restart the server, and report this with all stages' logs."
        )

    def finish(self, message: Message, gather: GatherGroup | None, *, owned: bool) -> dict[str, Any]:
        """Put the tensor dict of a taken message together, waiting for the device lane if it must."""
        tensors = dict(message.tensors)
        for name, device in message.devices.items():
            tensors[name] = tensors[name].to(device)
        shapes = dict(message.slices)
        if message.device_specs:
            tensors |= unpack(self._wait_for_device(message, owned), message.device_specs)
            shapes |= {s.name: (s.sliced, s.shape) for s in message.device_specs if s.sliced > 1}
        for name in message.keys:  # one order on all ranks: a gather is a collective
            if name in shapes:
                tensors[name] = _gather_slices(tensors[name], shapes[name], gather, self._where)
        values = message.values or {}
        return {name: tensors[name] if name in tensors else values[name] for name in message.keys}

    def release(self, reader: Any) -> None:
        """The device tensors handed out so far are used up once the event `reader` has passed."""
        for receive in self._in_use:
            receive.release(reader)
        self._in_use.clear()
        self._post_announced()

    def _wait_for_device(self, message: Message, owned: bool) -> torch.Tensor:
        key = (message.kind, message.number)
        self._post_announced()
        if key not in self._posted:
            raise SequenceError(
                f"{self._where}: all receive slots are held by messages that were not released; "
                "raise SGLANG_NPU_PP_SLOTS, or take the tensor dicts one after another."
            )
        receive = self._posted.pop(key)
        counters = self.telemetry.receiving(message.kind.label)
        began = time.monotonic()
        buffer = receive.wait()
        counters.wait_s += time.monotonic() - began
        if not owned:
            self._in_use.append(receive)
            return buffer
        buffer = buffer.clone()
        receive.release(DeviceStreams(buffer.device).record())
        return buffer

    def _arrived(self, message: Message) -> None:
        if message.device_nbytes:
            self._announced.append(message)
            self._post_announced()

    def _post_announced(self) -> None:
        """Post every announced receive for which there is a slot, in the order of the headers."""
        lane = self.device_lane
        while lane is not None and self._announced and lane.can_receive():
            message = self._announced.popleft()
            key = (message.kind, message.number)
            self._posted[key] = lane.post_receive(message.device_nbytes)
            self.record("post_receive", message)

    def record(self, name: str, message: Message) -> None:
        self.trace.record(name, message.kind.label, message.slot, message.iteration)

    def close(self) -> None:
        self.host_lane.close()


def _slice_for(tensor: torch.Tensor, gather: GatherGroup | None) -> torch.Tensor:
    """This rank's slice when the tensor can be cut into equal ones, else all of it."""
    if gather is None or gather.world_size == 1 or tensor.numel() == 0:
        return tensor
    if tensor.numel() % gather.world_size:
        return tensor
    return tensor.reshape(gather.world_size, -1)[gather.rank_in_group]


def _gather_slices(
    part: torch.Tensor,
    cut: tuple[int, tuple[int, ...]],
    gather: GatherGroup | None,
    where: str,
) -> torch.Tensor:
    count, shape = cut
    if gather is None or gather.world_size != count:
        raise SequenceError(
            f"{where}: a tensor arrived in {count} slices, but the receiver gathers over "
            f"{1 if gather is None else gather.world_size} ranks: pass the same all_gather_group "
            "on both sides."
        )
    return gather.all_gather(part, dim=0).reshape(shape)
