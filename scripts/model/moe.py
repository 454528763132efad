"""Write a tiny Qwen3-MoE with random weights: model and tokenizer, for data-parallel attention.

    python scripts/model/moe.py --out rig/assets/random_moe

4 layers of width 64, each with 4 experts of which 2 are taken, 512 tokens; 0.9 MB in bfloat16.
"""

import argparse
from pathlib import Path

import torch
from random_model import CONTEXT, END_OF_TEXT, SEED, TURN_END, VOCABULARY, make_tokenizer
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="output directory")
    options = parser.parse_args()
    tokenizer = make_tokenizer()
    vocabulary = tokenizer.get_vocab()
    torch.manual_seed(SEED)
    config = Qwen3MoeConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=128,
        moe_intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_experts=4,
        num_experts_per_tok=2,
        norm_topk_prob=True,
        decoder_sparse_step=1,
        mlp_only_layers=[],
        max_position_embeddings=CONTEXT,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=False,
        initializer_range=0.1,  # at the usual 0.02 so small a model says the same whatever it is asked
        eos_token_id=vocabulary[TURN_END],
        pad_token_id=vocabulary[END_OF_TEXT],
        bos_token_id=vocabulary[END_OF_TEXT],
    )
    config.head_dim = 32
    model = Qwen3MoeForCausalLM(config).bfloat16()
    model.save_pretrained(options.out)
    tokenizer.save_pretrained(options.out)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    print(f"{options.out}: {parameters} parameters, {len(tokenizer)} tokens")


if __name__ == "__main__":
    main()
