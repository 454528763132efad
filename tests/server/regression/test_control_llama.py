"""LoRA adapters that only some stages can load, and weights by name.

On a small Llama with random weights: not every model of SGLang has them.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import requests
import torch
from safetensors.torch import load_file, save_file

from scripts.lib.server import Server
from tests.server import battery
from tests.server.conftest import RANDOM_MODEL, Launcher

from .loads import ask, greedy

pytestmark = pytest.mark.server

LAYERS, HIDDEN, RANK = 4, 128, 8
PROMPT = greedy(battery.prompt(40, seed=616), 8)
ADAPTERS = (
    "--enable-lora",
    *("--max-lora-rank", str(RANK)),
    *("--lora-target-modules", "q_proj", "o_proj"),
    *("--lora-backend", "torch_native"),
)


def make_model(folder: Path) -> Path:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=HIDDEN,
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


def make_adapter(folder: Path) -> Path:
    """One that changes every answer."""
    folder.mkdir()
    generator = torch.Generator().manual_seed(1)
    tensors = {
        f"base_model.model.model.layers.{layer}.self_attn.{module}.lora_{part}.weight": torch.randn(
            shape, generator=generator
        )
        for layer in range(LAYERS)
        for module in ("q_proj", "o_proj")
        for part, shape in (("A", (RANK, HIDDEN)), ("B", (HIDDEN, RANK)))
    }
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": 16, "target_modules": ["q_proj", "o_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def server(model: Path, make_launcher: Callable[[str], Launcher]) -> Iterator[Server]:
    launcher = make_launcher("llama")
    env = {"PP_PROBE_ONLY_ON_STAGE_0": "1"}
    yield launcher.start(1, 2, patched=True, model=model, args=ADAPTERS, env=env)
    launcher.stop_all()


def load(server: Server, path: Path) -> requests.Response:
    return server.post("/load_lora_adapter", {"lora_name": "one", "lora_path": str(path)}, timeout_s=60)


def test_an_adapter_that_a_later_stage_does_not_have(server: Server, tmp_path: Path) -> None:
    """It may be loaded under its name when all have it, which shows that stage 0 has unloaded it."""
    plain = ask(server, PROMPT)
    adapter = make_adapter(tmp_path / "adapter")
    answer = load(server, Path(shutil.copytree(adapter, tmp_path / "only-on-stage-0")))
    told: dict[str, Any] = answer.json()
    assert answer.status_code == requests.codes.bad_request
    assert told["error_message"].startswith("stage 1 rank 0: ")
    assert told["error_message"].endswith("it was undone where it had succeeded")
    assert not told["loaded_adapters"]
    assert ask(server, PROMPT) == plain
    answer = load(server, adapter)
    assert answer.ok, answer.text
    assert ask(server, {**PROMPT, "lora_path": "one"}) != plain
    assert server.post("/unload_lora_adapter", {"lora_name": "one"}, timeout_s=60).ok
    assert ask(server, PROMPT) == plain


def test_an_adapter_that_no_stage_has(server: Server, tmp_path: Path) -> None:
    answer = load(server, tmp_path / "nowhere")
    assert answer.status_code == requests.codes.bad_request
    assert "undone" not in answer.json()["error_message"]
    assert ask(server, PROMPT)


def test_a_weight_comes_from_the_stage_that_has_it(server: Server, model: Path) -> None:
    weights = load_file(model / "model.safetensors")
    for layer in range(LAYERS):
        name = f"model.layers.{layer}.mlp.down_proj.weight"
        answer = server.post("/get_weights_by_name", {"name": name, "truncate_size": 2})
        assert answer.ok, answer.text
        found = torch.tensor(answer.json())
        assert torch.equal(found, weights[name][:2].float())
