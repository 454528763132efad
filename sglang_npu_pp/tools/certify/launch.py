"""A server with the user's own arguments: started, asked, and ended with everything that it left."""

from __future__ import annotations

import atexit
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Any, Self

import psutil
import requests

from .arguments import option
from .ports import DERIVED_FROM_PORT, HOST, free_ports, why_not_free
from .processes import POLL_S, ProcessTree, schedulers, wait_gone
from .reports import TELEMETRY_DIR_VARIABLE, TRACE_VARIABLE, ReportError, write_reports
from .startup_log import READY, likely_cause, reached

START_LIMIT_S = 1800.0  # large models take long to load
PORT_LIMIT_S = 60.0
END_LIMIT_S = 15.0
LOOK_EVERY_S = 1.0  # for processes, while a server starts
HEALTH_EVERY_S = 5.0  # costs a request
LOG_LINES = 40  # of its end, in an error
ANY_ADDRESS = ("0.0.0.0", "::", "")
ADMIN_PATHS = ("/flush_cache", "/abort_request", "/start_profile", "/stop_profile")


class LaunchError(RuntimeError):
    """The server did not start, ended, or did not do what was asked within its limit.

    `reason` is one sentence; `str()` adds the end of the server's log.
    """

    def __init__(self, reason: str, log: str = "") -> None:
        super().__init__("\n".join([reason, *log.splitlines()[-LOG_LINES:]]))
        self.reason = reason


def reporting(folder: Path) -> dict[str, str]:
    """Variables of a patched server that writes telemetry and traces into `folder`."""
    return {TELEMETRY_DIR_VARIABLE: str(folder), TRACE_VARIABLE: str(folder)}


class LaunchedServer:
    """`python -m sglang.launch_server` with `arguments`; a context manager, ready when it is entered.

    Its log is `folder`/log. Without --host and --port it listens on loopback, at a free port.

    Args:
        environment: variables on top of this process's own.
        start_limit_s: longest time until it is ready.
        on_progress: called several times a second while it starts, with the part of the start (see
            `startup_log`) and the seconds so far.
    """

    def __init__(
        self,
        arguments: Sequence[str],
        folder: Path,
        *,
        environment: Mapping[str, str] = MappingProxyType({}),
        python: str = sys.executable,
        start_limit_s: float = START_LIMIT_S,
        on_progress: Callable[[str, float], None] = lambda part, seconds: None,
    ) -> None:
        self.arguments, self.folder = tuple(arguments), folder.resolve()
        self.log = self.folder / "log"
        self._environment, self._python = dict(environment), python
        self._start_limit_s, self._on_progress = start_limit_s, on_progress
        self._tree = ProcessTree()
        self._scratch: Path | None = None
        self._address = _Address.of(self.arguments)
        keys = [option(self.arguments, name) for name in ("--api-key", "--admin-api-key")]
        self._key, self._admin_key = keys[0] or "", keys[1] or ""

    # --- life --------------------------------------------------------------------------------------

    def __enter__(self) -> Self:
        try:
            self._start()
            self._wait_ready()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.stop()

    @property
    def url(self) -> str:
        return self._address.url

    @property
    def variables(self) -> dict[str, str]:
        """Of its environment, but the folder of temporary files."""
        return {**os.environ, **self._environment}

    @property
    def command(self) -> list[str]:
        return [self._python, "-m", "sglang.launch_server", *self.arguments, *self._address.added]

    def stop(self, limit_s: float = END_LIMIT_S) -> None:
        """End every process, after `limit_s` by force. Can be called twice.

        Raises LaunchError if a process survives SIGKILL.
        """
        if self._scratch is None:
            return
        left = self._tree.end(limit_s)
        shutil.rmtree(self._scratch, ignore_errors=True)
        self._scratch = None
        atexit.unregister(self.stop)  # last: a Ctrl-C in the middle leaves the rest to atexit
        if left:
            raise LaunchError(f"Processes {left} of the server survived SIGKILL; end them by hand.")

    def _start(self) -> None:
        if self._scratch is not None:
            raise LaunchError("This server has been started already.")
        self._wait_for_port()
        self.folder.mkdir(parents=True, exist_ok=True)
        # SGLang leaves its ipc sockets in the temporary directory: this one goes with the server.
        self._scratch = Path(tempfile.mkdtemp(prefix="sglang-"))
        atexit.register(self.stop)
        environment = {**self.variables, "TMPDIR": str(self._scratch)}
        # In the user's folder: arguments may have paths that begin there.
        self._tree.launch(self.command, environment=environment, folder=Path.cwd(), log=self.log)

    def _wait_for_port(self) -> None:
        """The server of the turn before may still hold a port that the user has given."""
        deadline = time.monotonic() + PORT_LIMIT_S
        while reason := self._address.why_not_free():
            if time.monotonic() > deadline:
                raise LaunchError(
                    f"Port {self._address.port} is not free after {PORT_LIMIT_S:.0f} s ({reason}); end what "
                    "listens there, or leave --port out."
                )
            time.sleep(POLL_S)

    def _wait_ready(self) -> None:
        began = time.monotonic()
        next_look, next_health = 0.0, HEALTH_EVERY_S
        while (part := reached(self.log_text())) != READY:
            elapsed = time.monotonic() - began
            self._on_progress(part, elapsed)
            if elapsed >= next_look:
                self._tree.alive()  # now: a server that fails takes the traces of its processes along
                next_look = elapsed + LOOK_EVERY_S
            self.check_alive()
            if elapsed >= next_health:  # a log level above info hides the marker
                if self._is_healthy():
                    break
                next_health = time.monotonic() - began + HEALTH_EVERY_S
            if elapsed > self._start_limit_s:
                raise LaunchError(
                    f"The server was not ready after {self._start_limit_s:.0f} s, it was at: {part}; see "
                    f"{self.log}, or give it more time.",
                    self.log_text(),
                )
            time.sleep(POLL_S)
        self._on_progress(READY, time.monotonic() - began)
        self._tree.alive()

    def _is_healthy(self) -> bool:
        with suppress(requests.RequestException):
            return self.get("/health", timeout_s=10.0).status_code == requests.codes.ok
        return False

    # --- what it does ------------------------------------------------------------------------------

    def check_alive(self, when: str | None = None) -> None:
        """Raise LaunchError if the launcher has ended; `when` completes the sentence (default: the start)."""
        for launcher in self._tree.launchers:
            if launcher.poll() is not None:
                when = when or f"while it was starting ({reached(self.log_text())})"
                cause = likely_cause(self.log_text())
                raise LaunchError(
                    f"The server ended with exit code {launcher.returncode} {when}"
                    f"{f': {cause}' if cause else ''}; see {self.log}.",
                    self.log_text(),
                )

    def processes(self) -> list[psutil.Process]:
        """All that live, the launcher among them."""
        return self._tree.alive()

    def scheduler_pids(self) -> list[int]:
        """In the order of their titles: stage, then rank."""
        return list(self.scheduler_titles())

    def scheduler_titles(self) -> dict[int, str]:
        """Process id -> title, such as "sglang::scheduler_PP1_TP0"."""
        return schedulers(self._tree.alive())

    def wait_gone(self, limit_s: float) -> list[int]:
        """Wait for a server that ends by itself; the processes that are still there after `limit_s`."""
        return [process.pid for process in wait_gone(self._tree.alive(), limit_s)]

    def get(self, path: str, *, timeout_s: float = 60.0) -> requests.Response:
        """GET `path` (it begins with a slash)."""
        return self._request("GET", path, timeout_s)

    def post(
        self, path: str, body: Any = None, *, timeout_s: float = 300.0, stream: bool = False
    ) -> requests.Response:
        """POST `body` as JSON to `path`; safe to call from several threads."""
        return self._request("POST", path, timeout_s, json=body, stream=stream)

    def dump(self, limit_s: float = 60.0) -> list[Path]:
        """Have every scheduler write telemetry and trace now; the files, all complete.

        Raises LaunchError: the server has no folder for them (see `reporting`), or is not patched, or they
        did not come.
        """
        folder = self._environment.get(TELEMETRY_DIR_VARIABLE)
        if folder is None:
            raise LaunchError(f"This server was started without {TELEMETRY_DIR_VARIABLE}.")
        try:
            return write_reports(
                Path(folder),
                self.scheduler_pids(),
                limit_s,
                lambda: self.check_alive("while it was writing telemetry"),
            )
        except ReportError as error:
            raise LaunchError(f"{error}.", self.log_text()) from None

    def log_text(self) -> str:
        """Everything logged so far, without the keys of the arguments."""
        try:
            text = self.log.read_text(errors="replace")
        except FileNotFoundError:
            return ""
        for key in filter(None, (self._key, self._admin_key)):
            text = text.replace(key, "***")
        return text

    def _request(self, method: str, path: str, timeout_s: float, **more: Any) -> requests.Response:
        key = self._key
        if self._admin_key and path.startswith(ADMIN_PATHS):
            key = self._admin_key
        with requests.Session() as session:
            session.trust_env = False  # a proxy of the environment must not see loopback requests
            if key:
                session.headers["Authorization"] = f"Bearer {key}"
            return session.request(method, self.url + path, timeout=timeout_s, **more)


class _Address:
    """Where a server listens; `added` are the arguments that the user has not given."""

    def __init__(self, host: str, port: int, added: Sequence[str]) -> None:
        self.host, self.port, self.added = host, port, tuple(added)

    @classmethod
    def of(cls, arguments: Sequence[str]) -> _Address:
        if option(arguments, "--ssl-certfile") is not None:
            raise LaunchError(
                "certify speaks HTTP to the server: leave out the options that begin with --ssl."
            )
        host, port = option(arguments, "--host"), option(arguments, "--port")
        added: list[str] = []
        if host is None:
            added += ["--host", HOST]
        if port is None:
            (free,) = free_ports(1, with_also=DERIVED_FROM_PORT)
            added += ["--port", str(free)]
            return cls(host or HOST, free, added)
        if not port.isdecimal():
            raise LaunchError(f"--port {port} is not a number.")
        return cls(host or HOST, int(port), added)

    @property
    def url(self) -> str:
        host = HOST if self.host in ANY_ADDRESS else self.host
        return f"http://{f'[{host}]' if ':' in host else host}:{self.port}"

    def why_not_free(self) -> str:
        return "" if ":" in self.host else why_not_free(self.port, self.host)
