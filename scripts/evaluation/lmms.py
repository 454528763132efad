"""Runs lmms_eval 0.7.3 against a server and reads what it wrote.

lmms_eval is a part beside .venv, on PYTHONPATH of its own process only: servers see nothing of it.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scripts.environment.parts import Part

from .pictures import OWN_TASKS, TASKS, write_data_sets
from .recorder import REQUEST_LIMIT_S, Exchange, Recorder
from .results import Layout, Result, Side, Token

PART = Part("accuracy")
OWN_TASKS_ONLY = Path(__file__).with_name("own_tasks_only.py")
FAILURE_MARK = "[LMMS_EVAL_"  # what lmms_eval writes for an answer that it did not get
POLL_S = 0.2


class EvaluationError(RuntimeError):
    """The evaluation could not be run; the message is one sentence."""


@dataclass(frozen=True)
class Target:
    """A server that answers, and how it is to be asked."""

    url: str
    model: str
    layout: Layout | str
    side: Side
    concurrency: int
    headers: Mapping[str, str]
    check_alive: Callable[[], None] = lambda: None
    """Raises when the server has ended."""


def run_tasks(
    tasks: Sequence[str],
    target: Target,
    folder: Path,
    *,
    limit: int | None,
    limit_s: float,
    on_progress: Callable[[int], None] = lambda answered: None,
) -> list[Result]:
    """Run tasks, one result each; the files of lmms_eval lie in `folder` afterwards.

    `limit`: the first so many samples of a task, None for all. `on_progress` gets the number of requests
    answered so far. Tasks of this repository share one process of lmms_eval, any other has its own.

    Raises:
        EvaluationError: lmms_eval failed or took longer than `limit_s`, or wrote no result.
    """
    own = [task for task in tasks if task in OWN_TASKS]
    results = {}
    for group in [own] * bool(own) + [[task] for task in tasks if task not in OWN_TASKS]:
        place = folder / "-".join(group)
        exchanges, seconds = _run_group(group, target, place, limit, limit_s, on_progress)
        samples = {task: read_samples(place, task) for task in group}
        passed = by_task(exchanges, samples)
        for task in group:
            results[task] = read_result(task, target, place, limit, samples[task], passed[task], seconds)
    return [results[task] for task in tasks]


def _run_group(
    tasks: Sequence[str],
    target: Target,
    folder: Path,
    limit: int | None,
    limit_s: float,
    on_progress: Callable[[int], None],
) -> tuple[list[Exchange], float]:
    """Run one lmms_eval to its end: what was exchanged, and the seconds it took."""
    folder.mkdir(parents=True)
    own = set(tasks) <= set(OWN_TASKS)
    if own:
        write_data_sets(folder)
    began = time.monotonic()
    with (
        Recorder(target.url, target.model, target.headers) as recorder,
        (folder / "log").open("wb") as log,
        subprocess.Popen(
            command(tasks, target.concurrency, limit),
            cwd=folder,
            env=environment(recorder.url, folder, offline=own),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
        ) as process,
    ):
        try:
            while process.poll() is None:
                on_progress(len(recorder.exchanges))
                target.check_alive()
                if time.monotonic() - began > limit_s:
                    raise EvaluationError(
                        f"lmms_eval had not finished {', '.join(tasks)} after {limit_s:.0f} s; raise "
                        f"--limit-s or ask for fewer samples with --samples (its log: {folder / 'log'})"
                    )
                time.sleep(POLL_S)
        finally:
            process.kill()
        exchanges = recorder.exchanges
    target.check_alive()
    if process.returncode:
        raise EvaluationError(
            f"lmms_eval ended with exit code {process.returncode} in {', '.join(tasks)}: "
            f"{last_error(folder / 'log')} (its log: {folder / 'log'})"
        )
    return exchanges, time.monotonic() - began


def command(tasks: Sequence[str], concurrency: int, limit: int | None) -> list[str]:
    """The command line of lmms_eval. Nothing is cached: neither --use_cache nor --cache_requests is given."""
    arguments = {
        "model_version": "served",  # the recorder names the model: lmms_eval treats some names differently
        "num_concurrent": concurrency,
        "max_retries": 1,
        "timeout": int(REQUEST_LIMIT_S),
        "httpx_trust_env": False,
    }
    text = ",".join(f"{name}={value}" for name, value in arguments.items())
    program = [str(OWN_TASKS_ONLY)] if set(tasks) <= set(OWN_TASKS) else ["-m", "lmms_eval"]
    line = [sys.executable, *program, "--model", "openai", "--model_args", text]
    line += ["--tasks", ",".join(tasks), "--include_path", str(TASKS), "--batch_size", "1"]
    line += ["--log_samples", "--output_path", "out"]
    return line + (["--limit", str(limit)] if limit is not None else [])


def environment(server: str, folder: Path, *, offline: bool) -> dict[str, str]:
    """Variables of lmms_eval's process. `offline`: data sets come from this machine, not from the hub."""
    own = {
        "PYTHONPATH": os.pathsep.join(filter(None, [str(PART.folder), os.environ.get("PYTHONPATH", "")])),
        "OPENAI_API_BASE": f"{server}/v1",
        "OPENAI_API_KEY": "EMPTY",
        "NO_PROXY": "127.0.0.1",
        "TORCH_DEVICE_BACKEND_AUTOLOAD": "0",  # it computes nothing, and devices belong to the server
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    if offline:
        hub = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(folder / "datasets")}
        return {**os.environ, **own, **hub}
    return {**os.environ, **own}


def read_samples(folder: Path, task: str) -> list[dict[str, Any]]:
    """What lmms_eval logged of every sample."""
    lines = only_file(folder / "out", f"*_samples_{task}.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def read_result(
    task: str,
    target: Target,
    folder: Path,
    limit: int | None,
    samples: Sequence[Mapping[str, Any]],
    exchanges: Sequence[Exchange],
    seconds: float,
) -> Result:
    """Put together what lmms_eval wrote and what passed by."""
    summary = json.loads(only_file(folder / "out", "*_results.json").read_text())
    answers = {str(sample["doc_id"]): raw_answer(sample) for sample in samples}
    available = summary["n-samples"][task]["original"]
    failures = [exchange.error for exchange in exchanges if exchange.error]
    marked = sum(FAILURE_MARK in answer for answer in answers.values())
    return Result(
        task=task,
        layout=str(target.layout),
        side=target.side,
        asked=available if limit is None else min(limit, available),
        ran=len(answers) - marked,
        failed=max(len(failures), marked),
        accuracy=accuracy(summary["results"][task], task),
        answers=answers,
        tokens=by_request(exchanges),
        seconds=seconds,
        errors=tuple(dict.fromkeys(failures)),
    )


def by_task(
    exchanges: Sequence[Exchange], samples: Mapping[str, Sequence[Mapping[str, Any]]]
) -> dict[str, list[Exchange]]:
    """Divide what passed by among the tasks of one run, by the text of the question.

    Raises:
        EvaluationError: a request belongs to no task.
    """
    if len(samples) == 1:
        return {task: list(exchanges) for task in samples}
    questions = {bare(sample["input"]): task for task, logged in samples.items() for sample in logged}
    divided: dict[str, list[Exchange]] = {task: [] for task in samples}
    for exchange in exchanges:
        task = questions.get(bare(exchange.question))
        if task is None:
            raise EvaluationError(f"lmms_eval asked what is in none of its tasks: {exchange.question!r}")
        divided[task].append(exchange)
    return divided


def bare(question: str) -> str:
    """A question without the marks of its pictures, which are not sent as text."""
    return " ".join(re.sub(r"<image( \d+)?>", " ", question).split())


def by_request(exchanges: Sequence[Exchange]) -> dict[str, Sequence[Token]]:
    """Tokens of every answered request; a request that came several times counts as several."""
    seen: Counter[str] = Counter()
    found: dict[str, Sequence[Token]] = {}
    for exchange in exchanges:
        if not exchange.error:
            seen[exchange.request] += 1
            found[f"{exchange.request}#{seen[exchange.request]}"] = exchange.tokens
    return found


def raw_answer(sample: Mapping[str, Any]) -> str:
    """What the server said, before any parsing: MMMU's parser guesses when it finds no letter."""
    answer: Any = sample["filtered_resps"]
    while isinstance(answer, list):
        answer = answer[0]
    return str(answer)


def accuracy(metrics: Mapping[str, Any], task: str) -> float:
    """The task's first metric that is a number: its main one."""
    for name, value in metrics.items():
        if "," in name and "stderr" not in name and isinstance(value, int | float):
            return float(value)
    raise EvaluationError(f"lmms_eval gave no score for {task}")


def only_file(folder: Path, pattern: str) -> Path:
    """The one file of that name below `folder`; lmms_eval ends with exit code 0 when it wrote none, too."""
    found = list(folder.rglob(pattern))
    if len(found) != 1:
        log = folder.parent / "log"
        raise EvaluationError(
            f"lmms_eval wrote {len(found)} files {pattern} instead of one: {last_error(log)} (its log: {log})"
        )
    return found[0]


def last_error(log: Path) -> str:
    """The last line of a log that names an error, that of a traceback if there is one."""
    plain = re.sub(r"\x1b\[[0-9;]*m", "", log.read_text(errors="replace"))  # lmms_eval colours its log
    lines = [line.strip() for line in plain.splitlines() if line.strip()]
    named = [line for line in lines if "Error" in line and not line.startswith(("File", "raise"))]
    raised = [line for line in named if re.match(r"(?!tenacity)[\w.]+: ", line)]
    return (raised or named or lines or ["it said nothing"])[-1]
