"""Write a tiny Qwen3-VL with random weights: model, tokenizer, processor, chat template.

    python scripts/model/random_model.py --out /tmp/random_vl

With the defaults: 8 text layers of width 128, 4 vision layers of width 64, 512 tokens, 3.9 MB in
bfloat16. Small enough for a repository, and it takes every path of a large one: images, deepstack
(vision layers 0 to 2 feed text layers 0 to 2), grouped-query attention, interleaved mrope.

Under pipeline parallelism every stage but the first must begin at a layer >= the number of
deepstack layers. 8 layers in 2 stages do; 4 stages need SGLANG_PP_LAYER_PARTITION=3,2,2,1, which
rig/server.py sets.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    PreTrainedTokenizerFast,
    Qwen2VLImageProcessor,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLProcessor,
    Qwen3VLVideoProcessor,
)

SEED = 0
VOCABULARY = 512  # rounded up: learned tokens, then the special ones
LEARNED_TOKENS = 505
CONTEXT = 4096
HEADS, KEY_VALUE_HEADS, HEAD_WIDTH = 4, 2, 32
VISION_LAYERS, VISION_WIDTH, VISION_HEADS = 4, 64, 2
PATCH, MERGE = 16, 2  # pixels per patch side; patches per token side
MIN_PIXELS, MAX_PIXELS = 64 * 64, 128 * 128
END_OF_TEXT, TURN_END = "<|endoftext|>", "<|im_end|>"
SPECIAL_TOKENS = (
    END_OF_TEXT,
    "<|im_start|>",
    TURN_END,
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
)

# What the tokenizer learns whole words from; any other text falls back to bytes.
CORPUS = (
    "which digit is shown in the image? answer with a single digit.\n",
    "You are a helpful assistant.\n",
    "what is + = ?\n",
    "user\n",
    "assistant\n",
    "system\n",
)

CHAT_TEMPLATE = """\
{%- macro picture(kind) -%}<|vision_start|><|{{ kind }}_pad|><|vision_end|>{%- endmacro -%}
{%- for message in messages -%}
<|im_start|>{{ message['role'] }}{{ '\\n' }}
{%- if message['content'] is string -%}
{{ message['content'] }}
{%- else -%}
{%- for part in message['content'] -%}
{%- if part['type'] == 'image' or 'image' in part or 'image_url' in part -%}{{ picture('image') }}
{%- elif part['type'] == 'video' or 'video' in part -%}{{ picture('video') }}
{%- elif 'text' in part -%}{{ part['text'] }}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
<|im_end|>{{ '\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}<|im_start|>assistant{{ '\\n' }}{%- endif -%}
"""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="output directory")
    parser.add_argument("--layers", type=int, default=8, help="text layers (8)")
    parser.add_argument("--width", type=int, default=128, help="width of the text model (128)")
    parser.add_argument(
        "--deepstack", type=int, nargs="*", default=[0, 1, 2], help="vision layers that feed it"
    )
    options = parser.parse_args()

    tokenizer = make_tokenizer()
    model = make_model(tokenizer, options.layers, options.width, options.deepstack)
    model.save_pretrained(options.out)
    make_processor(tokenizer).save_pretrained(options.out)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    print(f"{options.out}: {parameters} parameters, {len(tokenizer)} tokens")


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer in which every decimal digit is a token of its own."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=LEARNED_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    # Repeated, because BPE merges a pair only when it has seen it more than once.
    bpe.train_from_iterator([*CORPUS * 20, *"0123456789"], trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        eos_token=TURN_END,
        pad_token=END_OF_TEXT,
        additional_special_tokens=list(SPECIAL_TOKENS),
        model_max_length=CONTEXT,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    if len(tokenizer) > VOCABULARY:
        raise ValueError(f"{len(tokenizer)} tokens do not fit a vocabulary of {VOCABULARY}")
    return tokenizer


def make_processor(tokenizer: PreTrainedTokenizerFast) -> Qwen3VLProcessor:
    """Pictures of 64 x 64 to 128 x 128 pixels: 4 to 16 tokens of 32 x 32 pixels each."""
    geometry = {
        "patch_size": PATCH,
        "temporal_patch_size": 2,
        "merge_size": MERGE,
        "size": {"shortest_edge": MIN_PIXELS, "longest_edge": MAX_PIXELS},
        "image_mean": [0.5] * 3,
        "image_std": [0.5] * 3,
    }
    return Qwen3VLProcessor(
        image_processor=Qwen2VLImageProcessor(**geometry),
        video_processor=Qwen3VLVideoProcessor(**geometry),
        tokenizer=tokenizer,
        chat_template=CHAT_TEMPLATE,
    )


def make_model(
    tokenizer: PreTrainedTokenizerFast, layers: int, width: int, deepstack: Sequence[int]
) -> Qwen3VLForConditionalGeneration:
    """The model in bfloat16, weights drawn with a fixed seed."""
    torch.manual_seed(SEED)
    vocabulary = tokenizer.get_vocab()
    token = {text: vocabulary[text] for text in SPECIAL_TOKENS}
    text_config = {
        "vocab_size": VOCABULARY,
        "hidden_size": width,
        "intermediate_size": 2 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KEY_VALUE_HEADS,
        "head_dim": HEAD_WIDTH,
        "max_position_embeddings": CONTEXT,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10000.0,
            "mrope_section": [6, 5, 5],  # time, height, width: half of HEAD_WIDTH together
            "mrope_interleaved": True,
        },
        "tie_word_embeddings": False,
        "eos_token_id": token[TURN_END],
        "pad_token_id": token[END_OF_TEXT],
        "bos_token_id": token[END_OF_TEXT],
    }
    vision_config = {
        "depth": VISION_LAYERS,
        "hidden_size": VISION_WIDTH,
        "intermediate_size": 2 * VISION_WIDTH,
        "num_heads": VISION_HEADS,
        "patch_size": PATCH,
        "spatial_merge_size": MERGE,
        "temporal_patch_size": 2,
        "out_hidden_size": width,
        "num_position_embeddings": 64,
        "deepstack_visual_indexes": list(deepstack),
    }
    config = Qwen3VLConfig(
        text_config=text_config,
        vision_config=vision_config,
        image_token_id=token["<|image_pad|>"],
        video_token_id=token["<|video_pad|>"],
        vision_start_token_id=token["<|vision_start|>"],
        vision_end_token_id=token["<|vision_end|>"],
        tie_word_embeddings=False,
    )
    model = Qwen3VLForConditionalGeneration(config)
    model.generation_config.eos_token_id = token[TURN_END]
    model.generation_config.pad_token_id = token[END_OF_TEXT]
    return model.bfloat16()


if __name__ == "__main__":
    main()
