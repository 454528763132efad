"""Tiny twins of models on which SGLang's own tests compare one stage with two: random weights, float32."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import (
    Glm4vConfig,
    Glm4vForConditionalGeneration,
    Glm4vImageProcessor,
    Glm4vProcessor,
    Glm4vVideoProcessor,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)

SEED = 0
VOCABULARY, CONTEXT, LAYERS = 512, 4096, 4
HEADS, KEY_VALUE_HEADS, HEAD_WIDTH, WIDTH = 4, 2, 16, 64
SCALE = 0.15  # of weights: at the usual 0.02 so small a model says the same whatever it is asked
PICTURE_TOKENS = (
    *("<|begin_of_image|>", "<|image|>", "<|end_of_image|>"),
    *("<|begin_of_video|>", "<|video|>", "<|end_of_video|>"),
)
CHAT_TEMPLATE = """\
{%- for message in messages -%}
<|im_start|>{{ message['role'] }}{{ '\\n' }}
{%- for part in message['content'] -%}
{%- if part['type'] == 'text' -%}{{ part['text'] }}
{%- else -%}<|begin_of_image|><|image|><|end_of_image|>
{%- endif -%}
{%- endfor -%}
<|im_end|>{{ '\\n' }}
{%- endfor -%}
<|im_start|>assistant{{ '\\n' }}"""


def write_model(name: str, folder: Path, tokenizer_of: Path) -> Path:
    """One of `MODELS`, in `folder`, with the tokenizer of another model."""
    torch.manual_seed(SEED)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(tokenizer_of)
    MODELS[name](tokenizer, folder).float().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def _qwen3(tokenizer: PreTrainedTokenizerFast, *, tied: bool) -> PreTrainedModel:
    return Qwen3ForCausalLM(Qwen3Config(**_text(tokenizer), head_dim=HEAD_WIDTH, tie_word_embeddings=tied))


def _glm4v(tokenizer: PreTrainedTokenizerFast, folder: Path) -> PreTrainedModel:
    """GLM-4.1V, with a processor of pictures of 56 x 56 to 112 x 112 pixels."""
    tokenizer.add_special_tokens({"additional_special_tokens": list(PICTURE_TOKENS)})
    tokenizer.chat_template = CHAT_TEMPLATE
    geometry = {
        "patch_size": 14,
        "temporal_patch_size": 2,
        "merge_size": 2,
        "size": {"shortest_edge": 56 * 56, "longest_edge": 112 * 112},
    }
    processor = Glm4vProcessor(
        image_processor=Glm4vImageProcessor(**geometry),
        video_processor=Glm4vVideoProcessor(**geometry),
        tokenizer=tokenizer,
        chat_template=CHAT_TEMPLATE,
    )
    processor.save_pretrained(folder)
    ids = tokenizer.get_vocab()
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}
    config = Glm4vConfig(
        text_config={**_text(tokenizer), "rope_parameters": rope, "tie_word_embeddings": False},
        vision_config={
            "depth": 2,
            "hidden_size": WIDTH,
            "num_heads": 4,
            "intermediate_size": 2 * WIDTH,
            "out_hidden_size": WIDTH,
            "image_size": 112,
            "patch_size": 14,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "initializer_range": SCALE,
        },
        image_start_token_id=ids["<|begin_of_image|>"],
        image_token_id=ids["<|image|>"],
        image_end_token_id=ids["<|end_of_image|>"],
        video_start_token_id=ids["<|begin_of_video|>"],
        video_token_id=ids["<|video|>"],
        video_end_token_id=ids["<|end_of_video|>"],
        tie_word_embeddings=False,
    )
    return Glm4vForConditionalGeneration(config)


def _text(tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
    return {
        "vocab_size": VOCABULARY,
        "hidden_size": WIDTH,
        "intermediate_size": 2 * WIDTH,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KEY_VALUE_HEADS,
        "max_position_embeddings": CONTEXT,
        "initializer_range": SCALE,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.pad_token_id,
    }


MODELS: Mapping[str, Callable[[PreTrainedTokenizerFast, Path], PreTrainedModel]] = {
    "qwen3": lambda tokenizer, _: _qwen3(tokenizer, tied=False),
    "qwen3-tied": lambda tokenizer, _: _qwen3(tokenizer, tied=True),
    "glm4v": _glm4v,
}
