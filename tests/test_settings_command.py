"""The settings command: every setting is printed, and docs/settings.md is what it prints."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import pytest

from sglang_npu_pp.__main__ import main
from sglang_npu_pp.settings import Settings
from sglang_npu_pp.text import WIDTH

ROOT = Path(__file__).parents[1]


def test_the_document_is_what_the_command_prints(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["settings", "--markdown"]) == 0
    written = (ROOT / "docs/settings.md").read_text()
    assert written == capsys.readouterr().out, (
        "write it again: python -m sglang_npu_pp settings --markdown > docs/settings.md"
    )


@pytest.mark.parametrize("options", [[], ["--markdown"]])
def test_every_fact_of_every_setting_is_printed(
    options: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["settings", *options]) == 0
    words = " ".join(capsys.readouterr().out.replace("|", " ").replace("`", "").split())
    for setting in fields(Settings):
        facts = [setting.metadata[name] for name in ("variable", "default", "meaning")]
        shared = "; equal on all ranks" if setting.metadata["shared"] else ""
        assert " ".join(filter(None, facts)) + shared in words


def test_the_table_fits_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["settings"]) == 0
    header, *lines = capsys.readouterr().out.splitlines()
    assert header.split() == ["variable", "default", "meaning"]
    assert max(map(len, lines)) <= WIDTH
