"""Speed of a running server, by SGLang's own load generator (`python -m sglang.bench_serving`).

Its options used here are the same in 0.5.13.post1 to 0.5.23. The default data set, `random-ids`, needs no
network: ids below the size of the tokenizer's vocabulary, sent as ids, so that all lengths are exact.
"""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import tempfile
import urllib.parse
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...errors import PipelineError
from .processes import start
from .results import Latency, Side, Speed

GENERATOR = "sglang.bench_serving"
RANDOM_IDS = "random-ids"
LIMIT_S = 900.0
_WARM_UP = 4  # requests, at most
_LAST_LINES = 6
_NO_LIMIT = math.inf


class SpeedError(PipelineError):
    """The load generator failed, took too long, or wrote something else; with its last lines."""


@dataclass(frozen=True)
class Load:
    """What is asked of a server. Lengths in tokens; `more`: options of the load generator, which win."""

    input_tokens: int = 1024
    output_tokens: int = 128
    prompts: int = 64
    concurrency: int | None = None  # requests at a time, at most; None: no limit
    rate: float = _NO_LIMIT  # requests per second
    dataset: str = RANDOM_IDS
    more: tuple[str, ...] = ()
    seed: int = 1

    def __post_init__(self) -> None:
        """Raises ValueError for what the load generator could not do."""
        counts = (self.input_tokens, self.output_tokens, self.prompts, self.concurrency or 1)
        if min(counts) < 1 or not self.rate > 0:
            raise ValueError("Lengths, number of prompts, concurrency and rate of a load are above 0.")

    def __str__(self) -> str:
        lengths = f" of {self.input_tokens} tokens, {self.output_tokens} to generate each"
        parts = [
            f"{self.prompts} requests, {self.dataset}{lengths if self.dataset.startswith('random') else ''}",
            "all at once" if self.rate == _NO_LIMIT else f"{self.rate:g} a second",
        ]
        if self.concurrency is not None:
            parts.append(f"at most {self.concurrency} at a time")
        return ", ".join([*parts, *([" ".join(self.more)] if self.more else [])])


@dataclass(frozen=True)
class Served:
    """A running server: base URL, the model as it was given to it, and what a client needs to be let in."""

    url: str
    model: str
    tokenizer: str | None = None
    api_key: str | None = None
    environ: Mapping[str, str] | None = None  # of the load generator; None: of this process


def command(load: Load, served: Served, output: Path) -> list[str]:
    """The command line; one JSON line is appended to `output`."""
    parts = [sys.executable, "-m", GENERATOR, "--backend", "sglang", "--base-url", served.url]
    parts += ["--model", served.model, "--tokenizer", served.tokenizer or served.model]
    parts += ["--dataset-name", load.dataset, "--num-prompts", str(load.prompts)]
    parts += ["--random-input-len", str(load.input_tokens), "--random-output-len", str(load.output_tokens)]
    parts += ["--random-range-ratio", "1.0", "--request-rate", f"{load.rate:g}", "--seed", str(load.seed)]
    if load.dataset == RANDOM_IDS:
        parts.append("--tokenize-prompt")
    if load.concurrency is not None:
        parts += ["--max-concurrency", str(load.concurrency)]
    parts += ["--warmup-requests", str(min(_WARM_UP, load.prompts)), "--flush-cache", "--disable-tqdm"]
    return [*parts, "--output-file", str(output), "--output-details", *load.more]


def measure(load: Load, served: Served, side: Side, turn: int, limit_s: float = LIMIT_S) -> Speed:
    """Run the load once. Raises SpeedError."""
    with tempfile.TemporaryDirectory(prefix="sglang-npu-pp-speed-") as folder:
        output = Path(folder) / "speed.jsonl"
        said = _run(command(load, served, output), _environment(load, served), Path(folder), limit_s)
        if not output.is_file():
            raise SpeedError(f"The load generator wrote no result.{_ending(said)}")
        return read(output, side, turn, str(load))


def read(output: Path, side: Side, turn: int, load: str = "") -> Speed:
    """The last line of a file of the load generator. Raises SpeedError for failed requests, too."""
    try:
        found: Mapping[str, Any] = json.loads(output.read_text().splitlines()[-1])
        speed = Speed(
            side=side,
            round=turn,
            completed=int(found["completed"]),
            requests_per_s=float(found["request_throughput"]),
            output_tokens_per_s=float(found["output_throughput"]),
            total_tokens_per_s=float(found["total_throughput"]),
            ttft_ms=_latency(found, "ttft"),
            tpot_ms=_latency(found, "tpot"),
            itl_ms=_latency(found, "itl"),
            load=load,
        )
    except (OSError, ValueError, IndexError) as error:
        raise SpeedError(f"The result of the load generator cannot be read ({error}).") from None
    except (KeyError, TypeError) as error:
        raise SpeedError(f"The load generator of this SGLang gives no {error}, or not as a number.") from None
    _check(found, speed)
    return speed


def _latency(found: Mapping[str, Any], name: str) -> Latency:
    mean, median, p99 = (float(found[f"{kind}_{name}_ms"]) for kind in ("mean", "median", "p99"))
    return Latency(mean, median, p99)


def _check(found: Mapping[str, Any], speed: Speed) -> None:
    """A speed of failed requests, or without any, is none."""
    errors = [str(each) for each in found.get("errors") or () if each]
    if errors:
        asked = speed.completed + len(errors)
        raise SpeedError(f"{len(errors)} of {asked} requests failed.{_ending(errors[0])}")
    values = (speed.output_tokens_per_s, speed.ttft_ms.median, speed.tpot_ms.median, speed.itl_ms.median)
    if speed.completed < 1 or not all(map(math.isfinite, values)):
        raise SpeedError(
            f"{speed.completed} requests were completed, without times that could be compared; ask for more, "
            "or for longer answers."
        )


# --- the process -----------------------------------------------------------------------------------


def _environment(load: Load, served: Served) -> dict[str, str]:
    """Without this package, without a proxy to the server, and without a network that is not needed."""
    environ = dict(os.environ if served.environ is None else served.environ)
    environ["SGLANG_NPU_PP"] = "0"
    environ["PYTHONUNBUFFERED"] = "1"  # last lines of a process that is killed
    host = urllib.parse.urlsplit(served.url).hostname or "localhost"
    for name in ("no_proxy", "NO_PROXY"):
        environ[name] = ",".join(filter(None, (environ.get(name), host)))
    if load.dataset == RANDOM_IDS and Path(served.tokenizer or served.model).exists():
        environ["HF_HUB_OFFLINE"] = "1"
    environ.pop("OPENAI_API_KEY", None)
    environ.pop("API_KEY", None)
    if served.api_key:
        environ["OPENAI_API_KEY"] = served.api_key  # where the load generator looks for it
    return environ


def _run(arguments: Sequence[str], environ: Mapping[str, str], folder: Path, limit_s: float) -> str:
    """What the process printed. Raises SpeedError; no process is left behind."""
    printed = folder / "printed.txt"
    process = start(arguments, environment=environ, folder=folder, log=printed)
    try:
        code = process.wait(limit_s)
    except subprocess.TimeoutExpired:
        said = printed.read_text(errors="replace")
        sentence = f"The load generator did not end within {limit_s:g} s; ask for less, or allow more time."
        raise SpeedError(f"{sentence}{_ending(said)}") from None
    finally:
        _end(process)
    said = printed.read_text(errors="replace")
    if code:
        raise SpeedError(f"The load generator ended with exit code {code}.{_ending(said)}")
    return said


def _end(process: subprocess.Popen[bytes]) -> None:
    """With its children; nothing where it has ended."""
    if process.poll() is None:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _ending(said: str) -> str:
    """The last lines, below a sentence."""
    lines = [line.rstrip() for line in said.splitlines() if line.strip()][-_LAST_LINES:]
    return "".join(f"\n  {line}" for line in lines)
