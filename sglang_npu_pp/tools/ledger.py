"""`python -m sglang_npu_pp ledger`: every patch with its reason, source and end.

Printed from the `Patch` objects and the contracts, without SGLang; docs/patches.md is the output of
`--markdown`.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from itertools import groupby
from typing import Any

from ..patching import Contracts, Patch
from ..text import table
from .imports import without_device_backends

REPOSITORIES = {
    "sglang": "sgl-project/sglang",
    "vllm": "vllm-project/vllm",
    "vllm-ascend": "vllm-project/vllm-ascend",
    "Megatron": "NVIDIA/Megatron-LM",
}
"""What stands in front of a number in `Patch.upstream`."""

_REFERENCE = re.compile(r"(?:([\w-]+) )?#(\d+)")


@dataclass(frozen=True)
class Entry:
    """The facts of one patch."""

    target: str  # "module:Class.method" of SGLang
    adds: bool  # the function is new; otherwise it is replaced
    code: str  # "patches/module.py:function"
    seam: str  # subject of that module: its first paragraph
    why: str
    how: str
    upstream: str
    links: tuple[str, ...]  # of the numbers in `upstream`, in their order
    releases: tuple[str, ...]  # that need the patch, oldest first
    device: str | None  # only where SGLang serves on it; None: everywhere
    relies_on: tuple[str, ...]  # further functions of SGLang whose behaviour it depends on
    plan: str  # when and how it goes away

    @property
    def name(self) -> str:
        return self.target.partition(":")[2]


def add(commands: Any) -> None:
    """Add the command to an argparse parser's commands."""
    parser = commands.add_parser(
        "ledger",
        help="every patch: target, why, how, upstream work, releases, plan to remove it",
        description="Prints what is known of every patch. SGLang is not imported.",
    )
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--markdown", action="store_true", help="as docs/patches.md has it")
    form.add_argument("--json", action="store_true", help="a list of objects")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    with without_device_backends():  # the ledger is read where CANN is missing, too
        from .. import patches
    contracts = patches.load_contracts()
    found = entries(patches.PATCHES, contracts)
    if options.json:
        print(json.dumps([asdict(entry) for entry in found], indent=1))
    else:
        print((markdown if options.markdown else text)(found, tuple(contracts)))
    return 0


def entries(patches: Iterable[Patch], contracts: Contracts) -> list[Entry]:
    """One for each patch, in order of application."""
    return [_entry(patch, contracts) for patch in patches]


def _entry(patch: Patch, contracts: Contracts) -> Entry:
    module = sys.modules[patch.wrapper.__module__]
    paragraph, _, _ = (module.__doc__ or "").partition("\n\n")
    return Entry(
        target=patch.target,
        adds=patch.adds,
        code=f"patches/{module.__name__.rpartition('.')[2]}.py:{patch.wrapper.__name__}",
        seam=" ".join(paragraph.removeprefix("Seam: ").split()),
        why=patch.why,
        how=patch.how,
        upstream=patch.upstream,
        links=tuple(url for _, url in _references(patch.upstream)),
        releases=tuple(release for release, contract in contracts.items() if patch.is_needed(contract)),
        device=patch.device,
        relies_on=patch.relies_on,
        plan=patch.plan,
    )


def _references(upstream: str) -> list[tuple[str, str]]:
    """Issue and pull request numbers as written, each with its address.

    A number without a repository belongs to the one before: "sglang #19582, #22747".
    """
    found: list[tuple[str, str]] = []
    repository = ""
    for match in _REFERENCE.finditer(upstream):
        if match[1] in REPOSITORIES:
            repository = match[1]
        written = match[0] if match[1] in REPOSITORIES else f"#{match[2]}"
        # GitHub leads from an issue's address to the pull request of that number.
        found.append((written, f"https://github.com/{REPOSITORIES[repository]}/issues/{match[2]}"))
    return found


# --- output -----------------------------------------------------------------------------


def text(found: list[Entry], releases: tuple[str, ...]) -> str:
    """For the terminal: one block a patch."""
    blocks = [f"{len(found)} patches; contracts for SGLang {', '.join(releases)}"]
    for entry in found:
        facts = [
            ("code", entry.code),
            ("why", entry.why),
            ("how", entry.how),
            ("upstream", "  ".join([entry.upstream, *entry.links])),
            ("releases", _releases(entry, releases)),
            *([("device", f"only {entry.device}")] if entry.device else []),
            *([("relies on", ", ".join(map(_short, entry.relies_on)))] if entry.relies_on else []),
            ("plan", entry.plan),
        ]
        blocks.append(f"{entry.name}  ({_kind(entry)}, {_module(entry)})\n{table(facts, indent='  ')}")
    return "\n\n".join(blocks)


def markdown(found: list[Entry], releases: tuple[str, ...]) -> str:
    """docs/patches.md: a table of all, then one section a seam."""
    lines = [
        "# Patches",
        "",
        "<!-- Written by `python -m sglang_npu_pp ledger --markdown > docs/patches.md`; do not edit. -->",
        "",
        f"Everything that this package changes in SGLang: {len(found)} functions, with contracts for the "
        f"releases {', '.join(releases)}. A release gets the patches that it needs, all of them or none.",
        "",
        "| function | | releases | device |",
        "|---|---|---|---|",
    ]
    for entry in found:
        cells = [f"[`{entry.name}`](#{_anchor(entry)})", _kind(entry), _releases(entry, releases)]
        lines.append(f"| {' | '.join(cells)} | {entry.device or 'all'} |")
    for code, of_seam in groupby(found, key=lambda entry: entry.code.partition(":")[0]):
        group = list(of_seam)
        lines += ["", f"## {code}", "", _first_upper(group[0].seam)]
        for entry in group:
            lines += ["", f"### {entry.name}", "", *_facts(entry, releases)]
    return "\n".join(lines)


def _facts(entry: Entry, releases: tuple[str, ...]) -> list[str]:
    facts = [
        f"- **{_first_upper(_kind(entry))}**: `{entry.target}`, by `{entry.code.partition(':')[2]}`",
        f"- **Why**: {entry.why}",
        f"- **How**: {entry.how}",
        f"- **Upstream**: {_linked(entry.upstream)}",
        f"- **Releases**: {_releases(entry, releases)}"
        + (f"; only where SGLang serves on {entry.device}" if entry.device else ""),
    ]
    if entry.relies_on:
        facts.append(f"- **Relies on**: {', '.join(f'`{_short(target)}`' for target in entry.relies_on)}")
    return [*facts, f"- **Plan**: {entry.plan}"]


def _linked(upstream: str) -> str:
    addresses = iter(_references(upstream))

    def link(match: re.Match[str]) -> str:
        written, address = next(addresses)
        return match[0].removesuffix(written) + f"[{written}]({address})"

    return _REFERENCE.sub(link, upstream)


def _kind(entry: Entry) -> str:
    return "added" if entry.adds else "replaced"


def _releases(entry: Entry, releases: tuple[str, ...]) -> str:
    return "all" if entry.releases == releases else ", ".join(entry.releases)


def _module(entry: Entry) -> str:
    return entry.target.partition(":")[0]


def _short(target: str) -> str:
    return target.partition(":")[2]


def _anchor(entry: Entry) -> str:
    """As GitHub derives it from the heading."""
    return re.sub(r"[^\w -]", "", entry.name.lower()).replace(" ", "-")


def _first_upper(words: str) -> str:
    return words[:1].upper() + words[1:]
