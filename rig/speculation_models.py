"""A tiny Llama with random weights and an EAGLE draft for it, of which a part is accepted.

The draft has none of the target's layers. 0.6 MB in float32, without a tokenizer of their own.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from rig.checkpoints import LAYER_SCALE, Weights, draft_input, write_checkpoint

SEED = 0
WIDTH, HEADS, KEY_VALUE_HEADS, HEAD_WIDTH, INNER = 64, 4, 2, 16, 128
VOCABULARY, CONTEXT = 512, 4096
LAYERS = 4


def write_models(folder: Path, model: Path) -> tuple[Path, Path]:
    """Target and draft, with the tokenizer of `model`."""
    generator = torch.Generator().manual_seed(SEED)
    target, draft = folder / "target", folder / "draft"
    embedding, head = (torch.randn(VOCABULARY, WIDTH, generator=generator) for _ in range(2))
    layers = [layer(f"model.layers.{index}.", generator) for index in range(LAYERS)]
    weights: Weights = {
        "model.embed_tokens.weight": embedding,
        "model.norm.weight": torch.ones(WIDTH),
        "lm_head.weight": head,
        **{name: value for each in layers for name, value in each.items()},
    }
    write_checkpoint(target, _config("LlamaForCausalLM", LAYERS), weights, model)
    write_checkpoint(draft, _config("LlamaForCausalLMEagle", 1), _draft(embedding, generator), model)
    return target, draft


def _draft(embedding: torch.Tensor, generator: torch.Generator) -> Weights:
    """It reads [embedding of a token, hidden state that said it]; the head is the target's."""
    projection = draft_input(WIDTH, generator)
    own = layer("layers.0.", generator)
    del own["layers.0.input_layernorm.weight"]  # the draft's layer has none
    return {
        "embed_tokens.weight": embedding.clone(),
        "fc.weight": projection,
        "fc.bias": torch.zeros(WIDTH),
        **own,
    }


def layer(prefix: str, generator: torch.Generator) -> Weights:
    def matrix(rows: int, columns: int, scale: float = 1.0) -> torch.Tensor:
        return torch.randn(rows, columns, generator=generator) * scale / columns**0.5

    attention, mlp = f"{prefix}self_attn.", f"{prefix}mlp."
    query, key = HEADS * HEAD_WIDTH, KEY_VALUE_HEADS * HEAD_WIDTH
    return {
        f"{attention}q_proj.weight": matrix(query, WIDTH),
        f"{attention}k_proj.weight": matrix(key, WIDTH),
        f"{attention}v_proj.weight": matrix(key, WIDTH),
        f"{attention}o_proj.weight": matrix(WIDTH, query, LAYER_SCALE),
        f"{mlp}gate_proj.weight": matrix(INNER, WIDTH),
        f"{mlp}up_proj.weight": matrix(INNER, WIDTH),
        f"{mlp}down_proj.weight": matrix(WIDTH, INNER, LAYER_SCALE),
        f"{prefix}input_layernorm.weight": torch.ones(WIDTH),
        f"{prefix}post_attention_layernorm.weight": torch.ones(WIDTH),
    }


def _config(architecture: str, layers: int) -> Mapping[str, Any]:
    return {
        "architectures": [architecture],
        "model_type": "llama",
        "hidden_size": WIDTH,
        "intermediate_size": INNER,
        "num_hidden_layers": layers,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KEY_VALUE_HEADS,
        "head_dim": HEAD_WIDTH,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": CONTEXT,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
    }
