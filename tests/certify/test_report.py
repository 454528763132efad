"""The report as Markdown, JSON and a picture: complete, redacted, honest about the device."""

from __future__ import annotations

import json
import math
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from sglang_npu_pp.tools.certify import report as writing
from sglang_npu_pp.tools.certify.comparing import compare_speeds, number
from sglang_npu_pp.tools.certify.markdown import block, markdown, plain, table
from sglang_npu_pp.tools.certify.redact import HIDDEN, redactor
from sglang_npu_pp.tools.certify.results import (
    Check,
    Difference,
    Latency,
    Report,
    Resources,
    Side,
    Speed,
    Verdict,
)
from sglang_npu_pp.tools.timeline.states import COMPUTE, Span, StageTimeline, Timeline

MS = 1_000_000
LOAD = "64 requests, random-ids of 32 tokens"
ARGUMENTS = ("--model-path", "/data/alice/Qwen3-VL", "--api-key", "sk-123456789012", "--pp-size", "2")
REDACTOR = redactor(ARGUMENTS, {"USER": "alice", "HOME": "/home/alice"})


def speed(side: Side, turn: int, tokens: float, load: str = LOAD) -> Speed:
    latency = Latency(1.5, 1000 / tokens, 3.0)
    return Speed(side, turn, 64, tokens / 8, tokens, 5 * tokens, latency, latency, latency, load)


SPEEDS = (
    speed(Side.UNPATCHED, 1, 100.0),
    speed(Side.PATCHED, 1, 150.0),
    speed(Side.UNPATCHED, 2, 120.0),
    speed(Side.PATCHED, 2, 240.0),
)
REPORT = Report(
    build="0.5.24.dev7+gabc",
    digest="0123456789abcdef",
    decision="55 patches in force by a trial certificate",
    versions={"Python": "3.11.9", "torch": "2.10.0+cpu"},
    arguments=ARGUMENTS,
    checks=(
        Check("one by one", Verdict.PASSED, "24 of 24 requests are equal."),
        Check("order", Verdict.FAILED, "stage 1 waits too early.", ("slot 0: wait | launch", "`post`")),
        Check("lost peer", Verdict.LEFT_OUT, "--faults was not given."),
    ),
    doctor=(Check("Versions", Verdict.PASSED, "Nothing is wrong.", ("note: torch_npu: not in /opt/x/y",)),),
    differences=(
        Difference("m:Loop.step", "0.5.23", "--- SGLang 0.5.23\n+++ this build\n@@ -1 +1 @@\n-a\n+b  # ```"),
        Difference("m:start", "0.5.23", "pip cannot download it (no network)."),
    ),
    speeds=SPEEDS,
    resources=(
        Resources(Side.UNPATCHED, 1, 1.01, 900.0, {}),
        Resources(Side.PATCHED, 1, 0.02, 950.0, {0: 0.01, 1: 0.125}),
    ),
    picture="",
    certified=False,
    conclusion="Not certified: the check 'order' failed.",
    seconds=330.0,
    device="simulated Ascend (2 devices)",
)


def timeline() -> Timeline:
    spans = [Span(0, 10 * MS, COMPUTE, "", 0, 1), Span(10 * MS, 20 * MS, COMPUTE, "", 1, 2)]
    return Timeline(0, 20 * MS, [StageTimeline(stage, spans) for stage in range(2)])


def rows(text: str) -> dict[str, list[str]]:
    """Cells of each row of all tables, by the first."""
    lines = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")]
    return {cells[0]: cells[1:] for cells in reversed(lines)}


def test_three_files_are_written(tmp_path: Path) -> None:
    paths = writing.write(REPORT, tmp_path / "new" / "folder", REDACTOR, timeline())
    assert [path.name for path in paths] == ["report.md", "report.json", "report.png"]
    assert all(path.stat().st_size for path in paths)


def test_nothing_that_names_the_machine_is_in_any_of_them(tmp_path: Path) -> None:
    dirty = replace(
        REPORT,
        checks=(
            Check("x", Verdict.FAILED, "10.0.0.3 refused alice", ("/home/alice/a/b.log: sk-123456789012",)),
        ),
        conclusion="see /home/alice/x/y.log",
        differences=(Difference("m:f", "1", "+ open('/home/alice/deep/c')"),),
    )
    for path in writing.write(dirty, tmp_path, REDACTOR)[:2]:
        text = path.read_text()
        for secret in ("alice", "10.0.0.3", "sk-123456789012", "/data", "/home", "deep", "/opt"):
            assert secret not in text, (path, secret)
        assert "Qwen3-VL" in text


def test_the_json_has_everything(tmp_path: Path) -> None:
    broken = replace(
        REPORT, speeds=(speed(Side.PATCHED, 1, 150.0), replace(SPEEDS[0], requests_per_s=math.nan))
    )
    writing.write(broken, tmp_path, REDACTOR)
    found = json.loads((tmp_path / "report.json").read_text(), parse_constant=pytest.fail)
    assert found["passed"] is found["certified"] is False
    assert found["arguments"][:4] == ["--model-path", "<path>/Qwen3-VL", "--api-key", HIDDEN]
    assert [check["verdict"] for check in found["checks"]] == ["passed", "failed", "left out"]
    assert found["speeds"][0]["output_tokens_per_s"] == 150.0
    assert found["speeds"][1]["requests_per_s"] is None
    assert found["resources"][1]["exposed"] == {"0": 0.01, "1": 0.125}
    assert found["picture"] == "report.png"
    assert set(found) == {"passed", *Report.__dataclass_fields__}


def test_the_verdict_comes_first() -> None:
    first, _, conclusion, *_ = markdown(REPORT).splitlines()
    assert first == "# sglang-npu-pp on SGLang 0.5.24.dev7+gabc: not the same server"
    assert conclusion == REPORT.conclusion
    assert "dev7+gabc: certified\n" in markdown(replace(REPORT, certified=True))
    assert "dev7+gabc: nothing differs\n" in markdown(replace(REPORT, checks=()))


def test_checks_are_a_table_with_their_details_below() -> None:
    text = markdown(REPORT)
    found = rows(text)
    assert found["one by one"] == ["passed", "24 of 24 requests are equal."]
    assert found["order"] == ["**FAILED**", "stage 1 waits too early."]
    assert found["lost peer"] == ["left out", "--faults was not given."]
    assert "<summary>order: 2 details</summary>\n\n```\nslot 0: wait | launch\n`post`\n```" in text


def test_speed_is_side_by_side_with_spread_and_the_ratio_of_each_round() -> None:
    text = markdown(REPORT)
    assert rows(text)["output tokens/s"] == ["110 (100 to 120)", "195 (150 to 240)", "1.75 (1.5 to 2)"]
    assert "| output tokens/s | unpatched | 100 | 120 |\n| output tokens/s | patched | 150 | 240 |" in text
    assert "| output tokens/s | ratio | 1.5 | 2 |" in text
    assert f"Load: {LOAD}" in text


def test_loads_are_compared_apart() -> None:
    other = [speed(side, 1, 10.0, "another load") for side in Side]
    found = compare_speeds([*SPEEDS, *other])
    assert list(found) == [LOAD, "another load"]
    by_name = {measure.name: measure for measure in found["another load"]}
    assert dict(by_name["output tokens/s"].ratios) == {1: 1.0}


def test_a_round_that_only_one_server_has_has_no_ratio() -> None:
    measures = {each.name: each for each in compare_speeds(SPEEDS[:3])[LOAD]}
    assert dict(measures["output tokens/s"].ratios) == {1: 1.5}
    found = rows(markdown(replace(REPORT, speeds=SPEEDS[:1])))
    assert found["output tokens/s"] == ["100", "not measured", "no pair"]


def test_resources_and_exposed_communication() -> None:
    text = markdown(REPORT)
    found = rows(text)
    assert found["CPU of the idle server, cores"] == ["1.01", "0.02", "0.0198"]
    assert found["patched, round 1"] == ["1.0 %", "12.5 %"]
    without = replace(REPORT, resources=(Resources(Side.PATCHED, 1, 0.02, 950.0, {}),))
    assert "Exposed communication: no traces of all stages." in markdown(without)


def test_differences_are_blocks_that_nothing_ends_early() -> None:
    text = markdown(REPORT)
    diff = REPORT.differences[0].diff
    assert f"### `m:Loop.step`\n\nAgainst SGLang 0.5.23:\n\n````diff\n{diff}\n````" in text
    assert "```\npip cannot download it (no network).\n```" in text
    assert "None: all are as in a known release." in markdown(replace(REPORT, differences=()))


def test_a_simulated_device_is_called_simulated_and_its_times_worthless() -> None:
    assert "times and shares say nothing about real hardware" in markdown(REPORT)
    on_cpu = markdown(replace(REPORT, device="CPU (2 cores)"))
    assert rows(on_cpu)["device"] == ["CPU (2 cores)"]
    assert "simulated" not in on_cpu


def test_what_was_not_measured_is_said() -> None:
    text = markdown(replace(REPORT, speeds=(), resources=(), checks=(), doctor=()))
    assert text.count("Not measured.") == 2
    assert "Nothing was checked." in text


def test_placeholders_are_seen_on_a_page() -> None:
    assert plain("<path>/c | __init__ a_b *x*") == r"&lt;path&gt;/c \| \_\_init\_\_ a_b \*x\*"
    assert table(("a", "b"), [("x|y", "1\n2")]) == "| a | b |\n| --- | --- |\n| x\\|y | 1 2 |"
    assert block("a ```` b") == "`````\na ```` b\n`````"


@pytest.mark.parametrize(
    ("value", "shown"),
    [(1234.5, "1,234"), (12.345, "12.3"), (0.0123, "0.0123"), (0.00012, "0.00012"), (0.0, "0")],
)
def test_numbers(value: float, shown: str) -> None:
    assert number(value) == shown


def test_the_picture_shows_speed_above_the_timeline(tmp_path: Path) -> None:
    heights = []
    for name, speeds, drawn in (
        ("speed", SPEEDS, None),
        ("time", (), timeline()),
        ("both", SPEEDS, timeline()),
    ):
        writing.write(replace(REPORT, speeds=speeds), tmp_path / name, REDACTOR, drawn)
        heights.append(Image.open(tmp_path / name / "report.png").height)
    assert heights[2] > max(heights[:2])
    assert "![throughput" in (tmp_path / "both/report.md").read_text()


def test_without_matplotlib_there_is_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    (tmp_path / "report.png").write_bytes(b"of an earlier report")
    paths = writing.write(REPORT, tmp_path, REDACTOR)
    assert [path.name for path in paths] == ["report.md", "report.json"]
    assert not (tmp_path / "report.png").exists()
    assert "There is no picture: it needs matplotlib" in paths[0].read_text()
    assert "needs matplotlib" in json.loads(paths[1].read_text())["picture"]


def test_without_anything_to_draw_there_is_a_sentence(tmp_path: Path) -> None:
    (text, _) = writing.write(replace(REPORT, speeds=()), tmp_path, REDACTOR)
    assert "nothing to draw" in json.loads(text.with_suffix(".json").read_text())["picture"]
