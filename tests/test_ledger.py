"""The ledger: complete, true of the patches, and docs/patches.md is what it prints."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from sglang_npu_pp.__main__ import main
from sglang_npu_pp.patches import PATCHES, load_contracts
from sglang_npu_pp.tools import ledger

ROOT = Path(__file__).parents[1]
ENTRIES = ledger.entries(PATCHES, load_contracts())


def test_the_document_is_what_the_command_prints(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["ledger", "--markdown"]) == 0
    written = (ROOT / "docs/patches.md").read_text()
    assert written == capsys.readouterr().out, (
        "write it again: python -m sglang_npu_pp ledger --markdown > docs/patches.md"
    )


@pytest.mark.parametrize("options", [[], ["--markdown"]])
def test_every_fact_of_every_patch_is_printed(options: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["ledger", *options]) == 0
    printed = capsys.readouterr().out
    words = " ".join(re.sub(r"\[(.*?)\]\(.*?\)", r"\1", printed).split())
    for patch in PATCHES:
        module, _, name = patch.target.partition(":")
        for fact in (module, name, patch.why, patch.how, patch.upstream, patch.plan):
            assert " ".join(fact.split()) in words, (patch.target, fact)


def test_json_has_the_same_facts(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["ledger", "--json"]) == 0
    found = {entry["target"]: entry for entry in json.loads(capsys.readouterr().out)}
    contracts = load_contracts()
    assert set(found) == {patch.target for patch in PATCHES}
    for patch in PATCHES:
        entry = found[patch.target]
        assert (entry["why"], entry["how"], entry["plan"]) == (patch.why, patch.how, patch.plan)
        assert (entry["device"], entry["adds"]) == (patch.device, patch.adds)
        assert entry["releases"] == [name for name in contracts if patch.is_needed(contracts[name])]


def test_a_patch_that_not_every_release_needs_says_which_do() -> None:
    (entry,) = (entry for entry in ENTRIES if entry.name == "ModelRunner.init_torch_distributed")
    assert entry.releases == tuple(load_contracts())[:9]
    assert entry.releases[-1] == "0.5.20"


def test_the_code_is_where_it_says() -> None:
    for entry in ENTRIES:
        path, _, function = entry.code.partition(":")
        assert f"def {function}(" in (ROOT / path).read_text(), entry.code


def test_every_number_of_an_upstream_work_has_its_address() -> None:
    for entry in ENTRIES:
        assert len(entry.links) == entry.upstream.count("#"), entry.upstream


@pytest.mark.parametrize(
    ("upstream", "links"),
    [
        ("sglang #19582, #22747", ["sgl-project/sglang/issues/19582", "sgl-project/sglang/issues/22747"]),
        (
            "vllm-ascend #2788, vllm #51650 and Megatron #5240",
            [
                "vllm-project/vllm-ascend/issues/2788",
                "vllm-project/vllm/issues/51650",
                "NVIDIA/Megatron-LM/issues/5240",
            ],
        ),
        ("0.5.21 makes them itself", []),
    ],
)
def test_addresses(upstream: str, links: list[str]) -> None:
    found = [address for _, address in ledger._references(upstream)]
    assert found == [f"https://github.com/{link}" for link in links]
    assert ledger._linked(upstream).count("](https://github.com/") == len(links)


def test_headings_are_found_by_the_links_of_the_table() -> None:
    text = (ROOT / "docs/patches.md").read_text()
    headings = re.findall(r"^### (.+)$", text, re.M)
    anchors = re.findall(r"^\| \[`[^`]+`\]\(#([^)]+)\)", text, re.M)
    # GitHub keeps letters, digits, underscores and hyphens.
    assert anchors == [re.sub(r"[^\w-]", "", heading.lower()) for heading in headings]
    assert len(anchors) == len(set(anchors)) == len(PATCHES)


@pytest.mark.slow
def test_sglang_is_not_imported() -> None:
    """So the ledger can be read where SGLang is not installed, or does not start."""
    program = (
        "import sys; from sglang_npu_pp.__main__ import main; main(['ledger']); "
        "print([name for name in sys.modules if name.split('.')[0] == 'sglang'])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    assert f"{len(PATCHES)} patches" in done.stdout
    assert done.stdout.splitlines()[-1] == "[]"
