"""Record upstream's pipeline and ours under one load, and draw both in one picture: `make picture`.

Two stages (tp 1 pp 2) as two nodes, joined by the benchmark's emulated link, its small model, forwards
padded to a set time, and its decode load: 32 requests of 32 tokens in and 33 out. Both servers get the same
requests, one after the other. An unpatched server is recorded by upstream_trace.py, ours by
SGLANG_NPU_PP_TRACE. The traces, cut to the time of the load, stay in FOLDER/upstream and
FOLDER/sglang-npu-pp; `python -m sglang_npu_pp timeline` draws them, and its command line is printed.
"""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import signal
import sys
import time
from contextlib import nullcontext
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path

from rig.folders import new_folder
from rig.server import ServerError
from sglang_npu_pp.__main__ import main as command_line
from sglang_npu_pp.observe.trace import read_trace

from . import load
from .asked import ask_schedulers
from .competitors import OURS, ROOT, UPSTREAM, Competitor, Contestant
from .link import EmulatedLink, Link, LinkError, Loopback, reason_for_loopback
from .load import DECODE, LoadError
from .model import for_cpu

TRACES = {UPSTREAM: "BENCH_UPSTREAM_TRACE", OURS: "SGLANG_NPU_PP_TRACE"}
"""Variables that name the folder of the traces."""

_STAGES = 2


@dataclass(frozen=True)
class Setting:
    """What both servers run under."""

    delay_ms: float
    pad_ms: float
    depth: int

    def sentence(self, link: Link) -> str:
        delay = f"{self.delay_ms:g} ms one way" if self.delay_ms else "no delay"
        return (
            f"SGLang {version('sglang')}, CPU, {len(os.sched_getaffinity(0))} cores; link: {link.kind}, "
            f"{delay}; decode, forwards padded to {self.pad_ms:g} ms; depth {self.depth}"
        )


class Recorded(Contestant):
    """A server that records its pipeline, and the time of the last load."""

    def __init__(self, design: str, depth: int, model: Path, link: Link, folder: Path) -> None:
        self._traces = folder / f"{design}-whole"
        self._traces.mkdir(parents=True)
        variables = {TRACES[design]: str(self._traces)}
        super().__init__(Competitor(design, depth), _STAGES, model, link, folder, variables=variables)
        self._loaded_ns = (0, 0)

    def write(self, folder: Path) -> None:
        """Have every stage write its trace; keep what was recorded during the last load."""
        self.server.thaw()
        ask_schedulers(self.server, self._traces, signal.SIGUSR2)
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        begin_ns, end_ns = self._loaded_ns
        for path in self._traces.glob("stage*.json"):
            trace = read_trace(path)
            during = [event for event in trace.events if begin_ns <= event.time_ns <= end_ns]
            replace(trace, events=during, written_ns=end_ns).write(folder)

    def _load(self, work: load.Load, seed: int) -> load.Answers:
        begin_ns = time.monotonic_ns()
        answers = super()._load(work, seed)
        self._loaded_ns = (begin_ns, time.monotonic_ns())
        return answers


def record(setting: Setting, link: Link, model: Path, logs: Path, output: Path) -> None:
    """Traces of both designs into `output`. Raises ServerError, LinkError, LoadError."""
    for design in TRACES:
        link.set(0, 0)
        server = Recorded(design, setting.depth, model, link, logs)
        try:
            server.start()
            link.set(setting.delay_ms, 0)
            run = server.run(DECODE, setting.pad_ms / 1e3, seed=1)
            server.write(output / design)
        finally:
            server.stop()
        rate = DECODE.answer_tokens / run.answers.duration_s
        print(
            f"{design}: {run.stages[0].launches:.0f} forwards a stage, {rate:.0f} tokens/s, "
            f"load of the machine {run.load_average:.1f}",
            flush=True,
        )


def draw(recorded: Path, picture: Path, heading: str) -> int:
    command = ["timeline", recorded / OURS, "--against", recorded / UPSTREAM]
    words = [*map(str, command), "--heading", heading, "--output", str(picture)]
    print(f"python -m sglang_npu_pp {shlex.join(words)}\n", flush=True)
    return command_line(words)


def main() -> int:
    options = parse_command_line()
    reason = "--link none" if options.link == "none" else reason_for_loopback()
    delay_ms = 0.0 if reason else options.delay
    setting = Setting(delay_ms, options.pad, options.depth)
    logs = new_folder(ROOT / ".run", "pipelines")
    if reason:
        print(f"Two nodes on loopback, without delays: {reason}.")
    try:
        with nullcontext(Loopback()) if reason else EmulatedLink(logs) as link:
            record(setting, link, options.model_path or for_cpu(), logs, options.folder)
            heading = setting.sentence(link)
    except (ServerError, LinkError, LoadError, OSError) as error:
        print(f"{error.reason if isinstance(error, ServerError) else error}\nLogs: {logs}", file=sys.stderr)
        return 1
    shutil.rmtree(logs)
    return draw(options.folder, options.output, heading)


def parse_command_line() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="pipelines", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--output", type=Path, default=ROOT / "docs/pipelines.svg", help="(docs/pipelines.svg)")
    add("--folder", type=Path, default=ROOT / ".run/recorded", help="for the traces (.run/recorded)")
    add("--delay", type=float, default=1.0, metavar="MS", help="one way (1)")
    add("--pad", type=float, default=20.0, metavar="MS", help="a forward takes at least so long (20)")
    add("--depth", type=int, default=0, help="--pp-async-batch-depth of both servers (0)")
    add("--link", choices=("auto", "none"), default="auto", help="none: loopback")
    add("--model-path", type=Path, help="(a random Qwen3-VL of 4 layers, width 384)")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
