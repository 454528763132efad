"""Tiny checkpoints with random weights, for targets whose drafts are partly accepted.

The next token is mostly that which the last one's embedding says, changed by small layers: a draft that reads
that embedding is then right about half of the time.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

LAYER_SCALE = 0.35  # of what a layer adds: with more, fewer drafts are accepted
HIDDEN_SCALE = 0.1  # of what the target's hidden states tell the draft

Weights = dict[str, torch.Tensor]


def write_checkpoint(folder: Path, config: Mapping[str, Any], weights: Weights, model: Path) -> None:
    """In float32, with the tokenizer and the end-of-text token of `model`."""
    end_of_text = json.loads((model / "config.json").read_text())["text_config"]["eos_token_id"]
    common = {
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
        "bos_token_id": end_of_text,
        "eos_token_id": end_of_text,
        "pad_token_id": end_of_text,
    }
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({**config, **common}, indent=1))
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    for path in model.glob("tokenizer*"):
        shutil.copy(path, folder)


def draft_input(width: int, generator: torch.Generator) -> torch.Tensor:
    """[width, 2 x width]: of the embedding of a token, and of the hidden state that said it."""
    told = torch.randn(width, width, generator=generator) * HIDDEN_SCALE / width**0.5
    return torch.cat([torch.eye(width), told], dim=1)
