"""Forwards as captured graphs, in a rank's process: the functions of `ranks`, with replays.

A graph reads one place and writes one place for ever. It makes `made_of(n)` of the number n, so that what
comes out is not mistaken for what went in, by two operators with an intermediate result that is freed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ascend_sim.kernels import occupy
from rig.harness import Here
from sglang_npu_pp.host_copies import copy_to_host
from sglang_npu_pp.streams import DeviceStreams
from sglang_npu_pp.transport.message import Kind

from . import ranks
from .mutation import Rule, broken

INSIDE = "aten::mul*"  # a task of each replay, and of nothing else


def made_of(number: int) -> int:
    return 2 * number + 1


class GraphForward:
    def __init__(self, here: Here) -> None:
        npu = ranks.npu(here)
        self.inputs = ranks.numbered(here, -1)
        self._graph = npu.NPUGraph()
        with npu.graph(self._graph, stream=npu.Stream()):
            self.outputs = self.inputs.mul(2).add(1)

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        """As SGLang's runner: copy to the place that the graph reads, replay, return the place it writes."""
        self.inputs.copy_(hidden)
        self._graph.replay()
        return self.outputs


def copy_on_another_stream(place: torch.Tensor, hidden: torch.Tensor) -> None:
    """In the place of the copy above, it knows when `hidden` is there, but not who still reads `place`."""
    npu = torch.get_device_module(hidden.device)
    there = npu.Event()
    there.record(npu.default_stream())
    with npu.stream(npu.Stream()):
        npu.current_stream().wait_event(there)
        place.copy_(hidden)


def capture(here: Here) -> None:
    """Waits for the device, so not while a task is held."""
    with ranks.on_forward_stream(here):
        here.kept["graph"] = GraphForward(here)


def push(here: Here, numbers: Sequence[int], *, rule: Rule | None = None) -> None:
    forward: GraphForward = here.kept["graph"]
    with broken(rule), ranks.on_forward_stream(here):
        for number in numbers:
            proxies = {"hidden_states": forward(ranks.numbered(here, number))}
            here.link.push_tensors(Kind.PROXY, here.link.stage + 1, proxies, iteration=number)
    ranks.flush(here)


def take(here: Here, numbers: Sequence[int], *, rule: Rule | None = None, occupied: bool = False) -> None:
    """`occupied`: with a task "occupy" before the copy to the graph's input."""
    forward: GraphForward = here.kept["graph"]
    read = here.kept.setdefault("read", [])
    with broken(rule), ranks.on_forward_stream(here):
        for number in numbers:
            proxies = here.link.post(Kind.PROXY, here.link.stage - 1, iteration=number).wait()
            if occupied:
                occupy(1)
            read.append(forward(proxies["hidden_states"]).clone())
            here.link.release(ranks.event(here))
    ranks.flush(here)


def start_copy(here: Here, number: int, *, rule: Rule | None = None) -> None:
    """A replay, sampling from what it wrote, and the copy to the host; then the next replay."""
    forward: GraphForward = here.kept["graph"]
    streams = DeviceStreams(here.device)
    copy_stream: Any = here.kept.setdefault("copy stream", streams.new_stream())
    with ranks.on_forward_stream(here):
        outputs = {"next_token_ids": forward(ranks.numbered(here, number)).clone()}
        produced = ranks.event(here)
    with broken(rule):
        here.kept["copy"] = copy_to_host(outputs, streams, copy_stream, produced)
    del outputs
    with ranks.on_forward_stream(here):
        here.kept["next forward"] = [forward(ranks.numbered(here, -2)).clone() for _ in range(4)]
    ranks.flush(here)


def run_stage(here: Here, microbatches: int) -> int:
    """Replays, each on what the last stage made of it; how many of them got wrong proxies."""
    forward: GraphForward = here.kept["graph"]
    link, last = here.link, here.link.stages - 1
    with ranks.on_forward_stream(here):
        wrong = torch.zeros((), dtype=torch.int64, device=here.device)
        for number in range(microbatches):
            if link.stage == 0:
                hidden = ranks.numbered(here, number)
            else:
                proxies = link.post(Kind.PROXY, link.stage - 1, iteration=number).wait()
                hidden = proxies["hidden_states"]
            output = forward(hidden)
            expected = number
            for _ in range(link.stage + 1):
                expected = made_of(expected)
            wrong += (output != expected).any()
            if link.stage < last:
                link.push_tensors(Kind.PROXY, link.stage + 1, {"hidden_states": output}, iteration=number)
            link.release(ranks.event(here))
        return int(wrong.item())
