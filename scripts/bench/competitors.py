"""The servers that are compared: the same SGLang, model and flags, with another pipeline parallelism each."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, Self

import psutil

from rig import prefill_drafts
from rig.launcher import take_cpu_compat
from rig.probes import probe_variables
from rig.server import Server, ServerError
from sglang_npu_pp.tools.certify.ports import HOST, free_ports

from . import load, pairs, speculation
from .counters import Counted, StageFile, stage_path
from .link import Link
from .vllm import VllmDialect, VllmServer, vllm_variables

ROOT = Path(__file__).resolve().parents[2]
_NODES = 2
ANY = "0.0.0.0"  # in the namespace of node 0, which only node 1 reaches
FROZEN_LIMIT_S = "86400"  # a server that is frozen is not lost
_START_LIMIT_S = 600.0

# Chunks of 256 tokens: several microbatches in one prompt. No prefix cache: every repetition computes.
# float32: in bfloat16 an answer depends on who shares its batch, and who does so depends on the link.
FLAGS = (
    *("--dtype", "float32"),
    *("--chunked-prefill-size", "256"),
    *("--max-total-tokens", "65536"),
    *("--watchdog-timeout", FROZEN_LIMIT_S),
    *("--stream-interval", "8"),
    "--disable-radix-cache",
    "--skip-server-warmup",
)

UPSTREAM, PULL_REQUEST, OURS, VLLM = "upstream", "pr19582", "sglang-npu-pp", "vllm"
NOT_AHEAD = "sglang-npu-pp ahead 0"  # nothing is prepared while tokens are on their way
_OURS = {"SGLANG_NPU_PP": "require", "SGLANG_NPU_PP_PEER_TIMEOUT_S": FROZEN_LIMIT_S}
VARIABLES: Mapping[str, Mapping[str, str]] = {
    UPSTREAM: {"SGLANG_NPU_PP": "0"},
    PULL_REQUEST: {"SGLANG_NPU_PP": "0", "BENCH_DESIGN": "pr19582"},
    OURS: _OURS,
    NOT_AHEAD: {**_OURS, "SGLANG_NPU_PP_AHEAD": "0"},
}


@dataclass(frozen=True)
class Competitor:
    """One server: a design, `--pp-async-batch-depth`, and whether it speculates.

    `pair`: a prefill server that drafts, with a decode server of its own (pairs.py).
    """

    design: str
    depth: int = 0
    drafts: bool | None = None  # None: not the model and the flags of speculation.py, either
    pair: bool = False

    @property
    def is_sglang(self) -> bool:
        """Whether its forwards are counted and can be padded, and its tokens are upstream's."""
        return self.design != VLLM

    @property
    def name(self) -> str:
        depth = f" depth {self.depth}" if self.depth else ""
        drafts = {None: "", True: " with drafts", False: " without drafts"}[self.drafts]
        return f"{self.design}{depth}{drafts}{' in a pair' if self.pair else ''}"

    @property
    def without_drafts(self) -> Competitor:
        return replace(self, drafts=False)


@dataclass(frozen=True)
class Run:
    """One load on one server."""

    answers: load.Answers
    stages: tuple[Counted, ...]  # empty where they are not counted
    load_average: float

    @property
    def iteration_s(self) -> float | None:
        """Wall time by forward of the first stage, filling and draining the pipeline included."""
        return self.answers.duration_s / max(1.0, self.stages[0].launches) if self.stages else None


@dataclass(frozen=True)
class Idle:
    """A server without requests."""

    cpu_cores: float  # of its schedulers together
    first_tokens_s: tuple[float, ...]  # of requests that come then, one by one


class Contestant:
    """A competitor's server on two nodes, resident while others are measured: frozen except in `awake`.

    `variables`: of the environment, in addition to those of its design.
    """

    def __init__(
        self,
        competitor: Competitor,
        pp: int,
        model: Path,
        link: Link,
        folder: Path,
        vllm: Path | None = None,
        variables: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        self.competitor, self.pp, self._variables = competitor, pp, variables
        self._folder = folder / f"pp{pp}-{competitor.name.replace(' ', '-')}"
        self._folder.mkdir(parents=True)
        common: dict[str, Any] = {
            "log": self._folder / "log",
            "nnodes": _NODES,
            "node_prefix": {node: link.prefix(node) for node in range(_NODES)},
            "master": link.master,
        }
        self._decode: Server | None = None  # behind it
        self._dialect: load.Dialect = load.SGLANG
        if competitor.pair:
            self._pair(model, link, common)
        elif competitor.is_sglang:
            self.server = self._sglang(model, link, common)
        else:
            assert vllm is not None, "vLLM takes part where --vllm names its interpreter"
            of_nodes = {node: vllm_variables(link, node) for node in range(_NODES)}
            self.server = VllmServer(model, 1, pp, python=vllm, node_env=of_nodes, **common)
            self._dialect = VllmDialect(model)
        self._stages: list[StageFile] = []

    def _sglang(self, model: Path, link: Link, common: dict[str, Any]) -> Server:
        environment = {
            **VARIABLES[self.competitor.design],
            **self._variables,
            **probe_variables("scripts.bench.probe", paths=[ROOT]),
            "BENCH_FOLDER": str(self._folder),
        }
        arguments: tuple[str, ...] = (*FLAGS, "--pp-async-batch-depth", str(self.competitor.depth))
        variables = {node: link.variables(node) for node in range(_NODES)}
        if (drafts := self.competitor.drafts) is not None:
            arguments += speculation.arguments(model, drafts)
            environment |= speculation.variables(drafts)
        server = Server(model, 1, self.pp, env=environment, args=arguments, node_env=variables, **common)
        if drafts is not None:
            take_cpu_compat(server)
        return server

    def _pair(self, model: Path, link: Link, common: dict[str, Any]) -> None:
        (bootstrap_port,) = free_ports(1)
        self.server = Server(
            model,
            1,
            self.pp,
            env={
                **VARIABLES[self.competitor.design],
                **pairs.variables(pairs.PREFILL),
                "BENCH_FOLDER": str(self._folder),
            },
            args=(
                *FLAGS,
                *prefill_drafts.arguments(pairs.PREFILL, bootstrap_port),
                *("--host", HOST if link.master == HOST else ANY),  # also of the bootstrap server
            ),
            node_env={node: link.variables(node) for node in range(_NODES)},
            **common,
        )
        self._decode = Server(
            model,
            1,
            1,
            log=self._folder / "decode/log",
            env={**VARIABLES[UPSTREAM], **pairs.variables(pairs.DECODE)},
            args=(*FLAGS, *prefill_drafts.arguments(pairs.DECODE, bootstrap_port)),
            node_env={0: link.variables(0)},
            node_prefix={0: link.prefix(0)},
        )
        for server in self._servers:
            take_cpu_compat(server)
        self._dialect = pairs.PairDialect(self.server.url, link.master, bootstrap_port)

    @property
    def _servers(self) -> list[Server]:
        """The last one answers."""
        return [self.server, *([self._decode] if self._decode else [])]

    def _freeze(self) -> None:
        for server in self._servers:
            server.freeze()

    def _thaw(self) -> None:
        for server in self._servers:
            server.thaw()

    def start(self) -> Self:
        """Start, warm up and freeze the server. Raises ServerError, LoadError."""
        for server in self._servers:
            server.start()
        for server in self._servers:
            server.wait_ready(_START_LIMIT_S)
        if self.competitor.is_sglang:
            self._wait_for_last_node()
            self._stages = [StageFile(stage_path(self._folder, stage)) for stage in range(self.pp)]
        for warm_up in [load.PREFILL] if self.competitor.pair else load.LOADS.values():
            self._load(warm_up, seed=0)
        self._freeze()
        return self

    def stop(self) -> None:
        self._thaw()
        for server in self._servers:
            server.stop()

    def run(self, work: load.Load, pad_s: float, seed: int) -> Run:
        """Wake the server, give it `work`, and freeze it again."""
        self._thaw()
        try:
            self._pad(pad_s)
            self._load(load.SETTLE, seed)
            before = [stage.read() for stage in self._stages]
            answers = self._load(work, seed)
            after = [stage.read() for stage in self._stages]
        finally:
            self._freeze()
        counted = tuple(late - early for late, early in zip(after, before, strict=True))
        return Run(answers, counted, os.getloadavg()[0])

    def rest(self, *, settle_s: float = 2.0, measure_s: float = 2.0, requests: int = 3) -> Idle:
        """What the server does without requests, from `settle_s` after the last one on."""
        self._thaw()
        try:
            self._pad(0.0)
            self._load(load.SETTLE, seed=0)
            time.sleep(settle_s)
            before = self._cpu_s()
            time.sleep(measure_s)
            cores = (self._cpu_s() - before) / measure_s
            delays = []
            for seed in range(requests):
                time.sleep(settle_s)
                one = load.Load("one", [load.Request(32, 1)])
                delays.append(self._load(one, seed).first_token_s)
        finally:
            self._freeze()
        return Idle(cores, tuple(delays))

    def memory_mib(self) -> float:
        """Resident memory of its schedulers; pages that several share count in parts."""
        kilobytes = 0
        for pid in self.server.scheduler_pids():
            for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
                if line.startswith("Pss:"):
                    kilobytes += int(line.split()[1])
        return kilobytes / 1024

    def _load(self, work: load.Load, seed: int) -> load.Answers:
        return load.run(self._servers[-1].url, work, seed, self._dialect)

    def _pad(self, seconds: float) -> None:
        for stage in self._stages:
            stage.pad_s = seconds

    def _cpu_s(self) -> float:
        total = 0.0
        for pid in self.server.scheduler_pids():
            with suppress(psutil.NoSuchProcess):
                times = psutil.Process(pid).cpu_times()
                total += times.user + times.system
        return total

    def _wait_for_last_node(self, limit_s: float = 60.0) -> None:
        """Until it has finished its start, which it never does when it is frozen, and counts."""
        deadline = time.monotonic() + limit_s
        paths = [stage_path(self._folder, stage) for stage in range(self.pp)]
        while not (
            "ummy health check server" in self.server.log_text(_NODES - 1)
            and all(path.exists() for path in paths)
        ):
            self.server.check_alive("while its last node was starting")
            if time.monotonic() > deadline:
                raise ServerError(f"node {_NODES - 1} has not finished its start in {limit_s:.0f} s")
            time.sleep(0.1)
