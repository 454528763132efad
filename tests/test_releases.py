"""What is written down about each supported release is complete, and true of it where it is installed."""

from __future__ import annotations

import io
import json
import re
import zipfile
from pathlib import Path

import pytest
from rich.console import Console

from rig import battery
from rig.releases import EARLY, IN_VENV, MIDDLE, NEWEST, OLDEST, RELEASES
from scripts import fingerprint as script
from scripts.environment.install import SUITE
from scripts.environment.parts import parts
from sglang_npu_pp.fingerprints import fingerprint_in_file
from sglang_npu_pp.patches import PATCHES, load_contracts, sglang_release
from sglang_npu_pp.patching import Contract, contract_targets

ROOT = Path(__file__).parents[1]
CONTRACTS = load_contracts()
IDLE_SLEEPER = ("sglang.srt.managers.scheduler_components.idle_sleeper", "IdleSleeper")
EACH_RELEASE = pytest.mark.parametrize("release", RELEASES)


def test_the_same_releases_are_known_everywhere() -> None:
    assert list(CONTRACTS) == list(RELEASES), "oldest first"
    beside = {name.removeprefix("sglang-") for name in parts() if name.startswith("sglang-")}
    assert beside == set(RELEASES) - {IN_VENV}
    assert sglang_release() == IN_VENV
    assert {f"sglang-{release}" for release in (OLDEST, EARLY, MIDDLE, NEWEST)} <= set(SUITE)


@EACH_RELEASE
def test_the_contract_names_every_function(release: str) -> None:
    assert set(CONTRACTS[release]) == set(contract_targets(PATCHES))


@EACH_RELEASE
def test_the_contract_is_true_of_the_installed_release(release: str) -> None:
    found = RELEASES[release]
    if not found.is_installed:
        pytest.skip(f"SGLang {release} is not installed (make matrix does it)")
    assert read_installed(found.folder or site_packages()) == CONTRACTS[release]


@EACH_RELEASE
def test_every_function_that_a_release_needs_replaced_is_there(release: str) -> None:
    contract = CONTRACTS[release]
    needed = [patch for patch in PATCHES if patch.is_needed(contract)]
    assert {patch.target for patch in needed if not patch.adds and contract[patch.target] is None} == set()


def test_releases_differ_in_the_patches_that_say_so() -> None:
    everywhere = {patch.target for patch in PATCHES if not (patch.optional or patch.unless)}
    needed = {
        release: {patch.target.rpartition(".")[2] for patch in PATCHES if patch.is_needed(contract)}
        for release, contract in CONTRACTS.items()
    }
    common = {target.rpartition(".")[2] for target in everywhere}
    send, prefetch = "send_recv_tensor_dict", "prefetch_prefill_dp_rank_queries"
    limits = {"_abort_on_waiting_timeout", "_abort_on_running_timeout"}
    graphs = {"execute", "replay_with_input_update"}
    ready = "_sync_hicache_ready_counts"
    store = {"_init_zmq", "close"}
    assert {release: names - common for release, names in needed.items()} == {
        "0.5.13.post1": {"init_torch_distributed", *limits, "get_ready_grammar_requests"},
        "0.5.14": {*graphs, "init_torch_distributed", *limits, "get_ready_grammar_requests"},
        "0.5.15": {*graphs, "init_torch_distributed", *limits, "get_ready_grammar_requests"},
        "0.5.15.post1": {*graphs, "init_torch_distributed", *limits, "get_ready_grammar_requests"},
        "0.5.16": {*graphs, "init_torch_distributed", *limits},
        "0.5.17": {*graphs, "init_torch_distributed", *limits, ready},
        "0.5.18": {*graphs, "init_torch_distributed", *limits, ready},
        "0.5.19": {*graphs, "init_torch_distributed", *limits, prefetch, ready},
        "0.5.20": {*graphs, "init_torch_distributed", send, prefetch, ready},
        "0.5.21": {*graphs, send, prefetch, "_send_kv_chunk", ready},
        "0.5.22": {*graphs, send, prefetch, "_send_kv_chunk", ready, *store},
        "0.5.23": {*graphs, send, prefetch, "_send_kv_chunk", ready, *store},
    }


def test_what_is_not_asked_or_gets_no_company_is_a_case_of_the_battery() -> None:
    for release in RELEASES.values():
        assert set(release.not_in_company) <= set(battery.cases())
        assert not set(release.left_out) & set(release.alone)


# --- the script that writes the contracts ------------------------------------------------------------


def test_the_file_is_as_the_script_writes_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = script.CONTRACTS.read_text()
    monkeypatch.setattr(script, "CONTRACTS", tmp_path / "contracts.json")
    script.write(CONTRACTS)
    assert script.CONTRACTS.read_text() == text


def test_a_changed_function_changes_only_its_own_lines_of_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = script.CONTRACTS.read_text().splitlines()
    monkeypatch.setattr(script, "CONTRACTS", tmp_path / "contracts.json")
    target = contract_targets(PATCHES)[0]
    script.write({**CONTRACTS, "0.5.23": {**CONTRACTS["0.5.23"], target: "0123456789abcdef"}})
    after = script.CONTRACTS.read_text().splitlines()
    old = CONTRACTS["0.5.23"][target]
    assert all("0123456789abcdef" in line or f'"{old}"' in line for line in set(after) - set(before))
    assert json.loads("\n".join(after))["functions"][target]["0123456789abcdef"] == ["0.5.23"]


def test_releases_are_in_their_order_whatever_they_are_called(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(script, "CONTRACTS", tmp_path / "contracts.json")
    more = ["0.5.13.post1", "0.5.13", "0.5.22rc1", "0.5.100", "0.5.22.dev1+gabc", "0.5.9"]
    contract = CONTRACTS["0.5.22"]
    script.write({**CONTRACTS, **dict.fromkeys(more, contract)})
    written = json.loads(script.CONTRACTS.read_text())
    assert written["releases"][:4] == ["0.5.9", "0.5.13", "0.5.13.post1", "0.5.14"]
    assert written["releases"][-5:] == ["0.5.22.dev1+gabc", "0.5.22rc1", "0.5.22", "0.5.23", "0.5.100"]


def test_the_script_adds_a_post_release(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = script.CONTRACTS.read_text()
    monkeypatch.setattr(script, "CONTRACTS", tmp_path / "contracts.json")
    script.CONTRACTS.write_text(text)
    monkeypatch.setattr(script, "read_contract", lambda release: {**CONTRACTS["0.5.15"]})
    monkeypatch.setattr("sys.argv", ["fingerprint.py", "0.5.12.post1"])
    script.main()
    assert json.loads(script.CONTRACTS.read_text())["releases"] == ["0.5.12.post1", *CONTRACTS]


@pytest.mark.parametrize(
    ("given", "name"),
    [
        ("v0.5.15.post1", "0.5.15.post1"),
        ("0.5.22.dev1+g1234", "0.5.22.dev1+g1234"),
        ("0.5.24-rc1", "0.5.24rc1"),
        ("0.5.24a2", "0.5.24a2"),
    ],
)
def test_the_script_calls_a_release_as_pip_does(given: str, name: str) -> None:
    assert script.release_name(given) == name


def test_imports_that_a_release_does_not_have_are_named(tmp_path: Path) -> None:
    """`import` inside `try` or `suppress` is for some releases only."""
    wanted = set(script.imports_of_patches())
    assert ("startup.py", "sglang.srt.distributed.parallel_state", "model_parallel_is_initialized") in wanted
    assert not {name for _, module, name in wanted if "scheduler_stage_metrics" in (module, name)}
    with zipfile.ZipFile(tmp_path / "sglang.whl", "w") as wheel:
        for _, module, name in wanted - {("idle.py", *IDLE_SLEEPER)}:
            wheel.writestr(f"{module.replace('.', '/')}/{name}.py", "")
        assert script.missing_imports(wheel) == [
            f"patches/idle.py imports {IDLE_SLEEPER[1]} from {IDLE_SLEEPER[0]}"
        ]


def test_the_script_says_what_is_no_release(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["fingerprint.py", "latest"])
    with pytest.raises(SystemExit):
        script.main()
    assert "'latest' is not the name of a release" in capsys.readouterr().err


def test_the_table_shows_what_changed_where() -> None:
    target = "sglang.srt.distributed.parallel_state:GroupCoordinator.send_recv_tensor_dict"
    table = script.differences(CONTRACTS)
    console = Console(record=True, width=240, file=io.StringIO())
    console.print(table)
    cells = [re.sub("[│┃]", " ", line).split() for line in console.export_text().splitlines()]
    assert cells[1] == [*CONTRACTS, "function"]
    (line,) = (each for each in cells if each[-1:] == [target.rpartition("srt.")[2]])
    assert line[:-1] == [*["-"] * 8, *["A"] * 4]
    left = len(contract_targets(PATCHES)) - table.row_count
    assert " ".join(cells[-1]).startswith(f"{left} more functions")


# --- helpers ------------------------------------------------------------------------------------


def site_packages() -> Path:
    import sglang

    assert sglang.__file__
    return Path(sglang.__file__).parents[1]


def read_installed(folder: Path) -> Contract:
    """As the script reads a wheel: without importing it."""
    contract: dict[str, str | None] = {}
    for target in contract_targets(PATCHES):
        module, _, qualname = target.partition(":")
        path = folder / (module.replace(".", "/") + ".py")
        contract[target] = fingerprint_in_file(path.read_text(), qualname) if path.is_file() else None
    return contract
