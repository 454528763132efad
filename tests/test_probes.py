"""Probes: the one plugin that loads them into a server loads those that were asked for, and no others."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from rig.probes import FOLDER, probe_variables

ROOT = Path(__file__).parents[1]
PLUGINS = {FOLDER, ROOT / "ascend_sim/sglang_on_sim/startup"}  # the simulator is a product of its own

# What SGLang does with plugins, without SGLang. Last it says which modules of the folder were imported.
LOAD_PLUGINS = """
import sys
from importlib.metadata import entry_points
(point,) = (each for each in entry_points(group="sglang.srt.plugins") if each.name == "sglang_pp_probes")
point.load()()
print(sorted(name for name, module in sys.modules.items() if (getattr(module, "__file__", None) or "")
    .startswith({folder!r})))
"""


def load(variables: dict[str, str]) -> subprocess.CompletedProcess[str]:
    return run(LOAD_PLUGINS.format(folder=str(FOLDER)), variables)


def run(program: str, variables: dict[str, str]) -> subprocess.CompletedProcess[str]:
    inherited = {name: value for name, value in os.environ.items() if name != "PP_PROBES"}
    return subprocess.run(
        [sys.executable, "-c", program],
        cwd="/",
        env={**inherited, **variables},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_there_is_one_plugin_for_all_probes() -> None:
    folders = (ROOT / name for name in ("rig", "scripts", "tests", "ascend_sim", "sglang_npu_pp", "patches"))
    assert {path.parent for folder in folders for path in folder.rglob("*.dist-info")} == PLUGINS


@pytest.mark.parametrize("names", [("host_time_probe",), ("dp_metadata_probe", "sglang_pp_probe")])
def test_a_server_gets_the_probes_that_it_was_asked_for(names: tuple[str, ...]) -> None:
    """Only the folder is on the path, as where a server has another release of SGLang."""
    done = load(probe_variables(*names))
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(sorted(["load_probes", *names]))


def test_a_probe_that_lies_elsewhere_is_named_in_full(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere/probe.py").write_text("def register() -> None:\n    print('registered')\n")
    done = load(probe_variables("elsewhere.probe", paths=[tmp_path]))
    assert done.stdout.splitlines() == ["registered", "['load_probes']"], done.stderr


@pytest.mark.parametrize(
    ("variables", "sentence"),
    [
        (probe_variables("kv_prob"), "PP_PROBES: 'kv_prob' is no probe (No module named 'kv_prob'); in "),
        (probe_variables("json"), "PP_PROBES: 'json' is no probe (module 'json' has no attribute 'register'"),
        (probe_variables(), "PP_PROBES names no probe; in "),
        ({"PYTHONPATH": str(FOLDER)}, "PP_PROBES names no probe; in "),
    ],
)
def test_a_wrong_name_ends_the_process_with_a_sentence(variables: dict[str, str], sentence: str) -> None:
    done = load(variables)
    assert done.returncode == 1
    assert done.stderr.startswith(sentence)
    known = (
        "ahead_probe, dp_metadata_probe, dspark_probe, host_picture_probe, host_time_probe, kv_probe, "
        "layouts_probe, nextn_probe, sglang_pp_probe, storage_probe"
    )
    assert done.stderr.endswith(f"{FOLDER} there are {known}.\n")


@pytest.mark.parametrize("name", ["scripts.bench.probe", "scripts.bench.npu_sim_probe"])
def test_the_benchmarks_probes_are_found_where_they_lie(name: str) -> None:
    """Not registered: they need SGLang."""
    program = f"import {name}; print({name}.register.__name__)"
    done = run(program, probe_variables(name, paths=[ROOT]))
    assert done.stdout.strip() == "register", done.stderr
