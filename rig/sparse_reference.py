"""What the twins with sparse attention should say: transformers' GLM-5, which is written without SGLang.

A forward of the whole prompt at once, with a mask in the place of pages, and without stages. Where SGLang
does it otherwise on an NPU, its way is taken over: the indexer's rotation has its pairs beside each other, as
the published configurations say, and the indexer's weights and the experts are rounded to bfloat16.
"""

from __future__ import annotations

import types
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from rig.published_twin import INDEX_HEADS, INDEX_WIDTH, ROTARY

NARROW = torch.bfloat16


class Reference:
    """A twin in `folder`, of the configurations with an indexer."""

    def __init__(self, folder: Path) -> None:
        from transformers import GlmMoeDsaForCausalLM
        from transformers.utils import logging

        logging.set_verbosity_error()  # the NEXTN layer, which it does not know, is left out
        logging.disable_progress_bar()
        self._model = GlmMoeDsaForCausalLM.from_pretrained(
            folder, dtype=torch.float32, attn_implementation="eager"
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
