"""What the documents tell people to type works, what they point to exists, and every error is explained."""

from __future__ import annotations

import ast
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from sglang_npu_pp import errors
from sglang_npu_pp.__main__ import main

ROOT = Path(__file__).parents[1]
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]

EXECUTED = "by test_a_command_ends_well"

RUN_BY = {
    "pip install --no-deps .": "tests/test_packaging.py::test_sglang_finds_the_plugin",
    "pip install 'sglang-npu-pp[tools]'": "tests/test_timeline.py::"
    "test_without_matplotlib_the_table_is_printed_and_a_sentence_says_how_to_get_it",
    # The command line of the tool.
    "python -m sglang_npu_pp doctor": EXECUTED,
    "python -m sglang_npu_pp doctor --tp-size 2 --pp-size 2 --nnodes 2 --node-rank 0 --dist-init-addr "
    "10.0.0.1:5000": "tests/doctor/test_command.py::test_the_options_of_a_server_on_two_nodes",
    "python -m sglang_npu_pp doctor --listen 10.0.0.1:5001": "tests/doctor/test_command.py::"
    "test_the_listener_prints_the_command_for_the_other_node",
    "python -m sglang_npu_pp doctor --peer 10.0.0.1:5001 --key KEY": "tests/doctor/test_peer.py::"
    "test_both_sides_see_the_same_link",
    "python -m sglang_npu_pp certify --rounds 2 --faults -- --model-path /models/Qwen3-VL-8B-Instruct "
    "--tp-size 2 --pp-size 2": "tests/server/test_certify.py::"
    "test_a_harmless_change_is_shown_certified_and_then_in_force",
    "python -m sglang_npu_pp ledger --markdown > docs/patches.md": "tests/test_ledger.py::"
    "test_the_document_is_what_the_command_prints",
    "python -m sglang_npu_pp settings --markdown > docs/settings.md": "tests/test_settings_command.py::"
    "test_the_document_is_what_the_command_prints",
    "python -m sglang_npu_pp topologies --markdown > docs/topologies.md": "tests/test_topologies.py::"
    "test_the_document_is_what_the_command_prints",
    "python -m sglang_npu_pp timeline DIR": "tests/test_timeline.py::"
    "test_the_command_prints_the_table_and_draws_the_picture",
    "python -m sglang_npu_pp timeline DIR --iterations 100:140": "tests/test_timeline.py::"
    "test_the_command_can_look_at_a_part",
    "python -m sglang_npu_pp timeline DIR --against DIR2 --output both.svg": "tests/test_timeline.py::"
    "test_two_pipelines_are_drawn_to_one_scale",
    # Servers, which other tests start.
    "python -m sglang.launch_server --model-path Qwen/Qwen3-VL-8B-Instruct --tp-size 2 --pp-size 2": ""
    "tests/server/test_demo.py::test_demo_answers_and_shows_where_the_time_went",
    "SGLANG_NPU_PP=require python -m sglang.launch_server --model-path Qwen/Qwen3-VL-8B-Instruct "
    "--tp-size 2 --pp-size 2": "tests/server/test_demo.py::test_demo_answers_and_shows_where_the_time_went",
    "python -m sglang.launch_server --model-path Qwen/Qwen3-VL-8B-Instruct --tp-size 2 --pp-size 2 "
    "--nnodes 2 --node-rank 0 --dist-init-addr 10.0.0.1:5000": "tests/server/test_lost_peers.py::"
    "test_what_is_over_before_the_time_out_changes_no_token",
    "export SGLANG_NPU_PP=require GLOO_SOCKET_IFNAME=eth0 HCCL_SOCKET_IFNAME=eth0": ""
    "tests/server/test_lost_peers.py::test_what_is_over_before_the_time_out_changes_no_token",
    "curl -s http://127.0.0.1:30000/metrics | grep sglang_npu_pp": "tests/server/test_metrics.py::"
    "test_metrics_of_an_idle_server_are_what_its_ranks_counted",
    "kill -USR2 PID": "tests/server/test_serving.py::test_counters_of_both_ends_agree",
    # Scripts.
    "python scripts/accuracy.py --model-path Qwen/Qwen3-VL-8B-Instruct --tp 2 --pp 2 --tasks mmmu_val -- "
    "--dtype bfloat16": "tests/accuracy/test_command_line.py::test_the_run_of_upstreams_pull_request",
    "python scripts/accuracy.py --base-url http://HOST:PORT --tasks mmmu_val": ""
    "tests/accuracy/test_runs.py::test_the_command_measures_one_server_as_it_is",
    ".venv/bin/python -m scripts.bench.kv --json result.json": "tests/server/test_kv_transfer.py::"
    "test_a_chunk_is_queued_behind_its_launch",
    ".venv/bin/python -m scripts.bench.dp_metadata --rounds 4 --json result.json": ""
    "tests/bench/test_waits.py::test_the_table_has_all_rounds_of_a_competitor",
    ".venv/bin/python -m scripts.bench.row_gather --json result.json": "tests/ascend/test_row_gather.py::"
    "test_rows_do_not_wait_for_the_forwards_that_were_launched",
    "DP_ATTENTION_DEVICE=npu-sim .venv/bin/python -m pytest tests/server/test_dp_attention.py": ""
    "tests/server/test_dp_attention.py::test_answers_are_upstreams",
    "python scripts/fingerprint.py --all": "tests/test_releases.py::"
    "test_the_contract_is_true_of_the_installed_release",
    "python -m ascend_sim.build": "tests/ascend_sim/test_build.py::test_what_was_built_is_not_built_again",
}
"""Who runs what a command does; those of make are run as `make -n`, and a script's options are asked for."""


def blocks(text: str) -> Iterator[str]:
    yield from re.findall(r"^```bash\n(.*?)^```", text, re.M | re.S)


def commands(document: Path) -> Iterator[str]:
    for block in blocks(document.read_text()):
        for line in block.splitlines():
            command = re.sub(r"\s+#.*$", "", line).strip()
            if command:
                yield command


WRITTEN = sorted({command for document in DOCUMENTS for command in commands(document)})
OF_MAKE = [command for command in WRITTEN if command.startswith("make ")]


def test_documents_have_commands_in_blocks_that_are_understood() -> None:
    assert len(WRITTEN) > 20
    for document in DOCUMENTS:
        kinds = re.findall(r"^```(.*)$", document.read_text(), re.M)
        assert set(kinds[::2]) <= {"bash", ""}, document
        assert set(kinds[1::2]) <= {""}, document


def test_every_command_is_run_by_some_test() -> None:
    others = [command for command in WRITTEN if command not in OF_MAKE]
    assert set(others) - set(RUN_BY) == set(), "say in RUN_BY which test runs what they do"
    assert set(RUN_BY) - set(others) == set(), "no document has these any more"


@pytest.mark.parametrize("test", sorted(set(RUN_BY.values()) - {EXECUTED}))
def test_the_test_that_is_named_exists(test: str) -> None:
    path, _, name = test.partition("::")
    assert f"def {name}(" in (ROOT / path).read_text()


@pytest.mark.slow
@pytest.mark.parametrize("command", [command for command, test in RUN_BY.items() if test == EXECUTED])
def test_a_command_ends_well(command: str, tmp_path: Path) -> None:
    program, *arguments = shlex.split(command)
    assert program == "python"
    done = subprocess.run(
        [sys.executable, *arguments], cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("command", OF_MAKE)
def test_make_knows_what_to_do(command: str) -> None:
    """Without doing it; that a target does its work is shown by the tests of its script."""
    _, *arguments = shlex.split(command)
    # `make test` runs this: its own options and level are not those of a user's make.
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))
    }
    done = subprocess.run(
        ["make", "-n", *arguments],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    given = next((one.removeprefix("ARGS=") for one in arguments if one.startswith("ARGS=")), "")
    assert given in done.stdout
    script = re.search(r"(?:-m (scripts\.[\w.]+)|(scripts/\w+\.py))", done.stdout.splitlines()[-1])
    for option in re.findall(r"--[a-z-]+", given):
        assert script, f"{command}: whose option is {option}?"
        assert f'"{option}"' in source_of(script[1] or script[2]), f"{command}: {option} does not exist"


def source_of(script: str) -> str:
    """The text of a script, a module, or a package's command line."""
    if script.endswith(".py"):
        return (ROOT / script).read_text()
    path = ROOT / script.replace(".", "/")
    return (path / "__main__.py" if path.is_dir() else path.with_suffix(".py")).read_text()


@pytest.mark.parametrize("command", ["doctor", "ledger", "settings", "timeline", "topologies"])
def test_options_of_the_tool_that_are_named_exist(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main([command, "--help"])
    known = set(re.findall(r"--[a-z-]+", capsys.readouterr().out))
    named: set[str] = set()
    for document in DOCUMENTS:
        for line in re.findall(rf"python -m sglang_npu_pp {command}[^`\n#>]*", document.read_text()):
            named.update(re.findall(r"(?<!\S)--[a-z-]+", line))
    assert named <= known


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(document: Path) -> None:
    """Files, and headings in them; addresses of the web are not asked."""
    for link in re.findall(r"\]\(([^)\s]+)\)", document.read_text()):
        if link.startswith("http"):
            continue
        name, _, anchor = link.partition("#")
        target = (document.parent / name).resolve() if name else document
        assert target.exists(), f"{document.name}: {link}"
        if anchor and target.suffix == ".md":
            headings = re.findall(r"^#+ (.+)$", target.read_text(), re.M)
            anchors = {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}
            assert anchor in anchors, f"{document.name}: {link}"


# --- errors --------------------------------------------------------------------------------------

CLASSES = {
    name
    for name, value in vars(errors).items()
    if isinstance(value, type) and issubclass(value, errors.PipelineError)
}
# What these say stands inside a sentence of the inbox, "a message of stage ... cannot be used".
INSIDE_ANOTHER = {"sglang_npu_pp/transport/message.py"}
INSIDE_SETTINGS = "ValueError"  # becomes a SettingsError that puts variable and value in front of it


def sentences() -> Iterator[tuple[str, str]]:
    """Where an error is made, and its text with "..." in the place of what differs."""
    for path in sorted([*(ROOT / "sglang_npu_pp").rglob("*.py"), *(ROOT / "patches").rglob("*.py")]):
        name = str(path.relative_to(ROOT))
        if name in INSIDE_ANOTHER or "/doctor/" in name:
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Name):
                continue
            text = "".join(_text(part) for part in node.args)
            ours = node.func.id in CLASSES or (
                node.func.id == INSIDE_SETTINGS and name == "sglang_npu_pp/settings.py"
            )
            if ours and re.search("[a-z]{3}", text):  # not one that only puts others together
                yield f"{name}:{node.lineno}", text


def _text(node: ast.expr) -> str:
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(_text(part) for part in node.values)
    return "..."


SENTENCES = list(sentences())


def explained() -> list[str]:
    """First cells of the tables of errors."""
    section = (ROOT / "docs/operating.md").read_text().split("## What each error means")[1]
    return [row.split("|")[1].strip() for row in section.splitlines() if row.startswith("| `")]


def fits(cell: str, sentence: str) -> bool:
    """Whether one of the quoted phrases of a cell is in the sentence; "..." stands for anything."""
    for phrase in re.findall(r"`([^`]+)`", cell):
        pattern = ".*".join(re.escape(part.strip()) for part in phrase.split("...") if part.strip())
        if re.search(pattern, sentence, re.S):
            return True
    return False


@pytest.mark.parametrize(("where", "sentence"), SENTENCES, ids=[where for where, _ in SENTENCES])
def test_every_error_is_explained(where: str, sentence: str) -> None:
    assert any(fits(cell, sentence) for cell in explained()), (
        f"{where}: add {sentence!r} to the tables of docs/operating.md"
    )


def test_no_error_is_explained_that_does_not_exist() -> None:
    assert len(SENTENCES) > 25
    for cell in explained():
        assert any(fits(cell, sentence) for _, sentence in SENTENCES), cell
