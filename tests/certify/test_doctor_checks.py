"""The doctor's findings as checks, for the server whose arguments are given."""

from __future__ import annotations

import pytest

from sglang_npu_pp.builds import CORE
from sglang_npu_pp.tools.certify import doctor_checks
from sglang_npu_pp.tools.certify.results import Check, Verdict
from sglang_npu_pp.tools.doctor.findings import Finding, Level, Section
from sglang_npu_pp.tools.doctor.layout import Layout


def check(*findings: Finding, title: str = "Patches and contracts") -> Check:
    (found,) = doctor_checks.checks([Section(title, findings)])
    return found


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ("", Layout(pp_size=1)),
        ("--model-path m --tp-size 2 --pp-size=4 --port 30000", Layout(tp_size=2, pp_size=4)),
        ("--tp 2 --pipeline-parallel-size 2", Layout(tp_size=2, pp_size=2)),
        ("--pp-size 2 --pp-max-micro-batch-size 8", Layout(pp_size=2)),
        ("--pp-size 2 --dp-size 2", Layout(pp_size=2, dp_size=2)),
        ("--tp-size 2 --pp-size 2 --dp-size 2 --enable-dp-attention", Layout(tp_size=2, pp_size=2)),
        (
            "--pp-size 2 --nnodes 2 --node-rank 1 --nccl-init-addr a:1",
            Layout(pp_size=2, nnodes=2, node_rank=1, dist_init_addr="a:1"),
        ),
    ],
)
def test_the_layout_is_that_of_the_arguments(arguments: str, expected: Layout) -> None:
    assert doctor_checks.layout(arguments.split()) == expected


@pytest.mark.parametrize(
    "arguments", ["--pp-size many", "--pp-size 3 --nnodes 2 --dist-init-addr a:1", "--tp-size"]
)
def test_arguments_that_launch_server_would_refuse_are_a_sentence(arguments: str) -> None:
    with pytest.raises(ValueError, match=r"^(launch_server would not take|3 ranks cannot be spread).*\.$"):
        doctor_checks.layout(arguments.split())


def test_what_is_wrong_fails_and_is_named() -> None:
    found = check(
        Finding(Level.OK, "ipc", "good"),
        Finding(Level.WRONG, "ports", "30000 is taken."),
        title="Interfaces, addresses and ports",
    )
    assert found.verdict is Verdict.FAILED
    assert found.text == "ports: 30000 is taken."
    assert found.details == ["wrong: ports: 30000 is taken."]


def test_a_build_that_is_not_known_is_no_failure() -> None:
    found = check(
        Finding(Level.WRONG, "contract", "not known"),
        Finding(Level.WRONG, CORE, "not in force"),
        Finding(Level.WARNING, "step", "differs"),
    )
    assert found.verdict is Verdict.LEFT_OUT
    assert "not known" in found.text
    assert len(found.details) == 3


def test_warnings_and_notes_pass_and_can_be_read() -> None:
    found = check(Finding(Level.WARNING, "a", "slow"), Finding(Level.NOTE, "b", "good to know"))
    assert (found.verdict, found.text) == (Verdict.PASSED, "Nothing is wrong, 1 warning.")
    assert found.details == ["warning: a: slow", "note: b: good to know"]
    assert check(Finding(Level.OK, "a", "fine")).text == "Nothing is wrong."


@pytest.mark.slow
def test_the_whole_doctor_for_this_machine() -> None:
    sections = doctor_checks.sections(["--pp-size", "2"], {"SGLANG_NPU_PP_WINDOW": "many"})
    found = {each.name: each for each in doctor_checks.checks(sections)}
    assert len(found) == len(sections) >= 6
    assert found["Settings of sglang-npu-pp"].verdict is Verdict.FAILED
    assert found["Interfaces, addresses and ports"].verdict is Verdict.PASSED
    versions = doctor_checks.versions(sections)
    assert {"Python", "SGLang", "sglang-npu-pp", "torch"} <= set(versions)
    assert not any("/" in text for text in versions.values())
