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
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from ..errors import SequenceError
from ..observe.telemetry import ChannelCounters
from ..streams import DeviceStreams
from .clock import UNMEASURED, LinkClock
from .device_lane import DeviceLane, Receive, pack_layout, unpack
from .host_lane import HostLane
from .inbox import ReceiveChannel
from .message import Kind, Message, TensorSpec, dtype_name
from .outbox import Outbox


class GatherGroup(Protocol):
    """Tensor-parallel ranks that hold equal tensors: each sends a slice, the receivers gather."""

    world_size: int
    rank_in_group: int

    def all_gather(self, tensor: torch.Tensor, dim: int) -> torch.Tensor: ...


@dataclass(eq=False, slots=True)
class Pending:
    """A message that is on its way, and what it has to be. Only `wait` blocks."""

    link: StageLink
    channel: ReceiveChannel
    number: int
    slot: int
    iteration: int
    overtaken_by: ReceiveChannel | None = None
    batch: str = ""
    """Which requests the microbatch has here; compared with what the message says unless empty."""

    @property
    def kind(self) -> Kind:
        return self.channel.kind

    def wait(self, gather: GatherGroup | None = None, *, owned: bool = False) -> dict[str, Any]:
        """The tensor dict, in the sender's key order.

        The current stream is ordered behind the arrival of device tensors. They are views of a receive
        slot and good until `StageLink.release`; with `owned` they are copies and good for ever.
        Raises PeerLostError, WaitLimitError, MessageError, SequenceError.
        """
        return self.link.receive_tensors(self, gather, owned)

    def wait_values(self) -> Any:
        """The Python object of a message that is not a tensor dict."""
        return self.link.receive(self)


class StageLink:
    """The link of one rank to the same rank of the other stages. Owned by the scheduler thread."""

    def __init__(
        self, host_lane: HostLane, device_lane: DeviceLane | None, clock: LinkClock = UNMEASURED
    ) -> None:
        context = self.context = host_lane.context
        self.stage, self.stages, self.rank = context.stage, context.stages, context.rank
        self.telemetry, self.trace, self.clock = context.telemetry, context.trace, clock
        self.host_lane, self.device_lane = host_lane, device_lane
        self._announced: deque[Message] = deque()  # device messages whose receive is not posted yet
        self._posted: dict[tuple[Kind, int], Receive] = {}
        self._in_use: list[Receive] = []
        host_lane.on_announcement(self._announce)

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
                self.trace.record("full", kind.label, slot, iteration)
            counters = self.telemetry.sending(kind.label)
            self.device_lane.send(on_device, message, counters)
            self.trace.record("post_send", kind.label, slot, iteration)

    def _compose(
        self,
        message: Message,
        peer: int,
        tensors: Mapping[str, Any],
        gather: GatherGroup | None,
        owned: bool,
    ) -> dict[str, torch.Tensor]:
        """Fill `message` from a tensor dict; returns what the device lane carries."""
        lane_device = self._lane_device(peer)
        on_device: dict[str, torch.Tensor] = {}
        values: dict[str, Any] = {}
        host_specs: list[TensorSpec] = []
        device_specs: list[TensorSpec] = []
        for name, value in tensors.items():
            if not isinstance(name, str):
                raise TypeError(f"{self.context.where}: a tensor dict needs string keys, not {name!r}.")
            if not isinstance(value, torch.Tensor):
                values[name] = value
                continue
            part, count = (value, 1) if gather is None else _slice_for(value, gather)
            device = value.device.type
            spec = TensorSpec(name, dtype_name(value.dtype), tuple(value.shape), device, count)
            if device == lane_device and part.numel():
                on_device[name] = part
                device_specs.append(spec)
            else:
                message.tensors[name] = part if device == "cpu" else part.cpu()
                host_specs.append(spec)
        message.values = values or None
        message.borrowed = not owned and bool(values or host_specs)
        if device_specs:
            device_specs, message.device_nbytes = pack_layout(device_specs)
        message.specs = (*host_specs, *device_specs)
        return on_device

    def _lane_device(self, peer: int) -> str | None:
        """The type of the device whose tensors take the device lane to that stage."""
        lane = self.device_lane
        return None if lane is None or peer != self.stage + 1 else lane.device_type

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
        lane = self.host_lane
        channel = lane.channel(source, kind)
        overtaking = None if overtaken_by is None else lane.channel(source, overtaken_by)
        if self.device_lane is not None:
            lane.poll()  # a header that is here posts its receive
        self.trace.record("post", kind.label, slot, iteration)
        return Pending(self, channel, channel.post(), slot, iteration, overtaking)

    def receive(self, pending: Pending) -> Any:
        """The value of a message that is not a tensor dict; see `Pending.wait_values`."""
        message = self._take(pending)
        self.trace.record("ready", pending.kind.label, message.slot, message.iteration)
        return message.values

    def receive_tensors(self, pending: Pending, gather: GatherGroup | None, owned: bool) -> dict[str, Any]:
        """See `Pending.wait`."""
        message = self._take(pending)
        tensors, values = message.tensors, message.values or {}
        sliced: dict[str, TensorSpec] = {}
        on_device = False
        for spec in message.specs:
            if spec.offset >= 0:
                on_device = True
            elif spec.device != "cpu":
                tensors[spec.name] = tensors[spec.name].to(spec.device)
            if spec.sliced > 1:
                sliced[spec.name] = spec
        if on_device:
            buffer = self._wait_for_device(message, pending.channel.counters, owned)
            tensors |= unpack(buffer, message.specs)
        found: dict[str, Any] = {}
        for name in message.keys:  # one order on all ranks: a gather is a collective
            if name in sliced:
                found[name] = self._gather_slices(tensors[name], sliced[name], gather)
            else:
                found[name] = tensors[name] if name in tensors else values[name]
        self.trace.record("ready", message.kind.label, message.slot, message.iteration)
        return found

    def _take(self, pending: Pending) -> Message:
        """Wait for the message, and check that it is the one expected."""
        channel, slot, iteration = pending.channel, pending.slot, pending.iteration
        self.trace.record("wait", channel.kind.label, slot, iteration)
        for _ in self.host_lane.wait_steps(channel, pending.number):
            self._check_overtaken(pending)
        message = channel.take(pending.number)
        if iteration >= 0 and (message.slot, message.iteration) != (slot, iteration):
            raise SequenceError(
                f"{self.context.where}: expected the {channel.kind.label} message of microbatch slot {slot}, "
                f"iteration {iteration}, but stage {message.source} sent slot "
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

    def has_arrived(self, kind: Kind, source: int) -> bool:
        """Whether a message of `kind` is here that nothing has waited for."""
        return bool(self.host_lane.channel(source, kind).waiting)

    def refuse_leftovers(self, kind: Kind, source: int, iteration: int) -> None:
        """Raise SequenceError if a message of `kind` for an earlier iteration was never asked for."""
        message = self.host_lane.channel(source, kind).oldest()
        if message is not None and message.iteration < iteration:
            raise self._diverged(
                message.slot,
                message.iteration,
                f"was run on stage {source} ({message.batch or 'not described'}), but not here",
            )

    def _check_overtaken(self, pending: Pending) -> None:
        """Asked while the message of `pending` is not here."""
        if pending.overtaken_by is None:
            return
        later = pending.overtaken_by.oldest()
        if later is not None and later.iteration > pending.iteration:
            raise self._diverged(
                pending.slot,
                pending.iteration,
                f"is {pending.batch or 'run'} here, but stage {later.source} ran nothing in it and has "
                f"gone on to iteration {later.iteration}",
            )

    def _diverged(self, slot: int, iteration: int, difference: str) -> SequenceError:
        return SequenceError(
            f"{self.context.where}: microbatch slot {slot}, iteration {iteration}, {difference}: the stages "
            "decided differently which requests to run; restart the server, and report this with all stages' "
            "logs."
        )

    def _gather_slices(
        self, part: torch.Tensor, spec: TensorSpec, gather: GatherGroup | None
    ) -> torch.Tensor:
        if gather is None or gather.world_size != spec.sliced:
            raise SequenceError(
                f"{self.context.where}: a tensor arrived in {spec.sliced} slices, but the receiver gathers "
                f"over {1 if gather is None else gather.world_size} ranks: pass the same all_gather_group "
                "on both sides."
            )
        return gather.all_gather(part, dim=0).reshape(spec.shape)

    def release(self, reader: Any) -> None:
        """The device tensors handed out so far are used up once the event `reader` has passed."""
        for receive in self._in_use:
            receive.release(reader)
        self._in_use.clear()
        self._post_announced()

    def _wait_for_device(self, message: Message, counters: ChannelCounters, owned: bool) -> torch.Tensor:
        key = (message.kind, message.number)
        self._post_announced()
        if key not in self._posted:
            raise SequenceError(
                f"{self.context.where}: all receive slots are held by messages that were not released; "
                "raise SGLANG_NPU_PP_SLOTS, or take the tensor dicts one after another."
            )
        receive = self._posted.pop(key)
        began = time.monotonic()
        buffer = receive.wait()
        counters.wait_s += time.monotonic() - began
        if not owned:
            self._in_use.append(receive)
            return buffer
        buffer = buffer.clone()
        receive.release(DeviceStreams(buffer.device).record())
        return buffer

    def _announce(self, message: Message) -> None:
        """Its header is here; its tensors come on the device lane."""
        self._announced.append(message)
        self._post_announced()

    def _post_announced(self) -> None:
        """Post every announced receive for which there is a slot, in the order of the headers."""
        lane = self.device_lane
        while lane is not None and self._announced and lane.can_receive():
            message = self._announced.popleft()
            key = (message.kind, message.number)
            self._posted[key] = lane.post_receive(message.device_nbytes)
            self.trace.record("post_receive", message.kind.label, message.slot, message.iteration)

    def close(self) -> None:
        self.host_lane.close()


def _slice_for(tensor: torch.Tensor, gather: GatherGroup) -> tuple[torch.Tensor, int]:
    """This rank's slice and the number of slices; all of a tensor that cannot be cut into equal ones."""
    count, elements = gather.world_size, tensor.numel()
    if count == 1 or elements == 0 or elements % count:
        return tensor, 1
    return tensor.reshape(count, -1)[gather.rank_in_group], count
