"""The README and the tables of settings and metrics say what the code says."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path

import pytest

from sglang_npu_pp.observe.metrics import COUNTERS, FEATURE, LIMITS, PREFIX
from sglang_npu_pp.patches import PATCHES, load_contracts
from sglang_npu_pp.settings import Settings

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
OPERATING = (ROOT / "docs/operating.md").read_text()
SETTINGS = (ROOT / "docs/settings.md").read_text()


@pytest.mark.parametrize("setting", fields(Settings), ids=lambda setting: setting.metadata["variable"])
def test_every_setting_is_in_the_table_with_its_default_and_meaning(setting: object) -> None:
    metadata = setting.metadata  # type: ignore[attr-defined]
    default = f"`{metadata['default']}`" if metadata["default"] else ""
    cells = [f"`{metadata['variable']}`", default, metadata["meaning"]]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in SETTINGS.splitlines()]
    shared = "; equal on all ranks" if metadata["shared"] else ""
    assert [*cells[:2], cells[2] + shared] in rows


def test_the_table_has_no_setting_that_does_not_exist() -> None:
    named = set(re.findall(r"`(SGLANG_NPU_PP\w*)`", README + SETTINGS))
    assert named <= {setting.metadata["variable"] for setting in fields(Settings)}


def test_the_table_of_metrics_is_what_is_exported() -> None:
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in OPERATING.splitlines()]
    listed = [row for row in rows if row[0].startswith(f"`{PREFIX}")]
    assert listed == [
        [f"`{metric.name}`", ", ".join(f"`{label}`" for label in metric.labels), metric.meaning]
        for metric in (*COUNTERS, *LIMITS, FEATURE)
    ]


def test_every_make_target_that_is_named_exists() -> None:
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"(?:`|^)make ([a-z-]+)", README, re.MULTILINE))
    assert len(targets) > 3
    for target in targets:
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


def test_the_number_of_patches_is_right() -> None:
    (release,) = re.findall(r"patches in force for SGLang ([\d.]+)", README)
    needed = [patch for patch in PATCHES if patch.is_needed(load_contracts()[release])]
    assert f"sglang-npu-pp: {len(needed)} patches in force for SGLang {release}, all features;" in README


def test_every_release_is_named() -> None:
    for release in load_contracts():
        assert release in README
        assert f"\n| {release} | " in OPERATING


def test_the_readme_is_short_and_begins_with_a_command() -> None:
    assert len(README.split()) <= 1000
    before, _, block = README.partition("```bash\n")
    first_command = block.splitlines()[0].partition("#")[0]
    assert len(f"{before} ```bash {first_command}".split()) <= 80
