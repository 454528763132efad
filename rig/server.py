"""Start a real SGLang server on one machine, talk to it, and end it without leaving anything behind."""

import atexit
import json
import os
import shlex
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import psutil
import requests

from rig.devices import DEVICES, DeviceUnavailableError
from sglang_npu_pp.tools.certify.ports import DERIVED_FROM_PORT, HOST, free_ports, why_not_free
from sglang_npu_pp.tools.certify.processes import POLL_S, ProcessTree, schedulers, wait_gone
from sglang_npu_pp.tools.certify.reports import TELEMETRY_DIR_VARIABLE, ReportError, write_reports
from sglang_npu_pp.tools.certify.startup_log import READY, likely_cause, reached

LAYER_PARTITION_VARIABLE = "SGLANG_PP_LAYER_PARTITION"
PATH, LIBRARY_PATH = "PYTHONPATH", "LD_LIBRARY_PATH"
REFUSED_VARIABLE = "SGLANG_SERVERS_REFUSED"  # why no server may be started in this process and its children

# For a tiny model on a small machine. bfloat16, because transformers writes float32 into the
# sub-configurations of a saved Qwen3-VL and SGLang then serves it in float16.
SMALL_MODEL_ARGS = (
    *("--dtype", "bfloat16"),
    *("--max-total-tokens", "8192"),
    *("--mem-fraction-static", "0.3"),
)

# Ports that SGLang derives from --dist-init-addr, where attention is data-parallel.
DERIVED_FROM_INIT_PORT = (*range(1, 7), 13)

TRACK_EVERY_S = 1.0


class ServerError(RuntimeError):
    """The server did not start, died, or did not do what was asked within its limit.

    `reason` is one sentence; `str()` adds the end of the server's log.
    """

    def __init__(self, reason: str, log_tail: Sequence[str] = ()) -> None:
        super().__init__("\n".join([reason, *log_tail]))
        self.reason = reason


class Server:
    """One SGLang server of `tp` x `pp` ranks, on loopback and free ports.

    `device` is a name in `rig.devices.DEVICES`: the CPU, the simulated Ascend, or a real device,
    where `model` may be a name on the hub.

    Use it as a context manager, or call `start`, `wait_ready` and `stop`. The process tree runs in
    sessions of its own, with a temporary directory of its own. With `nnodes` > 1 it starts that
    many launchers, as if each were on another machine; node i > 0 writes to `<log>.node<i>`.

    `env` and `args` come after the defaults and win over them, `node_env` and `node_args` over both for one
    node. "{init_port}" in `node_args` becomes the port of --dist-init-addr.
    `node_prefix` is what a node's command line begins with (a network namespace to enter), `master` the
    address of node 0 as the others see it.
    """

    program = "SGLang"  # in sentences

    def __init__(
        self,
        model: Path | str,
        tp: int,
        pp: int,
        *,
        log: Path,
        device: str = "cpu",
        env: Mapping[str, str] | None = None,
        args: Sequence[str] = (),
        python: Path | str = sys.executable,
        nnodes: int = 1,
        node_env: Mapping[int, Mapping[str, str]] | None = None,
        node_args: Mapping[int, Sequence[str]] | None = None,
        node_prefix: Mapping[int, Sequence[str]] | None = None,
        master: str = HOST,
        port: int | None = None,
    ) -> None:
        if tp * pp % nnodes:
            raise ValueError(f"{tp} x {pp} ranks cannot be divided among {nnodes} nodes")
        self.tp, self.pp, self.nnodes = tp, pp, nnodes
        self.device = DEVICES[device]
        on_hub = self.device.real and not Path(model).exists()  # SGLang downloads it by its name
        self.model = model if on_hub else Path(model).resolve()
        self.log = Path(log).resolve()
        self.python = str(python)
        self.args = tuple(args)
        self.env = dict(env or {})
        self.node_env = dict(node_env or {})
        self.node_args = dict(node_args or {})
        self.node_prefix, self.master = dict(node_prefix or {}), master
        (self._nccl_port,) = free_ports(1)
        (self._init_port,) = free_ports(1, with_also=DERIVED_FROM_INIT_PORT)
        self._node_ports = free_ports(nnodes, with_also=DERIVED_FROM_PORT)
        if port is not None:
            self._node_ports[0] = port
        self._tree = ProcessTree()
        self._scratch: Path | None = None

    # -- what is started ---------------------------------------------------------------------

    @property
    def port(self) -> int:
        """The port of the HTTP server, which runs on node 0."""
        return self._node_ports[0]

    @property
    def url(self) -> str:
        return f"http://{HOST}:{self.port}"

    @property
    def environment(self) -> dict[str, str]:
        """The variables that the server gets on top of this process's own.

        Raises:
            ServerError: this machine cannot provide the device.
        """
        try:
            device = self.device.environment(self.tp * self.pp)
        except DeviceUnavailableError as error:
            raise ServerError(str(error)) from None
        partition = None if self.device.real else layer_partition(Path(self.model), self.pp)
        sources = (self.env, device, os.environ)
        paths = {
            name: os.pathsep.join(each[name] for each in sources if each.get(name))
            for name in (PATH, LIBRARY_PATH)
        }
        return {
            **device,
            **({LAYER_PARTITION_VARIABLE: partition} if partition else {}),
            **self.env,
            **{name: path for name, path in paths.items() if path},
        }

    def command(self, node: int = 0) -> list[str]:
        """The launch command of one node."""
        command = [*self.node_prefix.get(node, ()), self.python, "-m", "sglang.launch_server"]
        command += ["--model-path", str(self.model)]
        command += [*self.device.arguments, "--tp-size", str(self.tp), "--pp-size", str(self.pp)]
        command += ["--host", HOST, "--port", str(self._node_ports[node])]
        if "--dp-size" not in self.args or "--enable-dp-attention" in self.args:  # each replica needs its own
            command += ["--nccl-port", str(self._nccl_port)]
        if self.nnodes > 1:
            command += ["--nnodes", str(self.nnodes), "--node-rank", str(node)]
            command += ["--dist-init-addr", f"{self.master}:{self._init_port}"]
        of_node = [one.format(init_port=self._init_port) for one in self.node_args.get(node, ())]
        return [*command, *(() if self.device.real else SMALL_MODEL_ARGS), *self.args, *of_node]

    def shell_command(self) -> str:
        """The command that starts the same server from a shell, environment included."""
        variables = [f"{name}={shlex.quote(value)}" for name, value in self.environment.items()]
        return " ".join([*variables, shlex.join(self.command())])

    # -- life --------------------------------------------------------------------------------

    def __enter__(self) -> Self:
        try:
            self.start()
            self.wait_ready()
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

    def start(self) -> None:
        """Start the launcher of every node and return at once.

        Raises:
            ServerError: it runs already, the model directory is incomplete, the port is taken, or servers
                are refused.
        """
        if self._tree.launchers:
            raise ServerError("this server has been started already")
        if isinstance(self.model, Path) and not (self.model / "config.json").is_file():
            raise ServerError(f"{self.model} is not a model directory: it has no config.json")
        for port in self._node_ports:
            check_port_is_free(port)
        if refused := os.environ.get(REFUSED_VARIABLE):
            raise ServerError(f"no server is started here: {refused}")
        self.log.parent.mkdir(parents=True, exist_ok=True)
        # SGLang leaves its ipc sockets in the temporary directory: this one goes with the server.
        self._scratch = Path(tempfile.mkdtemp(prefix="sglang-"))
        atexit.register(self.stop)
        common = {**os.environ, **self.environment, "TMPDIR": str(self._scratch)}
        for node in range(self.nnodes):
            environment = {**common, **self.node_env.get(node, {})}
            self._tree.launch(
                self.command(node), environment=environment, folder=self._scratch, log=self._log_of(node)
            )

    def wait_ready(
        self,
        limit_s: float = 300.0,
        on_progress: Callable[[str, float], None] = lambda stage, elapsed_s: None,
    ) -> float:
        """Wait until the server has passed its own warm-up; return the seconds that took.

        `on_progress(stage, elapsed_s)` is called about ten times a second; `stage` is one of the
        names in `startup_log`.

        Raises:
            ServerError: a launcher ended, or `limit_s` passed; with the last lines of the log.
        """
        begin = time.monotonic()
        tracked = -TRACK_EVERY_S
        while True:
            elapsed = time.monotonic() - begin
            stage = self._stage()
            on_progress(stage, elapsed)
            if stage == READY or elapsed - tracked >= TRACK_EVERY_S:
                self._track()  # now: a server that fails takes the traces of its processes along
                tracked = elapsed
            if stage == READY:
                return elapsed
            self.check_alive()
            if elapsed > limit_s:
                raise ServerError(
                    f"{self.program} was not ready after {limit_s:.0f} s, it was {stage}; see {self.log}",
                    self.log_tail(),
                )
            time.sleep(POLL_S)

    def check_alive(self, when: str | None = None) -> None:
        """Raise `ServerError` if a launcher has ended; `when` completes the sentence (default: the start)."""
        for node, launcher in enumerate(self._tree.launchers):
            if launcher.poll() is not None:
                when = when or f"while it was starting ({self._stage()})"
                where = f" of node {node}" if self.nnodes > 1 else ""
                raise ServerError(
                    f"{self.program}{where} ended with exit code {launcher.returncode} {when}"
                    f"{self._likely_cause(node)}; see {self._log_of(node)}",
                    self.log_tail(),
                )

    def wait_end(self, limit_s: float) -> None:
        """Wait until a server that is expected to end by itself has left no process behind.

        Raises:
            ServerError: `limit_s` passed.
        """
        if left := wait_gone(self._track(), limit_s):
            raise ServerError(
                f"processes {[process.pid for process in left]} were still alive after {limit_s:.0f} s",
                self.log_tail(),
            )

    def stop(self, limit_s: float = 15.0) -> None:
        """End every process that this server started and remove what they leave behind.

        Safe to call twice; see `ProcessTree.end`.

        Raises:
            ServerError: a process survived SIGKILL.
        """
        if self._scratch is None:
            return
        left = self._tree.end(limit_s)
        shutil.rmtree(self._scratch, ignore_errors=True)
        self._scratch = None
        atexit.unregister(self.stop)  # last: a Ctrl-C in the middle leaves the rest to atexit
        if left:
            raise ServerError(f"processes {left} survived SIGKILL")

    # -- talking to it -----------------------------------------------------------------------

    def get(self, path: str, *, timeout_s: float = 60.0) -> requests.Response:
        """GET `path` (it begins with a slash)."""
        return self._request("GET", path, timeout_s)

    def post(
        self, path: str, body: Any = None, *, timeout_s: float = 300.0, stream: bool = False
    ) -> requests.Response:
        """POST `body` as JSON to `path`; safe to call from several threads."""
        return self._request("POST", path, timeout_s, json=body, stream=stream)

    def freeze(self) -> None:
        """Stop every process where it is (SIGSTOP), until `thaw`: another server then has the machine."""
        for process in self._track():
            with suppress(psutil.NoSuchProcess):
                process.suspend()

    def thaw(self) -> None:
        """Let the processes go on."""
        for process in self._track():
            with suppress(psutil.NoSuchProcess):
                process.resume()

    def scheduler_pids(self) -> list[int]:
        """Process ids of the schedulers, in the order of their titles (stage, then rank)."""
        return list(schedulers(self._track()))

    def dump_telemetry(self, limit_s: float = 10.0) -> list[Path]:
        """Have every scheduler write its telemetry file now; return the files, all complete.

        Raises:
            ServerError: the server has no telemetry directory, a scheduler has no handler for the
                signal (its default action would end the process), or the files did not come.
        """
        if TELEMETRY_DIR_VARIABLE not in self.environment:
            raise ServerError(f"this server was started without {TELEMETRY_DIR_VARIABLE}")
        folder = Path(self.environment[TELEMETRY_DIR_VARIABLE])
        try:
            return write_reports(
                folder,
                self.scheduler_pids(),
                limit_s,
                lambda: self.check_alive("while it was writing telemetry"),
            )
        except ReportError as error:
            raise ServerError(str(error), self.log_tail()) from None

    def log_text(self, node: int = 0) -> str:
        """Everything that node has logged so far."""
        try:
            return self._log_of(node).read_text(errors="replace")
        except FileNotFoundError:
            return ""

    def log_tail(self, lines: int = 40) -> list[str]:
        """The last lines of every node's log."""
        return [line for node in range(self.nnodes) for line in self.log_text(node).splitlines()[-lines:]]

    # -- inside ------------------------------------------------------------------------------

    def _request(self, method: str, path: str, timeout_s: float, **kwargs: Any) -> requests.Response:
        with requests.Session() as session:
            session.trust_env = False  # a proxy of the environment must not see loopback requests
            return session.request(method, self.url + path, timeout=timeout_s, **kwargs)

    def _log_of(self, node: int) -> Path:
        return self.log if node == 0 else self.log.with_name(f"{self.log.name}.node{node}")

    def _stage(self) -> str:
        stage = reached(self.log_text())
        # A log level above info hides the marker of readiness; /health then costs a request.
        if stage != READY and any(arg.startswith("--log-level") for arg in self.args):
            with suppress(requests.RequestException):
                if self.get("/health", timeout_s=10.0).status_code == requests.codes.ok:
                    return READY
        return stage

    def _likely_cause(self, node: int) -> str:
        """Behind a colon, where the node's log has one."""
        cause = likely_cause(self.log_text(node))
        return f": {cause}" if cause else ""

    @property
    def _shared_memory(self) -> set[Path]:
        return self._tree.shared_memory

    def _track(self) -> list[psutil.Process]:
        return self._tree.alive()


def check_port_is_free(port: int) -> None:
    """Raise `ServerError` if something listens on `port` of the loopback interface."""
    if reason := why_not_free(port):
        raise ServerError(f"port {port} of {HOST} is not free: {reason}")


def layer_partition(model: Path, pp: int) -> str | None:
    """SGLANG_PP_LAYER_PARTITION for a Qwen3-VL with fewer layers per stage than deepstack layers.

    SGLang refuses a later stage that would begin inside the deepstack layers: give stage 0 all of
    them and divide the rest. None where SGLang's own, even division will do.
    """
    with suppress(OSError, ValueError, KeyError):
        config = json.loads((model / "config.json").read_text())
        layers = config["text_config"]["num_hidden_layers"]
        deepstack = len(config["vision_config"]["deepstack_visual_indexes"])
        if pp > 1 and layers // pp < deepstack and layers - deepstack >= pp - 1:
            each, extra = divmod(layers - deepstack, pp - 1)
            later = [each + (stage < extra) for stage in range(pp - 1)]
            return ",".join(map(str, [deepstack, *later]))
    return None
