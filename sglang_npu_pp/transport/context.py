"""Shared by all parts of one rank."""

from __future__ import annotations

from dataclasses import dataclass

from ..observe.telemetry import Telemetry
from ..observe.trace import Trace
from ..settings import Settings


@dataclass(frozen=True)
class RankContext:
    """A rank's position in its pipeline, settings, counters and trace."""

    stage: int
    stages: int
    rank: int  # within the stage
    settings: Settings
    telemetry: Telemetry
    trace: Trace

    @classmethod
    def begin(
        cls, stage: int, stages: int, settings: Settings, *, rank: int = 0, replica: int | None = None
    ) -> RankContext:
        """With new counters and, if set, a trace."""
        trace = Trace(enabled=settings.trace_dir is not None)
        return cls(stage, stages, rank, settings, Telemetry(stage, rank, replica=replica), trace)

    @property
    def where(self) -> str:
        """For errors."""
        return f"stage {self.stage} rank {self.rank}"

    @property
    def check_all(self) -> bool:
        """Whether the checksum covers frames of any size."""
        return self.settings.checksum == "full"
