"""Servers that speculate on one server of several stages (SGLANG_ENABLE_PP_SPEC), and what they are asked.

On CPU, with plain torch in the place of SGLang's kernels for it (`scripts/cpu_compat`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from rig import battery
from rig.launcher import RANDOM_MODEL, Launcher, take_cpu_compat
from rig.server import Server
from rig.speculation_models import write_models

# Of SGLang's for the CPU, the one that knows trees.
BACKENDS = ("--prefill-attention-backend", "intel_amx", "--decode-attention-backend", "intel_amx")
STEPS = 3  # of a draft
NODES = {1: STEPS + 1, 4: 8}  # of the tree that is verified, by branches at each step
LENGTHS = (1, 2, 5, 17, 60, 250, 256, 257, 300, 511, 600, 777)  # tokens; chunks are 256
TOKENS = 24
CONCURRENCY = 12
ACCEPTANCE = ("spec_verify_ct", "spec_correct_drafts_histogram", "spec_accept_length")

# Of a NEXTN layer, by servers of a pair: as published.
NEXTN_STEPS = {"prefill": 1, "decode": 3}

Answers = Mapping[str, dict[str, Any]]


def nextn_arguments(steps: int) -> tuple[str, ...]:
    """Of a server that drafts `steps` tokens, one behind the other, with the model's NEXTN layer."""
    return (
        *("--speculative-algorithm", "NEXTN", "--speculative-num-steps", str(steps)),
        *("--speculative-eagle-topk", "1", "--speculative-num-draft-tokens", str(steps + 1)),
    )


@dataclass(frozen=True)
class Models:
    target: Path
    draft: Path

    @classmethod
    def written(cls, folder: Path) -> Models:
        return cls(*write_models(folder, RANDOM_MODEL))

    def configure(
        self,
        launcher: Launcher,
        stages: int,
        *,
        patched: bool,
        branches: int = 4,
        args: Sequence[str] = (),
        env: Mapping[str, str] | None = None,
    ) -> Server:
        """A server that is not started."""
        server = launcher.configure(
            1,
            stages,
            patched=patched,
            model=self.target,
            args=(*self.arguments(branches), *args),
            env={"SGLANG_ENABLE_PP_SPEC": "1", "PP_PROBE_STATES": "1", **(env or {})},
        )
        take_cpu_compat(server)
        return server

    def arguments(self, branches: int = 4) -> tuple[str, ...]:
        return (
            *BACKENDS,
            *("--speculative-algorithm", "EAGLE", "--speculative-draft-model-path", str(self.draft)),
            *("--speculative-num-steps", str(STEPS), "--speculative-eagle-topk", str(branches)),
            *("--speculative-num-draft-tokens", str(NODES[branches])),
        )

    def without_speculation(self, bodies: Sequence[Mapping[str, Any]]) -> list[list[int]]:
        """Greedy answers of the target in transformers, one token after another."""
        from transformers import LlamaForCausalLM

        model = LlamaForCausalLM.from_pretrained(self.target, dtype=torch.float32).eval()
        found = []
        for body in bodies:
            prompt = torch.tensor([body["input_ids"]])
            with torch.inference_mode():
                ids = model.generate(
                    prompt,
                    attention_mask=torch.ones_like(prompt),  # else none of a token that is also the padding
                    max_new_tokens=body["sampling_params"]["max_new_tokens"],
                    do_sample=False,
                    eos_token_id=None,
                )
            found.append(ids[0, prompt.shape[1] :].tolist())
        return found


def requests() -> dict[str, dict[str, Any]]:
    """By name; log-probabilities of the input, too, for some."""
    found = {}
    for seed in range(2):
        for length in LENGTHS:
            start = {"logprob_start_len": 0} if length % 2 else {}
            found[f"{length} tokens, {seed}"] = {
                "input_ids": battery.prompt(length, seed),
                "sampling_params": {"ignore_eos": True, "max_new_tokens": TOKENS},
                "return_logprob": True,
                "top_logprobs_num": 2,
                **start,
            }
    return found


def ask_all(server: Server, concurrency: int) -> dict[str, dict[str, Any]]:
    with ThreadPoolExecutor(concurrency) as pool:
        answers = pool.map(lambda body: battery.generate(server, **body), requests().values())
        return dict(zip(requests(), answers, strict=True))


def essence(answers: Answers) -> dict[str, Any]:
    """Tokens, log-probabilities and how many drafts were accepted in how many rounds."""
    return {
        name: {**battery.summary(answer), **{key: answer["meta_info"][key] for key in ACCEPTANCE}}
        for name, answer in answers.items()
    }
