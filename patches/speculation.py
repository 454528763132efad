"""Seam: speculative decoding with stages, on one server (SGLANG_ENABLE_PP_SPEC) or before a decode server.

On one server the last stage drafts; every stage verifies the same tree, rebuilt from outputs: accept lengths,
new lengths, bonus tokens, tree. On a prefill server every stage gets the draft's first proposal (scores,
tokens, hidden states, indices of sparse attention), which it writes into its message for the decode server;
with DSPARK there is none, and what the draft reads of earlier stages travels with their proxies.

All of it takes the host lane: at most some 100 KB a microbatch, wanted by the host or by a launch of a later
iteration, and device tensors flow in one direction only.
"""

from __future__ import annotations

from typing import Any

from sglang_npu_pp.patching import Patch

_MIXIN = "sglang.srt.managers.scheduler_pp_mixin:SchedulerPPMixin"
_RELAY = "sglang.srt.speculative.pp_spec_relay:PPSpecRelayInput"
_WORKER = "sglang.srt.speculative.eagle_worker_v2:EAGLEWorkerV2"

_KNOWN = ("EAGLE", "NEXTN", "DSPARK")  # NEXTN is SGLang's other name of EAGLE
_ACCEPTED = "spec_accept_lens"  # an output of verify rounds only
_LENGTHS = "spec_new_seq_lens"
_PROPOSAL = ("topk_p", "topk_index", "hidden_states", "dsa_topk_indices")  # "draft_..." among the outputs

# Kept in the batch on the device until the next launch, or used there. The others are read on the host; new
# lengths, too, and become a tensor of the batch then (`put_lengths_on_device`).
DEVICE_OUTPUTS = ("spec_bonus_tokens", "spec_accept_index", "spec_next_")


def refused(server_args: Any) -> str | None:
    """Speculation without an asynchronous path; upstream refuses further combinations when it starts."""
    algorithm = server_args.speculative_algorithm
    if server_args.pp_size == 1 or algorithm is None:
        return None
    if algorithm.upper() not in _KNOWN:
        return f"speculative decoding by {algorithm} with pipeline parallelism is not supported yet"
    if server_args.disaggregation_mode == "decode":
        return "speculative decoding on a decode server with stages is not supported yet"
    return None


def prepare_tensor_dict(original: Any, scheduler: Any, result: Any, batch: Any) -> dict[str, Any]:
    """Of a verify round, nothing but what other stages read."""
    tensors: dict[str, Any] = original(scheduler, result, batch)
    if is_verify_round(tensors):
        return {name: value for name, value in tensors.items() if not name.startswith("draft_")}
    return tensors


def has_proposal(outputs: Any) -> bool:
    """Of a prefill: what the draft proposes first."""
    return "draft_topk_p" in outputs


def leave_proposal_on_host(result: Any, outputs: Any) -> None:
    """Behind upstream's preparation: what a prefill server copies into its message comes from the host.

    A copy from the device is waited for, behind all that the host has launched before.
    """
    for name in _PROPOSAL:
        if (value := outputs.get(f"draft_{name}")) is not None:
            setattr(result.next_draft_input, name, value)


def is_verify_round(outputs: Any) -> bool:
    return _ACCEPTED in outputs


def put_lengths_on_device(batch: Any, result: Any, outputs: Any, on_device: Any) -> None:
    """Behind upstream's preparation, which reads the new lengths on the host and keeps them in the batch."""
    if is_verify_round(outputs):
        lengths = outputs[_LENGTHS]
        result.new_seq_lens = on_device(_LENGTHS, lengths)
        if batch.seq_lens is lengths:
            batch.seq_lens = result.new_seq_lens


PATCHES = (
    Patch(
        target=f"{_MIXIN}._pp_prepare_tensor_dict",
        wrapper=prepare_tensor_dict,
        why="hidden states, scores and tokens of the draft return with each verify round, though the tree "
        "is drafted already and no stage reads them",
        how="leaves them out",
        upstream="none known",
        plan="goes when upstream sends them for a prefill only",
        relies_on=(
            f"{_MIXIN}._pp_spec_rebuild_verify_input",
            f"{_MIXIN}._pp_spec_compact_accept_kv",
            f"{_MIXIN}._pp_spec_commit_relayed_accept",  # the same, from 0.5.22 on
            f"{_MIXIN}._pp_spec_adopt_relayed_tree",
            f"{_MIXIN}._pp_spec_set_relay",
            f"{_RELAY}.adopt",
            f"{_RELAY}.filter_batch",
            f"{_RELAY}.merge_batch",
            f"{_WORKER}.forward_batch_generation",
            "sglang.srt.speculative.dspark_components.dspark_draft:make_next_draft_input",
            "sglang.srt.arg_groups.validation_hook:check_pipeline_parallel_compat",
        ),
    ),
)
