"""The servers of an accuracy run: the same command, with the patches and without."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from rig.devices import DEVICES
from rig.server import Server

from .direct import served_model
from .lmms import Target
from .results import Layout, Side

SWITCH = "SGLANG_NPU_PP"
# float32, because in bfloat16 SGLang itself gives other log-probabilities when other requests share a batch.
SMALL_MACHINE_ARGUMENTS = ("--dtype", "float32", "--skip-server-warmup")
SMALL_START_LIMIT_S, REAL_START_LIMIT_S = 300.0, 3600.0  # a real model is loaded, perhaps downloaded


def configure(
    model: Path | str,
    layout: Layout,
    side: Side,
    log: Path,
    *,
    args: Sequence[str] = (),
    env: Mapping[str, str] | None = None,
) -> Server:
    """A server that is not started. `require`: where the patches cannot be applied, it must not start."""
    small = () if DEVICES[layout.device].real else SMALL_MACHINE_ARGUMENTS
    return Server(
        model,
        layout.tp,
        layout.pp,
        log=log,
        device=layout.device,
        env={SWITCH: "require" if side is Side.PATCHED else "0", **(env or {})},
        args=(*small, *args),
    )


@contextmanager
def running(
    server: Server,
    layout: Layout,
    side: Side,
    concurrency: int,
    on_progress: Callable[[str, float], None] = lambda stage, elapsed_s: None,
) -> Iterator[Target]:
    """Start `server`, give what asks it, and end it.

    Raises:
        ServerError: it did not start, or ended while it was asked.
    """
    limit_s = REAL_START_LIMIT_S if server.device.real else SMALL_START_LIMIT_S
    try:
        server.start()
        server.wait_ready(limit_s, on_progress)
        yield Target(
            server.url,
            served_model(server.url, {}),
            layout,
            side,
            concurrency,
            headers={},
            check_alive=lambda: server.check_alive("while it was answering questions"),
        )
        server.check_alive("while it was answering questions")
    finally:
        server.stop()
