"""The design of SGLang pull request 19582 as a plugin for 0.5.21, to be measured beside ours.

What the pull request proposes: all tensors of a message are received at once instead of one after another,
and are waited for right before the forward that reads them. With it goes the early send of its sequel: the
proxies leave behind the launch, not at the end of the iteration. Sizes, pickles, requests and the ring of
outputs stay as they are. Written from its description for tensor-parallel size 1; no code is taken from it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

_WORKS = "__works__"  # receives under way, riding in the tensor dict until the scheduler has it


def register() -> None:
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    group = "sglang.srt.distributed.parallel_state.GroupCoordinator"
    mixin = "sglang.srt.managers.scheduler_pp_mixin.SchedulerPPMixin"
    for target, hook in (
        (f"{group}.recv_tensor_dict", recv_tensor_dict),
        (f"{mixin}._pp_recv_proxy_tensors", recv_proxy_tensors),
        (f"{mixin}._pp_launch_batch", launch_batch),
        (f"{mixin}._pp_send_proxy_to_next_stage", send_proxy),
    ):
        HookRegistry.register(target, hook, HookType.AROUND)


def recv_tensor_dict(
    original: Callable[..., Any], group: Any, src: int | None = None, all_gather_group: Any = None
) -> dict[str, Any]:
    """Post the receives of all tensors; outputs are waited for here, proxies by `launch_batch`."""
    import torch
    from sglang.srt.distributed.parallel_state import TensorMetadata

    if all_gather_group is not None and all_gather_group.world_size > 1:
        raise NotImplementedError("the design of pull request 19582 is written for --tp-size 1 here")
    source = (group.rank_in_group - 1) % group.world_size if src is None else src
    received: dict[str, Any] = {}
    works = []
    for name, value in group.recv_object(src=source):
        if not isinstance(value, TensorMetadata):
            received[name] = value
            continue
        tensor = torch.empty(value.size, dtype=value.dtype, device=value.device)
        received[name] = tensor
        if tensor.numel():
            lane = group.cpu_group if tensor.device.type == "cpu" else group.device_group
            works.append(torch.distributed.irecv(tensor, src=group.ranks[source], group=lane))
    if received.get("__msg_type__") == "proxy":
        received[_WORKS] = works
    else:
        wait(works)
    return received


def recv_proxy_tensors(original: Callable[..., Any], scheduler: Any) -> Any:
    proxies = original(scheduler)
    if proxies is not None:
        proxies.works = proxies.tensors.pop(_WORKS)
    return proxies


def launch_batch(
    original: Callable[..., Any], scheduler: Any, mb_id: int, batch: Any, proxies: Any, *rest: Any
) -> Any:
    """Wait for the proxies, launch, and send what the launch produces."""
    if proxies is not None:
        wait(proxies.works)
    result, scheduler.launch_event = launched = original(scheduler, mb_id, batch, proxies, *rest)
    if not scheduler.pp_group.is_last_rank:
        scheduler.sends_early = True
        scheduler._pp_send_proxy_to_next_stage(result)
        scheduler.sends_early = False
    return launched


def send_proxy(original: Callable[..., Any], scheduler: Any, result: Any) -> None:
    """The loop's own call comes when the proxies have left."""
    if scheduler.sends_early:
        original(scheduler, result)


def wait(works: list[Any]) -> None:
    for work in works:
        work.wait()
