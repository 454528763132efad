"""A prefill server of two stages that drafts with DSPARK, which SGLang takes on an accelerator only: SGLang's
path for NPUs, on the simulated Ascend.

Such a server proposes nothing. Its last stage turns hidden states of the target into keys and values of the
draft, which go to the decode server with the cache; between stages only the tokens return. The KV cache goes
nowhere here (SGLang's fake bootstrap), so each prompt gets one token.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from rig import battery
from rig.devices import EAGER
from rig.disaggregated import FAKE_BOOTSTRAP_HOST, arguments
from rig.dspark_models import write_models
from rig.faults import Faults
from rig.launcher import RANDOM_MODEL, ROOT, Launcher
from rig.probes import probe_variables
from rig.probes.dspark_probe import STATES_BEFORE
from rig.probes.sglang_pp_faults import NONE
from rig.releases import NEWEST, RELEASES, Release
from rig.server import Server
from sglang_npu_pp.tools.certify.ports import HOST, free_ports

from .test_hierarchical_cache import forget

pytestmark = pytest.mark.release

STAGES = 2
LENGTHS = (1, 5, 17, 60, 255, 256, 257, 600)  # tokens; chunks are 256
REQUEST: Mapping[str, Any] = {
    "sampling_params": {"temperature": 0, "max_new_tokens": 4},
    "return_logprob": True,
    "logprob_start_len": 0,
}


PROXIES = "last row zeroed"  # of what the last stage computes with
FAULTS = {PROXIES: {"answers", "kept"}, STATES_BEFORE: {"kept"}}  # and what of it has to differ


@dataclass(frozen=True)
class Said:
    answers: list[dict[str, Any]]
    kept: list[str]  # of the draft, by forward (dspark_probe)

    def differs(self, other: Said) -> set[str]:
        return {name for name, value in vars(self).items() if value != vars(other)[name]}


@dataclass(frozen=True)
class Served:
    upstream: Said  # of an unpatched server, which has ended
    server: Server
    faults: Faults


@pytest.fixture(scope="module", params=["0.5.22", NEWEST])
def release(request: pytest.FixtureRequest) -> Release:
    """Those of DSPARK with stages that are installed beside SGLang's."""
    found = RELEASES[request.param]
    if not found.is_installed:
        pytest.skip(f"SGLang {found.name} is not installed")
    return found


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return write_models(tmp_path_factory.mktemp("models"), RANDOM_MODEL)


@pytest.fixture(scope="module")
def served(
    make_launcher: Callable[[str], Launcher], models: tuple[Path, Path], release: Release
) -> Iterator[Served]:
    launcher = make_launcher(f"dspark-{release.name}")
    faults = Faults(launcher.directory / "fault")
    try:
        upstream = ask_all(start(launcher, models, release, faults, patched=False))
        launcher.stop_all()
        yield Served(upstream, start(launcher, models, release, faults, patched=True), faults)
    finally:
        launcher.stop_all()


def start(
    launcher: Launcher, models: tuple[Path, Path], release: Release, faults: Faults, *, patched: bool
) -> Server:
    target, draft = models
    (bootstrap_port,) = free_ports(1)
    drafting = ("--speculative-algorithm", "DSPARK", "--speculative-draft-model-path", str(draft))
    folders = [*([release.folder] if release.folder else []), ROOT]
    server = launcher.configure(
        1,
        STAGES,
        patched=patched,
        device="npu-sim",
        model=target,
        args=(*EAGER, *arguments("prefill", bootstrap_port, "ascend"), *drafting),
        env={
            **probe_variables("sglang_pp_probe", "dspark_probe", paths=folders),
            **faults.variables,
            "PP_PROBE_KEEP_FREE_PAGES": "0" if patched else "1",  # a patch does that
            "SGLANG_HOST_IP": HOST,
            "ASCEND_SIM_POISON": "1",
        },
        release=release,
    )
    return launcher.servers.enter_context(server)


def ask_all(server: Server) -> Said:
    """One by one, from empty caches."""
    forget(server)
    before = len(kept(server))
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
    return Said([battery.summary(answer) for answer in answers], kept(server)[before:])


def kept(server: Server) -> list[str]:
    """By the last stage: others keep nothing."""
    return [line for path in server.log.parent.glob("*.kept") for line in path.read_text().splitlines()]


def test_tokens_and_what_the_draft_keeps_are_upstreams(served: Served) -> None:
    found = ask_all(served.server)
    assert [len(answer["ids"]) for answer in found.answers] == [1] * len(LENGTHS)
    written = [int(line.split()[1]) for line in found.kept]
    assert sum(written) == sum(LENGTHS), "a chunk of a prompt is not in the draft's cache"
    assert found == served.upstream


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_turns_the_comparison_red(served: Served, fault: str) -> None:
    served.faults.arm(fault)
    found = ask_all(served.server)
    assert served.faults.struck > 0, "the fault never took effect"
    served.faults.arm(NONE)
    assert found.differs(served.upstream) == FAULTS[fault]
    assert ask_all(served.server) == served.upstream
