"""Seam: the end of a server that has lost a stage.

A scheduler with a silent peer ends its node; a launcher ends it when one of its schedulers was stopped or
killed. With a requested dump or a signal handler of the operator, SGLang ends the server instead.

By default, after a crash on the first node, its launcher waits five seconds and runs py-spy on the schedulers
still alive. A scheduler with a lost peer waits for that, up to a limit, if another one is alive beside it.
"""

from __future__ import annotations

import logging
import os
import re
import shutil
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

from sglang_npu_pp.ending import LAUNCHER, POLL_S, Node, Watch, best_effort, end_node
from sglang_npu_pp.errors import PeerLostError
from sglang_npu_pp.patching import Patch, with_names
from sglang_npu_pp.settings import load_settings

from .features import unsupported
from .pipeline import current_or_none, has_pipeline

logger = logging.getLogger("sglang_npu_pp")

# Upstream dumps unless these are false. With no process left to dump, only an explicit true waits.
_DUMPS = ("SGLANG_PYSPY_DUMP_BEFORE_CRASH", "SGLANG_CUDA_COREDUMP_BEFORE_CRASH")
_YES = ("1", "true", "yes", "y")

DUMPS = "_SGLANG_NPU_PP_DUMPS_S"
"""Environment variable of schedulers: how long SGLang may take to dump them; absent where it does not."""

_TITLE = "sglang::scheduler"  # SGLang searches for it
_CRASHED = "crashed"
_SETTLE_S = 60.0  # SGLang's own five seconds, a busy machine, and its check for ended processes
_A_DUMP_S = 30.0  # of one scheduler
_CUDA = "CUDA_ENABLE_USER_TRIGGERED_COREDUMP"
_CUDA_WAIT = "SGLANG_CUDA_COREDUMP_BEFORE_CRASH_WAIT_SECS"

_node: Node | None = None  # in a launcher: also the scope of its end


def launch_scheduler_processes(
    original: Any, cls: Any, server_args: Any, port_args: Any, *args: Any, **kwargs: Any
) -> Any:
    """In the launcher of every node; returns when the processes were started, before they are ready."""
    from sglang.srt.managers.load_snapshot import shm_path_for

    ours = server_args.pp_size > 1 and unsupported(server_args) is None
    at_once = ours and not has_own_end(server_args)
    node = Node(psutil.Process(), (Path(shm_path_for(port_args.instance_id)),))
    global _node
    _node = node if ours else None
    os.environ.pop(LAUNCHER, None)
    os.environ.pop(DUMPS, None)
    if at_once:
        node.export_to_children()
        _export_dump_limit(server_args)
    result, processes = original(cls, server_args, port_args, *args, **kwargs)
    if ours and processes:
        schedulers = _alive(result.all_child_pids)

        def on_lost(pid: int, error: PeerLostError) -> None:
            best_effort(lambda: logger.error("sglang-npu-pp: %s", error))
            if at_once:
                let_dumps_be_made(schedulers)
                end_node(node)
            with suppress(psutil.NoSuchProcess):
                psutil.Process(pid).kill()  # the rest is SGLang's reaction to a dead scheduler

        limit_s = load_settings().peer_timeout_s
        watch = Watch(processes, result.all_child_pids, limit_s=limit_s, name=name_of)
        watch.start(on_lost)
        _look_before_it_ends(result, watch, on_lost)
    return result, processes


def _look_before_it_ends(result: Any, watch: Watch, on_lost: Callable[[int, PeerLostError], None]) -> None:
    """Launchers of later nodes wait for their schedulers, then kill the rest of the node at once."""
    wait_for_schedulers = getattr(result, "block_until_scheduler_exits", None)  # 0.5.17 and later
    if wait_for_schedulers is None:
        return

    def wait_and_look() -> None:
        wait_for_schedulers()
        lost = watch.look() or watch.look()
        if lost is not None:
            on_lost(*lost)

    result.block_until_scheduler_exits = wait_and_look


def has_own_end(server_args: Any) -> bool:
    """Whether the operator asked for more than the end of all processes."""
    asked = any(os.environ.get(variable, "").lower() in _YES for variable in _DUMPS)
    return asked or bool(server_args.crash_dump_folder) or server_args.custom_sigquit_handler is not None


def _export_dump_limit(server_args: Any) -> None:
    """Only the launcher of the first node dumps, through its tokenizer manager, and only its own children."""
    from sglang.srt.environ import envs

    if (
        getattr(server_args, "node_rank", 0)
        or getattr(server_args, "dp_size", 1) > 1  # SGLang's controller takes its schedulers along
        or getattr(server_args, "tokenizer_worker_num", 1) > 1
        or os.environ.get("SGLANG_RUST_SERVER", "").lower() in _YES
    ):
        return
    limit_s = 0.0
    if envs.SGLANG_PYSPY_DUMP_BEFORE_CRASH.get() and shutil.which("py-spy"):
        limit_s = _SETTLE_S
    if envs.SGLANG_CUDA_COREDUMP_BEFORE_CRASH.get() and os.environ.get(_CUDA) == "1":
        limit_s = _SETTLE_S + envs.SGLANG_CUDA_COREDUMP_BEFORE_CRASH_WAIT_SECS.get()
    if limit_s:
        os.environ[DUMPS] = f"{limit_s:g}"


def _alive(pids: Sequence[int]) -> list[psutil.Process]:
    found = []
    for pid in pids:
        with suppress(psutil.Error):
            found.append(psutil.Process(pid))
    return found


def let_dumps_be_made(schedulers: Sequence[psutil.Process]) -> None:
    """Return when SGLang has nothing to dump: none of `schedulers` (others of this node) has crashed, or none
    is alive. Else its launcher ends this process, or a limit passes."""
    limit_s = float(os.environ.get(DUMPS, "0"))
    deadline = time.monotonic() + limit_s + _A_DUMP_S * len(schedulers)
    while limit_s and time.monotonic() < deadline:
        states = {_state(process) for process in schedulers}
        if not {_CRASHED, _TITLE} <= states:
            return
        time.sleep(POLL_S)


def _state(process: psutil.Process) -> str:
    """_CRASHED, _TITLE for a live scheduler, or another state."""
    try:
        status, title = process.status(), " ".join(process.cmdline()).strip()
    except psutil.NoSuchProcess:
        return _CRASHED
    except psutil.Error:
        return ""
    if status == psutil.STATUS_ZOMBIE or title.endswith(_CRASHED):
        return _CRASHED
    return _TITLE if title.startswith(_TITLE) and status != psutil.STATUS_STOPPED else ""


def _mark_as_crashed() -> None:
    """In the process title, visible to the others of this node until the end."""
    with suppress(Exception):
        import setproctitle

        setproctitle.setproctitle(f"{setproctitle.getproctitle()} {_CRASHED}")


def name_of(process: psutil.Process) -> str:
    """Stage, and rank where a stage has several, from a scheduler's title.

    Empty for a process about to end.
    """
    title = " ".join(process.cmdline()).strip()
    stage = re.match(r"sglang::scheduler.*_PP(\d+)", title)
    if stage is None:
        return title[:40]
    rank = re.search(r"_TP(\d+)", title)
    return f"stage {stage[1]} rank {rank[1] if rank else 0}"


def dispatch_event_loop(original: Any, scheduler: Any) -> Any:
    """A scheduler's main function after its start."""
    beside = _schedulers_beside()
    try:
        return original(scheduler)
    except PeerLostError as error:
        sentence, node, pipeline = f"sglang-npu-pp: {error}", Node.of_this_process(), current_or_none()
        if node is None or pipeline is None:
            _mark_as_crashed()
            raise
        report = pipeline.reporter.finish
        best_effort(lambda: logger.error("%s", sentence), report, lambda: _publish_last_metrics(scheduler))
        let_dumps_be_made(beside)
        end_node(node)
    except Exception:
        _mark_as_crashed()
        raise


def _schedulers_beside() -> list[psutil.Process]:
    """All others started so far (a pipeline's start together); empty without dumps to wait for."""
    with suppress(Exception):  # the end of this scheduler must not depend on it
        node = Node.of_this_process() if DUMPS in os.environ else None
        if node is not None:
            children = node.launcher.children(recursive=True)
            others = [process for process in children if process.pid != os.getpid()]
            return [process for process in others if _state(process) == _TITLE]
    return []


def _publish_last_metrics(scheduler: Any) -> None:
    """Upstream's step after a scheduler's failure; time-limited."""
    scheduler.metrics_reporter._shutdown_fpm()


def running_phase_sigquit_handler(original: Any, handler: Any, *args: Any, **kwargs: Any) -> Any:
    """In the launcher of the first node after a scheduler's crash: dumps, then the end."""
    node = _node
    if node is None:
        return original(handler, *args, **kwargs)
    if os.environ.get(_CUDA) != "1" and _DUMPS[1] not in os.environ:
        os.environ.setdefault(_CUDA_WAIT, "0")  # CUDA writes no core then, and upstream would wait for it
    try:
        return with_names(original, kill_process_tree=lambda *_: end_node(node))(handler, *args, **kwargs)
    finally:  # a dump that fails does not keep a node from ending that has lost a scheduler
        end_node(node)


PATCHES = (
    Patch(
        target="sglang.srt.entrypoints.engine:Engine._launch_scheduler_processes",
        wrapper=launch_scheduler_processes,
        why="the launcher of a stopped scheduler serves for ever, silent; one of a later node waits "
        "for its schedulers one after another, in a fixed order",
        how="check them; a kill, or a stop for the peer time-out, ends this node",
        upstream="sglang #18421: node 0 detects ended schedulers",
        plan="goes when upstream detects stopped schedulers on every node",
        relies_on=(
            "sglang.srt.managers.load_snapshot:create_load_snapshot_writer",
            "sglang.srt.managers.load_snapshot:shm_path_for",
            "sglang.srt.managers.scheduler:configure_scheduler_process",
            "sglang.srt.utils.common:kill_process_tree",
        ),
    ),
    Patch(
        target="sglang.srt.managers.tokenizer_manager:SignalHandler.running_phase_sigquit_handler",
        wrapper=running_phase_sigquit_handler,
        why="its end leaves shared memory, and waits a minute for CUDA's cores where CUDA does not write any",
        how="end the node when the dumps are made; no wait unless CUDA writes cores on request",
        upstream="none",
        plan="goes when upstream removes its shared memory",
        relies_on=(
            "sglang.srt.utils.cudacore_pyspy_dump_utils:collect_scheduler_processes",
            "sglang.srt.utils.watchdog:SubprocessWatchdog._check_processes",
        ),
    ),
    Patch(
        target="sglang.srt.managers.scheduler:dispatch_event_loop",
        wrapper=dispatch_event_loop,
        why="upstream sleeps five seconds before it ends, with no process left to dump, and leaves the "
        "shared memory of its processes",
        how="when a peer is lost, report, then kill this node's processes but the resource tracker",
        upstream="none",
        plan="goes when upstream ends at once and removes its shared memory",
        when=has_pipeline,
    ),
)
