"""Serve the tiny Qwen3-VL of this repository, ask it which digit a picture shows.

scripts/serve.py                          serve until Ctrl-C, after one question
scripts/serve.py --demo                   end after the answer: 0 if it is right, 1 if not
scripts/serve.py --device npu-sim         on the simulated Ascend: SGLang's NPU path and the real torch_npu
scripts/serve.py --device npu-sim --eager the same without graphs in decode
scripts/serve.py --pp 4 -- --log-level debug    what follows -- goes to SGLang
"""

import argparse
import base64
import shutil
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path
from types import FrameType

import requests
from PIL import Image
from rich.console import Console

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # as a script, only its own folder would be on the path

from rig.devices import DEVICES, EAGER  # noqa: E402
from rig.server import READY, TELEMETRY_DIR_VARIABLE, Server, ServerError  # noqa: E402
from sglang_npu_pp.tools.certify.ports import free_ports  # noqa: E402

ASSETS = ROOT / "scripts" / "assets"
QUESTION = "which digit is shown in the image?\nanswer with a single digit."  # as it was trained
POLL_S = 0.5
START_LIMIT_S = 600.0

console = Console(highlight=False)


def main() -> int:
    options, sglang_args = parse_command_line(sys.argv[1:])
    signal.signal(signal.SIGTERM, end_like_ctrl_c)
    signal.signal(signal.SIGHUP, end_like_ctrl_c)
    try:
        return serve(options, sglang_args)
    except ServerError as error:
        return report_failure(error.reason)
    except (requests.RequestException, OSError, ValueError) as error:
        return report_failure(f"{type(error).__name__}: {error}")
    except KeyboardInterrupt:
        return 130


def parse_command_line(arguments: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """Split at the first `--`: our options before it, SGLang's flags after it."""
    split = arguments.index("--") if "--" in arguments else len(arguments)
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tp", type=int, default=2, help="tensor-parallel size (2)")
    parser.add_argument("--pp", type=int, default=2, help="pipeline-parallel size (2)")
    parser.add_argument("--device", choices=list(DEVICES), default="cpu", help="what it runs on (cpu)")
    parser.add_argument("--model", type=Path, default=ASSETS / "digits_vl", help="model directory")
    parser.add_argument("--port", type=int, help="HTTP port on loopback (any free one)")
    parser.add_argument(
        "--image",
        type=Path,
        default=ASSETS / "digits" / "0_2.png",
        help="picture to ask about, named <anything>_<digit>.png",
    )
    parser.add_argument("--unpatched", action="store_true", help="SGLang as it is: SGLANG_NPU_PP=0")
    parser.add_argument("--eager", action="store_true", help="decode without graphs")
    parser.add_argument("--demo", action="store_true", help="end after the answer")
    options = parser.parse_args(arguments[:split])
    if options.tp < 1 or options.pp < 1:
        parser.error("--tp and --pp must be at least 1")
    if not options.image.is_file():
        parser.error(f"there is no picture {options.image}")
    return options, arguments[split + 1 :]


def serve(options: argparse.Namespace, sglang_args: list[str]) -> int:
    """Start the server, ask, show the table; with --demo return, else wait for Ctrl-C.

    The server's log and telemetry lie in .run/<port> while it runs, and stay there when something failed.
    """
    port = options.port or free_ports(1)[0]
    folder = ROOT / ".run" / str(port)
    telemetry = folder / "telemetry"
    shutil.rmtree(telemetry, ignore_errors=True)  # of a server that failed at this port
    telemetry.mkdir(parents=True)
    server = Server(
        options.model,
        options.tp,
        options.pp,
        log=folder / "serve.log",
        device=options.device,
        env={"SGLANG_NPU_PP": "0"} if options.unpatched else {TELEMETRY_DIR_VARIABLE: str(telemetry)},
        args=[*(EAGER if options.eager else ()), *sglang_args],
        port=port,
    )
    patched = "without the patch" if options.unpatched else "with the patch"
    where = DEVICES[options.device].title
    console.print(f"Starting SGLang on {where}, tp {options.tp} pp {options.pp}, {patched}:\n")
    console.print(server.shell_command(), style="dim", soft_wrap=True)
    console.print()
    try:
        server.start()
        wait_with_progress(server)
        right = ask(server, options.image)
        if not options.unpatched:
            show_telemetry(server, telemetry)
        if not options.demo:
            console.print(f"\nListening at [bold]{server.url}[/bold] (log: {server.log}).")
            console.print("Ctrl-C stops it.")
            wait_for_ctrl_c(server)
    finally:
        with console.status("stopping"):
            server.stop()
        console.print("Stopped.")
    if options.demo and not right:
        return 1
    shutil.rmtree(folder)
    return 0


def wait_with_progress(server: Server) -> None:
    """One line per finished stage, and a moving one for the current stage."""
    current, begin_s = "", 0.0

    with console.status("") as status:

        def show(stage: str, elapsed_s: float) -> None:
            nonlocal current, begin_s
            if stage != current:
                if current:
                    console.print(f"  {current:<14}{elapsed_s - begin_s:6.1f} s")
                current, begin_s = stage, elapsed_s
            status.update(f"{stage} ... {elapsed_s:.0f} s")

        total_s = server.wait_ready(START_LIMIT_S, show)
    console.print(f"  {READY:<14}{total_s:6.1f} s after the start\n")


def ask(server: Server, picture: Path) -> bool:
    """Send the picture through the OpenAI API, show the answer; return whether it is right."""
    expected = picture.stem.rpartition("_")[2]
    show_picture(picture)
    encoded = base64.b64encode(picture.read_bytes()).decode()
    content = [
        {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{encoded}"}},
        {"type": "text", "text": QUESTION},
    ]
    request = {
        "model": "default",
        "messages": [{"role": "user", "content": content}],
        "temperature": 0,
        "max_tokens": 8,
    }
    begin = time.monotonic()
    response = server.post("/v1/chat/completions", request)
    elapsed_ms = 1e3 * (time.monotonic() - begin)
    if response.status_code != requests.codes.ok:
        raise ServerError(f"SGLang answered HTTP {response.status_code}: {response.text.strip()}")
    answer = response.json()["choices"][0]["message"]["content"]
    first_line, second_line = QUESTION.splitlines()
    console.print(f"\nAsked:    {first_line} {second_line}")
    console.print(f"Answered: [bold]{answer}[/bold]   ({elapsed_ms:.0f} ms)")
    if answer.strip() == expected:
        console.print(f"Expected: {expected}   [green]right[/green]")
        return True
    console.print(f"Expected: {expected}   [red]wrong[/red]: the model should know this picture")
    return False


def show_picture(picture: Path, columns: int = 16, rows: int = 8) -> None:
    """Print the picture as shaded character cells (a cell is about twice as high as wide)."""
    shades = " .:-=+*#%@"
    with Image.open(picture) as image:
        gray = image.convert("L").resize((columns, rows)).tobytes()
    console.print(f"{picture.name}:")
    for row in range(rows):
        cells = gray[row * columns : (row + 1) * columns]
        console.print("  " + "".join(shades[cell * len(shades) // 256] for cell in cells))


def show_telemetry(server: Server, folder: Path) -> None:
    """Print where each stage's scheduler spent its time since the start."""
    from sglang_npu_pp.observe.telemetry import read_snapshots, render_table

    server.dump_telemetry()
    console.print("\nWhere the time of each stage went, since the start of the server:\n")
    console.print(render_table(read_snapshots(folder)), soft_wrap=True)


def wait_for_ctrl_c(server: Server) -> None:
    """Return on Ctrl-C; raise `ServerError` when the server dies before."""
    with suppress(KeyboardInterrupt):
        while True:
            server.check_alive("while it was serving")
            time.sleep(POLL_S)


def report_failure(sentence: str) -> int:
    Console(stderr=True, highlight=False).print(f"serve: {sentence}", markup=False, soft_wrap=True)
    return 1


def end_like_ctrl_c(_number: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())
