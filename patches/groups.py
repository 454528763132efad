"""Seam: explicit tensor dicts and objects, through `GroupCoordinator`. A patched server sends objects this
way. The five tensor-dict functions have no caller there, since its loop uses the seams of proxies and
outputs: they are the interface proposed by sglang #19582, for code on top of SGLang. On upstream's path
upstream's functions run.

A started pipeline's group uses the two lanes, other groups upstream's functions; the new `isend_tensor_dict`
and `irecv_tensor_dict` use torch.distributed there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from sglang_npu_pp.patching import Patch
from sglang_npu_pp.transport.message import Kind
from sglang_npu_pp.transport.stage_link import Pending, StageLink

_GROUP = "sglang.srt.distributed.parallel_state:GroupCoordinator"
_LINK_ATTRIBUTE = "_npu_pp_link"


class Done:
    """A complete transfer: the lanes own the bytes."""

    def wait(self) -> None:
        return


class ArrivingDict:
    """Fills `tensors` in `wait`. Idempotent."""

    def __init__(self, pending: Pending, tensors: dict[str, Any], gather: Any) -> None:
        self._pending: Pending | None = pending
        self._tensors, self._gather = tensors, gather

    def wait(self) -> None:
        if self._pending is not None:
            pending, self._pending = self._pending, None
            self._tensors.update(pending.wait(self._gather, owned=True))


class ReceivedDict(NamedTuple):
    """Result of `irecv_tensor_dict`: complete only after `wait` of every handle, then every postprocess step
    in order."""

    tensors: dict[str, Any]
    handles: Sequence[Any]
    postprocess: Sequence[Callable[[], None]]

    def finish(self) -> dict[str, Any]:
        for handle in self.handles:
            handle.wait()
        for step in self.postprocess:
            step()
        return self.tensors


def attach_link(group: Any, link: StageLink) -> None:
    """Let `group` use the lanes."""
    setattr(group, _LINK_ATTRIBUTE, link)


def has_lanes(group: Any, *_: Any, **__: Any) -> bool:
    """`Patch.when` of upstream's functions."""
    return _link(group) is not None


def _link(group: Any) -> StageLink | None:
    return getattr(group, _LINK_ATTRIBUTE, None)


def _lanes(group: Any) -> StageLink:
    link = _link(group)
    assert link is not None  # `has_lanes`
    return link


def _works(handles: Sequence[Any]) -> list[Any]:
    """Handles for upstream's callers: `work.work.wait()`."""
    from sglang.srt.distributed.parallel_state import P2PWork

    return [P2PWork(handle, None) for handle in handles]


def _peer(group: Any, rank: int | None, step: int) -> int:
    peer = (group.rank_in_group + step) % group.world_size if rank is None else rank
    if not 0 <= peer < group.world_size or peer == group.rank_in_group:
        raise ValueError(
            f"rank {group.rank_in_group} of a group of {group.world_size} cannot exchange a tensor "
            f"dict with rank {peer}."
        )
    return peer


# --- tensor dicts ------------------------------------------------------------------------------


def isend_tensor_dict(
    group: Any, tensor_dict: dict[str, Any], dst: int | None = None, all_gather_group: Any = None
) -> list[Any]:
    """Send a dict of tensors and Python values to local rank `dst` (default: the next).

    Returns handles with `wait()`. Tensors may be overwritten after that; on a pipeline group at once.
    `all_gather_group`: send only this rank's slice of every evenly divisible tensor.
    """
    if group.world_size == 1:
        return []
    if not isinstance(tensor_dict, dict):
        raise TypeError(f"isend_tensor_dict needs a dict, not a {type(tensor_dict).__name__}.")
    dst = _peer(group, dst, +1)
    link = _link(group)
    if link is not None:
        link.push_tensors(Kind.TENSORS, dst, tensor_dict, gather=all_gather_group)
        return [Done()]
    return _isend_over_torch(group, tensor_dict, dst, all_gather_group)


def irecv_tensor_dict(group: Any, src: int | None = None, all_gather_group: Any = None) -> ReceivedDict:
    """Post the receive of a tensor dict from local rank `src` (default: the previous).

    Non-blocking on a pipeline group; elsewhere it waits for the dict's description, then posts all tensors
    together.
    """
    if group.world_size == 1:
        return ReceivedDict({}, (), ())
    src = _peer(group, src, -1)
    link = _link(group)
    if link is None:
        return _irecv_over_torch(group, src, all_gather_group)
    tensors: dict[str, Any] = {}
    pending = link.post(Kind.TENSORS, src)
    return ReceivedDict(tensors, (ArrivingDict(pending, tensors, all_gather_group),), ())


def send_tensor_dict(
    original: Any,
    group: Any,
    tensor_dict: dict[str, Any],
    dst: int | None = None,
    all_gather_group: Any = None,
    async_send: bool = False,
) -> Any:
    handles = isend_tensor_dict(group, tensor_dict, dst, all_gather_group)
    if async_send:
        return _works(handles)
    for handle in handles:
        handle.wait()
    return []


def recv_tensor_dict(
    original: Any, group: Any, src: int | None = None, all_gather_group: Any = None
) -> dict[str, Any]:
    return irecv_tensor_dict(group, src, all_gather_group).finish()


def send_recv_tensor_dict(
    original: Any,
    group: Any,
    send_tensor_dict: dict[str, Any],
    send_dst: int | None = None,
    recv_src: int | None = None,
    send_all_gather_group: Any = None,
    recv_all_gather_group: Any = None,
) -> dict[str, Any] | None:
    """With lanes a send does not wait for its receiver, so needs no paired batch."""
    received = irecv_tensor_dict(group, recv_src, recv_all_gather_group)
    isend_tensor_dict(group, send_tensor_dict, send_dst, send_all_gather_group)
    return received.finish()


# --- objects (grammar readiness, for one) ------------------------------------------------------


def send_object(
    original: Any, group: Any, obj: Any, dst: int, async_send: bool = False, tag: int = 0
) -> list[Any]:
    """`tag`: from 0.5.16 on."""
    _lanes(group).push(Kind.OBJECT, _peer(group, dst, 0), (tag, obj))
    return _works([Done()]) if async_send else []


def recv_object(original: Any, group: Any, src: int, tag: int = 0) -> Any:
    link = _lanes(group)
    sent_tag, obj = link.post(Kind.OBJECT, _peer(group, src, 0)).wait_values()
    if sent_tag != tag:
        raise RuntimeError(
            f"stage {link.stage} rank {link.rank}: expected an object with tag {tag} from stage "
            f"{src}, but it sent one with tag {sent_tag}; report this."
        )
    return obj


# --- groups without lanes ----------------------------------------------------------------------


def _isend_over_torch(group: Any, tensor_dict: dict[str, Any], dst: int, gather: Any) -> list[Any]:
    from sglang.srt.distributed.parallel_state import _split_tensor_dict

    metadata, tensors = _split_tensor_dict(tensor_dict)
    handles = [work.work for work in group.send_object(metadata, dst=dst, async_send=True)]
    for tensor in tensors:
        if tensor.numel():
            part = _part(tensor, gather).contiguous()
            carrier = group.cpu_group if tensor.is_cpu else group.device_group
            handles.append(dist.isend(part, group.ranks[dst], group=carrier))
    return handles


def _irecv_over_torch(group: Any, src: int, gather: Any) -> ReceivedDict:
    from sglang.srt.distributed.parallel_state import TensorMetadata

    tensors: dict[str, Any] = {}
    handles: list[Any] = []
    postprocess: list[Callable[[], None]] = []
    for key, value in group.recv_object(src=src):
        tensors[key] = value
        if not isinstance(value, TensorMetadata):
            continue
        tensor = torch.empty(value.size, dtype=value.dtype, device=value.device)
        tensors[key] = tensor
        if tensor.numel() == 0:
            continue
        part = _part(tensor, gather)
        carrier = group.cpu_group if tensor.is_cpu else group.device_group
        handles.append(dist.irecv(part, src=group.ranks[src], group=carrier))
        if part.numel() != tensor.numel():
            postprocess.append(_gather_step(tensors, key, part, tensor.shape, gather))
    return ReceivedDict(tensors, handles, postprocess)


def _part(tensor: torch.Tensor, gather: Any) -> torch.Tensor:
    if gather is None or gather.world_size == 1 or tensor.numel() % gather.world_size:
        return tensor
    return tensor.reshape(gather.world_size, -1)[gather.rank_in_group]


def _gather_step(
    tensors: dict[str, Any], key: str, part: torch.Tensor, shape: torch.Size, gather: Any
) -> Callable[[], None]:
    def step() -> None:
        tensors[key] = gather.all_gather(part, dim=0).reshape(shape)

    return step


_WHY = "every tensor is received and waited for before the next one is posted"
_PLAN = "goes when sglang #19582 is merged"
_HELPERS = (
    "sglang.srt.distributed.parallel_state:_split_tensor_dict",
    f"{_GROUP}.all_gather",
)


def _added(name: str, function: Any, how: str) -> Patch:
    return Patch(
        target=f"{_GROUP}.{name}",
        wrapper=function,
        why="no way to post a tensor dict and wait for it later",
        how=how,
        upstream="sglang #19582",
        plan=_PLAN,
        relies_on=_HELPERS,
        adds=True,
    )


def _replaced(name: str, function: Any, why: str, how: str, optional: bool = False) -> Patch:
    return Patch(
        target=f"{_GROUP}.{name}",
        wrapper=function,
        why=why,
        how=how,
        upstream="sglang #19582, #22747",
        plan=_PLAN,
        optional=optional,
        when=has_lanes,
    )


PATCHES = (
    _added("isend_tensor_dict", isend_tensor_dict, "push the dict on the lanes"),
    _added("irecv_tensor_dict", irecv_tensor_dict, "post the receive, return handles"),
    _replaced("send_tensor_dict", send_tensor_dict, _WHY, "a wait over isend_tensor_dict"),
    _replaced("recv_tensor_dict", recv_tensor_dict, _WHY, "a wait over irecv_tensor_dict"),
    _replaced(
        "send_recv_tensor_dict",
        send_recv_tensor_dict,
        "needs batch_isend_irecv so that two rendezvous sends do not wait for each other",
        "post, push, wait",
        optional=True,  # from 0.5.20 on
    ),
    _replaced("send_object", send_object, "two rendezvous messages", "one push"),
    _replaced("recv_object", recv_object, "two blocking receives", "one message"),
)
