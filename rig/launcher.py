"""Starts servers, and reads what their ranks recorded."""

from __future__ import annotations

import os
import struct
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

from rig.probes import probe_variables
from rig.releases import IN_VENV, RELEASES, Release
from rig.server import PATH, Server
from sglang_npu_pp.observe.trace import Event, read_traces

ROOT = Path(__file__).parents[1]
RANDOM_MODEL = ROOT / "sglang_npu_pp/tools/certify/model"  # random weights: the sensitive twin
MOE_MODEL = ROOT / "rig/assets/random_moe"  # random weights, experts
DIGITS_MODEL = ROOT / "scripts/assets/digits_vl"  # trained

# Chunks of 256 tokens force chunked prefill for the longer prompts of the battery. In bfloat16 upstream
# itself gives other log-probabilities when other requests share a batch; in float32 it does not.
ARGUMENTS = (
    *("--chunked-prefill-size", "256"),
    *("--max-total-tokens", "16384"),
    *("--dtype", "float32"),
    "--skip-server-warmup",
)


@dataclass
class Launcher:
    """Starts servers for tests; ends the ones it started."""

    directory: Path
    servers: ExitStack = field(default_factory=ExitStack)
    started: int = 0

    def configure(
        self,
        tp: int,
        pp: int,
        *,
        patched: bool,
        device: str = "cpu",
        model: Path = RANDOM_MODEL,
        args: Sequence[str] = (),
        env: Mapping[str, str] | None = None,
        release: Release = RELEASES[IN_VENV],
        nnodes: int = 1,
        node_env: Mapping[int, Mapping[str, str]] | None = None,
    ) -> Server:
        """A server that is not started; of a release that is installed, or another one would be found."""
        assert release.is_installed, f"SGLang {release.name} is not installed (make matrix does it)"
        self.started += 1
        folder = self.directory / f"server{self.started}"
        folder.mkdir()
        # This tree is the one under test, also where another is installed.
        paths = [*([release.folder] if release.folder else []), ROOT]
        environment = {
            "SGLANG_NPU_PP": "require" if patched else "0",
            "SGLANG_NPU_PP_TELEMETRY_DIR": str(folder),
            "SGLANG_NPU_PP_TRACE": str(folder),
            "PP_PROBE_DIR": str(folder),
            **probe_variables("sglang_pp_probe", paths=paths),
            **release.environment(tp),
            **(env or {}),
        }
        return Server(
            model,
            tp,
            pp,
            log=folder / "log",
            device=release.device(device),
            env=environment,
            args=(*ARGUMENTS, *release.arguments, *args),
            nnodes=nnodes,
            node_env=node_env,
        )

    def start(self, tp: int, pp: int, *, patched: bool, **options: object) -> Server:
        """A running server, which lives until `stop_all`."""
        server = self.configure(tp, pp, patched=patched, **options)  # type: ignore[arg-type]
        return self.servers.enter_context(server)

    def stop_all(self) -> None:
        self.servers.close()


def take_cpu_compat(server: Server) -> None:
    """This tree's `scripts/cpu_compat`, before that of the environment."""
    server.env[PATH] = os.pathsep.join([str(ROOT / "scripts/cpu_compat"), server.env[PATH]])


def traces(server: Server) -> dict[int, list[Event]]:
    """What every stage (rank 0) recorded so far."""
    server.dump_telemetry()
    return {trace.stage: trace.events for trace in read_traces(server.log.parent)}


def point_to_point_counts(server: Server) -> dict[int, int]:
    """torch.distributed sends and receives of every scheduler process, by pid."""
    folder = server.log.parent
    return {
        pid: struct.unpack("<Q", (folder / f"{pid}.p2p").read_bytes())[0] for pid in server.scheduler_pids()
    }
