"""Sampled token ids on their way from a simulated NPU to every stage: nobody waits but who reads them."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch

from ascend_sim.kernels import occupy
from rig.harness import Here, Rank, Team, results
from sglang_npu_pp.host_copies import HostCopy, copy_to_host
from sglang_npu_pp.streams import DeviceStreams
from sglang_npu_pp.token_return import PORT, TokenReturn
from sglang_npu_pp.transport.message import Kind

from . import ranks
from .mutation import Rule, broken
from .rest import at_rest, holding

MICROBATCHES = 5
ADOPTION = Rule(
    "the sending thread has the device of its scheduler",
    "sglang_npu_pp.token_return",
    "TokenReturn._run",
    "self._adopt_thread()",
)


def open_token_return(here: Here, rule: Rule | None = None) -> None:
    """As the last stage does at its start. The thread runs all the time, so a broken rule stays broken."""
    streams = DeviceStreams(here.device)
    with broken(rule):
        tokens = TokenReturn(here.link, here.kept[PORT], streams.adopt_thread)
        own = copy_to_host({}, streams, streams.new_stream(), ranks.event(here))
        tokens.post(own, slot=0, iteration=0)
        assert own.wait() == {}
    here.kept["token return"] = tokens
    here.closers.append(tokens.close)


def refuse(tensor: torch.Tensor) -> list[int]:
    raise AssertionError(f"tolist() of a tensor on {tensor.device}: that waits for the device")


def post_tokens(here: Here, microbatches: int, pinned: bool = True) -> None:
    """Forwards that sample, and what the last stage does behind each launch; with `tolist` on a device
    tensor, upstream's way to the token ids, made to fail."""
    streams = DeviceStreams(here.device, pinned=pinned)
    copy_stream = streams.new_stream()
    original = torch.Tensor.tolist

    def tolist(tensor: torch.Tensor) -> list[int]:
        return original(tensor) if tensor.device.type == "cpu" else refuse(tensor)

    with mock.patch.object(torch.Tensor, "tolist", tolist):
        for number in range(1, microbatches + 1):
            with ranks.on_forward_stream(here):
                occupy(1)
                outputs = {"next_token_ids": ranks.numbered(here, number), "scores": [None, number]}
                produced = ranks.event(here)
            copy = copy_to_host(outputs, streams, copy_stream, produced)
            here.kept["token return"].post(copy, slot=number % 2, iteration=number)
    ranks.flush(here)


def take_tokens(here: Here, numbers: range) -> list[tuple[int | str, object]]:
    found = []
    for number in numbers:
        values = here.link.post(Kind.OUTPUT, here.link.stages - 1, slot=number % 2, iteration=number).wait()
        found.append((ranks.number_of(values["next_token_ids"]), values["scores"]))
    return found


def skip_first(here: Here) -> None:
    here.link.post(Kind.OUTPUT, here.link.stages - 1, slot=0, iteration=0).wait()


def open_all(team: Team) -> list[Rank]:
    stages = team.open_lanes(3, extra_ports={PORT: [2]})
    stages[2].call(open_token_return)
    results([rank.start(skip_first) for rank in stages[:2]])
    return stages


@pytest.mark.parametrize(
    ("pinned", "held"), [(True, "memcpy D2H"), (False, "occupy")], ids=["pinned", "plain"]
)
def test_tokens_reach_every_stage_while_the_last_one_goes_on(npu_team: Team, pinned: bool, held: str) -> None:
    """Held is the copy, or the forward before it: a copy into plain memory is no task of a stream."""
    *others, last = open_all(npu_team)
    numbers = range(1, MICROBATCHES + 1)
    with holding(last, held):
        last.call(post_tokens, MICROBATCHES, pinned)  # comes back although nothing has been copied
        taking = [rank.start(take_tokens, numbers) for rank in others]
        at_rest(last)
        assert not any(call.has_answer for call in taking)
    assert results(taking) == [[(number, [None, number]) for number in numbers]] * 2


class Witness(HostCopy):
    """Remembers which device is current in the thread that waits for it."""

    device: int

    def wait(self) -> dict[str, Any]:
        self.device = torch.get_device_module("npu").current_device()
        return super().wait()


def device_of_sending_thread(here: Here) -> int:
    tokens: TokenReturn = here.kept["token return"]
    witness = Witness({}, ranks.event(here))
    tokens.post(witness, slot=1, iteration=1)
    tokens.close()  # when it has sent everything
    return witness.device


def test_the_sending_thread_has_the_device_of_its_scheduler(npu_team: Team) -> None:
    """An event is waited for in the context of a device, and torch_npu silently takes device 0."""
    for rule, device in ((None, 2), (ADOPTION, 0)):
        last = npu_team.open_lanes(3, extra_ports={PORT: [2]})[2]
        last.call(open_token_return, rule)
        assert last.call(device_of_sending_thread) == device
        npu_team.reset()


def test_an_upload_keeps_its_pinned_memory_until_it_is_copied(npu_team: Team) -> None:
    """Nobody here keeps it: torch's allocator does not give it to the uploads that follow."""
    (rank,) = npu_team.open_lanes(1)
    with holding(rank, "memcpy H2D"):
        rank.call(ranks.start_upload, 41)
        at_rest(rank)
    assert rank.call(ranks.read_numbers) == [41]
