"""What is measured: the cells of a run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

from .competitors import NOT_AHEAD, OURS, PULL_REQUEST, UPSTREAM, Competitor


@dataclass(frozen=True)
class LinkSetting:
    """One-way delay, and rate (0: unlimited)."""

    delay_ms: float
    rate_mbit: float = 0.0

    def __str__(self) -> str:
        rate = f"{self.rate_mbit / 1000:g} Gbit/s" if self.rate_mbit else ""
        return rate if rate and not self.delay_ms else f"{self.delay_ms:g} ms {rate}".strip()


@dataclass(frozen=True)
class Work:
    """A load, and how long a forward takes at least."""

    load: str
    pad_ms: float

    def __str__(self) -> str:
        return f"{self.load}, {f'padded {self.pad_ms:g} ms' if self.pad_ms else 'real compute'}"


@dataclass(frozen=True)
class Group:
    """Servers that are resident together, and what each of them is given."""

    pp: int
    competitors: Sequence[Competitor]  # the first is what the others are compared with
    works: Sequence[Work]


NO_DELAY = LinkSetting(0)
LINKS = (NO_DELAY, LinkSetting(1), LinkSetting(5), LinkSetting(0, 1000))

_THREE = (Competitor(UPSTREAM), Competitor(PULL_REQUEST), Competitor(OURS))
_CORE = (Work("decode", 0), Work("decode", 20), Work("prefill", 30))

# On two cores four stages share two cores: only padded forwards, which sleep, say something there.
QUICK = (Group(2, (*_THREE, Competitor(OURS, 1)), _CORE),)
SPECULATION = (
    Group(
        2,
        (
            Competitor(UPSTREAM, drafts=True),
            Competitor(OURS, drafts=True),
            Competitor(OURS, drafts=False),
        ),
        _CORE,
    ),
)
PAIRS = (
    Group(
        2,
        (Competitor(UPSTREAM, drafts=True, pair=True), Competitor(OURS, drafts=True, pair=True)),
        (Work("prefill", 0), Work("prefill", 30)),
    ),
)
FULL = (
    Group(
        2,
        (
            *(*_THREE, Competitor(NOT_AHEAD)),
            *(Competitor(UPSTREAM, 1), Competitor(OURS, 1), Competitor(OURS, 2)),
        ),
        [
            *(Work(name, pad) for name, pad in product(("decode", "prefill"), (0, 10, 20, 30))),
            Work("mixed", 20),
        ],
    ),
    Group(4, _THREE, (Work("decode", 20), Work("prefill", 30))),
)
