"""Does the plugin change what a model answers? Run lmms_eval unpatched and patched, and compare.

scripts/accuracy.py                        the shipped model: tp1 pp1, tp1 pp2, tp2 pp2, simulated Ascend
scripts/accuracy.py --quick --json FILE    the same with fewer questions, at most 10 minutes
scripts/accuracy.py --self-test            plant faults between two stages: each must turn the gate red
scripts/accuracy.py --base-url http://HOST:PORT     one server that runs already; nothing is compared
scripts/accuracy.py --model-path Qwen/Qwen3-VL-8B-Instruct --tp 2 --pp 2 --tasks mmmu_val
                                           on a real machine; what follows -- goes to SGLang

Ends with 0 when the gate is green, 1 when it is red, 2 when it could not be run.
"""

import argparse
import os
import shutil
import signal
import sys
from pathlib import Path
from types import FrameType

import requests
from rich.console import Console

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # as a script, only its own folder would be on the path

from rig.devices import DEVICES  # noqa: E402
from rig.folders import new_folder  # noqa: E402
from rig.server import ServerError  # noqa: E402
from scripts.environment.parts import PartError, provide  # noqa: E402
from scripts.evaluation import gate, lmms, selftest  # noqa: E402
from scripts.evaluation.pictures import OWN_TASKS  # noqa: E402
from scripts.evaluation.report import show, to_json, write_json  # noqa: E402
from scripts.evaluation.results import Layout  # noqa: E402
from scripts.output import plain_console  # noqa: E402

# Questions of each task; the simulated Ascend computes slowly.
QUICK = {"cpu": 100, gate.SIMULATED: 40}
FULL = {"cpu": None, gate.SIMULATED: 100}
EXIT_RED, EXIT_NOT_RUN = 1, 2


def main() -> int:
    options, server_args = parse_command_line(sys.argv[1:])
    signal.signal(signal.SIGTERM, end_like_ctrl_c)
    signal.signal(signal.SIGHUP, end_like_ctrl_c)
    folder = new_folder(options.logs, "accuracy")
    console = plain_console()
    try:
        green = evaluate(options, server_args, folder, console)
    except (
        ServerError,
        lmms.EvaluationError,
        PartError,
        OSError,
        requests.RequestException,
        ValueError,
    ) as error:
        sentence = error.reason if isinstance(error, ServerError) else str(error)
        Console(stderr=True, highlight=False).print(f"accuracy: {sentence}", markup=False, soft_wrap=True)
        return EXIT_NOT_RUN
    except KeyboardInterrupt:
        return 130
    if not green:
        console.print(f"Logs and samples: {folder}", soft_wrap=True)
        return EXIT_RED
    shutil.rmtree(folder)
    return 0


def parse_command_line(arguments: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """Split at the first `--`: our options before it, SGLang's flags after it."""
    split = arguments.index("--") if "--" in arguments else len(arguments)
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="fewer questions")
    parser.add_argument("--self-test", action="store_true", help="does the gate notice planted faults?")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the report there as well")
    parser.add_argument("--model-path", help="model directory, or name on the hub (the shipped model)")
    parser.add_argument("--tasks", help="lmms_eval's tasks, with commas (those of this repository)")
    parser.add_argument("--tp", type=int, help="tensor-parallel size; one layout instead of four")
    parser.add_argument("--pp", type=int, help="pipeline-parallel size; one layout instead of four")
    parser.add_argument("--device", choices=list(DEVICES), help="cpu; with --model-path what SGLang finds")
    parser.add_argument("--base-url", metavar="URL", help="measure this server, start none (no /v1)")
    parser.add_argument("--samples", type=int, help="questions of each task, the first so many")
    parser.add_argument("--floor", type=float, help="lowest good accuracy (0.97 for the shipped model)")
    parser.add_argument("--concurrency", type=int, default=16, help="requests at a time (16)")
    parser.add_argument(
        "--logs", type=Path, default=ROOT / ".run", help="where they lie, unless green (.run)"
    )
    parser.add_argument("--limit-s", type=float, default=4 * 3600, help="longest run of one lmms_eval")
    options = parser.parse_args(arguments[:split])
    for name in ("tp", "pp", "samples", "concurrency"):
        value = getattr(options, name)
        if value is not None and value < 1:
            parser.error(f"--{name} must be at least 1")
    if options.base_url and (options.model_path or options.tp or options.pp or options.device):
        parser.error("--base-url measures a server as it is: --model-path, --tp, --pp and --device start one")
    return options, arguments[split + 1 :]


def evaluate(options: argparse.Namespace, server_args: list[str], folder: Path, console: Console) -> bool:
    """Run what was asked for, show it, and return whether the gate is green (self-test: whether it works)."""
    if options.self_test:
        outcome = selftest.run(folder, console)
        if options.json:
            write_json(selftest.to_json(outcome), options.json)
        return outcome.passed
    provide(lmms.PART.name)
    plan = plan_of(options, server_args)
    if options.base_url:
        url = options.base_url.rstrip("/").removesuffix("/v1")
        report = gate.measure_url(plan, url, authorization(), folder, console)
    else:
        report = gate.measure(plan, folder, console)
    show(report, console)
    if options.json:
        write_json(to_json(report), options.json)
    return report.green


def plan_of(options: argparse.Namespace, server_args: list[str]) -> gate.Plan:
    """The options in the terms of the gate.

    A model of the user's has no twin of ours and no floor; nor has a number of questions of the user's, for
    the shipped model's floor is that of the whole test set (and holds for its first 100).
    """
    shipped = options.model_path is None and options.base_url is None
    device = options.device or ("cpu" if shipped else "auto")
    layouts: tuple[Layout, ...] = gate.MATRIX
    if options.tp or options.pp or options.device or not shipped:
        layouts = (Layout(options.tp or 1, options.pp or 2, device),)
    samples = QUICK if options.quick else FULL if shipped else {}
    if options.samples is not None:
        samples = {"cpu": options.samples}
    floor = options.floor
    if floor is None and shipped and options.samples is None:
        floor = gate.SHIPPED_FLOOR
    return gate.Plan(
        model=options.model_path or gate.SHIPPED_MODEL,
        layouts=layouts,
        tasks=tuple(options.tasks.split(",")) if options.tasks else OWN_TASKS,
        samples=samples,
        floor=floor,
        twin=gate.RANDOM_MODEL if shipped and not DEVICES[device].real else None,
        concurrency=options.concurrency,
        limit_s=options.limit_s,
        server_args=server_args,
    )


def authorization() -> dict[str, str]:
    """For a server that wants a key: the one that lmms_eval's users set."""
    key = os.environ.get("OPENAI_API_KEY")
    return {"Authorization": f"Bearer {key}"} if key else {}


def end_like_ctrl_c(_number: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())
