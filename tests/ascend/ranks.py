"""What rank processes do in the tests on the simulated Ascend: forwards, and proxies that tell their number.

A message's tensor holds its number everywhere, so that one look tells whether it is the right message, all of
it, and not memory that somebody else has written to.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist

from ascend_sim.kernels import occupy
from rig.harness import Here
from sglang_npu_pp.host_copies import HostCopy, copy_to_host, upload
from sglang_npu_pp.streams import DeviceStreams
from sglang_npu_pp.transport.message import Kind

from .mutation import Rule, broken

ELEMENTS = 4096  # int32: 16 KiB, a few pages


def npu(here: Here) -> Any:
    return torch.get_device_module(here.device)


def forward_stream(here: Here) -> Any:
    """One stream for a rank's forwards, as SGLang has it."""
    return here.kept.setdefault("forward stream", npu(here).Stream())


def on_forward_stream(here: Here) -> AbstractContextManager[Any]:
    stream: AbstractContextManager[Any] = npu(here).stream(forward_stream(here))
    return stream


def stream_of_group(here: Here, peer: int | None = None) -> int:
    """The id of HCCL's stream for the default group's collectives, or for its messages with `peer`, or -1."""
    backend: Any = dist.distributed_c10d._get_default_group()._get_backend(torch.device(here.device))
    found: int = backend._get_stream_id(peer is not None, -1 if peer is None else peer)
    return found


def event(here: Here) -> Any:
    """At the tail of the current stream."""
    recorded = npu(here).Event()
    recorded.record(npu(here).current_stream())
    return recorded


def numbered(here: Here, number: int, elements: int = ELEMENTS) -> torch.Tensor:
    return torch.full((elements,), number, dtype=torch.int32, device=here.device)


def number_of(tensor: torch.Tensor) -> int | str:
    """The number that a tensor holds, or what is wrong with it. Waits for the device."""
    values = tensor.unique().tolist()
    return values[0] if len(values) == 1 else f"{len(values)} different values, {values[:3]} ..."


def flush(here: Here) -> None:
    """Let torch_npu's task queue put everything on the streams. Waits for no stream."""
    _ = forward_stream(here).npu_stream


# --- device lane ---------------------------------------------------------------------------------


def push(
    here: Here,
    numbers: Sequence[int],
    *,
    elements: int = ELEMENTS,
    rule: Rule | None = None,
    occupied: bool = False,
    graph: bool = False,
) -> None:
    """Forwards that make proxies for the next stage. `occupied`: with a task "occupy" before that; `graph`:
    always in the same memory."""
    with broken(rule), on_forward_stream(here):
        # On that stream, which is then the one that this memory is freed to.
        output = numbered(here, -1, elements) if graph else None
        for number in numbers:
            if occupied:
                occupy(1)
            hidden = numbered(here, number, elements) if output is None else output.fill_(number)
            proxies = {"hidden_states": hidden}
            here.link.push_tensors(Kind.PROXY, here.link.stage + 1, proxies, iteration=number)
    flush(here)


def take(
    here: Here,
    numbers: Sequence[int],
    *,
    rule: Rule | None = None,
    occupied: bool = False,
) -> None:
    """Forwards that read their proxies; `occupied`: with a task "occupy" before that."""
    read = here.kept.setdefault("read", [])
    with broken(rule), on_forward_stream(here):
        for number in numbers:
            proxies = here.link.post(Kind.PROXY, here.link.stage - 1, iteration=number).wait()
            if occupied:
                occupy(1)
            read.append(proxies["hidden_states"].clone())
            here.link.release(event(here))
    flush(here)


def read_numbers(here: Here) -> list[int | str]:
    """The numbers of all proxies taken so far. Waits for the device."""
    with on_forward_stream(here):
        return [number_of(tensor) for tensor in here.kept.pop("read", [])]


def push_view(here: Here, number: int, *, rule: Rule | None = None) -> list[int]:
    """Proxies in the middle of a larger tensor; the storage offsets of what torch.distributed was given."""
    offsets: list[int] = []
    isend = dist.isend

    def noted(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        offsets.append(int(tensor.storage_offset()))
        return isend(tensor, *args, **kwargs)

    with broken(rule), on_forward_stream(here), patch.object(dist, "isend", noted):
        whole = numbered(here, number, 3 * ELEMENTS)
        proxies = {"hidden_states": whole[ELEMENTS : 2 * ELEMENTS]}
        here.link.push_tensors(Kind.PROXY, here.link.stage + 1, proxies, iteration=number)
    flush(here)
    return offsets


def take_by_graph(here: Here, numbers: Sequence[int], *, copied: bool) -> None:
    """Forwards that always read the place of the first proxies; `copied`: where all others are copied to."""
    read = here.kept.setdefault("read", [])
    place: torch.Tensor | None = None
    with on_forward_stream(here):
        for number in numbers:
            proxies = here.link.post(Kind.PROXY, here.link.stage - 1, iteration=number).wait()
            hidden = proxies["hidden_states"]
            if place is None:
                place = hidden.clone() if copied else hidden
            elif copied:
                place.copy_(hidden)
            read.append(place.clone())
            here.link.release(event(here))
    flush(here)


# --- token return --------------------------------------------------------------------------------


def start_copy(
    here: Here, number: int, *, rule: Rule | None = None, occupied: bool = False, pinned: bool = True
) -> None:
    """A forward makes outputs, their copy to the host is started, and the device outputs are dropped."""
    streams = DeviceStreams(here.device, pinned=pinned)
    copy_stream = here.kept.setdefault("copy stream", streams.new_stream())
    with on_forward_stream(here):
        if occupied:
            occupy(1)
        outputs = {"next_token_ids": numbered(here, number)}
        produced = event(here)
    with broken(rule):
        here.kept["copy"] = copy_to_host(outputs, streams, copy_stream, produced)
    del outputs
    with on_forward_stream(here):
        here.kept["next forward"] = [numbered(here, -1) for _ in range(4)]  # takes whatever memory is free
    flush(here)


def read_copy(here: Here, *, rule: Rule | None = None) -> int | str:
    """The number of the outputs, as whoever processes them reads it."""
    copy: HostCopy = here.kept.pop("copy")
    with broken(rule):
        ids = copy.wait()["next_token_ids"]
    assert ids.device.type == "cpu"
    return number_of(ids)


def start_upload(
    here: Here, number: int, *, rule: Rule | None = None, occupied: bool = False, pinned: bool = True
) -> None:
    """Token ids that came from another stage, on their way to the device; then more of them.

    `occupied`: behind a forward.
    """
    streams = here.kept["streams"] = DeviceStreams(here.device, pinned=pinned)  # keeps what is staged
    with broken(rule), on_forward_stream(here):
        if occupied:
            occupy(1)
        uploaded = [
            upload(torch.full((ELEMENTS,), value, dtype=torch.int32), streams) for value in (number, -1, -2)
        ]
    here.kept["read"] = uploaded[:1]
    flush(here)


def start_forward(here: Here) -> None:
    with on_forward_stream(here):
        occupy(1)
    flush(here)
