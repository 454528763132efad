"""Seam: the end of a server that has lost a stage.

A scheduler that hears nothing from a peer ends its node. The launcher of a node ends it when a scheduler of
its own was stopped or killed. Operators who want a dump at the end, or have a handler of their own, get
SGLang's way of ending instead.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

from sglang_npu_pp.ending import LAUNCHER, Node, end_node
from sglang_npu_pp.errors import PeerLostError
from sglang_npu_pp.patching import Patch
from sglang_npu_pp.settings import load_settings
from sglang_npu_pp.watch import Watch

from .pipeline import current, has_pipeline

logger = logging.getLogger("sglang_npu_pp")

# Upstream dumps unless these say no. With nobody left to be dumped, only who says yes is made to wait.
_DUMPS = ("SGLANG_PYSPY_DUMP_BEFORE_CRASH", "SGLANG_CUDA_COREDUMP_BEFORE_CRASH")
_YES = ("1", "true", "yes", "y")


def launch_scheduler_processes(
    original: Any, cls: Any, server_args: Any, port_args: Any, *args: Any, **kwargs: Any
) -> Any:
    """In the launcher of every node; returns when the processes were started, before they are ready."""
    from sglang.srt.managers.load_snapshot import shm_path_for

    ours = server_args.pp_size > 1 and server_args.speculative_algorithm is None
    at_once = ours and not has_own_end(server_args)
    node = Node(psutil.Process(), (Path(shm_path_for(port_args.instance_id)),))
    os.environ.pop(LAUNCHER, None)
    if at_once:
        node.tell_children()
    result, processes = original(cls, server_args, port_args, *args, **kwargs)
    if ours and processes:

        def on_lost(pid: int, error: PeerLostError) -> None:
            logger.error("sglang-npu-pp: %s", error)
            if at_once:
                end_node(node)
            with suppress(psutil.NoSuchProcess):
                psutil.Process(pid).kill()  # what follows is what SGLang does when a scheduler dies

        limit_s = load_settings().peer_timeout_s
        watch = Watch(processes, result.all_child_pids, limit_s=limit_s, name=name_of)
        watch.start(on_lost)
        _look_before_it_ends(result, watch, on_lost)
    return result, processes


def _look_before_it_ends(result: Any, watch: Watch, on_lost: Callable[[int, PeerLostError], None]) -> None:
    """Launchers of later nodes wait for their schedulers, and kill what is left of the node at once then."""
    wait_for_schedulers = getattr(result, "block_until_scheduler_exits", None)  # 0.5.18 and later
    if wait_for_schedulers is None:
        return

    def wait_and_look() -> None:
        wait_for_schedulers()
        lost = watch.look() or watch.look()
        if lost is not None:
            on_lost(*lost)

    result.block_until_scheduler_exits = wait_and_look


def has_own_end(server_args: Any) -> bool:
    """Whether the operator wants more of SGLang's end than that everything has ended."""
    asked = any(os.environ.get(variable, "").lower() in _YES for variable in _DUMPS)
    return asked or bool(server_args.crash_dump_folder) or server_args.custom_sigquit_handler is not None


def name_of(process: psutil.Process) -> str:
    """Schedulers carry their stage in the title, and their rank where a stage has several.

    Empty for a process that is ending.
    """
    title = " ".join(process.cmdline()).strip()
    stage = re.match(r"sglang::scheduler.*_PP(\d+)", title)
    if stage is None:
        return title[:40]
    rank = re.search(r"_TP(\d+)", title)
    return f"stage {stage[1]} rank {rank[1] if rank else 0}"


def dispatch_event_loop(original: Any, scheduler: Any) -> Any:
    """All that a scheduler does once it has started."""
    try:
        return original(scheduler)
    except PeerLostError as error:
        node, pipeline = Node.of_this_process(), current()
        if node is None or pipeline is None:
            raise
        logger.error("sglang-npu-pp: %s", error)
        if pipeline.reporter is not None:
            pipeline.reporter.finish()
        end_node(node)


PATCHES = (
    Patch(
        target="sglang.srt.entrypoints.engine:Engine._launch_scheduler_processes",
        wrapper=launch_scheduler_processes,
        why="the launcher of a scheduler that was stopped serves for ever, silent; one of a later node waits "
        "for its schedulers one after another, whichever was killed",
        how="look after them; when one was killed, or stopped for the peer time-out, this node ends",
        upstream="sglang #18421: node 0 notices schedulers that have ended",
        plan="goes when upstream notices a scheduler that was stopped, on every node",
        relies_on=(
            "sglang.srt.managers.load_snapshot:create_load_snapshot_writer",
            "sglang.srt.managers.load_snapshot:shm_path_for",
            "sglang.srt.managers.scheduler:configure_scheduler_process",
            "sglang.srt.utils.common:kill_process_tree",
        ),
    ),
    Patch(
        target="sglang.srt.managers.scheduler:dispatch_event_loop",
        wrapper=dispatch_event_loop,
        why="upstream sleeps five seconds before it ends, with nobody left to be dumped, and leaves the "
        "shared memory of its processes",
        how="when a peer is lost, report, then kill this node's processes but the resource tracker",
        upstream="none",
        plan="goes when upstream ends at once and removes its shared memory",
        when=has_pipeline,
    ),
)
