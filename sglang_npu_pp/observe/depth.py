"""Which `--pp-async-batch-depth` would hide the link between the stages, and what it would cost.

How the loop runs. Stage 0 launches the forward of iteration i and then waits for the outputs of the
microbatch that has been under way longest, iteration i + 1 - S, where S = pp_size + depth is the number of
slots. Only behind that does it schedule the same slot again. Every other wait is weaker: a later stage
waits for its proxies as the last thing before its forward, their request list has left before them (by a
forward, in which it does its own host work), and its wait for outputs begins behind what stage 0 waits for.
So beside the work of the slowest stage one thing limits how long an iteration takes, a round of stage 0,

    round = forwards of all stages + hops, the one back to stage 0 included + host work of stage 0

in which S iterations fit:

    period = max(work of the slowest stage, round / S)

The link is hidden when the second is not the larger one. With equal stages T, equal hops L and no host work
that is depth * T >= pp_size * L: a depth of d covers a one-way latency of d * T / pp_size. Stages that
differ need less, because the slowest one leaves the others time. Host work between two launches needs less
on CPU, where it keeps the stage busy, and more on a device, where it comes on top of the round.

What a slot costs. All S microbatches share the requests that may run at once, so each holds fewer of them.
In prefill that costs nothing: a chunk has as many tokens as before, and throughput goes as 1 / period. In
decoding a token of every request takes one round, however many slots there are: more of them bring
something only if a forward gets shorter with fewer requests, or if more requests may run.

Measured: hops as half the shortest round trip of a small message on the host lane at start, forwards and
host work by `stage_times.py`. Not measured: the time that the bytes of a proxy need, the latency of the
device lane, and how a forward changes with fewer requests.
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

    @property
    def work_s(self) -> float:
        return max(self.forward_s, self.host_s) if self.asynchronous else self.forward_s + self.host_s


def round_s(stages: Sequence[StageTimes]) -> float:
    """Seconds from a launch of stage 0 until it can launch the same slot again; `stages` in order."""
    return sum(stage.forward_s + stage.hop_s for stage in stages) + stages[0].host_s


def shortest_period_s(stages: Sequence[StageTimes]) -> float:
    """Seconds that an iteration takes at any depth: the work of the slowest stage."""
    return max(stage.work_s for stage in stages)


def period_s(stages: Sequence[StageTimes], depth: int) -> float:
    """Seconds that an iteration takes when all slots are busy."""
    return max(shortest_period_s(stages), round_s(stages) / (len(stages) + depth))


def is_hidden(stages: Sequence[StageTimes], depth: int) -> bool:
    """Whether the slowest stage waits for at most `HIDDEN` of an iteration."""
    return shortest_period_s(stages) >= (1 - HIDDEN) * period_s(stages, depth)


def needed_depth(stages: Sequence[StageTimes]) -> int:
    """The smallest depth at which the link is hidden."""
    slots = math.ceil((1 - HIDDEN) * round_s(stages) / shortest_period_s(stages) - 1e-9)
    return max(0, slots - len(stages))


def microbatch_size(max_requests: int, slots: int, limit: int | None) -> int:
    """Requests of one microbatch when `slots` share `max_requests` evenly, at least 1 and at most `limit`
    (the user's --pp-max-micro-batch-size, None where there is none)."""
    return max(1, min(max_requests // slots, limit or max_requests))


def advise(
    measured: Mapping[str, Sequence[StageTimes]],
    *,
    depth: int,
    max_requests: int,
    limit: int | None,
    proxy_bytes: int,
) -> str:
    """What to tell the operator, in a few sentences.

    `measured`: the stages in order, for "prefill" and "decode" or one of them. `depth`: the present one.
    `max_requests`: requests that may run at once in all slots. `proxy_bytes`: of the largest proxy message.
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
    """That a smaller depth would do, if so."""
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
