"""The doctor's findings for the server that is to be certified."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence

from ...builds import CORE
from ..doctor.examine import examine
from ..doctor.findings import Finding, Level, Section, count
from ..doctor.layout import Layout
from .results import Check, Verdict

_BUILD = {"contract", "certificate", CORE}
"""Subjects of findings on a build that is not known, or no longer certified: certify is there for it."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:  # type: ignore[override]
        raise ValueError(f"launch_server would not take these arguments: {message}.")


def layout(arguments: Sequence[str]) -> Layout:
    """Ranks and nodes of a server with these arguments of launch_server. Raises ValueError, a sentence."""
    parser = _Parser(add_help=False, allow_abbrev=False)
    parser.add_argument("--tp-size", "--tp", "--tensor-parallel-size", type=int, default=1)
    parser.add_argument("--pp-size", "--pp", "--pipeline-parallel-size", type=int, default=1)
    parser.add_argument("--dp-size", "--dp", "--data-parallel-size", type=int, default=1)
    parser.add_argument("--nnodes", type=int, default=1)
    parser.add_argument("--node-rank", type=int, default=0)
    parser.add_argument("--dist-init-addr", "--nccl-init-addr")
    parser.add_argument("--enable-dp-attention", action="store_true")
    found, _ = parser.parse_known_args(list(arguments))
    return Layout(
        tp_size=found.tp_size,
        pp_size=found.pp_size,
        nnodes=found.nnodes,
        node_rank=found.node_rank,
        dist_init_addr=found.dist_init_addr,
        dp_size=1 if found.enable_dp_attention else found.dp_size,
    )


def sections(arguments: Sequence[str], environ: Mapping[str, str]) -> list[Section]:
    """All that the doctor examines, for a server with these arguments. Raises ValueError."""
    return list(examine(environ, layout(arguments), peer_test=None))


def checks(found: Sequence[Section]) -> list[Check]:
    """One a section; its details are a line for each finding that says more than that all is well."""
    return [_check(section) for section in found]


def versions(found: Sequence[Section]) -> dict[str, str]:
    """What is installed, without the folders."""
    return {
        finding.subject: finding.text.partition(" at ")[0]
        for section in found
        if section.title == "Versions"
        for finding in section.findings
    }


def _check(section: Section) -> Check:
    details = [_line(finding) for finding in section.findings if finding.level is not Level.OK]
    wrong = [finding for finding in section.findings if _is_failure(finding)]
    unknown = [each for each in section.findings if each.level is Level.WRONG and not _is_failure(each)]
    if wrong:
        return Check(section.title, Verdict.FAILED, f"{wrong[0].subject}: {wrong[0].text}", details)
    if unknown:
        return Check(
            section.title, Verdict.LEFT_OUT, "This build is not known: what is run here decides.", details
        )
    warnings = count([section], Level.WARNING)
    text = (
        "Nothing is wrong."
        if not warnings
        else f"Nothing is wrong, {warnings} warning{'s' * (warnings > 1)}."
    )
    return Check(section.title, Verdict.PASSED, text, details)


def _is_failure(finding: Finding) -> bool:
    return finding.level is Level.WRONG and finding.subject not in _BUILD


def _line(finding: Finding) -> str:
    return f"{finding.level.value.lower()}: {finding.subject}: {finding.text}"
