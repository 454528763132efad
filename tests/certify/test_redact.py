"""What is planted never survives; what a reader needs does."""

from __future__ import annotations

import json
import re
import socket
from collections.abc import Mapping
from pathlib import Path

import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st

from sglang_npu_pp.tools.certify import redact
from sglang_npu_pp.tools.certify.redact import ADDRESS, HIDDEN, HOST, PATH, USER, Redactor, redactor
from sglang_npu_pp.tools.certify.results import Check, Difference, Verdict

PLAIN = Redactor({})
WORDS = "abcdefghijklmnopqrstuvwxyz0123456789"
SAFE = "".join(chr(code) for code in range(33, 127) if chr(code) not in "'\"\\,")

# Longer than any word that stands in a placeholder or in what surrounds the secret.
names = st.text(WORDS, min_size=9, max_size=16).map(lambda text: f"q{text}")
keys = st.text(SAFE, min_size=9, max_size=40).filter(lambda text: text[0] not in "-<{[")
surroundings = st.sampled_from(
    [
        "{}",
        "cannot reach {}",
        "({})",
        "'{}'",
        '"{}"',
        "x={}, y",
        "[rank0] {}: refused",
        "\x1b[31m{}\x1b[0m",
        "{}\n",
        "+    opened = open('{}')",
    ]
)


@pytest.mark.parametrize(
    ("given_arguments", "shown"),
    [
        (["--model-path", "/a/b/c"], ["--model-path", "<path>/c"]),
        (["--model-path=/a/b/c"], ["--model-path=<path>/c"]),
        (["--model-path", "Qwen/Qwen3-8B"], ["--model-path", "Qwen/Qwen3-8B"]),
        (["--model-path", "~/models/c/"], ["--model-path", "<path>/c"]),
        (["--tp-size", "4", "--enable-x"], ["--tp-size", "4", "--enable-x"]),
        (["--mem-fraction-static", ".5"], ["--mem-fraction-static", ".5"]),
        (["--api-key", "abc"], ["--api-key", HIDDEN]),
        (["--admin-api-key=abc"], [f"--admin-api-key={HIDDEN}"]),
        (["--api-k", "abc"], ["--api-k", HIDDEN]),
        (["--hf-token", "abc"], ["--hf-token", HIDDEN]),
        (["--ssl-keyfile-password", "abc"], ["--ssl-keyfile-password", HIDDEN]),
        (["--header", "A=b", "C=d", "--port", "1"], ["--header", HIDDEN, HIDDEN, "--port", "1"]),
        (["--max-total-tokens", "8192"], ["--max-total-tokens", "8192"]),
        (["--speculative-num-draft-tokens", "4"], ["--speculative-num-draft-tokens", "4"]),
        (["--host", "0.0.0.0"], ["--host", HOST]),
        (["--dist-init-addr", "node7:5000"], ["--dist-init-addr", f"{HOST}:5000"]),
        (["--dist-init-addr", "[fe80::1]:5000"], ["--dist-init-addr", f"{HOST}:5000"]),
        (
            ["--encoder-urls", "http://node7:1", "http://node8:1"],
            ["--encoder-urls", f"{HOST}:1", f"{HOST}:1"],
        ),
        (["--lora-paths", "one=/a/b/c"], ["--lora-paths", "one=<path>/c"]),
    ],
)
def test_arguments(given_arguments: list[str], shown: list[str]) -> None:
    assert PLAIN.arguments(given_arguments) == shown


def test_values_in_json_are_redacted_by_their_names() -> None:
    given_value = {"api_key": "abc", "extra": {"path": "/a/b/c", "size": 3}, "hosts": ["node7"]}
    (_, shown) = PLAIN.arguments(["--config-json", json.dumps(given_value)])
    assert json.loads(shown) == {"api_key": HIDDEN, "extra": {"path": "<path>/c", "size": 3}, "hosts": [HOST]}


def test_a_relative_path_that_exists_is_a_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "alice" / "model").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert PLAIN.arguments(["--model-path", "alice/model"]) == ["--model-path", "<path>/model"]


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("cannot open /home/alice/models/x.json: no", "cannot open <path>/x.json: no"),
        ('  File "/opt/a b/sglang/srt/server.py", line 3', '  File "<path>/server.py", line 3'),
        ("PATH=/usr/bin:/opt/alice/bin", "PATH=<path>/bin"),
        ("-I/usr/include/alice/x.h", "<path>/x.h"),
        ("/home/alice is full", f"<path>/{USER} is full"),
        ("see ../alice/x and ~alice/y", "see <path>/x and <path>/y"),
        ("POST /generate 200", "POST /generate 200"),
        ("http://10.0.0.3:30000/v1/models", f"http://{HOST}:30000/<path>/models"),
        ("ipc:///tmp/sglang-npu-pp/alice/x", "ipc:///<path>/x"),
        (
            "https://github.com/sgl-project/sglang/issues/1",
            "https://github.com/sgl-project/sglang/issues/1",
        ),
        ("https://alice:pw@huggingface.co/x?token=1", "https://huggingface.co/x"),
        ("bound to 10.0.0.3:29500.", f"bound to {ADDRESS}:29500."),
        ("bound to [fe80::1%eth0]:29500", f"bound to [{ADDRESS}]:29500"),
        ("address:fe80::1: down", f"address:{ADDRESS}: down"),
        ("fe80::1:refused", f"{ADDRESS}:refused"),
        ("c10d::allreduce_ std::cout", "c10d::allreduce_ std::cout"),
        ("mapped ::ffff:10.0.0.3", f"mapped {ADDRESS}"),
        ("MAC aa:bb:cc:dd:ee:0f", f"MAC {ADDRESS}"),
        ("ip-10-0-0-3.ec2 and db7.corp", f"{HOST} and {HOST}"),
        ("12:30:45 0.5.13.post1 9.0.RC1 x[::2] x[::-1]", "12:30:45 0.5.13.post1 9.0.RC1 x[::2] x[::-1]"),
        ("ServerArgs(api_key='abc', x=1)", f"ServerArgs(api_key='{HIDDEN}', x=1)"),
        ("Authorization: Bearer abcdefg", f"Authorization: Bearer {HIDDEN}"),
        ("['--api-key', 'abc']", f"['--api-key', '{HIDDEN}']"),
        ("HF_TOKEN=hf_abcdefghijk", f"HF_TOKEN={HIDDEN}"),
        ("a / b, and/or, 3 tokens/s", "a / b, and/or, 3 tokens/s"),
        ("req.token_ids = batch.token_ids[i:j]", "req.token_ids = batch.token_ids[i:j]"),
    ],
)
def test_texts(text: str, shown: str) -> None:
    assert PLAIN.text(text) == shown


SECRET_ARGUMENTS = ("--api-key", "--admin-api-key", "--hf-token", "--header", "--ssl-keyfile-password")


@given(keys, st.sampled_from(SECRET_ARGUMENTS), surroundings, st.booleans())
def test_a_key_of_the_arguments_never_survives(key: str, name: str, around: str, joined: bool) -> None:
    assume(key not in around and key not in name)
    arguments = [f"{name}={key}"] if joined else [name, key]
    found = redactor(arguments, {})
    assert key not in " ".join(found.arguments(arguments))
    assert key not in found.text(around.format(key))
    assert key not in found.text(" ".join(arguments))


@given(
    keys,
    st.sampled_from(["HF_TOKEN", "OPENAI_API_KEY", "AWS_SECRET_ACCESS_KEY", "DB_PASSWORD"]),
    surroundings,
)
def test_a_key_of_the_environment_never_survives(key: str, name: str, around: str) -> None:
    assume(key not in around and not key.startswith("/"))
    assert key not in redactor([], {name: key}).text(around.format(key))


@given(st.lists(names, min_size=2, max_size=5, unique=True), names, surroundings)
def test_folders_of_a_path_never_survive(folders: list[str], last: str, around: str) -> None:
    assume(not any(folder in last for folder in folders))
    shown = PLAIN.text(around.format("/".join(["", *folders, last])))
    assert not any(folder in shown for folder in folders)
    assert f"{PATH}/{last}" in shown


@given(st.ip_addresses(), surroundings, st.sampled_from(["{}", "{}:29500", "tcp://{}:1", "to {}."]))
def test_addresses_never_survive(address: object, around: str, form: str) -> None:
    text = str(address)
    assume(not re.fullmatch(r"::\d*", text))  # slices, in a diff
    is_v6 = ":" in text
    shown = PLAIN.text(around.format(form.format(f"[{text}]" if is_v6 and ":1" in form else text)))
    assert text not in shown


@given(names, st.sampled_from(["{}", "{}:29500", "http://{}:1/x", "to {}.", "[{}] "]), surroundings)
def test_names_of_hosts_never_survive(host: str, form: str, around: str) -> None:
    found = redactor(["--dist-init-addr", f"{host}:5000"], {})
    assert host not in found.text(around.format(form.format(host)))
    assert host not in " ".join(found.arguments(["--dist-init-addr", f"{host}:5000"]))


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Mapping[str, str]:
    """Names of a machine, and variables of its user."""
    monkeypatch.setattr(socket, "gethostname", lambda: "trainer9")
    monkeypatch.setattr(socket, "getfqdn", lambda: "trainer9.dc4.example.com")
    hosts = tmp_path / "hosts"
    hosts.write_text("127.0.0.1 localhost\n10.0.0.4 storage5 # storage\n")
    monkeypatch.setattr(redact, "_HOSTS_FILE", hosts)
    return {"USER": "mallory", "HOME": "/home/mallory"}


def test_what_the_machine_calls_itself_never_survives(machine: Mapping[str, str]) -> None:
    found = redactor([], machine)
    text = "trainer9.dc4.example.com, TRAINER9: mallory asked storage5 about /home/mallory and mallory_x"
    shown = found.text(text)
    assert shown == f"{HOST}, {HOST}: {USER} asked {HOST} about <path>/{USER} and {USER}_x"


def test_the_machine_that_this_runs_on() -> None:
    shown = redactor([], {}).text(f"on {socket.gethostname()} in {Path.cwd() / 'x.txt'}")
    assert socket.gethostname() == "localhost" or socket.gethostname() not in shown
    assert str(Path.cwd()) not in shown


def test_folders_with_spaces_are_known_from_the_arguments() -> None:
    arguments = ["--model-path", "/data/secret project/v 1/model"]
    found = redactor(arguments, {})
    assert found.arguments(arguments) == ["--model-path", "<path>/model"]
    assert found.text("no /data/secret project/v 1/model there") == "no <path>/model there"


PLANTED = ("mallory", "node7", "10.0.0.3", "abcdefgh")
parts = st.sampled_from(
    [
        *(
            "/",
            "/",
            ".",
            "~",
            "-",
            "=",
            "?",
            ",",
            "@",
            "'",
            '"',
            " ",
            ": ",
            "home",
            "http://",
            "<path>",
            "<host>",
        ),
        *("--api-key", "api_key", "Bearer ", "x[::2]", " fe80::1 ", *PLANTED),
    ]
)


@given(st.lists(parts, max_size=9).map("".join))
@example("10.0.0.3http:////")  # a placeholder ends where a word did not, and an address begins
@example("'mallory//'")
def test_what_is_planted_anywhere_never_survives_and_redacting_twice_changes_nothing(text: str) -> None:
    found = redactor(["--api-key", "abcdefgh", "--host", "node7"], {"USER": "mallory"})
    once = found.text(text)
    for planted in PLANTED:
        assert not re.search(rf"(?<![\w.]){re.escape(planted)}(?![\w.])", once)
    assert found.text(once) == once


def test_everything_keeps_the_kinds_of_values() -> None:
    check = Check("one /a/b/c", Verdict.FAILED, "at 10.0.0.3", ("/a/b/d",))
    found = PLAIN.everything(
        {"check": check, "diffs": [Difference("m:f", "1.0", "+ open('/a/b/c')")], "n": 1.5}
    )
    assert found == {
        "check": Check("one <path>/c", Verdict.FAILED, f"at {ADDRESS}", ["<path>/d"]),
        "diffs": [Difference("m:f", "1.0", "+ open('<path>/c')")],
        "n": 1.5,
    }
    assert isinstance(found["check"].verdict, Verdict)  # type: ignore[attr-defined]
