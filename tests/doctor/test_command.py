"""The command: table, JSON, exit code, usage."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rig.releases import IN_VENV
from sglang_npu_pp.__main__ import main
from sglang_npu_pp.tools.doctor import examine, findings, link_test, versions
from sglang_npu_pp.tools.doctor.findings import Finding, Level, Section
from sglang_npu_pp.tools.doctor.rendezvous import new_key

pytestmark = pytest.mark.timeout(120)

SECTIONS = [
    "Versions",
    "Patches and contracts",
    "Settings of sglang-npu-pp",
    "Variables of HCCL and torch_npu",
    "Interfaces, addresses and ports",
    "Loopback self-test of the host lane",
]


@pytest.fixture(autouse=True)
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(link_test, "AIM_S", 0.02)
    monkeypatch.setattr(link_test, "ROUND_TRIPS", 5)


def run_json(capsys: pytest.CaptureFixture[str], *options: str) -> tuple[int, dict[str, Section]]:
    exit_code = main(["doctor", "--json", *options])
    printed = capsys.readouterr().out
    print(printed)  # again, so that a failure shows what was found
    answer = json.loads(printed)
    assert answer["exit_code"] == exit_code
    sections = {}
    for each in answer["sections"]:
        found = [Finding(_level(one["level"]), one["subject"], one["text"]) for one in each["findings"]]
        sections[each["title"]] = Section(each["title"], found, each["data"])
    return exit_code, sections


def _level(text: str) -> Level:
    return next(level for level in Level if level.value.lower() == text)


def test_here_nothing_is_wrong(capsys: pytest.CaptureFixture[str]) -> None:
    exit_code, sections = run_json(capsys)
    assert exit_code == 0
    assert list(sections) == SECTIONS
    assert set(sections["Loopback self-test of the host lane"].data) == {"ipc", "tcp"}
    sglang = next(each for each in sections["Versions"].findings if each.subject == "SGLang")
    assert sglang.text.startswith(f"{IN_VENV} at ")


def test_the_table_has_every_section_and_ends_with_a_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor"]) == 0
    printed = capsys.readouterr().out
    assert [line for line in printed.splitlines() if line in SECTIONS] == SECTIONS
    assert printed.splitlines()[-1] == "Nothing is wrong, 0 warnings."


def test_something_wrong_is_an_exit_code_and_the_rest_is_examined(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SGLANG_NPU_PP_WINDOW", "many")
    exit_code, sections = run_json(capsys)
    assert exit_code == 1
    wrong = [each for section in sections.values() for each in section.findings if each.level is Level.WRONG]
    assert [each.subject for each in wrong] == ["SGLANG_NPU_PP_WINDOW"]
    assert list(sections) == SECTIONS


def test_a_plugin_that_sglang_would_not_load_is_wrong(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SGLANG_PLUGINS", "another, third")
    exit_code, sections = run_json(capsys)
    assert exit_code == 1
    (plugin,) = (each for each in sections["Versions"].findings if each.subject == "plugin")
    assert plugin.text.startswith("SGLANG_PLUGINS=another, third does not name sglang_npu_pp")


def test_a_check_that_fails_itself_hides_nothing(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: object) -> None:
        raise ZeroDivisionError("nothing")

    monkeypatch.setattr(examine.network, "check", fail)
    exit_code, sections = run_json(capsys)
    assert exit_code == 1
    (finding,) = sections["Interfaces, addresses and ports"].findings
    assert finding.text == "could not be examined (ZeroDivisionError: nothing); report this."
    assert list(sections) == SECTIONS


def test_the_options_of_a_server_on_two_nodes(capsys: pytest.CaptureFixture[str]) -> None:
    """Whether this machine has a way to that address or not, it is said what was tried."""
    layout = ["--tp-size", "2", "--pp-size", "2", "--nnodes", "2", "--node-rank", "0"]
    exit_code, sections = run_json(capsys, *layout, "--dist-init-addr", "10.0.0.1:5000")
    (address,) = (
        each for each in sections["Interfaces, addresses and ports"].findings if each.subject == "address"
    )
    if exit_code == 0:
        assert address.text.startswith("the host lane listens on ")
    else:
        assert address.text.startswith("no address of this node leads to 10.0.0.1:5000")


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--nnodes", "2"], "needs --dist-init-addr"),
        (["--peer", "10.0.0.2:5000"], "--peer needs the --key"),
        (["--peer", "5000", "--key", "KEY"], "'5000' must be HOST:PORT."),
        (["--peer", "10.0.0.2:port", "--key", "KEY"], "'10.0.0.2:port' must be HOST:PORT."),
        (["--peer", "10.0.0.2:5000", "--key", "wrong"], "the key must be the 64 characters"),
        (["--listen", "70000"], "'70000' must be [HOST:]PORT."),
        (["--listen", "5000", "--limit", "0"], "--limit and --forward-ms are above 0."),
        (["--key", "KEY"], "--key goes with --peer"),
    ],
)
def test_options_that_do_not_fit_together(
    options: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["doctor", *options]) == 2
    printed = capsys.readouterr()
    assert sentence in printed.err
    assert printed.out == ""


def test_an_option_that_does_not_exist() -> None:
    with pytest.raises(SystemExit) as ended:
        main(["doctor", "--everything"])
    assert ended.value.code == 2


@pytest.fixture
def parsed(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """The link test that some options ask for."""
    asked: list[Any] = []

    def note(environ: object, layout: object, test: Any) -> list[Section]:
        asked.append(test)
        return []

    monkeypatch.setattr(examine, "examine", note)

    def parse(*options: str) -> Any:
        main(["doctor", *options])
        return asked.pop()

    return parse


def test_the_listener_prints_the_command_for_the_other_node(
    parsed: Callable[..., Any], capsys: pytest.CaptureFixture[str]
) -> None:
    test = parsed("--listen", "10.0.0.1:5000", "--limit", "60")
    assert (test.host, test.port, test.listens, test.limit_s) == ("10.0.0.1", 5000, True, 60)
    printed = capsys.readouterr().err
    assert f"doctor --peer 10.0.0.1:5000 --key {test.key}" in printed
    other = parsed("--peer", "10.0.0.1:5000", "--key", test.key, "--pp-size", "4", "--forward-ms", "12.5")
    assert (other.host, other.key, other.listens) == ("10.0.0.1", test.key, False)
    assert (other.stages, other.forward_ms) == (4, 12.5)


def test_a_key_from_standard_input_is_not_printed(
    parsed: Callable[..., Any],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    key = new_key()
    (tmp_path / "key").write_text(f"{key}\n")
    with (tmp_path / "key").open() as stream:
        monkeypatch.setattr(sys, "stdin", stream)
        test = parsed("--listen", "0.0.0.0:5000", "--key", "-")
    assert (test.key, test.host) == (key, "")
    assert key not in "".join(capsys.readouterr())


def test_an_ipv6_address(parsed: Callable[..., Any]) -> None:
    assert parsed("--peer", "[fd00::1]:5000", "--key", new_key()).host == "fd00::1"


def test_a_long_text_is_wrapped_under_its_column() -> None:
    section = Section("Title", [Finding(Level.OK, "subject", "word " * 40), Finding(Level.WRONG, "s", "x")])
    lines = findings.render(section).splitlines()
    assert lines[0] == "Title"
    assert lines[1].startswith("  ok     subject  word word")
    assert lines[2].startswith(" " * 18 + "word")
    assert lines[-1] == "  WRONG  s        x"
    assert max(map(len, lines)) <= 110


def test_cann_is_found_where_its_variables_say(tmp_path: Path) -> None:
    (tmp_path / "aarch64-linux").mkdir()
    (tmp_path / "aarch64-linux/ascend_toolkit_install.info").write_text("arch=aarch64\nversion=8.3.RC1\n")
    finding = versions._cann({"ASCEND_HOME_PATH": str(tmp_path)})
    assert (finding.level, finding.text) == (Level.OK, f"8.3.RC1 at {tmp_path}")
    assert versions._cann({"ASCEND_HOME_PATH": str(tmp_path / "none")}).level is Level.NOTE
