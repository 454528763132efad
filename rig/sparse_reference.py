"""What the twins with sparse attention should say: transformers' GLM-5, which is written without SGLang.

A forward of the whole prompt at once, with a mask in the place of pages, and without stages. Where SGLang
does it otherwise on an NPU, its way is taken over: the indexer's rotation has its pairs beside each other, as
the published configurations say, and the indexer's weights and the experts are rounded to bfloat16.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from rig.published_twin import INDEX_HEADS, INDEX_WIDTH, ROTARY
from rig.speculation import ACCEPTANCE

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
    """One prompt, the tokens that followed, the log-probabilities of all but the prompt's first; and, where
    there are drafts, how many were accepted."""

    prompt: list[int]
    tokens: list[int]
    log_probabilities: list[float]
    acceptance: Mapping[str, Any]

    @staticmethod
    def of(prompt: list[int], to_prompt: Mapping[str, Any], to_rest: Mapping[str, Any]) -> Answer:
        """From what /generate answered: a prefill server to the prompt, a decode server to the rest."""
        known = to_prompt["meta_info"]["input_token_logprobs"][1:]
        made = to_rest["meta_info"]["output_token_logprobs"]
        acceptance = {name: to_rest["meta_info"].get(name) for name in ACCEPTANCE}
        return Answer(prompt, to_rest["output_ids"], [value for value, *_ in (*known, *made)], acceptance)


class Reference:
    """A twin in `folder`, of the configurations with an indexer; `changes` are of its configuration.

    `ranks` share the experts of a stage (tensor parallelism), of the server that has the prompt;
    `ranks_behind` those of a decode server behind it.
    """

    def __init__(self, folder: Path, ranks: int = 1, ranks_behind: int | None = None, **changes: Any) -> None:
        from transformers import GlmMoeDsaForCausalLM
        from transformers.utils import logging

        logging.set_verbosity_error()  # the NEXTN layer, which it does not know, is left out
        logging.disable_progress_bar()
        self._ranks = (ranks, ranks_behind or ranks)
        self._prompt = 0  # tokens of the prompt in this forward
        self._model = GlmMoeDsaForCausalLM.from_pretrained(
            folder, dtype=torch.float32, attn_implementation="eager", **changes
        ).eval()
        for layer in self._model.model.layers:
            if layer.self_attn.indexer is not None:
                _as_published(layer.self_attn.indexer)
            if hasattr(layer.mlp, "experts"):
                layer.mlp.forward = functools.partial(self._experts, layer.mlp)

    @torch.no_grad()
    def log_probabilities(self, prompt: list[int], rest: list[int]) -> Tensor:
        """Of every next token behind each of these: [tokens, vocabulary]."""
        self._prompt = len(prompt)
        logits: Tensor = self._model(torch.tensor([[*prompt, *rest]])).logits
        return logits[0].log_softmax(-1)

    def _experts(self, layer: Any, hidden: Tensor) -> Tensor:
        """hidden [1, tokens, width]; each token by the server that computes it."""
        parts = hidden.split([self._prompt, hidden.shape[1] - self._prompt], 1)
        made = [_experts_of_ranks(ranks, layer, part) for ranks, part in zip(self._ranks, parts, strict=True)]
        return torch.cat(made, 1)


def differences(reference: Reference, answers: Mapping[int, Answer]) -> list[str]:
    """What in answers of a server is not as in a forward of the same tokens by the reference."""
    found, distances = [], []
    for length, answer in answers.items():
        rows = reference.log_probabilities(answer.prompt, answer.tokens[:-1])
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


def _experts_of_ranks(ranks: int, layer: Any, hidden: Tensor) -> Tensor:
    """A layer of experts whose inner width is divided among ranks: each rounds its part, and they are summed.

    One token after another in the place of SGLang's groups, hidden [1, tokens, width].
    """
    chosen, shares = layer.route_tokens_to_experts(layer.gate(hidden))
    parts = [_of_rank(layer, hidden[0], chosen, shares, rank, ranks) for rank in range(ranks)]
    total = parts[0]
    for part in parts[1:]:
        total = _narrow(total + part)
    return total.unsqueeze(0)


def _of_rank(layer: Any, hidden: Tensor, chosen: Tensor, shares: Tensor, rank: int, ranks: int) -> Tensor:
    inner = layer.experts.down_proj.shape[-1] // ranks
    mine = slice(rank * inner, (rank + 1) * inner)
    gate, up = layer.experts.gate_up_proj.chunk(2, 1)
    gate, up, down = gate[:, mine], up[:, mine], layer.experts.down_proj[..., mine]
    total = torch.zeros_like(hidden)
    for choice, expert in enumerate(chosen.t()):
        halves = (torch.einsum("tn,tmn->tm", hidden, part[expert]).to(NARROW) for part in (gate, up))
        within = (functional.silu(next(halves)) * next(halves)).float()
        total += _narrow(torch.einsum("tn,tmn->tm", within, down[expert])) * shares[:, choice, None]
    shared = layer.shared_experts
    within = functional.silu(hidden @ shared.gate_proj.weight[mine].t()) * (
        hidden @ shared.up_proj.weight[mine].t()
    )
    return _narrow(_narrow(total) + within @ shared.down_proj.weight[:, mine].t())


def _narrow_output(_module: Any, _arguments: Any, made: Tensor) -> Tensor:
    return _narrow(made)


def _narrow(values: Tensor) -> Tensor:
    return values.to(NARROW).float()
