"""A tiny Qwen3 with random weights and a DSPARK draft for it, of which a part is accepted.

On a prefill server the draft only turns hidden states of the target into its own keys and values. Of a Qwen3
SGLang takes them from layers of the last stage. On a decode server its Markov head says of each token what
the target mostly says behind it; its layers, which read those keys and values, change that.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from rig.checkpoints import Weights, write_checkpoint
from rig.speculation_models import (
    CONTEXT,
    HEAD_WIDTH,
    HEADS,
    INNER,
    KEY_VALUE_HEADS,
    LAYERS,
    VOCABULARY,
    WIDTH,
    layer,
)

SEED = 0
DRAFT_LAYERS, BLOCK = 2, 4
LAST_STAGE = (1, 2)  # layers whose outputs the draft reads: SGLang takes each before the layer that follows
SHARE = 0.5  # of what the draft's layers say, in what it drafts; with more, fewer drafts are accepted


def write_models(folder: Path, tokenizer_of: Path) -> tuple[Path, Path]:
    """Target and draft."""
    generator = torch.Generator().manual_seed(SEED)
    embedding, head = (torch.randn(VOCABULARY, WIDTH, generator=generator) for _ in range(2))
    weights: Weights = {
        "model.embed_tokens.weight": embedding,
        "model.norm.weight": torch.ones(WIDTH),
        "lm_head.weight": head,
        **_layers("model.", LAYERS, generator),
    }
    target, draft = folder / "target", folder / "draft"
    write_checkpoint(target, _TARGET, weights, tokenizer_of)
    write_checkpoint(draft, _DRAFT, _draft(embedding, head, generator), tokenizer_of)
    return target, draft


def _draft(embedding: torch.Tensor, head: torch.Tensor, generator: torch.Generator) -> Weights:
    """It has embedding and head of the target, and the product of the two as its Markov head."""
    read = len(LAST_STAGE) * WIDTH
    return {
        "fc.weight": torch.randn(WIDTH, read, generator=generator) / read**0.5,
        "hidden_norm.weight": torch.ones(WIDTH),
        "norm.weight": torch.full((WIDTH,), SHARE),
        "markov_head.markov_w1.weight": embedding.clone(),
        "markov_head.markov_w2.weight": head.clone(),
        **_layers("", DRAFT_LAYERS, generator),
    }


def _layers(prefix: str, count: int, generator: torch.Generator) -> Weights:
    """Those of a Llama, with norms of queries and keys."""
    found: Weights = {}
    for index in range(count):
        name = f"{prefix}layers.{index}."
        found |= layer(name, generator)
        found |= {f"{name}self_attn.{of}_norm.weight": torch.ones(HEAD_WIDTH) for of in "qk"}
    return found


_QWEN3: Mapping[str, Any] = {
    "model_type": "qwen3",
    "hidden_size": WIDTH,
    "intermediate_size": INNER,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KEY_VALUE_HEADS,
    "head_dim": HEAD_WIDTH,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": CONTEXT,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "attention_bias": False,
}
_TARGET: Mapping[str, Any] = {
    "architectures": ["Qwen3ForCausalLM"],
    "num_hidden_layers": LAYERS,
    **_QWEN3,
}
_DRAFT: Mapping[str, Any] = {
    "architectures": ["Qwen3DSparkModel"],
    "num_hidden_layers": DRAFT_LAYERS,
    **_QWEN3,
    "num_target_layers": LAYERS,
    "block_size": BLOCK,
    "markov_rank": WIDTH,
    "markov_head_type": "vanilla",
    "enable_confidence_head": False,
    "dflash_config": {"target_layer_ids": list(LAST_STAGE), "mask_token_id": VOCABULARY - 1},
}
