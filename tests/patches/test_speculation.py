"""Speculative decoding with stages: what is refused, what leaves the last stage, and that every stage makes
the same of it.

Upstream's own preparation runs here, on stand-ins for a scheduler and a batch: of these it reads what is
given to them. That servers answer alike is shown by tests/server/test_speculation.py.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sglang.srt.managers import scheduler_pp_mixin
from sglang.srt.managers.scheduler_pp_mixin import SchedulerPPMixin

from sglang_npu_pp.host_copies import HostCopy
from sglang_npu_pp.patches import outputs, speculation
from sglang_npu_pp.patches.pipeline import Launch
from sglang_npu_pp.streams import PassedEvent

ROUND = {  # of two requests, with trees of four nodes
    "next_token_ids": torch.tensor([7, 8, 0, 0, 9, 0, 0, 0]),
    "spec_accept_lens": torch.tensor([2, 1], dtype=torch.int32),
    "spec_new_seq_lens": torch.tensor([12, 21]),
    "spec_bonus_tokens": torch.tensor([8, 9], dtype=torch.int32),
    "spec_accept_index": torch.tensor([[0, 2, -1], [4, -1, -1]], dtype=torch.int32),
    "spec_next_chain": torch.tensor([8, 11, 12, 13, 9, 21, 22, 23]),
    "spec_next_parents": torch.tensor([[-1, 0, 1], [-1, 1, 0]]),
    "spec_next_top_scores": torch.tensor([[0, 1, 2], [0, 2, 3]]),
}


def arguments(**changed: Any) -> Any:
    usual = {"pp_size": 2, "speculative_algorithm": "EAGLE", "disaggregation_mode": "null"}
    return SimpleNamespace(**{**usual, **changed})


@pytest.mark.parametrize(
    ("changed", "sentence"),
    [
        ({"speculative_algorithm": None}, None),
        ({}, None),
        ({"speculative_algorithm": "NEXTN"}, None),
        ({"speculative_algorithm": "DSPARK", "disaggregation_mode": "prefill"}, None),
        ({"speculative_algorithm": "DFLASH"}, "speculative decoding by DFLASH with pipeline parallelism"),
        ({"speculative_algorithm": "DFLASH", "pp_size": 1}, None),
        ({"disaggregation_mode": "prefill"}, None),
        ({"disaggregation_mode": "decode"}, "speculative decoding on a decode server with stages"),
    ],
)
def test_what_is_refused_is_named(changed: dict[str, Any], sentence: str | None) -> None:
    expected = None if sentence is None else f"{sentence} is not supported yet"
    assert speculation.refused(arguments(**changed)) == expected


def test_a_verify_round_returns_no_input_of_the_next_draft() -> None:
    """A prefill does: another server, or a chunk, goes on with it."""
    draft = {"draft_topk_p": 1, "draft_topk_index": 2, "draft_hidden_states": 3}
    prefill = {"next_token_ids": 4, **draft}

    def sent(tensors: dict[str, Any]) -> dict[str, Any]:
        return speculation.prepare_tensor_dict(lambda *_: tensors, "scheduler", "result", "batch")

    assert sent({**ROUND, **draft}) == ROUND
    assert sent(prefill) == prefill


# --- a verify round on each stage -----------------------------------------------------------------


class Uploaded(torch.Tensor):
    """A tensor that was put on the device."""


class Scheduler(SchedulerPPMixin):
    def __init__(self, stage: int, role: str) -> None:
        self._pp_spec_relay, self.device = role == "null", "cpu"
        self.disaggregation_mode = role
        self.stashed: list[Any] = []  # upstream's table of what requests go on with, on the device
        self.future_map = SimpleNamespace(stash=lambda indices, payload: self.stashed.append(payload))
        self.pp_group = SimpleNamespace(is_first_rank=False)
        self.moved: list[Any] = []  # KV of accepted paths
        self.stage = stage

    def _pp_spec_compact_accept_kv(self, *arguments: Any) -> None:
        index = arguments[-1]["spec_accept_index"]
        self.moved.append((type(index), index.tolist(), arguments[-1]["spec_accept_lens"].tolist()))


@pytest.fixture(autouse=True)
def four_nodes(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = SimpleNamespace(speculative_num_draft_tokens=4)
    monkeypatch.setattr(scheduler_pp_mixin, "get_spec", lambda: spec)


@pytest.fixture
def uploads(monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    found: list[torch.Tensor] = []

    def upload(tensor: torch.Tensor, streams: Any) -> torch.Tensor:
        found.append(tensor)
        return tensor.as_subclass(Uploaded)

    monkeypatch.setattr(outputs, "upload", upload)
    return found


def batch_of(names: str) -> Any:
    """As it is when its outputs come: the requests that ran the forward."""
    return SimpleNamespace(
        reqs=[SimpleNamespace(rid=name) for name in names],
        return_logprob=False,
        return_hidden_states=False,
        spec_info=None,
        spec_algorithm=SimpleNamespace(is_dspark=lambda: False),
        req_pool_indices=None,
        contains_last_prefill_chunk=False,
        seq_lens=torch.tensor([10, 20]),
        seq_lens_cpu=torch.tensor([10, 20]),
        seq_lens_sum=30,
    )


def take(stage: int, values: dict[str, torch.Tensor], role: str = "null") -> tuple[Any, Any, Scheduler]:
    """Outputs on a stage of a server of that role, by the ticket; on the last (1) its own."""
    own = HostCopy(dict(values), PassedEvent(), sources=dict(values)) if stage == 1 else None
    pipeline: Any = SimpleNamespace(
        launched={0: Launch(5, False, own)},
        is_last=stage == 1,
        ahead=None,
        adviser=None,
        streams=None,
        token_return=SimpleNamespace(wait=lambda copy, iteration: copy.wait()),
        post_outputs=lambda slot: SimpleNamespace(wait=lambda: dict(values)),
    )
    batch, scheduler = batch_of("ab"), Scheduler(stage, role)
    metadata = SimpleNamespace(fwd_batch=batch_of("ab"), verify_out_cache_loc=None, can_run_cuda_graph=False)
    ticket = outputs.OutputTicket(scheduler, pipeline, 0, batch, metadata)
    ticket.synchronize()
    return batch, ticket.result, scheduler


def state(taken: tuple[Any, Any, Scheduler]) -> dict[str, Any]:
    """What the next round and the processing of this one depend on."""
    batch, result, scheduler = taken
    return {
        "lengths": batch.seq_lens.tolist(),
        "lengths on the host": batch.seq_lens_cpu.tolist(),
        "sum of lengths": batch.seq_lens_sum,
        "requests of the tree": batch.spec_info.rids,
        "tree": batch.spec_info.tokens.tolist(),
        "parents": batch.spec_info.parents.tolist(),
        "scores": batch.spec_info.top_scores.tolist(),
        "tokens": result.next_token_ids.tolist(),
        "accepted": result.accept_lens.tolist(),
        "moved": [moved[1:] for moved in scheduler.moved],
    }


def test_every_stage_goes_on_with_the_same_tree(uploads: list[torch.Tensor]) -> None:
    last = state(take(1, ROUND))
    assert uploads == []  # the last stage has kept its own tensors
    assert state(take(0, ROUND)) == last
    assert last["tree"] == [[8, 11, 12, 13], [9, 21, 22, 23]]
    assert last["lengths"] == last["lengths on the host"] == [12, 21]
    assert last["accepted"] == [2, 1]


def test_what_the_next_launch_reads_is_on_the_device_and_the_rest_is_not(uploads: list[torch.Tensor]) -> None:
    """`tolist()` on a tensor of the device would wait for it."""
    batch, result, scheduler = take(0, ROUND)
    on_device = [batch.seq_lens, batch.spec_info.tokens, batch.spec_info.parents, batch.spec_info.top_scores]
    assert all(isinstance(each, Uploaded) for each in on_device)
    assert scheduler.moved[0][0] is Uploaded
    on_host = [batch.seq_lens_cpu, result.next_token_ids, result.accept_lens]
    assert not any(isinstance(each, Uploaded) for each in on_host)


PREFILL = {  # of two requests
    "next_token_ids": torch.tensor([7, 8]),
    "draft_topk_p": torch.tensor([[0.5], [0.25]]),
    "draft_topk_index": torch.tensor([[11], [21]]),
    "draft_hidden_states": torch.arange(8.0).view(2, 4),
    "draft_dsa_topk_indices": torch.tensor([[3, 1], [2, 5]], dtype=torch.int32),
}


def proposal(result: Any) -> dict[str, Any]:
    names = ("topk_p", "topk_index", "hidden_states", "dsa_topk_indices")
    return {f"draft_{name}": getattr(result.next_draft_input, name) for name in names}


@pytest.mark.parametrize("stage", [0, 1])
def test_every_stage_of_a_prefill_server_gets_the_proposal_on_the_host(
    uploads: list[torch.Tensor], stage: int
) -> None:
    batch, result, scheduler = take(stage, PREFILL, role="prefill")
    assert batch.spec_info is result.next_draft_input  # upstream asserts it
    for name, value in proposal(result).items():
        assert torch.equal(value, PREFILL[name])
        assert not isinstance(value, Uploaded)
    (stashed,) = scheduler.stashed
    assert isinstance(stashed.topk_p, Uploaded) == (stage == 0)  # the last stage has its own


def test_where_a_launch_reads_the_proposal_it_is_on_the_device(uploads: list[torch.Tensor]) -> None:
    _, result, _ = take(0, PREFILL)
    assert all(isinstance(value, Uploaded) for value in proposal(result).values())


def swap_rows(name: str) -> Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]:
    return lambda values: {**values, name: values[name].view(2, -1).flip(0).reshape(values[name].shape)}


@pytest.mark.parametrize("name", [name for name in ROUND if name != "spec_bonus_tokens"])
def test_a_row_of_another_request_is_another_state(name: str, uploads: list[torch.Tensor]) -> None:
    """The comparison above notices it. Bonus tokens are the roots of trees, and read only without trees."""
    assert state(take(0, swap_rows(name)(ROUND))) != state(take(1, ROUND))


def test_a_lost_accept_length_is_noticed(uploads: list[torch.Tensor]) -> None:
    """Without them outputs are no verify round: the batch would keep its lengths and its tree."""
    lost = {name: value for name, value in ROUND.items() if name != "spec_accept_lens"}
    assert not speculation.is_verify_round(lost)
    shorter = {**ROUND, "spec_accept_lens": torch.tensor([1, 1], dtype=torch.int32)}
    assert state(take(0, shorter)) != state(take(1, ROUND))
