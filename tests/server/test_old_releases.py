"""Releases other than the one in .venv on the simulated Ascend, with graphs: as Ascend users run them.

Unpatched, the stages of 0.5.18 wait for each other there forever (rendezvous sends), so what is compared with
is a CPU server of one stage. `make matrix` compares each release with itself, on CPU. A dense Qwen3: with a
Qwen3-VL, 0.5.13.post1 calls a kernel in a form that the simulated Ascend does not have.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ascend_sim.sglang_on_sim.start_check import REPLAYS
from rig import battery
from rig.devices import EAGER
from rig.launcher import RANDOM_MODEL, Launcher
from rig.loads import ask_together, greedy
from rig.releases import IN_VENV, MIDDLE, OLDEST, RELEASES
from rig.upstream_models import write_model
from sglang_npu_pp.observe.telemetry import read_snapshots

from .installed import if_installed

REQUESTS = [greedy(battery.prompt(length, seed=length), 24) for length in (1, 5, 60, 130, 255, 256, 257, 700)]


def case(release: str, *marks: Any, graphs: bool = True) -> Any:
    name = release + ("" if graphs else "-eager")
    return pytest.param(release, graphs, id=name, marks=(*marks, if_installed(RELEASES[release])))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model("qwen3", tmp_path_factory.mktemp("models") / "qwen3", RANDOM_MODEL)


@pytest.fixture(scope="module")
def expected(make_launcher: Callable[[str], Launcher], model: Path) -> list[object]:
    with make_launcher("unpatched").configure(1, 1, patched=False, model=model) as server:
        return list(ask_together(server, REQUESTS))


@pytest.mark.parametrize(
    ("release", "graphs"),
    [
        *(case(release, pytest.mark.thorough) for release in (OLDEST, MIDDLE)),
        *(
            case(release, pytest.mark.release)
            for release in RELEASES
            if release not in (OLDEST, MIDDLE, IN_VENV)
        ),
        case(OLDEST, pytest.mark.release, graphs=False),
    ],
)
def test_it_answers_as_a_cpu_server_without_stages(
    make_launcher: Callable[[str], Launcher], model: Path, expected: list[object], release: str, graphs: bool
) -> None:
    """Twice, the second time from the radix cache. Memory that is freed is overwritten."""
    server = make_launcher(release).configure(
        1,
        2,
        patched=True,
        device="npu-sim",
        model=model,
        release=RELEASES[release],
        args=() if graphs else EAGER,
        env={"ASCEND_SIM_POISON": "1"},
    )
    with server:
        for _ in range(2):
            assert ask_together(server, REQUESTS) == expected
        server.dump_telemetry()
        first, last = sorted(read_snapshots(server.log.parent), key=lambda each: each.stage)
        assert first.prepared > 0 == last.prepared
        assert (REPLAYS in server.log_text()) == graphs
