"""Measures every layout, unpatched and patched, and puts the report together."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from rich.status import Status

from .checks import check_all
from .direct import TWIN, TWIN_PICTURES, TWIN_TOKENS, ask_pictures, load_weights, served_model
from .lmms import Target, run_tasks
from .pictures import OWN_TASKS, pictures
from .report import Report
from .results import Layout, Result, Side
from .servers import configure, running

ROOT = Path(__file__).parents[2]
SHIPPED_MODEL = ROOT / "scripts/assets/digits_vl"
RANDOM_MODEL = ROOT / "sglang_npu_pp/tools/certify/model"
SHIPPED_FLOOR = 0.97
SIMULATED = "npu-sim"
MATRIX = (Layout(1, 1), Layout(1, 2), Layout(2, 2), Layout(1, 2, SIMULATED))


@dataclass(frozen=True)
class Plan:
    """What is to be measured. `samples`: of each task, None for all; by device, others as "cpu"."""

    model: Path | str = SHIPPED_MODEL
    layouts: Sequence[Layout] = MATRIX
    tasks: Sequence[str] = OWN_TASKS
    samples: Mapping[str, int | None] = field(default_factory=dict)
    floor: float | None = SHIPPED_FLOOR
    twin: Path | None = RANDOM_MODEL
    concurrency: int = 16
    limit_s: float = 3600.0
    server_args: Sequence[str] = ()

    def samples_on(self, device: str) -> int | None:
        return self.samples.get(device, self.samples.get("cpu"))


def measure(plan: Plan, folder: Path, console: Console) -> Report:
    """Every layout of the plan, unpatched and patched, one server at a time.

    Raises:
        ServerError, EvaluationError: a server or lmms_eval failed; the sentence says which.
    """
    began = time.monotonic()
    results: list[Result] = []
    for layout in plan.layouts:
        for side in (Side.UNPATCHED, Side.PATCHED):
            place = folder / f"{layout} {side.value}".replace(" ", "-")
            results += measure_server(plan, layout, side, place, console)
    return Report(
        model=Path(plan.model).name,
        results=results,
        findings=check_all(results, plan.floor),
        floor=plan.floor,
        seconds=time.monotonic() - began,
        notes=notes(plan),
    )


def measure_server(plan: Plan, layout: Layout, side: Side, folder: Path, console: Console) -> list[Result]:
    """All tasks, and the twin, on one server."""
    server = configure(plan.model, layout, side, folder / "server.log", args=plan.server_args)
    with console.status(f"{layout}, {side.value}") as status:

        def starting(stage: str, elapsed_s: float) -> None:
            status.update(f"{layout}, {side.value}: starting, {stage} {elapsed_s:.0f} s")

        began = time.monotonic()
        with running(server, layout, side, plan.concurrency, starting) as target:
            started_s = time.monotonic() - began
            results = ask_tasks(plan, target, folder, status, plan.samples_on(layout.device))
            if plan.twin is not None:
                status.update(f"{layout}, {side.value}: random weights")
                results.append(ask_twin(plan.twin, target))
        took = ", ".join(f"{result.task} {result.ran}/{result.asked}" for result in results)
        console.print(
            f"  {layout}, {side.value}: started in {started_s:.0f} s, asked in "
            f"{time.monotonic() - began - started_s:.0f} s: {took}",
            highlight=False,
        )
    return results


def measure_url(plan: Plan, url: str, headers: Mapping[str, str], folder: Path, console: Console) -> Report:
    """All tasks on a server that somebody else has started: there is nothing to compare with.

    Raises:
        EvaluationError: no server answers, or lmms_eval failed.
    """
    began = time.monotonic()
    target = Target(url, served_model(url, dict(headers)), url, Side.GIVEN, plan.concurrency, headers)
    with console.status(url) as status:
        results = ask_tasks(plan, target, folder, status, plan.samples_on("cpu"))
    note = "One server was measured as it is: nothing was compared with an unpatched one."
    return Report(
        model=target.model,
        results=results,
        findings=check_all(results, plan.floor),
        floor=plan.floor,
        seconds=time.monotonic() - began,
        notes=[note, *notes(plan)],
    )


def ask_tasks(plan: Plan, target: Target, folder: Path, status: Status, samples: int | None) -> list[Result]:
    def answered(number: int) -> None:
        status.update(f"{target.layout}, {target.side.value}: lmms_eval, {number} requests answered")

    return run_tasks(
        plan.tasks,
        target,
        folder / "lmms_eval",
        limit=samples,
        limit_s=plan.limit_s,
        on_progress=answered,
    )


def ask_twin(model: Path, target: Target) -> Result:
    """The random-weight model, put into the running server: the weights change, nothing else."""
    load_weights(target, model)
    return ask_pictures(TWIN, target, pictures(TWIN_PICTURES), tokens=TWIN_TOKENS, whole=True)


def notes(plan: Plan) -> list[str]:
    """What a reader of the table must know."""
    said = []
    if set(plan.tasks) & set(OWN_TASKS):
        said.append(
            "digits_plain and digits_lettered: scikit-learn's scanned digits, the second through lmms_eval's "
            "MMMU code; neither is MMMU."
        )
    if any(layout.device == SIMULATED for layout in plan.layouts):
        said.append("npu-sim is the simulated Ascend: real torch_npu, simulated CANN, no real kernels.")
    if plan.twin is not None:
        said.append(f"{TWIN}: the same server with random weights; it has no right answers.")
    return said
