"""What one run of certify does, checked before a server starts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from .arguments import option

if TYPE_CHECKING:
    from .speed import Load  # with psutil, which other commands of this package do not need

MODEL = Path(__file__).with_name("model")

# For the shipped model, on any device. In float32 an answer does not depend on the company of a request;
# chunks of 256 tokens force chunked prefill for the longer prompts.
MODEL_ARGUMENTS = (
    *("--model-path", str(MODEL)),
    *("--dtype", "float32"),
    *("--chunked-prefill-size", "256"),
    *("--max-total-tokens", "16384"),
    *("--mem-fraction-static", "0.3"),
)
_MODEL = ("--model-path", "--model", "--config")
_STAGES = ("--pp-size", "--pipeline-parallel-size")


@dataclass(frozen=True)
class Plan:
    """What is done. `arguments` are complete: those of the user behind those of the shipped model."""

    arguments: tuple[str, ...]
    rounds: int
    faults: bool
    switches: bool
    output: Path
    reference: Path | None
    start_limit_s: float
    speed: Load | None  # None: no speed is measured


def complete(arguments: Sequence[str]) -> tuple[str, ...]:
    """With a model, where the user names none.

    Raises:
        ValueError: certify does not work with such a server (yet); one sentence.
    """
    if option(arguments, *_MODEL) is None:
        arguments = (*MODEL_ARGUMENTS, *arguments)
    stages = option(arguments, *_STAGES)
    if option(arguments, "--config") is None and (stages is None or stages == "1"):
        raise ValueError(
            "certify: a server of one stage has nothing to compare; give --pp-size 2 or more behind the --."
        )
    if (option(arguments, "--nnodes") or "1") != "1":
        raise ValueError(
            "certify does not work over several nodes yet; run it with one node, and `doctor --listen` and "
            "`doctor --peer` for the link."
        )
    if (option(arguments, "--disaggregation-mode") or "null") != "null":
        raise ValueError(
            "certify does not start prefill and decode servers yet; leave out --disaggregation-mode."
        )
    return tuple(arguments)
