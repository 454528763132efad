"""Communication of one rank with the other stages: post, wait, commit.

`StageLink` joins the two lanes. A send is one call and never blocks on the receiver; a receive is two: `post`
returns a `Pending`, `Pending.wait` is the only wait. A device message's receive is posted at its header's
arrival, also during other waits.

`SGLANG_NPU_PP_EARLY_RECEIVE=0` posts it in the wait for its message, behind those of earlier headers. No
circle of waits forms: a sender waits for that only to use a slot again, so for a message of an earlier
iteration, and the next stage comes there without later ones.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator, Mapping
from typing import Any, Protocol

import msgspec
import torch

from ..errors import SequenceError
from ..observe.telemetry import ChannelCounters
from ..streams import DeviceStreams
from .clock import UNMEASURED, LinkClock
from .device_lane import DeviceLane, Receive, pack_layout, unpack
from .host_lane import HostLane
from .inbox import ReceiveChannel
from .message import Kind, Message, TensorSpec, device_type, dtype_name
from .outbox import Outbox


class GatherGroup(Protocol):
    """Tensor-parallel ranks with equal tensors: each sends a slice, the receivers gather."""

    world_size: int
    rank_in_group: int

    def all_gather(self, tensor: torch.Tensor, dim: int) -> torch.Tensor: ...


class Pending(msgspec.Struct, eq=False):
    """An expected message. Only `wait` blocks."""

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

        The current stream is ordered after the arrival of device tensors: views of a slot, valid until
        `StageLink.release`, or copies (`owned`). Raises PeerLostError, WaitLimitError, MessageError,
        SequenceError.
        """
        return self.link.receive_tensors(self, gather, owned)

    def wait_values(self) -> Any:
        """The Python object of a message without tensor dict."""
        return self.link.receive(self)


class StageLink:
    """The link of one rank to the same rank of other stages. Owned by the scheduler thread."""

    def __init__(
        self, host_lane: HostLane, device_lane: DeviceLane | None, clock: LinkClock = UNMEASURED
    ) -> None:
        context = self.context = host_lane.context
        self.stage, self.stages, self.rank = context.stage, context.stages, context.rank
        self.telemetry, self.trace, self.clock = context.telemetry, context.trace, clock
        self.host_lane, self.device_lane = host_lane, device_lane
        self._posts_early = context.settings.early_receive == "1"
        self._announced: deque[Message] = deque()  # device messages whose receive is not posted yet
        self._posted: dict[tuple[Kind, int], Receive] = {}
        self._in_use: list[Receive] = []
        if device_lane is not None:
            host_lane.on_announcement(self._announce)

    # --- send ----------------------------------------------------------------------------------

    def push(self, kind: Kind, peer: int, values: Any = None, *, slot: int = -1, iteration: int = -1) -> None:
        """Push a Python object to stage `peer`; its arrays and tensors may then be overwritten."""
        self.host_lane.send(peer, Message(kind, slot, iteration, values=values, borrowed=True))

    def has_room(self, kind: Kind, peer: int) -> bool:
        """Whether pushing a small object would not wait."""
        return self.host_lane.has_room(peer, kind)

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

        The device lane carries its device's tensors if `peer` is the next stage; others go through the host.

        Args:
            gather: send this rank's 1/world_size of every divisible tensor.
            batch: the requests, in words; a receiver with others raises.
            owned: no later writes to host tensors, nor to tensors and arrays nested in values; else copied.
            outboxes: another thread's connections.
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
            if self.trace.enabled:
                self.trace.record("post_send", kind.label, slot, iteration)

    def _compose(
        self,
        message: Message,
        peer: int,
        tensors: Mapping[str, Any],
        gather: GatherGroup | None,
        owned: bool,
    ) -> dict[str, torch.Tensor]:
        """Fill `message` from a tensor dict; returns the device-lane tensors."""
        lane_device = self._lane_device(peer)
        on_device: dict[str, torch.Tensor] = {}
        values: dict[str, Any] = {}
        host_specs: list[TensorSpec] = []
        device_specs: list[TensorSpec] = []
        on_host = False
        for name, value in tensors.items():
            if not isinstance(name, str):
                raise TypeError(f"{self.context.where}: a tensor dict needs string keys, not {name!r}.")
            if not isinstance(value, torch.Tensor):
                values[name] = value
                continue
            part, count = (value, 1) if gather is None else _slice_for(value, gather)
            device = device_type(value)
            spec = TensorSpec(name, dtype_name(value.dtype), value.shape, device, count)
            if device == lane_device and part.numel():
                on_device[name] = part
                device_specs.append(spec)
            else:
                on_host = on_host or device == "cpu"
                message.tensors[name] = part if device == "cpu" else part.cpu()
                host_specs.append(spec)
        message.values = values or None
        # A copy that was staged from a device is ours already.
        message.borrowed = not owned and (on_host or bool(values))
        if device_specs:
            device_specs, message.device_nbytes = pack_layout(device_specs)
        message.specs = (*host_specs, *device_specs)
        return on_device

    def _lane_device(self, peer: int) -> str | None:
        """The device type whose tensors take the device lane to `peer`."""
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

        `slot` and `iteration` must equal the message's (-1: any). The sender sends it before any of kind
        `overtaken_by` with a later iteration: if such a one arrives first, waiting raises.
        """
        lane = self.host_lane
        channel = lane.channel(source, kind)
        overtaking = None if overtaken_by is None else lane.channel(source, overtaken_by)
        if self.device_lane is not None:
            lane.poll()  # a header that is here posts its receive
        if self.trace.enabled:
            self.trace.record("post", kind.label, slot, iteration)
        return Pending(self, channel, channel.post(), slot, iteration, overtaking)

    def receive(self, pending: Pending) -> Any:
        """See `Pending.wait_values`."""
        message = self._take(pending)
        if self.trace.enabled:
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
        if self.trace.enabled:
            self.trace.record("ready", message.kind.label, message.slot, message.iteration)
        return found

    def _take(self, pending: Pending) -> Message:
        """Wait for the message, and compare it with the expected one."""
        channel, slot, iteration = pending.channel, pending.slot, pending.iteration
        if self.trace.enabled:
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
        """Whether a message of `kind` has arrived and was not taken."""
        return bool(self.host_lane.channel(source, kind).waiting)

    def take_arrived(self, kind: Kind, source: int) -> Iterator[Any]:
        """The Python objects that are here, without waiting."""
        self.host_lane.poll()
        while self.has_arrived(kind, source):
            yield self.post(kind, source).wait_values()

    def refuse_leftovers(self, kind: Kind, source: int, iteration: int) -> None:
        """Raise SequenceError for an untaken message of `kind` of an earlier iteration."""
        message = self.host_lane.channel(source, kind).oldest()
        if message is not None and message.iteration < iteration:
            raise self._diverged(
                message.slot,
                message.iteration,
                f"was run on stage {source} ({message.batch or 'not described'}), but not here",
            )

    def _check_overtaken(self, pending: Pending) -> None:
        """Call while the message of `pending` has not arrived."""
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
        """Free the slots of all returned device tensors after the event `reader`."""
        for receive in self._in_use:
            receive.release(reader)
        self._in_use.clear()
        self._post_announced()

    def _wait_for_device(self, message: Message, counters: ChannelCounters, owned: bool) -> torch.Tensor:
        key = (message.kind, message.number)
        self._post_announced(wanted=key)
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
        """A header arrived; its tensors follow on the device lane."""
        self._announced.append(message)
        self._post_announced()

    def _post_announced(self, wanted: tuple[Kind, int] | None = None) -> None:
        """Post announced receives while slots are free, in header order; late ones as far as `wanted`."""
        lane = self.device_lane
        while lane is not None and self._announced and lane.can_receive():
            if not self._posts_early and (wanted is None or wanted in self._posted):
                return
            message = self._announced.popleft()
            key = (message.kind, message.number)
            self._posted[key] = lane.post_receive(message.device_nbytes)
            if self.trace.enabled:
                self.trace.record("post_receive", message.kind.label, message.slot, message.iteration)

    def close(self) -> None:
        self.host_lane.close()


def _slice_for(tensor: torch.Tensor, gather: GatherGroup) -> tuple[torch.Tensor, int]:
    """This rank's slice and the number of slices; the whole tensor if not divisible."""
    count, elements = gather.world_size, tensor.numel()
    if count == 1 or elements == 0 or elements % count:
        return tensor, 1
    return tensor.reshape(count, -1)[gather.rank_in_group], count
