"""A prefill server of two stages that drafts with DSPARK, which SGLang takes on an accelerator only: SGLang's
path for NPUs, on the simulated Ascend.

Such a server proposes nothing. Its last stage turns hidden states of the target into keys and values of the
draft, which go to the decode server with the cache; between stages only the tokens return. The KV cache goes
nowhere here (SGLang's fake bootstrap), so each prompt gets one token.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from rig import battery
from rig.devices import EAGER
from rig.disaggregated import FAKE_BOOTSTRAP_HOST, arguments
from rig.dspark_models import write_models
from rig.launcher import RANDOM_MODEL, Launcher
from rig.probes import probe_variables
from rig.releases import NEWEST, RELEASES
from sglang_npu_pp.tools.certify.ports import HOST, free_ports

RELEASE = RELEASES[NEWEST]

pytestmark = [
    pytest.mark.release,
    pytest.mark.skipif(not RELEASE.is_installed, reason=f"SGLang {RELEASE.name} is not installed"),
]

STAGES = 2
LENGTHS = (1, 5, 17, 60, 255, 256, 257, 600)  # tokens; chunks are 256
REQUEST: Mapping[str, Any] = {
    "sampling_params": {"temperature": 0, "max_new_tokens": 4},
    "return_logprob": True,
    "logprob_start_len": 0,
}


@dataclass(frozen=True)
class Served:
    answers: list[dict[str, Any]]
    kept: list[str]  # of the draft, by forward (dspark_probe)


def serve(launcher: Launcher, models: tuple[Path, Path], *, patched: bool) -> Served:
    target, draft = models
    (bootstrap_port,) = free_ports(1)
    drafting = ("--speculative-algorithm", "DSPARK", "--speculative-draft-model-path", str(draft))
    folders = [*([RELEASE.folder] if RELEASE.folder else []), Path(__file__).parents[2]]
    with launcher.configure(
        1,
        STAGES,
        patched=patched,
        device="npu-sim",
        model=target,
        args=(*EAGER, *arguments("prefill", bootstrap_port, "ascend"), *drafting),
        env={
            **probe_variables("sglang_pp_probe", "dspark_probe", paths=folders),
            "PP_PROBE_KEEP_FREE_PAGES": "0" if patched else "1",  # a patch does that
            "SGLANG_HOST_IP": HOST,
            "ASCEND_SIM_POISON": "1",
        },
        release=RELEASE,
    ) as server:
        answers = [
            battery.generate(
                server,
                input_ids=battery.prompt(length),
                bootstrap_host=FAKE_BOOTSTRAP_HOST,
                bootstrap_port=1,
                bootstrap_room=length,
                **REQUEST,
            )
            for length in LENGTHS
        ]
        (kept,) = [path.read_text().splitlines() for path in server.log.parent.glob("*.kept")]
        return Served([battery.summary(answer) for answer in answers], kept)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return write_models(tmp_path_factory.mktemp("models"), RANDOM_MODEL)


def test_tokens_and_what_the_draft_keeps_are_upstreams(
    make_launcher: Callable[[str], Launcher], models: tuple[Path, Path]
) -> None:
    patched = serve(make_launcher("dspark"), models, patched=True)
    assert [len(answer["ids"]) for answer in patched.answers] == [1] * len(LENGTHS)
    written = [int(line.split()[1]) for line in patched.kept]
    assert sum(written) == sum(LENGTHS), "a chunk of a prompt is not in the draft's cache"
    assert patched == serve(make_launcher("upstreams-dspark"), models, patched=False)
