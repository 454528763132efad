"""A launched program: real processes, in the place of a server."""

from __future__ import annotations

import os
import signal
import socket
import sys
import textwrap
from pathlib import Path

import psutil
import pytest

from sglang_npu_pp.tools.certify.arguments import option
from sglang_npu_pp.tools.certify.launch import LaunchedServer, LaunchError, reporting
from sglang_npu_pp.tools.certify.ports import HOST, free_ports
from sglang_npu_pp.tools.certify.processes import is_alive

pytestmark = pytest.mark.slow

LIMIT_S = 30.0

# Called as python is: with -m sglang.launch_server and the arguments.
SERVER = """
import http.server, json, os, signal, subprocess, sys, threading
signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job of a shell has it ignored
port = int(sys.argv[sys.argv.index("--port") + 1])

class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        key, folder = self.headers.get("Authorization"), os.environ["TMPDIR"]
        said = json.dumps({"key": key, "tmp": folder})
        self.send_response(200)
        self.send_header("Content-Length", str(len(said)))
        self.end_headers()
        self.wfile.write(said.encode())

    do_POST = do_GET

child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
server = http.server.ThreadingHTTPServer(("127.0.0.1", port), Handler)
print(" ".join(sys.argv), flush=True)
print("The server is fired up and ready to roll!" if "--quiet" not in sys.argv else "quiet", flush=True)
try:
    server.serve_forever()
finally:
    child.kill()
"""


@pytest.fixture
def program(tmp_path: Path) -> Path:
    return make_program(tmp_path, SERVER)


def make_program(folder: Path, text: str) -> Path:
    """An executable that takes the place of python."""
    path = folder / "program"
    path.write_text(f"#!{sys.executable}\n{textwrap.dedent(text)}")
    path.chmod(0o755)
    return path


def launched(program: Path, tmp_path: Path, *arguments: str, limit_s: float = LIMIT_S) -> LaunchedServer:
    return LaunchedServer(
        arguments,
        tmp_path / "turn",
        python=str(program),
        environment=reporting(tmp_path),
        start_limit_s=limit_s,
    )


def test_it_is_ready_when_it_says_so_and_ends_with_all_its_processes(program: Path, tmp_path: Path) -> None:
    parts: list[str] = []
    server = LaunchedServer(
        ["--model-path", "m"],
        tmp_path / "turn",
        python=str(program),
        on_progress=lambda part, _: parts.append(part),
    )
    with server:
        assert parts[-1] == "ready"
        assert f"--model-path m --host {HOST} --port" in server.log_text()
        processes = server.processes()
        scratch = Path(server.get("/any").json()["tmp"])
        assert len(processes) == 2
        assert scratch.is_dir()
    assert not any(map(is_alive, processes))
    assert not scratch.exists()
    server.stop()  # again


def test_a_port_and_an_address_of_the_user_are_used(program: Path, tmp_path: Path) -> None:
    (port,) = free_ports(1)
    for _ in range(2):  # one turn behind the other
        with launched(program, tmp_path, "--port", str(port), "--host=0.0.0.0") as server:
            assert server.url == f"http://{HOST}:{port}"
            assert server.get("/health").ok
            assert server.log_text().count("--port") == 1


def test_a_port_that_stays_taken_is_named(
    program: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sglang_npu_pp.tools.certify.launch.PORT_LIMIT_S", 0.3)
    (port,) = free_ports(1)
    with (
        socket.create_server((HOST, port)),
        pytest.raises(LaunchError, match=f"Port {port} is not free after"),
        launched(program, tmp_path, "--port", str(port)),
    ):
        pytest.fail("it has started")


def test_readiness_is_asked_for_where_the_log_does_not_say_it(
    program: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sglang_npu_pp.tools.certify.launch.HEALTH_EVERY_S", 0.2)
    with launched(program, tmp_path, "--quiet") as server:
        assert "fired up" not in server.log_text()


def test_a_program_that_dies_at_start_is_reported_with_its_likely_cause(tmp_path: Path) -> None:
    program = make_program(
        tmp_path,
        """
        import sys
        print("Load weight begin", flush=True)
        sys.exit("Traceback\\nsglang.errors.ContractError: no such build; install another one.\\nbye")
        """,
    )
    with pytest.raises(LaunchError) as caught, launched(program, tmp_path):
        pytest.fail("it has started")
    assert "exit code 1 while it was starting (weights): sglang.errors.ContractError: no such build" in (
        caught.value.reason
    )
    assert str(caught.value).splitlines()[-1] == "bye"


def test_a_program_that_never_gets_ready_is_ended(tmp_path: Path) -> None:
    program = make_program(tmp_path, "import time\ntime.sleep(600)\n")
    with (
        pytest.raises(LaunchError, match="not ready after 1 s, it was at: spawning") as caught,
        launched(program, tmp_path, limit_s=1.0),
    ):
        pytest.fail("it is ready")
    assert "give it more time" in caught.value.reason
    assert not [p for p in psutil.process_iter() if str(program) in " ".join(_words(p))]


def _words(process: psutil.Process) -> list[str]:
    try:
        return list(process.cmdline())
    except psutil.Error:
        return []


def test_keys_are_used_and_never_shown(program: Path, tmp_path: Path) -> None:
    with launched(program, tmp_path, "--api-key", "first-secret", "--admin-api-key=second-secret") as server:
        assert server.get("/generate").json()["key"] == "Bearer first-secret"
        assert server.post("/flush_cache").json()["key"] == "Bearer second-secret"
        assert "secret" not in server.log_text()
        for process in server.processes():
            os.kill(process.pid, signal.SIGKILL)
        assert server.wait_gone(LIMIT_S) == []
        with pytest.raises(LaunchError) as caught:
            server.check_alive("while it was asked")
    assert "secret" not in str(caught.value)
    assert "exit code -9 while it was asked" in caught.value.reason


def test_a_server_without_schedulers_has_no_reports(program: Path, tmp_path: Path) -> None:
    with launched(program, tmp_path) as server:
        assert server.scheduler_pids() == []
        assert server.dump() == []
    other = LaunchedServer([], tmp_path / "other", python=str(program))
    with other, pytest.raises(LaunchError, match="started without SGLANG_NPU_PP_TELEMETRY_DIR"):
        other.dump()


def test_encrypted_http_is_refused_with_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(LaunchError, match="leave out the options that begin with --ssl"):
        LaunchedServer(["--ssl-certfile", "x"], tmp_path)


@pytest.mark.parametrize(
    ("arguments", "value"),
    [
        ([], None),
        (["--port", "1"], "1"),
        (["--port=2"], "2"),
        (["--port", "1", "--port=2"], "2"),
        (["--port"], ""),
        (["--portal", "3"], None),
    ],
)
def test_an_option_is_found_in_both_forms(arguments: list[str], value: str | None) -> None:
    assert option(arguments, "--port") == value
