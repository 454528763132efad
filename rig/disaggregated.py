"""A prefill server and a decode server on one machine, with Mooncake's transfer engine between them."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from rig.probes import probe_variables
from rig.server import LIBRARY_PATH, Server
from scripts.environment.parts import LIBRARIES, Part
from sglang_npu_pp.tools.certify.ports import HOST

ENGINE = Part("mooncake")
MODES = ("prefill", "decode")
FAKE_BOOTSTRAP_HOST = "2.2.2.2"  # SGLang's name for a request whose KV cache goes nowhere

_rooms = itertools.count(1)


def engine_missing() -> str | None:
    """Why Mooncake cannot be used here, None if it can."""
    if ENGINE.is_installed:
        return None
    return (
        f"Mooncake's transfer engine is not in {ENGINE.folder}; "
        "install it with python -m scripts.environment.install mooncake"
    )


def engine_environment(*more_probes: str, paths: Sequence[Path] = ()) -> dict[str, str]:
    """For both servers: where the engine is, that it uses TCP, and a probe for what CPU lacks; `paths`: where
    else probes are imported from."""
    return {
        LIBRARY_PATH: str(ENGINE.folder / LIBRARIES),
        **probe_variables("kv_probe", *more_probes, paths=[ENGINE.folder, *paths]),
        "MC_FORCE_TCP": "1",
        "MOONCAKE_PROTOCOL": "tcp",
        "SGLANG_HOST_IP": HOST,
    }


def arguments(mode: str, bootstrap_port: int, backend: str = "mooncake") -> tuple[str, ...]:
    """Of a server that is one half of the pair; `mode` is one of `MODES`.

    A decode server usually keeps what it takes out of its batch in a pool on the host, for which it wants
    10 GiB to spare.
    """
    backup = ("--disaggregation-decode-retraction-backup", "cpu_tensor") if mode == "decode" else ()
    return (
        *("--disaggregation-mode", mode, "--disaggregation-transfer-backend", backend),
        *("--disaggregation-bootstrap-port", str(bootstrap_port)),
        *backup,
    )


def noted(folder: Path, what: str) -> list[dict[str, Any]]:
    """The notes with `what` in them of all processes whose KV_PROBE_DIR is `folder` (see `kv_probe`)."""
    lines = [line for path in folder.glob("*.jsonl") for line in path.read_text().splitlines()]
    return [found for line in lines if what in (found := json.loads(line))]


class Pair:
    """Asks two servers that run already, as a load balancer does: both get the request, decode answers."""

    def __init__(self, prefill: Server, decode: Server, bootstrap_port: int) -> None:
        self.prefill, self.decode, self.bootstrap_port = prefill, decode, bootstrap_port

    def generate(
        self, body: dict[str, Any], timeout_s: float = 60.0, bootstrap_port: int | None = None
    ) -> tuple[Any, Any]:
        """The answers of /generate: the prefill server's, whose text is one token, and the decode server's.

        An answer that is an HTTP error is given as the exception. `bootstrap_port`: of a server that stands
        before the real one.
        """
        room = self._new_room(bootstrap_port)
        with ThreadPoolExecutor(2) as pool:
            prefill, decode = pool.map(
                lambda server: _ask(server, {**body, **room}, timeout_s), (self.prefill, self.decode)
            )
        return prefill, decode

    def decode_alone(self, body: dict[str, Any], bootstrap_port: int, timeout_s: float = 300.0) -> Any:
        """The decode server's answer to a request that no prefill server gets."""
        return _ask(self.decode, {**body, **self._new_room(bootstrap_port)}, timeout_s)

    def _new_room(self, bootstrap_port: int | None) -> dict[str, Any]:
        port = self.bootstrap_port if bootstrap_port is None else bootstrap_port
        return {"bootstrap_host": HOST, "bootstrap_port": port, "bootstrap_room": next(_rooms)}

    def generate_all(self, bodies: Sequence[dict[str, Any]], concurrency: int) -> list[Any]:
        """The decode server's answers, in the order of `bodies`."""
        with ThreadPoolExecutor(concurrency) as pool:
            return [decode for _, decode in pool.map(self.generate, bodies)]


def start_pair(enter: Callable[[Server], Server], servers: Sequence[Server], bootstrap_port: int) -> Pair:
    """A prefill and a decode server, which start beside each other; `enter`: of what is to end them."""
    with ThreadPoolExecutor(2) as pool:
        prefill, decode = pool.map(enter, servers)
    return Pair(prefill, decode, bootstrap_port)


def _ask(server: Server, body: dict[str, Any], timeout_s: float) -> Any:
    response = server.post("/generate", body, timeout_s=timeout_s)
    return response.json() if response.ok else RuntimeError(f"{response.status_code} {response.text}")
