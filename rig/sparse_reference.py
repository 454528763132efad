"""What the twins with sparse attention should say: transformers' GLM-5, which is written without SGLang.

A forward of the whole prompt at once, with a mask in the place of pages, and without stages. Where SGLang
does it otherwise on an NPU, its way is taken over: the indexer's rotation has its pairs beside each other, as
the published configurations say, and the indexer's weights and the experts are rounded to bfloat16.
"""

from __future__ import annotations

import types
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from rig.published_twin import INDEX_HEADS, INDEX_WIDTH, ROTARY

NARROW = torch.bfloat16

LENGTHS = (1, 5, 60, 64, 65, 100, 130, 257, 600)  # of prompts; an indexer chooses 64 tokens
TOKENS = 8
REQUEST: Mapping[str, Any] = {
    "sampling_params": {"temperature": 0, "ignore_eos": True, "max_new_tokens": TOKENS},
    "return_logprob": True,
    "logprob_start_len": 0,
}

# Where sums are made in another order, rounding to bfloat16 now and then chooses another expert or token:
# half of the log-probabilities are near, most are not far.
NEAR, FAR, MOST = 0.02, 0.3, 0.97


@dataclass(frozen=True)
class Answer:
    """One prompt, the tokens that followed, and the log-probabilities of all but the prompt's first."""

    prompt: list[int]
    tokens: list[int]
    log_probabilities: list[float]

    @staticmethod
    def of(prompt: list[int], to_prompt: Mapping[str, Any], to_rest: Mapping[str, Any]) -> Answer:
        """From what /generate answered: a prefill server to the prompt, a decode server to the rest."""
        known = to_prompt["meta_info"]["input_token_logprobs"][1:]
        made = to_rest["meta_info"]["output_token_logprobs"]
        return Answer(prompt, to_rest["output_ids"], [value for value, *_ in (*known, *made)])


class Reference:
    """A twin in `folder`, of the configurations with an indexer; `changes` are of its configuration."""

    def __init__(self, folder: Path, **changes: Any) -> None:
        from transformers import GlmMoeDsaForCausalLM
        from transformers.utils import logging

        logging.set_verbosity_error()  # the NEXTN layer, which it does not know, is left out
        logging.disable_progress_bar()
        self._model = GlmMoeDsaForCausalLM.from_pretrained(
            folder, dtype=torch.float32, attn_implementation="eager", **changes
        ).eval()
        for layer in self._model.model.layers:
            if layer.self_attn.indexer is not None:
                _as_published(layer.self_attn.indexer)
            if hasattr(layer.mlp, "experts"):
                layer.mlp.experts.forward = types.MethodType(_narrow_experts, layer.mlp.experts)
                layer.mlp.register_forward_hook(_narrow_output)

    @torch.no_grad()
    def log_probabilities(self, tokens: list[int]) -> Tensor:
        """Of every next token behind each of these: [tokens, vocabulary]."""
        logits: Tensor = self._model(torch.tensor([tokens])).logits
        return logits[0].log_softmax(-1)


def differences(reference: Reference, answers: Mapping[int, Answer]) -> list[str]:
    """What in answers of a server is not as in a forward of the same tokens by the reference."""
    found, distances = [], []
    for length, answer in answers.items():
        rows = reference.log_probabilities([*answer.prompt, *answer.tokens[:-1]])
        following = [*answer.prompt[1:], *answer.tokens]
        expected = [row[token].item() for row, token in zip(rows, following, strict=True)]
        distances += [abs(a - b) for a, b in zip(expected, answer.log_probabilities, strict=True)]
        for row, token in zip(rows[length - 1 :], answer.tokens, strict=True):
            if row.max() - row[token] > FAR:
                found.append(f"prompt of {length}: {token} is not the likeliest token")
    middle, high = median(distances), sorted(distances)[int(MOST * len(distances))]
    if middle > NEAR or high > FAR:
        found.append(
            f"log-probabilities differ by {middle:.4f} in the middle, {MOST:.0%} by up to {high:.4f}"
        )
    return found


def _as_published(indexer: Any) -> None:
    """transformers turns pairs from two halves: put its columns there, which changes no product of two."""
    order = torch.cat(
        [torch.arange(0, ROTARY, 2), torch.arange(1, ROTARY, 2), torch.arange(ROTARY, INDEX_WIDTH)]
    )
    heads = indexer.wq_b.weight.data.view(INDEX_HEADS, INDEX_WIDTH, -1)
    indexer.wq_b.weight.data = heads[:, order].flatten(0, 1)
    for parameter in (indexer.wk.weight, indexer.k_norm.weight, indexer.k_norm.bias):
        parameter.data = parameter.data[order]
    weights = indexer.weights_proj
    weights.weight.data = _narrow(weights.weight.data)
    weights.register_forward_hook(_narrow_output)


def _narrow_experts(experts: Any, hidden: Tensor, chosen: Tensor, shares: Tensor) -> Tensor:
    """Each token's experts, one by one."""
    total = torch.zeros_like(hidden)
    for choice in range(chosen.shape[1]):
        expert = chosen[:, choice]
        gate_up = torch.einsum("tn,tmn->tm", hidden, experts.gate_up_proj[expert]).to(NARROW)
        gate, up = gate_up.chunk(2, -1)
        inner = (functional.silu(gate) * up).float()
        made = _narrow(torch.einsum("tn,tmn->tm", inner, experts.down_proj[expert]))
        total += made * shares[:, choice, None]
    return _narrow(total)


def _narrow_output(_module: Any, _arguments: Any, made: Tensor) -> Tensor:
    return _narrow(made)


def _narrow(values: Tensor) -> Tensor:
    return values.to(NARROW).float()
