"""What one run of certify does, checked before a server starts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from .speed import Load

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
_NODES = ("--nnodes",)
_ROLE = ("--disaggregation-mode",)


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


def value_of(arguments: Sequence[str], names: Sequence[str]) -> str | None:
    """The last value of an option, given as `--name value` or `--name=value`; None where it is not given."""
    found = None
    for place, argument in enumerate(arguments):
        name, equals, value = argument.partition("=")
        if name in names:
            found = value if equals else (arguments[place + 1] if place + 1 < len(arguments) else "")
    return found


def complete(arguments: Sequence[str]) -> tuple[str, ...]:
    """With a model, where the user names none.

    Raises:
        ValueError: certify does not work with such a server (yet); one sentence.
    """
    if value_of(arguments, _MODEL) is None:
        arguments = (*MODEL_ARGUMENTS, *arguments)
    stages = value_of(arguments, _STAGES)
    if value_of(arguments, ("--config",)) is None and (stages is None or stages == "1"):
        raise ValueError(
            "certify: a server of one stage has nothing to compare; give --pp-size 2 or more behind the --."
        )
    if (value_of(arguments, _NODES) or "1") != "1":
        raise ValueError(
            "certify does not work over several nodes yet; run it with one node, and `doctor --listen` and "
            "`doctor --peer` for the link."
        )
    if (value_of(arguments, _ROLE) or "null") != "null":
        raise ValueError(
            "certify does not start prefill and decode servers yet; leave out --disaggregation-mode."
        )
    return tuple(arguments)
