"""Weights by name, of a small Llama with random weights: not every model of SGLang gives them."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from rig.launcher import RANDOM_MODEL, Launcher
from rig.server import Server

pytestmark = pytest.mark.thorough

LAYERS = 4


def make_model(folder: Path) -> Path:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=4096,
        bos_token_id=326,
        eos_token_id=325,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(RANDOM_MODEL / name, folder / name)
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def server(model: Path, make_launcher: Callable[[str], Launcher]) -> Iterator[Server]:
    launcher = make_launcher("llama")
    yield launcher.start(1, 2, patched=True, model=model)
    launcher.stop_all()


def test_a_weight_comes_from_the_stage_that_has_it(server: Server, model: Path) -> None:
    weights = load_file(model / "model.safetensors")
    for layer in range(LAYERS):
        name = f"model.layers.{layer}.mlp.down_proj.weight"
        answer = server.post("/get_weights_by_name", {"name": name, "truncate_size": 2})
        assert answer.ok, answer.text
        found = torch.tensor(answer.json())
        assert torch.equal(found, weights[name][:2].float())
