"""Advice on `--pp-async-batch-depth`: the depth that hides the link between stages, and its cost.

Derivation and limits in docs/measuring.md. With S = pp_size + depth slots,

    round  = forwards of all stages + hops, back to stage 0 included + host work of stage 0 behind its tokens
    period = max(work of the slowest stage, round / S)

and the link is hidden when round / S is not the larger.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

HIDDEN = 0.02
"""What may be left of the link, as a part of the period, for us to call it hidden."""


@dataclass(frozen=True)
class StageTimes:
    """One stage's part of an iteration, in seconds."""

    forward_s: float  # one forward, on the device where there is one
    host_s: float  # the scheduler's work between two launches, without its waits
    hop_s: float  # one way to the next stage; of the last stage, to stage 0
    asynchronous: bool = False  # the host works while the forward runs
    turn_s: float | None = None  # of `host_s`, what comes between arrival of tokens and launch; None: all

    @property
    def in_round_s(self) -> float:
        """Host work that a round of this stage contains; the rest comes while messages travel."""
        return self.host_s if self.turn_s is None else self.turn_s

    @property
    def work_s(self) -> float:
        return max(self.forward_s, self.host_s) if self.asynchronous else self.forward_s + self.host_s


def round_s(stages: Sequence[StageTimes]) -> float:
    """Seconds between two launches of a slot on stage 0; `stages` in order."""
    return sum(stage.forward_s + stage.hop_s for stage in stages) + stages[0].in_round_s


def shortest_period_s(stages: Sequence[StageTimes]) -> float:
    """Lower bound of an iteration at any depth, in seconds."""
    return max(stage.work_s for stage in stages)


def period_s(stages: Sequence[StageTimes], depth: int) -> float:
    """Seconds of an iteration with all slots busy."""
    return max(shortest_period_s(stages), round_s(stages) / (len(stages) + depth))


def is_hidden(stages: Sequence[StageTimes], depth: int) -> bool:
    """Whether the slowest stage waits for at most `HIDDEN` of an iteration."""
    return shortest_period_s(stages) >= (1 - HIDDEN) * period_s(stages, depth)


def needed_depth(stages: Sequence[StageTimes]) -> int:
    """The smallest depth that hides the link."""
    slots = math.ceil((1 - HIDDEN) * round_s(stages) / shortest_period_s(stages) - 1e-9)
    return max(0, slots - len(stages))


def microbatch_size(max_requests: int, slots: int, limit: int | None) -> int:
    """Requests of a microbatch when `slots` share `max_requests`: at least 1, at most `limit`
    (--pp-max-micro-batch-size, None if unset)."""
    return max(1, min(max_requests // slots, limit or max_requests))


def advise(
    measured: Mapping[str, Sequence[StageTimes]],
    *,
    depth: int,
    max_requests: int,
    limit: int | None,
    proxy_bytes: int,
) -> str:
    """Advice for the operator, in a few sentences.

    `measured`: stages in order, for "prefill", "decode" or both. `depth`: the present one. `max_requests`:
    running requests of all slots. `proxy_bytes`: the largest proxy message.
    """
    stages = next(iter(measured.values()))
    hops = _milliseconds(stage.hop_s for stage in stages)
    forwards = _each(measured, lambda times: _milliseconds(stage.forward_s for stage in times))
    begin = f"{len(stages)} stages, hops of {hops} one way, forwards of {forwards}: "
    needed = {kind: needed_depth(times) for kind, times in measured.items()}
    depths = sorted({depth, *needed.values()})
    sizes = {at: microbatch_size(max_requests, len(stages) + at, limit) for at in depths}
    exposed = {kind: times for kind, times in measured.items() if not is_hidden(times, depth)}
    what = "the link and the scheduler of stage 0" if stages[0].asynchronous else "the link"
    if not exposed:
        return (
            f"{begin}--pp-async-batch-depth {depth} hides {what}{_less(max(needed.values()), depth, sizes)}"
        )
    waited = _each(exposed, lambda times: _waited(times, depth))
    would = _each(exposed, lambda times: str(needed_depth(times)))
    sentences = [
        f"{begin}{waited} of an iteration go into waiting for {what}",
        f"--pp-async-batch-depth {would} would hide it",
        _cost({needed[kind] for kind in exposed}, depth, sizes),
    ]
    if "decode" in exposed:
        sentences.append(
            "decoding gains only if more requests may run (--max-running-requests) or a forward with fewer "
            "of them is shorter"
        )
    sentences.append(f"the time that bytes need is not in this, a proxy has up to {_bytes(proxy_bytes)}")
    return "; ".join(sentences)


def _each(measured: Mapping[str, Sequence[StageTimes]], say: Callable[[Sequence[StageTimes]], str]) -> str:
    """For example "30 ms (prefill) and 9 ms (decode)"."""
    return " and ".join(f"{say(times)} ({kind})" for kind, times in measured.items())


def _waited(stages: Sequence[StageTimes], depth: int) -> str:
    period = period_s(stages, depth)
    return f"{1e3 * (period - shortest_period_s(stages)):.1f} of {1e3 * period:.1f} ms"


def _less(needed: int, depth: int, sizes: Mapping[int, int]) -> str:
    """Whether a smaller depth is enough, as a sentence or ""."""
    if needed >= depth:
        return ""
    return f", and {needed} would, with {sizes[needed]} instead of {sizes[depth]} requests a microbatch"


def _cost(depths: Iterable[int], depth: int, sizes: Mapping[int, int]) -> str:
    shrunk = [at for at in sorted(depths) if sizes[at] != sizes[depth]]
    if not shrunk:
        return f"a microbatch holds at most {sizes[depth]} requests as before"
    then = ", ".join(f"{sizes[at]} at depth {at}" for at in shrunk)
    return (
        f"a full microbatch then holds {then} instead of {sizes[depth]} requests (set "
        "--pp-max-micro-batch-size to it, or the first slots take all)"
    )


def _milliseconds(seconds: Iterable[float]) -> str:
    values = [1e3 * value for value in seconds]
    low, high = f"{min(values):.3g}", f"{max(values):.3g}"
    return f"{low} ms" if max(values) <= 1.1 * min(values) else f"{low} to {high} ms"


def _bytes(count: int) -> str:
    return f"{count / 2**20:.1f} MiB" if count >= 1 << 20 else f"{count / 2**10:.1f} KiB"
