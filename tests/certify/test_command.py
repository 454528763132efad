"""Options of certify: what it does not do is said before a server starts."""

from __future__ import annotations

import pytest

from sglang_npu_pp.__main__ import main
from sglang_npu_pp.tools.certify.arguments import option
from sglang_npu_pp.tools.certify.command import NOT_RUN
from sglang_npu_pp.tools.certify.plan import MODEL, complete
from sglang_npu_pp.tools.certify.results import Check, Verdict
from sglang_npu_pp.tools.certify.turns import SPEED, Found, Side


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--", "--tp-size", "2"], "a server of one stage has nothing to compare"),
        (["--", "--pp-size=1"], "a server of one stage has nothing to compare"),
        (["--", "--pp-size", "2", "--nnodes", "2"], "does not work over several nodes yet"),
        (["--", "--pp-size", "2", "--disaggregation-mode=prefill"], "does not start prefill and decode"),
        (["--ab", "--no-speed", "--", "--pp-size", "2"], "--ab measures speed"),
        (["--start-limit", "0", "--", "--pp-size", "2"], "--start-limit must be above 0 s"),
        (["--rate", "0", "--", "--pp-size", "2"], "above 0"),
    ],
)
def test_what_it_does_not_do_is_one_sentence(
    arguments: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["certify", *arguments]) == NOT_RUN
    said = capsys.readouterr().err
    assert said.startswith("certify: ")
    assert sentence in said
    assert said.count("\n") == 1


def test_without_a_model_the_shipped_one_is_served() -> None:
    arguments = complete(["--pp-size", "2", "--dtype", "bfloat16"])
    assert option(arguments, "--model-path") == str(MODEL)
    assert (MODEL / "config.json").is_file()
    assert option(arguments, "--dtype") == "bfloat16"  # the user's comes last, and counts


@pytest.mark.parametrize("given", [["--model-path", "m"], ["--model=m"], ["--config", "file.yaml"]])
def test_a_users_model_gets_no_arguments_of_ours(given: list[str]) -> None:
    assert complete([*given, "--pp-size", "2"]) == (*given, "--pp-size", "2")


@pytest.mark.parametrize(
    ("slow", "verdict"),
    [([Side.UNPATCHED], Verdict.LEFT_OUT), ([Side.PATCHED], Verdict.FAILED), (list(Side), Verdict.LEFT_OUT)],
)
def test_a_load_that_fails_on_the_patched_server_alone_is_red(slow: list[Side], verdict: Verdict) -> None:
    found = Found(slow=[("round 1", side, "requests failed") for side in slow])
    (check,) = (check for check in found.checks() if check.name == SPEED)
    assert isinstance(check, Check)
    assert check.verdict is verdict
