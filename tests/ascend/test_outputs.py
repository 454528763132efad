"""All of a result that is copied from a simulated NPU to the host is copied late enough, and waited for.

Real are the ticket, SGLang's own preparation of a batch result and its copy to the host; the observer, the
scheduler around them and the message of the last stage are stand-ins.
"""

from __future__ import annotations

import importlib
import sys
import time
from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any

import torch

from ascend_sim.controls import Simulator
from ascend_sim.kernels import occupy
from ascend_sim.sglang_on_sim.import_hooks import MissingPackageFinder
from rig.harness import Here, Rank, Team
from sglang_npu_pp.streams import DeviceStreams

from . import ranks
from .mutation import Rule, broken
from .rest import LIMIT_S, POLL_S, at_rest, holding

WAIT = Rule(
    "what the preparation copies to the host is waited for",
    "sglang_npu_pp.patches.outputs",
    "OutputTicket.synchronize",
    "self._pipeline.streams.record().synchronize()",
)
PRODUCED = Rule(
    "outputs are copied behind all that makes them, upstream's packing included",
    "sglang_npu_pp.patches.proxies",
    "_return_outputs",
    "scheduler.copy_stream, produced)",
    "scheduler.copy_stream, pipeline.launch_event)",
)
PROPOSAL = Rule(
    "what a prefill server tells its decode server of the first draft stays on the host",
    "sglang_npu_pp.patches.outputs",
    "_prepare_result",
    "speculation.leave_proposal_on_host(result, values)",
)

IMPORT_LIMIT_S = 120.0


class Scores:
    """The auxiliary output of a sampling observer, on the device and, once copied, on the host."""

    def __init__(self, scores: torch.Tensor) -> None:
        self.scores = scores

    def copy_to_host(self, copy_tensor: Callable[[torch.Tensor], torch.Tensor]) -> Scores:
        return Scores(copy_tensor(self.scores))


class Observer:
    def from_pp_tensors(self, tensors: Mapping[str, torch.Tensor]) -> Scores:
        """Computes, so that what is copied to the host is not what memory of an upload still holds."""
        assert tensors["scores"].device.type == "npu"
        return Scores(tensors["scores"] + 1)


def import_sglang(here: Here) -> None:
    """The modules of its scheduler, next to stand-ins for what Ascend's images have besides."""
    if "sglang.srt.managers.scheduler_pp_mixin" in sys.modules:
        return
    for name in [name for name in sys.modules if name.partition(".")[0] == "torchair"]:
        del sys.modules[name]  # torch_npu's own, which needs the graph engine of a real CANN
    sys.meta_path.insert(0, MissingPackageFinder())
    importlib.import_module("torchair")
    importlib.import_module("sglang.srt.managers.scheduler_pp_mixin")


def make_scheduler() -> Any:
    from sglang.srt.managers.scheduler_pp_mixin import SchedulerPPMixin

    class Scheduler(SchedulerPPMixin):
        pp_group = SimpleNamespace(is_first_rank=True)
        tp_worker = SimpleNamespace(model_runner=SimpleNamespace(sampling_observer=Observer()))
        future_map = SimpleNamespace(stash=lambda indices, payload: None)
        disaggregation_mode = "prefill"
        _pp_spec_relay = False

    return Scheduler()


def process_outputs(here: Here, number: int, rule: Rule | None = None) -> int | str:
    """As stage 0 takes the outputs of the last one; what the observer's consumer reads: `number` + 1."""
    scores = torch.full((ranks.ELEMENTS,), number, dtype=torch.int32)
    found = take_outputs(here, {"__sampling_observer_output__.scores": scores}, number, rule)
    scores = found.auxiliary_host_output.scores
    assert scores.device.type == "cpu"
    return ranks.number_of(scores)


def process_proposal(here: Here, number: int, rule: Rule | None = None) -> int | str:
    """As stage 0 of a prefill server behind a launch; what upstream copies into its message: `number`."""
    occupy(1)
    hidden = torch.full((1, ranks.ELEMENTS), number, dtype=torch.int32)
    draft = {"draft_topk_p": torch.ones(1, 1), "draft_topk_index": torch.zeros(1, 1, dtype=torch.int64)}
    found = take_outputs(here, {**draft, "draft_hidden_states": hidden}, number, rule)
    return ranks.number_of(found.next_draft_input.hidden_states.to("cpu")[0])


def take_outputs(here: Here, outputs: dict[str, torch.Tensor], number: int, rule: Rule | None) -> Any:
    """The result with these outputs beside a token."""
    from sglang_npu_pp.patches.outputs import OutputTicket
    from sglang_npu_pp.patches.pipeline import Launch

    values = {"next_token_ids": torch.tensor([number]), **outputs}
    pipeline: Any = SimpleNamespace(
        streams=DeviceStreams(here.device),
        launched={0: Launch(iteration=0, skipped=False)},
        is_last=False,
        ahead=None,
        adviser=None,
        post_outputs=lambda slot: SimpleNamespace(wait=lambda: values),
    )
    batch = SimpleNamespace(
        return_logprob=False,
        return_hidden_states=False,
        spec_algorithm=SimpleNamespace(is_dspark=lambda: False),
        req_pool_indices=None,
    )
    ticket = OutputTicket(make_scheduler(), pipeline, 0, batch, SimpleNamespace(can_run_cuda_graph=False))
    with broken(rule):
        ticket.synchronize()
    here.note("synchronized")
    found: Any = ticket.result
    assert found.next_token_ids.tolist() == [number]
    return found


def return_tokens(here: Here, number: int, rule: Rule | None = None) -> int | str:
    """As the last stage does behind a launch whose outputs are packed on the forward stream after its event;
    the number that the other stages get."""
    from sglang_npu_pp.patches import proxies

    streams, copies = DeviceStreams(here.device), []
    outputs = {"next_token_ids": ranks.numbered(here, -1)}
    with ranks.on_forward_stream(here):
        launched = ranks.event(here)
        occupy(1)
        outputs["next_token_ids"].fill_(number)
    pipeline: Any = SimpleNamespace(
        streams=streams,
        launch_event=launched,
        iteration=0,
        token_return=SimpleNamespace(post=lambda copy, slot, iteration: copies.append(copy)),
    )
    scheduler = SimpleNamespace(
        forward_stream_ctx=ranks.on_forward_stream(here), copy_stream=streams.new_stream()
    )
    batch = SimpleNamespace(return_hidden_states=False)
    microbatch = proxies._Microbatch(batch, prebuilt=False, skipped=False, words="")
    result = SimpleNamespace(logits_output=None)
    with broken(rule):
        proxies._return_outputs(scheduler, pipeline, 0, microbatch, result, SimpleNamespace(tensors=outputs))
    ranks.flush(here)
    here.note("returned")
    return ranks.number_of(copies[0].wait()["next_token_ids"])


def ready(team: Team) -> Rank:
    (rank,) = team.open_lanes(1)
    rank.start(import_sglang).result(IMPORT_LIMIT_S)
    return rank


def wait_until_held(rank: Rank, task: str) -> None:
    """Until a stream stands at a task of that name."""
    deadline = time.monotonic() + LIMIT_S
    with Simulator(rank.pid) as simulator:
        while not any(
            stream.running and stream.running.name == task for stream in simulator.listing().streams
        ):
            assert time.monotonic() < deadline, f"no stream has come to {task}:\n{simulator.listing()}"
            time.sleep(POLL_S)


def test_the_output_of_a_sampling_observer_is_there_when_the_result_is(npu_team: Team) -> None:
    rank = ready(npu_team)
    with holding(rank, "memcpy D2H"):
        call = rank.start(process_outputs, 41)
        wait_until_held(rank, "memcpy D2H")
        at_rest(rank)
        assert not call.has_answer, "the result is there, but its copy has not begun"
    assert call.note() == "synchronized"
    assert call.result() == 42


def test_without_the_wait_the_result_is_there_too_early(npu_team: Team) -> None:
    rank = ready(npu_team)
    with holding(rank, "memcpy D2H"):
        call = rank.start(process_outputs, 59, WAIT)
        assert call.note() == "synchronized"
        assert call.result() != 60  # which no other test leaves in memory


def test_a_prefill_servers_proposal_is_read_without_the_device(npu_team: Team) -> None:
    """Though a launch still runs; without the rule the host waits for it."""
    rank = ready(npu_team)
    for rule in (None, PROPOSAL):
        with holding(rank, "occupy"):
            call = rank.start(process_proposal, 77, rule)
            assert call.note() == "synchronized"
            wait_until_held(rank, "occupy")
            at_rest(rank)
            assert call.has_answer == (rule is None)
        assert call.result() == 77


def test_outputs_are_copied_when_they_are_packed(npu_team: Team) -> None:
    rank = ready(npu_team)
    for rule, found in ((None, 41), (PRODUCED, -1)):
        with holding(rank, "occupy"):
            call = rank.start(return_tokens, 41, rule)
            assert call.note() == "returned"  # the scheduler goes on although nothing is packed
            at_rest(rank)
            assert call.has_answer == (rule is PRODUCED)
        assert call.result() == found
